//! Other implementations of HTTP/2 and TLS against both ends of a tunnel.

use crate::world::certs;
use crate::world::{Pod, World, apps, connect, eventually, output_in, peer_script, python_env};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::Command;

const ECHO: u16 = 9000;
const WHO: u16 = 8080;

/// A server behind a daemon on the second node, and a pod without a daemon on the first.
fn world(settings: &[(&str, &str)]) -> (World, Pod, Pod) {
    let mut w = World::new();
    let (server, peer) = (w.mesh_pod("server", 2), w.plain_pod("peer", 1));
    apps::serve(&server.netns, ECHO, apps::echo);
    apps::serve(&server.netns, WHO, apps::who);
    w.write_mesh();
    w.write_pods(2, &[&server]);
    w.start_node(2, settings);
    w.wait_captured(2);
    (w, server, peer)
}

/// A program below `target/tools`, that `scripts/test` installs.
fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(name);
    assert!(path.exists(), "{} is not there: scripts/test installs it", path.display());
    path
}

/// In the peer's namespace, a port of the loopback address from which a program without TLS reaches the server's HBONE port.
fn adaptor(w: &mut World, from: &Pod, to: &Pod) -> u16 {
    let (cert, ready) = (certs::good(&w.ca(), &w.dir, &from.name), w.dir.join("adaptor.ready"));
    let mut command = Command::new(python_env("python"));
    command.arg(peer_script("tls_adaptor.py")).args(["15080", &to.v4.to_string(), "15008"]);
    command.arg(w.ca().join("ca.pem")).args([&cert.chain, &cert.key, &ready]);
    w.start_in(&from.netns, &mut command, "adaptor.out");
    eventually("the adaptor listens", || ready.exists());
    15080
}

/// The cases that failed. Each is there twice, as it happens and in the summary.
fn failed(report: &str) -> Vec<&str> {
    report.lines().filter_map(|line| line.find('×').and_then(|at| line.get(at..))).collect()
}

#[test]
fn h2spec_finds_only_what_needs_more_than_connect() {
    // h2spec takes it for granted that a frame of 20 KiB is too large.
    let (mut w, server, peer) = world(&[("HTTP2_FRAME_SIZE", "16384")]);
    let port = adaptor(&mut w, &peer, &server).to_string();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &peer.netns]).arg(tool("h2spec")).args(["--strict", "--port", &port]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = failed(&text);
    // Its requests are all refused, with answers without content. Four cases need content and skip themselves. One
    // waits until as many answers as streams are allowed are held back by a closed window, which empty ones are not;
    // `a_stream_beyond_the_limit_is_refused` has that case. Depending on the time it takes, it passes all the same.
    let at_once = "Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded";
    assert!(failed.iter().all(|line| line.contains(at_once)), "{text}");
    assert!(text.contains("146 tests, 14") && text.contains(" passed, 4 skipped, "), "{text}");
}

/// Runs the client of the library h2 against the server.
fn h2_client(w: &World, from: &Pod, to: &Pod, what: Value) -> Value {
    let cert = certs::good(&w.ca(), &w.dir, &from.name);
    let mut spec = json!({
        "to": [to.v4, 15008], "ca": w.ca().join("ca.pem"), "cert": cert.chain, "key": cert.key,
        "authority": format!("{}:{ECHO}", to.v4), "streams": 1, "bytes": 1 << 20, "chunk": 16_000,
    });
    spec.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
    let script = peer_script("h2_client.py");
    let args = [script.to_str().unwrap(), &spec.to_string()];
    serde_json::from_str(&output_in(&from.netns, python_env("python").to_str().unwrap(), &args)).unwrap()
}

#[test]
fn a_client_of_another_library_gets_back_what_it_sends() {
    let (w, server, peer) = world(&[]);
    let (window, frame) = (4, 5);
    let cases = [
        json!({"streams": 20, "bytes": 1 << 20}),
        json!({"streams": 4, "bytes": 4 << 20, "chunk": 1 << 20, "settings": {window.to_string(): (1u32 << 31) - 1}}),
        json!({"streams": 3, "bytes": 2000, "chunk": 3, "settings": {window.to_string(): 1}}),
        json!({"streams": 5, "bytes": 200_000, "settings": {window.to_string(): 1000, frame.to_string(): 16_777_215}}),
        json!({"streams": 5, "bytes": 1 << 20, "changes": [
            {"4": 0}, {"4": 100_000}, {"4": 7, "5": 1_000_000}, {"4": 65_535, "5": 16_384}, {"1": 0}, {"1": 65_536},
        ]}),
        json!({"streams": 5, "bytes": 1 << 20, "goaway": true}),
    ];
    for case in cases {
        let result = h2_client(&w, &peer, &server, case.clone());
        let all = vec![200; case["streams"].as_u64().unwrap() as usize];
        assert_eq!(result["answers"], json!(all), "{case}: {result}");
        assert_eq!(result["same"], true, "{case}");
    }
    assert_eq!(w.metric(2, "culvert_tunnels_cut_total", &[]), 0.0);
}

