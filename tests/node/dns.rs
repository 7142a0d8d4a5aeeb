//! DNS of captured pods: names of the mesh are answered from its facts, everything else as the pod's own resolver
//! answers it.

use crate::istio::Istio;
use crate::world::names::{RESOLVER, RESOLVER_V6, address, answer, ask, kubernetes_conf, question, refusal, with_edns};
use crate::world::{Pod, World, apps, eventually, http, inside};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const A: u16 = 1;

/// A client, two pods of a headless service, services, a host that only the mesh knows, and a resolver for everything
/// else.
fn world(settings: &[(&str, &str)]) -> (World, Pod) {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    let db: Vec<Pod> = ["db-0", "db-1"].map(|name| w.mesh_pod(name, 2)).into();
    w.mesh.service("shop", &["10.96.0.20", "fd96::20"], &json!({"80": 8080}), &[&db[0]]);
    w.mesh.service("four", &["10.96.0.21"], &json!({"80": 8080}), &[&db[0]]);
    w.mesh.service("db", &[], &json!({"5432": 5432}), &[&db[0], &db[1]]);
    w.mesh.services.last_mut().unwrap()["portNames"] = json!({"sql": 5432});
    for (host, vip) in
        [("only-mesh.example", "240.240.0.1"), ("shop.example", "240.240.0.2"), ("*.wild.example", "240.240.0.3")]
    {
        let entry = json!({"name": "entry", "namespace": "ns", "hostname": host, "vips": [format!("/{vip}")], "ports": {"443": 443}});
        w.mesh.services.push(entry);
    }
    w.start_resolver("");
    w.start_container(&client, &kubernetes_conf());
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, settings);
        w.wait_captured(node);
    }
    (w, client)
}

fn dig(w: &World, pod: &Pod, args: &[&str]) -> String {
    w.run_in(pod, &[&["dig", "+time=8", "+tries=1"], args].concat())
}

