//! Connections between all kinds of pods: which are possible, on which way, and what each side sees of the other.

use crate::world::{Pod, World, apps, ask, connect, eventually, is_reset};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown};

/// A world with captured and uncaptured clients and servers. Servers answer with the client's address, on 8080.
fn world() -> World {
    let mut w = World::new();
    for (name, node) in [("client", 1), ("near", 1), ("far", 2)] {
        w.mesh_pod(name, node);
    }
    for (name, node) in [("stranger", 1), ("plain-near", 1), ("plain-far", 2)] {
        w.plain_pod(name, node);
    }
    for server in ["near", "far", "plain-near", "plain-far"] {
        apps::serve(&w.ns(server), 8080, apps::who);
    }
    w
}

fn pod(w: &World, name: &str) -> Pod {
    w.pods.iter().find(|pod| pod.name == name).unwrap().clone()
}

#[test]
fn every_pair_of_captured_and_uncaptured_on_one_node_and_two_in_both_families() {
    let mut w = world();
    for (index, server) in ["near", "far", "plain-near", "plain-far"].into_iter().enumerate() {
        let pod = pod(&w, server);
        let (v4, v6) = (format!("10.96.0.1{index}"), format!("fd00:96::1{index}"));
        w.mesh.service(server, &[&v4, &v6], &json!({"80": 8080}), &[&pod]);
    }
    w.start();
    for client in ["client", "stranger"] {
        for (index, server) in ["near", "far", "plain-near", "plain-far"].into_iter().enumerate() {
            let (from, to) = (pod(&w, client), pod(&w, server));
            let vip = |text: String| -> IpAddr { text.parse().unwrap() };
            let mut ways = vec![(to.v4, 8080, from.v4), (to.v6, 8080, from.v6)];
            if client == "client" {
                // Service addresses exist only for captured clients, because nothing else resolves them here.
                ways.push((vip(format!("10.96.0.1{index}")), 80, from.v4));
                ways.push((vip(format!("fd00:96::1{index}")), 80, from.v6));
            }
            for (index, (ip, port, seen_as)) in ways.into_iter().enumerate() {
                let answer =
                    ask(&from.netns, (ip, port), "x").unwrap_or_else(|e| panic!("{client} to {server} at {ip}: {e}"));
                assert_eq!(answer, format!("{seen_as} x"), "{client} to {server} at {ip}");
                both_are_named(&w, &from, &to, index + 1);
            }
        }
    }
}

/// If both pods are captured, both logs name both identities, `times` times. If one is not, no identity is claimed for
/// it.
fn both_are_named(w: &World, from: &Pod, to: &Pod, times: usize) {
    let captured = |pod: &Pod| w.mesh.is_hbone(&pod.name);
    let sides = [("outbound", from, captured(from)), ("inbound", to, captured(to))];
    for (direction, own, watched) in sides {
        if !watched {
            continue;
        }
        let about = |line: &Value| {
            line["message"] == "connection complete"
                && line["direction"] == direction
                && line["src.workload"] == *from.name
                && line["dst.workload"] == *to.name
        };
        let mut lines = Vec::new();
        eventually(&format!("{times} lines, {direction} {} to {}", from.name, to.name), || {
            lines = w.log(own.node).into_iter().filter(about).collect();
            lines.len() == times
        });
        let line = &lines[times - 1];
        let both = captured(from) && captured(to);
        let name =
            |pod: &Pod| if both { json!(format!("spiffe://cluster.local/ns/ns/sa/{}", pod.name)) } else { Value::Null };
        assert_eq!(line["src.identity"], name(from), "{line}");
        assert_eq!(line["dst.identity"], name(to), "{line}");
        assert_eq!(line.get("error"), None, "{line}");
    }
}

#[test]
fn the_tunnel_is_post_quantum_tls_and_live_connections_are_listed_with_their_rule() {
    let mut w = world();
    w.mesh.policy("clients", "Namespace", "Allow", json!({"namespaces": [{"Exact": "ns"}]}));
    apps::serve(&w.ns("far"), 9000, apps::echo);
    w.start();
    let far = pod(&w, "far");
    let mut stream = connect(&w.ns("client"), (far.v4, 9000)).unwrap();
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    for (node, direction) in [(1, "outbound"), (2, "inbound")] {
        let all = w.json(node, "/connections");
        let live: Vec<&Value> = all.as_array().unwrap().iter().filter(|c| c["direction"] == direction).collect();
        let [one] = live.as_slice() else { panic!("{direction}: {all}") };
        assert_eq!(one["tls"]["version"], "TLSv1_3", "{one}");
        assert_eq!(one["tls"]["keyExchange"], "X25519MLKEM768", "{one}");
        assert_eq!(one["srcIdentity"], "spiffe://cluster.local/ns/ns/sa/client");
        assert_eq!(one["dstIdentity"], "spiffe://cluster.local/ns/ns/sa/far");
        eventually("all bytes are counted", || {
            let all = w.json(node, "/connections");
            all.as_array().unwrap().iter().any(|c| c["bytesSent"] == 4 && c["bytesReceived"] == 4)
        });
        if direction == "inbound" {
            assert_eq!(one["rule"], "allowed by ns/clients rule[0]");
        }
    }
}