#[test]
fn a_stream_beyond_the_limit_is_refused() {
    let (w, server, peer) = world(&[]);
    // The limit, and one more.
    let result = h2_client(&w, &peer, &server, json!({"hold": 200, "streams": 1, "bytes": 10}));
    assert_eq!(result["answers"], json!(["reset 7"]), "REFUSED_STREAM: {result}");
    assert_eq!(result["held"], json!(vec![200; 200]), "{result}");
}

/// A pod whose HBONE port is a program of the test, and a captured pod that reaches it.
struct Fake {
    pod: Pod,
    client: Pod,
}

/// A captured client on the first node, and a pod on the second whose HBONE port is a program of the test.
fn fake(settings: &[(&str, &str)]) -> (World, Fake, Vec<String>) {
    let mut w = World::new();
    let (client, pod) = (w.mesh_pod("client", 1), w.add_pod("fake", 2));
    w.mesh.workload(&pod, "HBONE");
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.start_node(1, settings);
    eventually("the client is captured", || w.state(1, "client").0 == "captured");
    let cert = certs::good(&w.ca(), &w.dir, "fake");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let files = vec![path(&w.ca().join("ca.pem")), path(&cert.chain), path(&cert.key)];
    (w, Fake { pod, client }, files)
}

/// Starts the server of the library h2 in the fake pod.
fn h2_server(w: &mut World, fake: &Fake, files: &[String], settings: Value) {
    let ready = w.dir.join("h2-server.ready");
    let spec = json!({
        "address": fake.pod.v4, "ca": files[0], "cert": files[1], "key": files[2], "ready": ready, "settings": settings,
    });
    let mut command = Command::new(python_env("python"));
    command.arg(peer_script("h2_server.py")).arg(spec.to_string());
    w.start_in(&fake.pod.netns, &mut command, "h2-server.out");
    eventually("the server listens", || ready.exists());
}

/// Sends bytes to an application that echoes them, and compares.
fn exchange(fake: &Fake, port: u16, bytes: usize) {
    let sent: Vec<u8> = (0..bytes).map(|at| (at * 31 / 7) as u8).collect();
    let stream = connect(&fake.client.netns, (fake.pod.v4, port)).unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        (&stream).read_to_end(&mut received).unwrap();
        received
    });
    assert!(sent == received, "{} of {bytes} bytes came back, or others", received.len());
}

fn exchange_at_once(fake: &Fake, port: u16, bytes: usize, connections: usize) {
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..connections).map(|_| scope.spawn(|| exchange(fake, port, bytes))).collect();
        all.into_iter().for_each(|one| one.join().unwrap());
    });
}

#[test]
fn a_server_of_another_library_gives_back_what_it_gets() {
    let settings = [
        (json!({}), 1 << 20, 20),
        (json!({"4": 1}), 2000, 3),
        (json!({"4": 1000, "1": 0}), 100_000, 5),
        (json!({"4": 2_147_483_647, "5": 16_777_215}), 4 << 20, 4),
        (json!({"3": 2}), 100_000, 9),
    ];
    for (settings, bytes, connections) in settings {
        let (mut w, fake, files) = fake(&[]);
        h2_server(&mut w, &fake, &files, settings.clone());
        exchange_at_once(&fake, 9000, bytes, connections);
        let failed = w.metric(1, "culvert_connection_failures_total", &[]);
        assert_eq!(failed, 0.0, "{settings}");
    }
}

#[test]
fn a_server_that_goes_away_or_changes_its_settings_loses_no_connection() {
    let (mut w, fake, files) = fake(&[]);
    h2_server(&mut w, &fake, &files, json!({}));
    // GOAWAY in the middle, with this stream or without it as the last one; then a window of 0, and of 7, and large
    // frames; and a first stream that is refused.
    for port in [9001, 9002, 9003] {
        exchange(&fake, port, 1 << 20);
        exchange_at_once(&fake, port, 100_000, 5);
    }
    exchange_at_once(&fake, 9000, 100_000, 5);
}