fn short(w: &World, pod: &Pod, args: &[&str]) -> Vec<String> {
    let text = dig(w, pod, &[&["+short"], args].concat());
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn names_of_the_mesh_are_answered_and_others_are_as_the_resolver_says() {
    let (w, client) = world(&[]);
    let fqdn = "shop.ns.svc.cluster.local";
    for name in [fqdn, "shop", "shop.ns", "shop.ns.svc", "SHOP.ns.SVC.cluster.LOCAL"] {
        assert_eq!(short(&w, &client, &[name]), ["10.96.0.20"], "{name}");
        assert_eq!(short(&w, &client, &[name, "AAAA"]), ["fd96::20"], "{name}");
    }
    let (first, second) = (w.pods[1].v4.to_string(), w.pods[2].v4.to_string());
    assert_eq!(short(&w, &client, &["db.ns.svc.cluster.local"]), [first.clone(), second]);
    assert_eq!(short(&w, &client, &["db-0.db.ns.svc.cluster.local"]), [first]);
    assert_eq!(
        short(&w, &client, &["db-7.db.ns.svc.cluster.local"]),
        ["10.9.9.9"],
        "a pod's own host name, known elsewhere"
    );
    let ports = short(&w, &client, &["_sql._tcp.db.ns.svc.cluster.local", "SRV"]);
    assert_eq!(ports, ["0 100 5432 db-0.db.ns.svc.cluster.local.", "0 100 5432 db-1.db.ns.svc.cluster.local."]);
    let unknown_port = short(&w, &client, &["_peer._tcp.db.ns.svc.cluster.local", "SRV"]);
    assert_eq!(unknown_port, ["0 100 9999 db-0.db.ns.svc.cluster.local."], "the resolver knows more");
    assert_eq!(short(&w, &client, &["only-mesh.example"]), ["240.240.0.1"]);
    assert_eq!(short(&w, &client, &["x.y.wild.example"]), ["240.240.0.3"]);
    assert_eq!(short(&w, &client, &["shop.example"]), ["240.240.0.2"]);
    assert_eq!(short(&w, &client, &["shop.example", "MX"]), ["10 mail.example."], "mail is not the mesh's affair");
    // External names that look like abbreviated names of the mesh are not taken for names of the mesh.
    assert_eq!(short(&w, &client, &["google.com"]), ["203.0.113.80"]);
    assert_eq!(short(&w, &client, &["a.example"]), ["203.0.113.1", "203.0.113.2"]);
    // Only the cluster's DNS knows ExternalName services, but possibly only the mesh knows their targets.
    let external = short(&w, &client, &["external.ns.svc.cluster.local"]);
    assert!(external.contains(&"a.example.".to_owned()), "{external:?}");
    let inward = short(&w, &client, &["inward.ns.svc.cluster.local"]);
    assert_eq!(inward, ["240.240.0.1", "only-mesh.example."]);
    let none = dig(&w, &client, &["four.ns.svc.cluster.local", "AAAA"]);
    assert!(none.contains("status: NOERROR") && none.contains("ANSWER: 0") && none.contains("SOA"), "{none}");
    let aa = dig(&w, &client, &["+edns=0", "+bufsize=4096", "+dnssec", "ShOp.ns.svc.cluster.local"]);
    assert!(aa.contains("flags: qr aa rd ra") && aa.contains("ShOp.ns.svc.cluster.local. 30"), "{aa}");
    assert!(aa.contains("EDNS: version: 0, flags: do"), "{aa}");
    let page = w.json(1, "/pods");
    let of = &page.as_array().unwrap().iter().find(|pod| pod["name"] == "client").unwrap()["dns"];
    assert!(of["requests"]["mesh"].as_u64().unwrap() > 10 && of["from"] == "the pod's resolv.conf", "{of}");
    assert_eq!(of["resolvers"], json!([format!("{RESOLVER}:53")]));
    assert!(
        w.metric(1, "istio_dns_requests_total", &["request_query_type=\"A\"", "source_canonical_service=\"client\""])
            > 10.0
    );
    assert!(w.metric(1, "istio_dns_upstream_requests_total", &["request_query_type=\"MX\""]) >= 1.0);
    // The requests of one pod are logged once that is requested, until it is reset.
    let logged = |name: &str| w.log(1).iter().any(|line| line["scope"] == "dns" && line["query"] == name);
    let post =
        |query: &str| inside(&w.ns("n1"), || http(15000, "POST", &format!("/logging?{query}"), "localhost")).unwrap();
    short(&w, &client, &["before.example"]);
    assert!(post("dns=ns/client").1.contains("DNS requests are logged of ns/client"));
    short(&w, &client, &["during.example"]);
    w.log_line(1, "the request", |line| {
        line["query"] == "during.example" && line["outcome"] == "forwarded" && line["pod"] == "ns/client"
    });
    assert_eq!(post("reset").0, 200);
    short(&w, &client, &["after.example"]);
    short(&w, &client, &["after.example"]);
    assert!(!logged("before.example") && !logged("after.example"));
    assert_eq!(post("dns=client").0, 400);
}

/// Messages of every kind that a client may send and that the mesh does not answer: at least two hundred.
fn shapes() -> Vec<(String, Vec<u8>)> {
    let names = [
        "a.example",
        "A.exAMple",
        "four.example",
        "six.example",
        "zero.example",
        "large.example",
        "huge.example",
        "odd.example",
        "absent.example",
        "example",
        "deep.er.absent.example",
        "_sip._tcp.example",
        "1.113.0.203.in-addr.arpa",
        "external.ns.svc.cluster.local",
        "not-in-mesh.ns.svc.cluster.local",
        "no-such.ns.svc.cluster.local",
        "",
    ];
    // A, NS, SOA, PTR, MX, TXT, AAAA, SRV, DS, DNSKEY, HTTPS, CAA, ANY, and a type without name.
    let types = [1, 2, 6, 12, 15, 16, 28, 33, 43, 48, 65, 257, 255, 65280];
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    for name in names {
        for kind in types {
            all.push((format!("{name} type {kind}"), question(name, kind)));
        }
    }
    for (payload, dnssec) in [(512, false), (1232, true), (4096, false), (65535, true)] {
        for name in ["a.example", "absent.example", "large.example", "huge.example"] {
            let message = with_edns(question(name, 16), payload, dnssec, &[]);
            all.push((format!("{name} payload {payload} dnssec {dnssec}"), message));
        }
    }
    // A cookie, a client subnet, padding and an unassigned option.
    let options: [&[u8]; 4] = [
        &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0, 8, 0, 7, 0, 1, 24, 0, 192, 0, 2],
        &[0, 12, 0, 4, 0, 0, 0, 0],
        &[0xff, 0xf0, 0, 2, 1, 2],
    ];
    for option in options {
        all.push((format!("option {option:?}"), with_edns(question("a.example", A), 1232, false, option)));
    }
    // Flags and operations: no recursion, checking disabled, authentic data, inverse query, status, notify, update,
    // reserved.
    for flags in [[0, 0], [1, 0x10], [1, 0x20], [9, 0], [0x11, 0], [0x21, 0], [0x29, 0], [0x39, 0], [0x79, 0]] {
        let mut message = question("a.example", A);
        message[2..4].copy_from_slice(&flags);
        all.push((format!("flags {flags:?}"), message));
    }
    // Class CHAOS, any class, another version of EDNS, an empty question section, two questions, trailing bytes, a
    // truncated label.
    for class in [3, 255] {
        let mut message = question("version.bind", 16);
        *message.last_mut().unwrap() = class;
        all.push((format!("class {class}"), message));
    }
    let mut version = with_edns(question("a.example", A), 1232, false, &[]);
    let at = version.len() - 5;
    version[at] = 1;
    all.push(("EDNS version 1".into(), version));
    let mut two = question("a.example", A);
    two[5] = 2;
    let second = two[12..].to_vec();
    two.extend(second);
    all.push(("two questions".into(), two));
    let mut none = question("", A);
    none.truncate(12);
    none[5] = 0;
    all.push(("no question".into(), none));
    all
}

