//! SOCKS5 in a captured pod: answered when the far side is open, and as what happened.

use crate::world::{World, apps, connect, inside};
use serde_json::json;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

const PORT: u16 = 15080;

/// A client, a server behind a service, and a host outside the mesh.
fn world() -> World {
    let mut w = World::new();
    let (_client, server, outside) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.add_pod("outside", 2));
    w.mesh.service("web", &["10.96.0.20"], &json!({"80": 8080}), &[&server]);
    w.mesh.service("none", &["10.96.0.21"], &json!({"80": 8080}), &[]);
    apps::serve(&server.netns, 8080, apps::who);
    apps::serve(&outside.netns, 8080, apps::who);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[("UNSTABLE_ENABLE_SOCKS5", "true")]);
        w.wait_captured(node);
    }
    w
}

pub fn request(kind: &[u8], port: u16) -> Vec<u8> {
    [&[5, 1, 0][..], kind, &port.to_be_bytes()].concat()
}

pub fn address(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => [&[1][..], &ip.octets()].concat(),
        IpAddr::V6(ip) => [&[4][..], &ip.octets()].concat(),
    }
}

pub fn host(name: &str) -> Vec<u8> {
    [&[3, name.len() as u8][..], name.as_bytes()].concat()
}

fn ask(w: &World, through: &str, request: &[u8]) -> (u8, TcpStream) {
    ask_in(&w.ns("client"), through, request)
}

/// Sends a request in a pod. Returns the code of the reply and the connection.
pub fn ask_in(ns: &str, through: &str, request: &[u8]) -> (u8, TcpStream) {
    let mut stream = connect(ns, SocketAddr::new(through.parse().unwrap(), PORT)).unwrap();
    stream.write_all(&[5, 1, 0]).unwrap();
    let mut method = [0; 2];
    stream.read_exact(&mut method).unwrap();
    assert_eq!(method, [5, 0]);
    stream.write_all(request).unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).unwrap();
    (reply[1], stream)
}

pub fn said(mut stream: TcpStream) -> String {
    stream.write_all(b"hello\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn connections_are_opened_through_the_mesh_and_failures_are_named() {
    let mut w = world();
    let pod = |name: &str| w.pods.iter().find(|pod| pod.name == name).unwrap().clone();
    let (client, server, outside) = (pod("client"), pod("server"), pod("outside"));
    let vip: IpAddr = "10.96.0.20".parse().unwrap();
    for (kind, port, own) in [
        (address(vip), 80, client.v4),
        (address(server.v4), 8080, client.v4),
        (address(server.v6), 8080, client.v6),
        (host("web.ns.svc.cluster.local"), 80, client.v4),
        (host("web"), 80, client.v4),
        (address(outside.v4), 8080, client.v4),
    ] {
        for through in ["127.0.0.1", "::1"] {
            let (code, stream) = ask(&w, through, &request(&kind, port));
            assert_eq!((code, said(stream)), (0, format!("{own} hello")), "{kind:?}");
        }
    }
    assert_eq!(w.metric(2, "istio_tcp_connections_opened_total", &["connection_security_policy=\"mutual_tls\""]), 10.0);

    for (kind, port, code, reason) in [
        (address(outside.v4), 9, 5, "connect"),
        (address("10.96.0.21".parse().unwrap()), 80, 4, "no_endpoint"),
        (address(vip), 81, 4, "no_port"),
        (address("127.0.0.1".parse().unwrap()), PORT, 2, "loop"),
        (address("0.0.0.0".parse().unwrap()), PORT, 2, "loop"),
        (address(client.v4), 15001, 2, "loop"),
    ] {
        let (answered, mut stream) = ask(&w, "127.0.0.1", &request(&kind, port));
        assert_eq!(answered, code, "{kind:?}:{port}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "an orderly end after the answer");
        w.log_line(1, reason, |line| line["reason"] == reason);
    }
    w.mesh.egress = vec![json!({"namespace": "ns", "dryRun": false, "default": "Deny"})];
    w.write_mesh();
    crate::world::eventually("the policy is in force", || w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    assert_eq!(ask(&w, "127.0.0.1", &request(&address(outside.v4), 8080)).0, 2, "a policy");
    assert_eq!(ask(&w, "127.0.0.1", &[5, 2, 0, 1]).0, 7, "BIND");
    w.log_line(1, "the command is named", |line| {
        line["reason"] == "socks" && line["error"].as_str().is_some_and(|error| error.contains("command 2"))
    });
}

#[test]
fn nobody_outside_of_the_pod_reaches_it_and_it_is_off_by_default() {
    let mut w = world();
    let client = w.pods[0].clone();
    let refused = |ns: &str, to: SocketAddr| {
        let error = inside(ns, || TcpStream::connect(to)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    };
    // Redirected as inbound plaintext, and nothing listens on that address in the pod.
    let to = SocketAddr::from((client.v4, PORT));
    assert!(crate::world::is_reset(&w.ns("outside"), to), "from another pod");
    refused(&client.netns, to);
    let stopped = w.take_node(1);
    drop(stopped);
    w.start_node(1, &[]);
    w.wait_captured(1);
    refused(&client.netns, SocketAddr::from(([127, 0, 0, 1], PORT)));
}