#[test]
fn each_reset_arrives_whatever_its_code() {
    let (mut w, fake, files) = fake(&[]);
    h2_server(&mut w, &fake, &files, json!({}));
    for code in 0..=14 {
        let mut stream = connect(&fake.client.netns, (fake.pod.v4, 9100 + code)).unwrap();
        stream.write_all(b"something").unwrap();
        let mut received = Vec::new();
        let error = stream.read_to_end(&mut received).unwrap_err();
        assert_eq!((error.kind(), &received[..]), (ErrorKind::ConnectionReset, &b"some"[..]), "code {code}");
        exchange(&fake, 9000, 10);
    }
    assert_eq!(w.metric(1, "culvert_tunnels_open", &[]), 1.0, "a reset ends a stream only");
}

/// The peer that is written in Go. It needs no packages.
fn go_peer(w: &World) -> PathBuf {
    let made = w.dir.join("h2_go");
    let mut command = Command::new("go");
    command.args(["build", "-o"]).arg(&made).arg(peer_script("h2_go.go"));
    command.env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false").env("GO111MODULE", "off");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    made
}

const STREAMS: usize = 20;
const BYTES: usize = 2 << 20;

#[test]
fn clients_in_go_and_node_get_back_what_they_send() {
    let (w, server, peer) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, &peer.name);
    let (authority, ca) = (format!("{}:{ECHO}", server.v4), w.ca().join("ca.pem"));
    let run = |program: &str, before: &[&str], address: &str| {
        let mut args = before.to_vec();
        args.extend(["client", address]);
        args.extend([&ca, &cert.chain, &cert.key].map(|path| path.to_str().unwrap()));
        let (streams, bytes) = (STREAMS.to_string(), BYTES.to_string());
        args.extend([&authority, &streams, &bytes].map(String::as_str));
        assert_eq!(output_in(&peer.netns, program, &args).trim(), format!("same {STREAMS}"), "{program}");
    };
    run(go_peer(&w).to_str().unwrap(), &[], &format!("{}:15008", server.v4));
    run("node", &[peer_script("h2_node.js").to_str().unwrap()], &server.v4.to_string());
    assert_eq!(w.metric(2, "culvert_tunnels_cut_total", &[]), 0.0);
}

#[test]
fn servers_in_go_and_node_give_back_what_they_get() {
    for go in [true, false] {
        let (mut w, fake, files) = fake(&[]);
        let ready = w.dir.join("server.ready");
        let mut command = if go { Command::new(go_peer(&w)) } else { Command::new("node") };
        if go {
            command.args(["server", &format!("{}:15008", fake.pod.v4)]);
        } else {
            command.arg(peer_script("h2_node.js")).args(["server", &fake.pod.v4.to_string()]);
        }
        w.start_in(&fake.pod.netns, command.args(&files).arg(&ready), "server.out");
        eventually("the server listens", || ready.exists());
        exchange_at_once(&fake, 9000, BYTES, STREAMS);
        assert_eq!(w.metric(1, "culvert_connection_failures_total", &[]), 0.0, "go: {go}");
    }
}

#[test]
fn nghttpx_carries_connections_over_a_tunnel() {
    let (mut w, server, peer) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, &peer.name);
    let mut command = Command::new("nghttpx");
    command.args(["--http2-proxy", "--workers=1", "--frontend=127.0.0.1,3128;no-tls", "--no-location-rewrite"]);
    command.arg(format!("--backend={},15008;;proto=h2;tls;sni=server", server.v4)).arg("--insecure");
    command.arg(format!("--client-private-key-file={}", cert.key.display()));
    command
        .arg(format!("--client-cert-file={}", cert.chain.display()))
        .args(["--conf=/dev/null", "--errorlog-file=/dev/stderr"]);
    w.start_in(&peer.netns, &mut command, "nghttpx.out");
    let local: std::net::IpAddr = "127.0.0.1".parse().unwrap();
    eventually("nghttpx listens", || connect(&peer.netns, (local, 3128)).is_ok());
    let carry = || {
        let mut stream = connect(&peer.netns, (local, 3128)).unwrap();
        write!(stream, "CONNECT {0}:{ECHO} HTTP/1.1\r\nHost: {0}:{ECHO}\r\n\r\n", server.v4).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
        let sent: Vec<u8> = (0..1 << 20).map(|at| (at * 31 / 7) as u8).collect();
        let mut received = vec![0; sent.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| (&stream).write_all(&sent).unwrap());
            (&stream).read_exact(&mut received).unwrap();
        });
        assert!(sent == received);
    };
    std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(carry))));
    assert_eq!(w.metric(2, "culvert_tunnels_cut_total", &[]), 0.0);
}