#[test]
fn what_is_not_of_the_mesh_is_answered_byte_for_byte_as_without_us() {
    let (w, client) = world(&[("CULVERT_DNS_CACHE_ENTRIES", "0")]);
    let shapes = shapes();
    assert!(shapes.len() >= 200);
    for tcp in [false, true] {
        let all = |ns: &str, server: &str| -> Vec<Option<Vec<u8>>> {
            let server = server.parse().unwrap();
            inside(ns, || shapes.iter().map(|(_, message)| ask(message, server, tcp)).collect())
        };
        for server in [RESOLVER, RESOLVER_V6] {
            let (without, with) = (all(&w.ns("n1"), server), all(&client.netns, server));
            for (((name, _), without), with) in shapes.iter().zip(without).zip(with) {
                // If the resolver gives no answer at all, the daemon answers with a failure. Without culvert there was
                // no answer.
                let Some(without) = without else { continue };
                assert_eq!(with.as_deref(), Some(&*without), "{name}, tcp {tcp}, {server}");
            }
        }
    }
    let huge = inside(&client.netns, || ask(&question("huge.example", 16), RESOLVER.parse().unwrap(), true)).unwrap();
    assert!(huge.len() > 50_000, "{}", huge.len());
    let cut = inside(&client.netns, || ask(&question("huge.example", 16), RESOLVER.parse().unwrap(), false)).unwrap();
    assert!(cut[2] & 2 != 0, "an answer too large for a datagram is cut by the resolver, and the client asks again");
    assert_eq!(w.metric(1, "istio_dns_upstream_failures_total", &[]), 0.0);
    let forwarded = w.metric(1, "culvert_dns_requests_total", &["forwarded"]);
    assert!(forwarded >= 4.0 * shapes.len() as f64, "all of it went through the daemon: {forwarded}");
}

/// A program that resolves names as its language or C library does.
fn resolver_program(w: &World, kind: &str) -> Vec<String> {
    let source = |name: &str| crate::world::peer_script(name).display().to_string();
    let made = w.dir.join(kind).display().to_string();
    let build = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false").env("GO111MODULE", "off");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    match kind {
        "glibc" => build("cc", &["-o", &made, &source("resolve.c")]),
        "musl" => build("musl-gcc", &["-static", "-o", &made, &source("resolve.c")]),
        "go" => build("go", &["build", "-o", &made, &source("resolve.go")]),
        _ => return vec!["python3".into(), source("resolve.py")],
    }
    vec![made]
}

#[test]
fn real_clients_find_what_they_look_for_however_they_look() {
    let (mut w, client) = world(&[]);
    let names =
        ["shop", "shop.ns", "db-1.db", "db", "only-mesh.example", "a.example", "google.com", "inward", "no-such"];
    let (first, second) = (w.pods[1].clone(), w.pods[2].clone());
    let v6_last = |mut all: Vec<String>| {
        all.sort();
        all.join(" ")
    };
    let of = |pod: &Pod| vec![pod.v4.to_string(), pod.v6.to_string()];
    let expected = [
        "shop 10.96.0.20 fd96::20".to_owned(),
        "shop.ns 10.96.0.20 fd96::20".into(),
        format!("db-1.db {}", v6_last(of(&second))),
        format!("db {}", v6_last([of(&first), of(&second)].concat())),
        "only-mesh.example 240.240.0.1".into(),
        "a.example 2001:db8:1::1 203.0.113.1 203.0.113.2".into(),
        "google.com 203.0.113.80".into(),
        "inward 240.240.0.1".into(),
        "no-such none".into(),
    ];
    let go = Command::new("go").arg("version").output().is_ok_and(|output| output.status.success());
    if !go {
        eprintln!("no Go toolchain is at hand: its resolver was not tried");
    }
    let kinds = ["glibc", "musl", "python"].into_iter().chain(go.then_some("go"));
    let programs: Vec<(&str, Vec<String>)> = kinds.map(|kind| (kind, resolver_program(&w, kind))).collect();
    let tries = |w: &World, what: &str| {
        for (kind, program) in &programs {
            let line: Vec<&str> = program.iter().map(String::as_str).chain(names).collect();
            let said = w.run_in(&client, &line);
            assert_eq!(said.lines().collect::<Vec<_>>(), expected, "{kind}, {what}");
        }
        let said = w.run_in(&client, &["getent", "ahostsv4", "shop"]);
        assert!(said.starts_with("10.96.0.20"), "{said}");
    };
    tries(&w, "over datagrams");
    let file = w.dir.join("client-resolv.conf");
    std::fs::write(&file, kubernetes_conf() + "options use-vc single-request-reopen\n").unwrap();
    let before = w.metric(1, "istio_dns_requests_total", &["tcp"]);
    tries(&w, "over connections, where the client can");
    assert!(w.metric(1, "istio_dns_requests_total", &["tcp"]) > before + 8.0);
    // A pod with IPv6 only.
    let six = w.mesh_pod("six", 1);
    crate::world::ip_in(&six.netns, &format!("addr del {}/24 dev eth0\n", six.v4));
    w.mesh.of("six")["workloadIps"] = json!([six.v6]);
    w.start_container(&six, &kubernetes_conf().replace(RESOLVER, RESOLVER_V6));
    w.write_mesh();
    w.write_pods(1, &w.captured_pods(1));
    w.wait_captured(1);
    for (kind, program) in &programs {
        let line: Vec<&str> = program.iter().map(String::as_str).chain(names).collect();
        let said = w.run_in(&six, &line);
        assert_eq!(said.lines().collect::<Vec<_>>(), expected, "{kind}, with IPv6 alone");
    }
}