#[test]
fn a_server_may_speak_first() {
    let mut w = world();
    w.start();
    for server in ["far", "plain-far"] {
        apps::serve(&w.ns(server), 9001, apps::greet);
        let mut stream = connect(&w.ns("client"), (pod(&w, server).v4, 9001)).unwrap();
        let mut hello = [0; 21];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello, who is there?\n");
        stream.write_all(b"me\n").unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "ME\n", "{server}");
    }
}

#[test]
fn upload_then_read_survives_half_close() {
    let mut w = world();
    w.start();
    let body = vec![9u8; 5_000_000];
    for (from, server) in [("client", "far"), ("client", "near"), ("client", "plain-far"), ("stranger", "far")] {
        if from == "client" {
            apps::serve(&w.ns(server), 9002, apps::count);
        }
        let mut stream = connect(&w.ns(from), (pod(&w, server).v4, 9002)).unwrap();
        stream.write_all(&body).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "5000000 true", "{from} to {server}");
    }
}

#[test]
fn a_reset_arrives_as_a_reset_in_both_directions() {
    let mut w = world();
    w.start();
    for (index, (from, server)) in
        [("client", "far"), ("client", "plain-far"), ("stranger", "far")].into_iter().enumerate()
    {
        let to = pod(&w, server);
        if index < 2 {
            apps::serve(&to.netns, 9003, apps::reset);
        }
        let mut stream = connect(&w.ns(from), (to.v4, 9003)).unwrap();
        stream.write_all(b"x").unwrap();
        let error = stream.read(&mut [0]).expect_err("an orderly end instead of a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "server {server} resets {from}");

        // The server records whether its stream ended in order.
        static ENDED: std::sync::Mutex<Vec<Result<usize, ErrorKind>>> = std::sync::Mutex::new(Vec::new());
        let tell = |mut stream: std::net::TcpStream| {
            stream.write_all(b"!").unwrap();
            let ended = std::iter::repeat_with(|| stream.read(&mut [0; 16])).find(|r| !matches!(r, Ok(n) if *n > 0));
            ENDED.lock().unwrap().push(ended.unwrap().map_err(|e| e.kind()));
        };
        if index < 2 {
            apps::serve(&to.netns, 9004, tell);
        }
        let mut stream = connect(&w.ns(from), (to.v4, 9004)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(stream);
        eventually("the server sees the end", || !ENDED.lock().unwrap().is_empty());
        let ended = ENDED.lock().unwrap().pop().unwrap();
        assert_eq!(ended, Err(ErrorKind::ConnectionReset), "{from} resets, server {server}");
    }
}

#[test]
fn an_unknown_address_is_passed_on_and_a_service_without_endpoints_is_refused() {
    let mut w = world();
    w.mesh.service("empty", &["10.96.0.99"], &json!({"80": 80}), &[]);
    let outsider = w.add_pod("outsider", 2);
    apps::serve(&outsider.netns, 8080, apps::who);
    w.start();
    let client = pod(&w, "client");
    assert_eq!(ask(&client.netns, (outsider.v4, 8080), "x").unwrap(), format!("{} x", client.v4));
    let vip: IpAddr = "10.96.0.99".parse().unwrap();
    assert!(is_reset(&client.netns, (vip, 80)), "refused with a reset");
    let line = w.log_line(1, "no endpoint", |l| l["reason"] == "no_endpoint");
    assert!(line["error"].as_str().unwrap().contains("no healthy upstream: empty.ns.svc.cluster.local"), "{line}");
}

#[test]
fn calls_to_our_own_ports_go_nowhere() {
    let mut w = world();
    w.start();
    let (client, far) = (pod(&w, "client"), pod(&w, "far"));
    for port in [15001, 15006, 15008] {
        for ip in [client.v4, client.v6, "127.0.0.1".parse().unwrap(), far.v4] {
            let Ok(mut stream) = connect(&client.netns, (ip, port)) else { continue };
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
            let mut answer = Vec::new();
            let ended = stream.read_to_end(&mut answer);
            let waited = matches!(&ended, Err(e) if e.kind() == ErrorKind::WouldBlock);
            assert!(!waited, "{ip}:{port}: neither refused nor answered");
            // Port 15008 answers anything but TLS with an alert (content type 21); nothing answers on other ports.
            assert!(answer.is_empty() || (port == 15008 && answer[0] == 21), "{ip}:{port}: {answer:?}");
        }
    }
    assert!(w.metric(1, "culvert_connection_failures_total", &["direction=\"outbound\"", "reason=\"loop\""]) >= 3.0);
    assert_eq!(w.metric(2, "culvert_connection_failures_total", &["direction=\"inbound\"", "reason=\"loop\""]), 3.0);
    eventually("nothing goes round and round", || {
        [1, 2].iter().all(|node| w.json(*node, "/connections").as_array().unwrap().is_empty())
    });
    assert_eq!(ask(&client.netns, (far.v4, 8080), "x").unwrap(), format!("{} x", client.v4), "and all goes on");
}

#[test]
fn a_server_may_close_its_side_first() {
    let mut w = world();
    w.start();
    for (from, server) in [("client", "far"), ("client", "plain-far"), ("stranger", "far")] {
        let to = pod(&w, server);
        if from == "client" {
            apps::serve(&to.netns, 9005, apps::finish_first);
        }
        let mut stream = connect(&w.ns(from), (to.v4, 9005)).unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        assert_eq!(all, "that is all from me", "{from} to {server}");
        stream.write_all(b"but not from me").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        eventually("the server has it", || {
            apps::FINISHED.lock().unwrap().pop().is_some_and(|t| t == "but not from me")
        });
    }
}