#[test]
fn each_rule_of_tls_that_a_client_breaks_is_answered_with_its_alert() {
    let (w, server, peer) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, &peer.name);
    let spec = json!({"to": [server.v4, 15008], "cert": cert.chain, "key": cert.key});
    let script = peer_script("tls13.py");
    let args = [script.to_str().unwrap(), &spec.to_string()];
    let text = output_in(&peer.netns, python_env("python").to_str().unwrap(), &args);
    let outcomes: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    let expected = |case: &str| TLS.iter().rev().find(|(prefix, _)| case.starts_with(prefix)).unwrap().1;
    let wrong = outcomes.iter().filter(|(case, outcome)| expected(case) != *outcome);
    let wrong: Vec<String> = wrong.map(|(case, is)| format!("{case}: {is}, expected {}", expected(case))).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(outcomes.len() > 80, "{} cases", outcomes.len());
}

fn tls_server(w: &mut World, fake: &Fake, files: &[String], how: &str) -> PathBuf {
    let ready = w.dir.join(format!("tls-server-{how}.ready"));
    let mut command = Command::new(python_env("python"));
    command.arg(peer_script("tls13_server.py")).arg(fake.pod.v4.to_string()).args(&files[1..]).arg(&ready).arg(how);
    let said = format!("tls-server-{how}.out");
    w.start_in(&fake.pod.netns, &mut command, &said);
    eventually("the server listens", || ready.exists());
    w.dir.join(said)
}

#[test]
fn a_tls_server_of_another_library_may_do_all_that_is_allowed() {
    for how in ["tickets", "updates", "padding", "tiny"] {
        let (mut w, fake, files) = fake(&[]);
        let said = tls_server(&mut w, &fake, &files, how);
        exchange_at_once(&fake, 9000, 50_000, 3);
        let ended = w.metric(1, "culvert_connection_failures_total", &[]);
        assert_eq!(ended, 0.0, "{how}: {:?}", fs::read_to_string(said));
    }
}

#[test]
fn each_rule_of_tls_that_a_server_breaks_ends_the_tunnel_with_its_alert() {
    let cases = [
        ("hello", "alert 10"),
        ("request", "alert 10"),
        ("finished", "alert 10"),
        ("certificate", "alert 10"),
        ("flood", "alert 10"),
        ("split", "alert 10"),
        ("mac", "alert 20"),
        ("large", "alert 22"),
        ("alert", "closed in order"),
        ("plain", "alert 10"),
    ];
    for (how, expected) in cases {
        let (mut w, fake, files) = fake(&[]);
        let said = tls_server(&mut w, &fake, &files, how);
        let mut stream = connect(&fake.client.netns, (fake.pod.v4, 9000)).unwrap();
        stream.write_all(b"something").unwrap();
        let error = stream.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{how}");
        let says = || fs::read_to_string(&said).unwrap();
        eventually("the server says how it ended", || says().contains('\n'));
        assert_eq!(says().trim(), expected, "{how}");
    }
}

/// What comes of the cases of `tls13.py`, by the beginnings of their names. The last one that fits counts. The alerts are
/// those of RFC 8446 section 6.2.
const TLS: &[(&str, &str)] = &[
    ("", "answered"),
    // The daemon has no such cipher.
    ("cipher chacha20", "alert 40"),
    ("tls 12", "alert 70"),
    ("finished with", "alert 51"),
    ("finished too short", "alert 51"),
    ("certificate verify with", "alert 51"),
    ("no certificate", "alert 116"),
    // More than 32 records without data in a row.
    ("key updates 0 40", "alert 10"),
    ("key updates 1 40", "alert 10"),
    ("empty records of data 100", "alert 10"),
    ("data inside of", "alert 10"),
    ("key update with value", "alert 47"),
    ("key update with length", "alert 50"),
    ("two key updates", "alert 10"),
    ("the old key", "alert 20"),
    ("an empty record of a handshake", "alert 10"),
    ("nothing but padding", "alert 10"),
    ("content and padding", "alert 22"),
    ("a record of the length", "alert 22"),
    ("a record that is too short", "alert 20"),
    ("a record with a wrong byte", "alert 20"),
    ("a record again", "alert 20"),
    ("change cipher spec", "alert 10"),
    ("an unprotected record", "alert 10"),
    ("a protected record", "alert 10"),
    ("a message of type", "alert 10"),
    ("close notify", "closed in order"),
    ("alert", "closed in order"),
    ("alert 1 90", "answered"),
    ("alert 2 90", "answered"),
    ("an alert of the bytes", "alert 10"),
    ("an alert of the bytes 1", "alert 50"),
];