/// A client whose container has these resolvers, in a mesh without other names.
fn small(resolvers: &str, settings: &[(&str, &str)], prepare: impl FnOnce(&mut World, &Pod)) -> (World, Pod) {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    w.mesh.service("shop", &["10.96.0.20"], &json!({"80": 8080}), &[]);
    if !resolvers.is_empty() {
        w.start_container(&client, resolvers);
    }
    prepare(&mut w, &client);
    w.write_mesh();
    w.write_pods(1, &w.captured_pods(1));
    w.start_node(1, settings);
    w.wait_captured(1);
    (w, client)
}

fn ask_in(pod: &Pod, name: &str, server: IpAddr) -> Option<Vec<u8>> {
    inside(&pod.netns, || ask(&question(name, A), server, false))
}

#[test]
fn the_resolver_that_is_asked_is_the_one_that_answers() {
    // No container is visible, as from the daemon of Istio's chart. The kernel's connection tracking is enough.
    let (w, client) = small("", &[], |_, _| {});
    let one = w.start_scripted(51, |q| vec![answer(q, [1, 1, 1, 1])]);
    let two = w.start_scripted(52, |q| vec![answer(q, [2, 2, 2, 2])]);
    let six = w.start_scripted_at("fd00:1::51", |q| vec![answer(q, [6, 6, 6, 6])]);
    for (server, expected) in [(&one, [1; 4]), (&two, [2; 4]), (&six, [6; 4]), (&one, [1; 4])] {
        assert_eq!(address(&ask_in(&client, "any.example", server.ip).unwrap()), Some(expected));
    }
    assert_eq!(one.asked.load(Ordering::Relaxed), 1, "the second time it was remembered");
    assert_eq!(address(&ask_in(&client, "shop.ns.svc.cluster.local", one.ip).unwrap()), Some([10, 96, 0, 20]));
    // Some pods have a resolver of their own. What it asks must reach its upstream and must not come back to it.
    let inner = inside(&client.netns, || UdpSocket::bind("127.0.0.1:53")).unwrap();
    let (netns, outer) = (client.netns.clone(), two.ip);
    let relay = std::thread::spawn(move || {
        let mut bytes = [0; 512];
        let (length, from) = inner.recv_from(&mut bytes).unwrap();
        let answer = inside(&netns, || ask(&bytes[..length], outer, false)).unwrap();
        inner.send_to(&answer, from).unwrap();
    });
    assert_eq!(address(&ask_in(&client, "inner.example", [127, 0, 0, 1].into()).unwrap()), Some([2, 2, 2, 2]));
    relay.join().unwrap();
    assert_eq!(w.metric(1, "culvert_dns_requests_total", &["forwarded"]), 4.0);
    assert_eq!(w.metric(1, "culvert_dns_requests_total", &["cached"]), 1.0);
}

#[test]
fn a_resolver_that_is_dead_slow_or_lies_is_passed_over() {
    let conf = "nameserver 10.1.0.51\nnameserver 10.1.0.52\nnameserver 10.1.0.53\n";
    let (w, client) = small(conf, &[("CULVERT_DNS_CACHE_ENTRIES", "0")], |_, _| {});
    let ip = |last: u8| IpAddr::from([10, 1, 0, last]);
    let asks = |name: &str| ask_in(&client, name, ip(51)).unwrap();
    // No resolver is reachable at all. That is reported at once, as a failure.
    crate::world::ip_in(
        &w.ns("n1"),
        "addr add 10.1.0.53/32 dev pods\naddr add 10.1.0.52/32 dev pods\naddr add 10.1.0.51/32 dev pods\n",
    );
    assert_eq!(asks("dead.example")[3] & 15, 2);
    assert_eq!(w.metric(1, "culvert_dns_requests_total", &["failed"]), 1.0);
    crate::world::ip_in(
        &w.ns("n1"),
        "addr del 10.1.0.52/32 dev pods\naddr del 10.1.0.51/32 dev pods\naddr del 10.1.0.53/32 dev pods\n",
    );
    // The first resolver is silent, the second refuses, the third answers.
    let silent = w.start_scripted(51, |_| vec![]);
    let refusing = w.start_scripted(52, |q| vec![refusal(q, 5)]);
    let good = w.start_scripted(53, |q| vec![answer(q, [3, 3, 3, 3])]);
    assert_eq!(address(&asks("third.example")), Some([3, 3, 3, 3]));
    assert_eq!((refusing.asked.load(Ordering::Relaxed), good.asked.load(Ordering::Relaxed)), (1, 1));
    let before = silent.asked.load(Ordering::Relaxed);
    assert_eq!(address(&asks("again.example")), Some([3, 3, 3, 3]), "who was silent is asked last");
    assert_eq!(silent.asked.load(Ordering::Relaxed), before);
    drop((silent, refusing, good));
    let denied = asks("nobody-left.example");
    assert_eq!(denied[3] & 15, 2, "no answer in time is said to be a failure: {denied:?}");
}

#[test]
fn forged_answers_are_not_believed_and_cost_little() {
    let conf = "nameserver 10.1.0.51\nnameserver 10.1.0.52\n";
    let (w, client) = small(conf, &[("CULVERT_DNS_CACHE_ENTRIES", "0")], |_, _| {});
    let good = w.start_scripted(52, |q| vec![answer(q, [2, 2, 2, 2])]);
    // Another id, another question, a question sent back, nothing, and too little; then the right answer.
    let lies = |q: &[u8]| {
        let mut other_id = answer(q, [6, 6, 6, 6]);
        other_id[0] ^= 1;
        let mut other_name = answer(q, [6, 6, 6, 6]);
        other_name[13] ^= 1;
        vec![other_id, other_name, q.to_vec(), vec![], q[..11].to_vec(), vec![0xff; 600]]
    };
    let lying = w.start_scripted(51, move |q| [lies(q), vec![answer(q, [1, 1, 1, 1])]].concat());
    assert_eq!(address(&ask_in(&client, "a.example", lying.ip).unwrap()), Some([1, 1, 1, 1]));
    drop(lying);
    // After a flood of wrong answers, the next resolver is asked.
    let flood = w.start_scripted(53, move |q| (0..200).flat_map(|_| lies(q)).collect());
    assert_eq!(address(&ask_in(&client, "b.example", flood.ip).unwrap()), Some([2, 2, 2, 2]));
    assert!(good.asked.load(Ordering::Relaxed) >= 1);
    // Datagrams that are not from the resolver do not reach the socket, because it is connected.
    let (first, second) = (question("c.example", A), question("c.example", A));
    assert_ne!(
        ports_and_ids(&w, &client, &first),
        ports_and_ids(&w, &client, &second),
        "neither port nor id is the client's"
    );
    // Compressed names that point to themselves, counts that promise thousands of records, 64 KiB of names.
    let bombs: Vec<Vec<u8>> = vec![
        [&question("", A)[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(),
        [&question("", A)[..4], &[0xff; 8], &[0xc0, 0x0c].repeat(500)].concat(),
        [&question("", A)[..4], &[0, 1, 0, 0, 0, 0, 0xff, 0xff], &[1, b'a'].repeat(2000)].concat(),
        vec![0xff; 60_000],
        [&[0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[63; 60_000]].concat(),
    ];
    inside(&client.netns, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..200 {
            for bomb in &bombs {
                let _ = socket.send_to(bomb, (good.ip, 53));
            }
        }
    });
    eventually("the bombs are behind us", || {
        ask_in(&client, "shop.ns.svc.cluster.local", good.ip).as_deref().and_then(address) == Some([10, 96, 0, 20])
    });
}

/// The id with which a question reaches the resolver, and the port from which it comes.
fn ports_and_ids(w: &World, client: &Pod, message: &[u8]) -> (u16, [u8; 2]) {
    let ns = w.ns("n1");
    let resolver = inside(&ns, || UdpSocket::bind("10.1.0.1:53")).unwrap();
    resolver.set_read_timeout(Some(crate::world::PATIENCE)).unwrap();
    let (netns, message) = (client.netns.clone(), message.to_vec());
    let asking = std::thread::spawn(move || inside(&netns, || ask(&message, "10.1.0.1".parse().unwrap(), false)));
    let mut bytes = [0; 512];
    let (length, from) = resolver.recv_from(&mut bytes).unwrap();
    let stranger = inside(&ns, || UdpSocket::bind("10.1.0.1:0")).unwrap();
    stranger.send_to(&answer(&bytes[..length], [6, 6, 6, 6]), from).unwrap();
    resolver.send_to(&answer(&bytes[..length], [1, 1, 1, 1]), from).unwrap();
    let got = asking.join().unwrap().unwrap();
    assert_eq!((address(&got), &got[..2]), (Some([1, 1, 1, 1]), &[0x5a, 0xa5][..]));
    (from.port(), [bytes[0], bytes[1]])
}

#[test]
fn a_pods_own_switch_wins_and_release_gives_its_dns_back() {
    let (w, client) = small("", &[("ISTIO_META_DNS_CAPTURE", "false")], |w, _| {
        w.mesh_pod("other", 1);
    });
    let other = w.pods[1].clone();
    let plain = w.start_scripted(51, |q| vec![answer(q, [1, 1, 1, 1])]);
    let shop = |pod: &Pod| address(&ask_in(pod, "shop.ns.svc.cluster.local", plain.ip).unwrap());
    assert_eq!((shop(&client), shop(&other)), (Some([1, 1, 1, 1]), Some([1, 1, 1, 1])));
    let entries = |dns: Option<bool>| {
        let entry = |pod: &Pod| {
            let mut entry = crate::world::pod_entry(pod);
            if pod.name == "other" {
                entry["dnsCapture"] = json!(dns);
            }
            entry
        };
        json!({"pods": [entry(&client), entry(&other)]}).to_string()
    };
    crate::world::replace(&w.pods_file(1), &entries(Some(true)));
    eventually("the other pod's DNS is taken", || shop(&other) == Some([10, 96, 0, 20]));
    assert_eq!(shop(&client), Some([1, 1, 1, 1]));
    w.write_pods(1, &[&client]);
    eventually("the other pod is released", || w.states(1).len() == 1);
    assert_eq!(shop(&other), Some([1, 1, 1, 1]));
}

#[test]
fn an_application_on_the_port_of_our_dns_is_reached_where_its_pods_dns_is_not_taken() {
    let mut w = World::new();
    let (client, server, stranger) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.plain_pod("stranger", 1));
    apps::serve(&server.netns, 15053, apps::who);
    w.write_mesh();
    w.write_pods(1, &[&client]);
    let mut entry = crate::world::pod_entry(&server);
    entry["dnsCapture"] = json!(false);
    crate::world::replace(&w.pods_file(2), &json!({"pods": [entry]}).to_string());
    for node in [1, 2] {
        w.start_node(node, &[]);
        w.wait_captured(node);
    }
    for from in [&client, &stranger] {
        for (own, to) in [(from.v4, server.v4), (from.v6, server.v6)] {
            let said = crate::world::ask(&from.netns, (to, 15053), "x").map_err(|error| error.to_string());
            assert_eq!(said, Ok(format!("{own} x")), "from {}", from.name);
        }
    }
    assert!(crate::world::ask(&server.netns, (server.v4, 15053), "x").is_ok(), "from the pod itself");
    // Where DNS is captured, the port is the daemon's.
    assert!(crate::world::is_reset(&stranger.netns, (client.v4, 15053)));
}

#[test]
fn a_question_from_outside_in_the_pods_own_name_is_not_taken() {
    let mut w = World::new();
    let (client, server, plain) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.plain_pod("plain", 1));
    w.mesh.service("shop", &["10.96.0.20"], &json!({"80": 8080}), &[&server]);
    w.start();
    let count = |what: &str| w.json(1, "/pods")[0]["dns"]["requests"][what].as_u64().unwrap_or(0);
    let own = std::net::SocketAddr::new(client.v6, 0);
    let spoofed = datagram(&plain.netns, false, |socket| {
        socket.set_freebind_v6(true).unwrap();
        socket.bind(&own.into()).unwrap();
    });
    let honest = datagram(&plain.netns, false, |_| {});
    let (answered, ignored) = (count("mesh"), count("ignored"));
    for socket in [&spoofed, &honest] {
        socket.send_to(&question("shop.ns.svc.cluster.local", A), (client.v6, 15053)).unwrap();
    }
    // It was sent after the other one.
    eventually("the honest one is ignored", || count("ignored") > ignored);
    assert_eq!(count("mesh"), answered);
}

#[test]
fn a_flood_from_one_pod_leaves_the_lookups_of_another_alone() {
    let (w, client) = small("nameserver 10.1.0.51\n", &[], |w, _| {
        w.mesh_pod("other", 1);
    });
    let other = w.pods[1].clone();
    let silent = w.start_scripted(51, |_| vec![]);
    let stop = Arc::new(AtomicBool::new(false));
    let flood: Vec<_> = (0..4)
        .map(|thread| {
            let (stop, netns, to) = (stop.clone(), client.netns.clone(), (silent.ip, 53));
            std::thread::spawn(move || {
                inside(&netns, || {
                    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        count += 1;
                        // Unknown names, which wait for a resolver that never answers, and names of the mesh.
                        let name = format!("r{thread}-{count}.flood.example");
                        let _ = socket.send_to(&question(&name, A), to);
                        let _ = socket.send_to(&question("shop.ns.svc.cluster.local", A), to);
                    }
                    count
                })
            })
        })
        .collect();
    eventually("the flood is more than may wait", || w.metric(1, "culvert_dns_requests_total", &["limited"]) > 1000.0);
    for _ in 0..200 {
        let got = ask_in(&other, "shop.ns.svc.cluster.local", silent.ip);
        assert_eq!(
            got.as_deref().and_then(address),
            Some([10, 96, 0, 20]),
            "none is lost, though each is asked only once"
        );
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", w.pid(1))).unwrap().count();
    assert!(descriptors < 600, "{descriptors} descriptors");
    stop.store(true, Ordering::Relaxed);
    for thread in flood {
        assert!(thread.join().unwrap() > 0);
    }
}

#[test]
fn a_workload_with_a_host_name_only_is_resolved_by_the_pod_that_connects() {
    let (w, client) = small("nameserver 10.1.0.51\n", &[], |w, _| {
        let server = w.plain_pod("server", 2);
        apps::serve(&server.netns, 8080, apps::who);
        let shop = w.mesh_pod("hbone", 2);
        apps::serve(&shop.netns, 8080, apps::who);
        w.mesh.service("behind", &["10.96.0.30"], &json!({"80": 8080}), &[&shop]);
        for (name, host, vip) in [
            ("one", "api.example", "240.240.0.1"),
            ("two", "gone.example", "240.240.0.2"),
            ("three", "inner.example", "240.240.0.3"),
        ] {
            let service = json!({"name": name, "namespace": "ns", "hostname": host, "vips": [format!("/{vip}")], "ports": {"80": 8080}});
            w.mesh.services.push(service);
            let workload = json!({
                "uid": format!("c1//ServiceEntry/{name}"), "name": name, "namespace": "ns", "serviceAccount": "", "hostname": host,
                "workloadIps": [], "protocol": "TCP", "services": {format!("ns/{host}"): {"80": if name == "three" { 80 } else { 8080 }}},
            });
            w.mesh.workloads.push(workload);
        }
        w.write_mesh();
        w.write_pods(2, &w.captured_pods(2).into_iter().filter(|pod| pod.name == "hbone").collect::<Vec<_>>());
        w.start_node(2, &[]);
    });
    let server = w.pods.iter().find(|pod| pod.name == "server").unwrap().v4;
    let IpAddr::V4(server) = server else { panic!("an IPv4 address") };
    let _resolver = w.start_scripted(51, move |q| {
        let name = String::from_utf8_lossy(q).into_owned();
        match (name.contains("api"), name.contains("inner"), q[q.len() - 3] == 1) {
            (true, _, true) => vec![answer(q, server.octets())],
            (_, true, true) => vec![answer(q, [10, 96, 0, 30])],
            (false, false, _) => vec![refusal(q, 3)],
            _ => vec![refusal(q, 0)],
        }
    });
    let said = crate::world::ask(&client.netns, ("240.240.0.1".parse::<IpAddr>().unwrap(), 80), "hello").unwrap();
    assert!(said.ends_with("hello"), "{said}");
    assert!(
        w.metric(1, "istio_on_demand_dns_total", &["hostname=\"api.example\"", "source_workload=\"client\""]) >= 1.0
    );
    // The name leads to a name of the mesh after all, so the connection goes through a tunnel, not in plaintext.
    let said = crate::world::ask(&client.netns, ("240.240.0.3".parse::<IpAddr>().unwrap(), 80), "inner").unwrap();
    assert!(said.ends_with("inner"), "{said}");
    w.log_line(1, "by HBONE", |l| l["dst.service"] == "behind.ns.svc.cluster.local" && l["dst.identity"].is_string());
    assert!(crate::world::ask(&client.netns, ("240.240.0.2".parse::<IpAddr>().unwrap(), 80), "x").is_err());
    let line = w.log_line(1, "the name is not known", |l| l["reason"] == "name_not_resolved");
    assert!(line["error"].as_str().unwrap().contains("gone.example"), "{line}");
}

#[test]
fn a_zones_transfer_comes_whole_and_the_connection_goes_on() {
    let (w, client) = small("", &[], |_, _| {});
    crate::world::ip_in(&w.ns("n1"), "addr add 10.1.0.51/32 dev pods\n");
    let listener = inside(&w.ns("n1"), || TcpListener::bind("10.1.0.51:53")).unwrap();
    let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes(), message].concat();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut question).unwrap();
        for n in 1..=3u8 {
            stream.write_all(&framed(&answer(&question, [n; 4]))).unwrap();
        }
        // The server keeps the connection open, as most do, so the client must notice the end of the transfer itself.
        let _ = stream.read(&mut length);
    });
    inside(&client.netns, || {
        let mut stream = TcpStream::connect("10.1.0.51:53").unwrap();
        stream.set_read_timeout(Some(crate::world::PATIENCE)).unwrap();
        let receive = |stream: &mut TcpStream| {
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut message).unwrap();
            assert_eq!(message[..2], question("", A)[..2], "the client's own id");
            address(&message).unwrap()
        };
        stream.write_all(&framed(&question("zone.example", 252))).unwrap();
        let all: Vec<_> = (0..3).map(|_| receive(&mut stream)).collect();
        assert_eq!(all, [[1; 4], [2; 4], [3; 4]]);
        stream.write_all(&framed(&question("shop.ns.svc.cluster.local", A))).unwrap();
        assert_eq!(receive(&mut stream), [10, 96, 0, 20]);
    });
    server.join().unwrap();
}

/// In an Istio mesh, where the agent redirects, with a control plane that announces facts and one that is on-demand.
#[test]
fn in_an_istio_mesh_names_are_known_also_on_demand_and_dns_fails_open() {
    for on_demand in ["false", "true"] {
        let mut istio = Istio::new();
        istio.w.mesh.service("shop", &["10.96.0.20"], &json!({"80": 8080}), &[]);
        let entry = json!({"name": "entry", "namespace": "ns", "hostname": "api.example", "vips": ["/240.240.0.1"], "ports": {"80": 80}});
        istio.w.mesh.services.push(entry);
        istio.tell();
        let resolver = istio.w.start_scripted(51, |q| vec![answer(q, [9, 9, 9, 9])]);
        istio.start_with(&[("XDS_ON_DEMAND", on_demand), ("CULVERT_DNS_CACHE_ENTRIES", "0")]);
        let client = istio.pod("client");
        let asks = |name: &str| ask_in(&client, name, resolver.ip).as_deref().and_then(address);
        assert_eq!(asks("shop.ns.svc.cluster.local"), Some([10, 96, 0, 20]));
        assert_eq!(asks("shop"), Some([10, 96, 0, 20]), "once it is known, also by its short name");
        assert_eq!(asks("api.example"), Some([240, 240, 0, 1]));
        assert_eq!(asks("api.example.ns.svc.cluster.local"), Some([240, 240, 0, 1]), "completed by a search domain");
        assert_eq!(asks("elsewhere.example"), Some([9, 9, 9, 9]));
        let failed_open = || istio.w.metric(1, "culvert_dns_requests_total", &["failed_open"]);
        assert_eq!(failed_open(), 0.0);
        if on_demand == "true" {
            // Whether the name belongs to the mesh stays unknown. The pod gets an answer all the same, and a counter
            // shows it.
            istio.plane.change(|state| state.stalled = true);
            assert_eq!(asks("unasked.example"), Some([9, 9, 9, 9]));
            assert_eq!(failed_open(), 1.0);
        }
        let requests = istio.w.json(1, "/pods")[0]["dns"]["requests"].clone();
        assert!(requests["mesh"].as_u64().unwrap() >= 2, "{requests}");
    }
}

/// A server that answers every name with one address, on port 53 of a namespace, over datagrams. It ends with the test
/// process.
fn serve_one_address(ns: &str) {
    for any in ["0.0.0.0:53", "[::]:53"] {
        let socket = inside(ns, || {
            let domain = if any.starts_with('0') { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
            let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
            if domain == socket2::Domain::IPV6 {
                socket.set_only_v6(true).unwrap();
            }
            socket.bind(&any.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
            UdpSocket::from(socket)
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&answer(&buffer[..length], [203, 0, 113, 9]), client);
            }
        });
    }
}

/// A prepared datagram socket in a namespace, with a read timeout.
fn datagram(ns: &str, v4: bool, prepare: impl FnOnce(&socket2::Socket) + Send) -> UdpSocket {
    inside(ns, || {
        let domain = if v4 { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
        let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
        prepare(&socket);
        socket.set_read_timeout(Some(std::time::Duration::from_secs(6))).unwrap();
        socket.into()
    })
}

fn answered(socket: &UdpSocket, to: std::net::SocketAddr, name: &str) -> Option<[u8; 4]> {
    socket.send_to(&question(name, A), to).unwrap();
    let mut buffer = [0; 512];
    let (length, from) = socket.recv_from(&mut buffer).ok()?;
    assert_eq!((from.ip(), from.port()), (to.ip(), to.port()), "from whom was asked");
    address(&buffer[..length])
}

#[test]
fn resolvers_are_reached_from_bound_sockets_on_any_link_and_servers_in_pods_from_any_port() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    let (resolver, plain) = (w.add_pod("resolver", 1), w.plain_pod("plain", 1));
    w.mesh.service("shop", &["10.96.0.20"], &json!({"80": 8080}), &[&server]);
    for ns in [&server.netns, &resolver.netns] {
        serve_one_address(ns);
    }
    w.start();
    let (found, mesh) = (Some([203, 0, 113, 9]), Some([10, 96, 0, 20]));
    let ((there, _), (_, index)) = (crate::tcp::link_local(&resolver.netns), crate::tcp::link_local(&client.netns));
    let on_link = std::net::SocketAddrV6::new(there, 53, 0, index).into();
    let second: IpAddr = "10.1.0.99".parse().unwrap();
    crate::world::ip_in(&client.netns, &format!("addr add {second}/24 dev eth0\n"));
    let device = |socket: &socket2::Socket| socket.bind_device(Some(b"eth0")).unwrap();
    let own = |socket: &socket2::Socket| socket.bind(&std::net::SocketAddr::new(second, 0).into()).unwrap();
    for (to, socket) in [
        ((resolver.v4, 53).into(), datagram(&client.netns, true, device)),
        ((resolver.v6, 53).into(), datagram(&client.netns, false, device)),
        (on_link, datagram(&client.netns, false, |_| {})),
        ((resolver.v4, 53).into(), datagram(&client.netns, true, own)),
    ] {
        assert_eq!(answered(&socket, to, "other.example"), found, "{to}");
        assert_eq!(answered(&socket, to, "shop.ns.svc.cluster.local"), mesh, "{to}");
    }
    // Servers ask each other from port 53, too.
    for (own, to) in [(plain.v4, server.v4), (plain.v6, server.v6)] {
        for port in [0, 53] {
            let from = std::net::SocketAddr::new(own, port);
            let socket = datagram(&plain.netns, own.is_ipv4(), |socket| socket.bind(&from.into()).unwrap());
            assert_eq!(answered(&socket, (to, 53).into(), "other.example"), found, "{own} port {port}");
        }
    }
    // The listeners for the pod's DNS serve no other clients.
    for ip in [client.v4, client.v6] {
        let socket = datagram(&plain.netns, ip.is_ipv4(), |_| {});
        let ignored = || w.json(1, "/pods")[0]["dns"]["requests"]["ignored"].as_u64().unwrap_or(0);
        let before = ignored();
        socket.send_to(&question("shop.ns.svc.cluster.local", A), (ip, 15053)).unwrap();
        eventually("it is ignored", || ignored() > before);
        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv(&mut [0; 512]).is_err(), "{ip}");
        assert!(crate::world::is_reset(&plain.netns, (ip, 15053)), "{ip}");
    }
}
