//! What one peer, pod or scraper can do to others: nothing. In each scenario an innocent pod's requests are all
//! answered.

use crate::limits::MemoryLimit;
use crate::world::certs::{self, Files, spiffe};
use crate::world::{PATIENCE, Pod, World, apps, connect, eventually, inside, is_reset, peer_script, python_env};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// One worker, so that there is one tunnel, and one blocked thread blocks everything.
const ONE_WORKER: (&str, &str) = ("ZTUNNEL_WORKER_THREADS", "1");

const ECHO: u16 = 9000;
const HOLD: u16 = 9001;
const POUR: u16 = 9002;

/// A client on the first node, a server on the second, and a hostile pod on the first that is not captured.
fn world(settings: &[(&str, &str)]) -> (World, Pod, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    let hostile = w.plain_pod("hostile", 1);
    apps::serve(&server.netns, ECHO, apps::echo);
    apps::serve(&server.netns, HOLD, apps::hold);
    apps::serve(&server.netns, POUR, apps::pour);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[&[ONE_WORKER], settings].concat());
    }
    [1, 2].iter().for_each(|node| w.wait_captured(*node));
    (w, client, server, hostile)
}

/// The same with a memory limit on the second node.
fn limited(bytes: u64) -> (World, MemoryLimit, [Pod; 3]) {
    let mut w = World::new();
    let limit = MemoryLimit::new(&w, bytes);
    let pods = [w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.plain_pod("hostile", 1)];
    apps::serve(&pods[1].netns, ECHO, apps::echo);
    apps::serve(&pods[1].netns, HOLD, apps::hold);
    apps::serve(&pods[1].netns, POUR, apps::pour);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
    }
    w.start_node(1, &[ONE_WORKER]);
    w.start_node_by(&limit.join(), 2, &[ONE_WORKER]);
    [1, 2].iter().for_each(|node| w.wait_captured(*node));
    (w, limit, pods)
}

fn round_trip(stream: &mut TcpStream) {
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
}

/// Makes new connections from a pod. Each request must be answered.
fn answered(from: &Pod, to: &Pod, times: usize) {
    for _ in 0..times {
        round_trip(&mut connect(&from.netns, (to.v4, ECHO)).unwrap());
    }
}

/// Starts the hostile peer. Its output is in the file.
pub fn misuse(w: &mut World, from: &Pod, to: &Pod, cert: &Files, what: Value) -> (u32, PathBuf) {
    let mut spec = json!({"to": [to.v4, 15008], "ca": w.ca().join("ca.pem"), "cert": cert.chain, "key": cert.key});
    spec.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
    let log = format!("hostile-{}.out", fs::read_dir(&w.dir).unwrap().count());
    let mut command = Command::new(python_env("python"));
    command.arg(peer_script("hostile.py")).arg(spec.to_string());
    let pid = w.start_in(&from.netns, &mut command, &log);
    (pid, w.dir.join(log))
}

fn said(file: &PathBuf) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

fn resident(w: &World, node: u8) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", w.pid(node))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn cut(w: &World, reason: &str) -> f64 {
    w.metric(2, "culvert_tunnels_cut_total", &[&format!("reason=\"{reason}\""), "direction=\"inbound\""])
}

#[test]
fn eight_uploads_that_nobody_reads_leave_the_tunnel_to_others() {
    let (w, client, server, _) = world(&[]);
    let mut before = connect(&client.netns, (server.v4, ECHO)).unwrap();
    let stalled: Vec<TcpStream> = (0..8).map(|_| connect(&client.netns, (server.v4, HOLD)).unwrap()).collect();
    let chunk = vec![1; 1 << 20];
    for stream in &stalled {
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // Until the buffers on the way are full.
        while (&*stream).write(&chunk).is_ok() {}
    }
    round_trip(&mut before);
    answered(&client, &server, 20);
    assert_eq!(w.metric(1, "culvert_tunnels_open", &[]), 1.0, "on the same tunnel");
    // A client that gives up is noticed although its window is closed.
    for stream in &stalled {
        socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    drop(stalled);
    eventually("all that was stalled has ended", || w.json(2, "/connections").as_array().unwrap().len() <= 1);
    round_trip(&mut before);
}

#[test]
fn small_messages_to_a_slow_reader_leave_the_tunnel_open() {
    let (mut w, _, server, hostile) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    let ask = json!({
        "do": "small", "authority": format!("{}:{HOLD}", server.v4), "other": format!("{}:{ECHO}", server.v4),
        "frames": 16_000, "bytes": 16,
    });
    let (_, says) = misuse(&mut w, &hostile, &server, &cert, ask);
    eventually("it has ended", || !said(&says).is_empty());
    assert_eq!(said(&says).trim(), "answered");
    // 256 kB of payload, as much as the window allows. Waiting frames of their own would cost hundreds of bytes more each.
    let held = w.metric(2, "culvert_buffers_held_bytes", &[]);
    assert!(held < 500e3, "{held}");
}

#[test]
fn control_frames_without_end_cut_their_tunnel_by_name_and_stall_nobody() {
    let (mut w, client, server, hostile) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    answered(&client, &server, 1);
    let kinds = ["ping", "ping-ack", "settings", "priority", "window-update", "unknown"];
    for (index, frame) in kinds.into_iter().enumerate() {
        let ask = json!({"do": "flood", "frame": frame, "seconds": 10});
        let (_, says) = misuse(&mut w, &hostile, &server, &cert, ask);
        eventually("it begins", || said(&says).contains("begins"));
        answered(&client, &server, 20);
        eventually("it ends", || said(&says).contains("cut"));
        assert!(!said(&says).contains("not cut"), "{frame}: {}", said(&says));
        eventually(&format!("{frame} is counted"), || cut(&w, "control_frames") >= (index + 1) as f64);
    }
    let line = w.log_line(2, "it is named", |line| line["reason"] == "control_frames");
    assert_eq!(line["identity"], spiffe("hostile"), "{line}");
    assert!(w.log(2).len() < 300, "{} lines", w.log(2).len());
}

#[test]
fn who_breaks_the_rules_of_http2_is_cut_by_name() {
    let (mut w, client, server, hostile) = world(&[]);
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    let kinds = [
        ("window_overflow", "window_overflow"),
        ("hpack", "bad_frame"),
        ("bad_frame", "bad_frame"),
        ("continuation_flood", "continuation_flood"),
        ("rapid_reset", "rapid_reset"),
    ];
    for (how, reason) in kinds {
        let before = cut(&w, reason);
        let (_, says) = misuse(&mut w, &hostile, &server, &cert, json!({"do": "break", "how": how}));
        eventually("it ends", || !said(&says).is_empty());
        eventually(&format!("{how} is counted: {}", said(&says)), || cut(&w, reason) == before + 1.0);
        let line = w.log_line(2, how, |line| line["message"] == "tunnel cut" && line["reason"] == reason);
        assert_eq!(line["identity"], spiffe("hostile"), "{line}");
    }
    answered(&client, &server, 1);
    // A client that starts a handshake and does not finish it.
    let mut late = connect(&hostile.netns, (server.v4, 15008)).unwrap();
    late.write_all(&[0x16]).unwrap();
    assert!(matches!(late.read(&mut [0]), Ok(0) | Err(_)), "closed or reset");
    eventually("it is counted", || cut(&w, "late_handshake") == 1.0);
    w.log_line(2, "it is named", |line| line["reason"] == "peer_handshake_deadline");
    // Connections that close without sending a byte are no failures, but they are counted.
    let unused = || w.metric(2, "culvert_tunnels_unused_total", &[]);
    let (before, failures) = (unused(), w.metric(2, "culvert_connection_failures_total", &[]));
    (0..3).for_each(|_| drop(connect(&hostile.netns, (server.v4, 15008)).unwrap()));
    eventually("they are counted", || unused() == before + 3.0);
    assert_eq!(w.metric(2, "culvert_connection_failures_total", &[]), failures);
}

#[test]
fn peers_that_do_not_read_or_do_not_let_read_cannot_use_up_the_memory() {
    let (mut w, limit, [client, server, hostile]) = limited(256 << 20);
    answered(&client, &server, 1);
    let most = w.metric(2, "culvert_buffers_max_bytes", &[]);
    assert!((30e6..70e6).contains(&most), "a quarter of the limit: {most}");
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    let unread = json!({"do": "unread", "authority": format!("{}:{POUR}", server.v4), "tunnels": 6, "streams": 200});
    let upload = json!({
        "do": "upload", "authority": format!("{}:{HOLD}", server.v4), "tunnels": 14, "streams": 4, "bytes": 4 << 20,
    });
    for (ask, done) in [(unread, "asked"), (upload, "sent")] {
        let (pid, says) = misuse(&mut w, &hostile, &server, &cert, ask);
        eventually("it has done its worst", || said(&says).contains(done) || said(&says).contains("Traceback"));
        answered(&client, &server, 20);
        let held = w.metric(2, "culvert_buffers_held_bytes", &[]);
        assert!(held <= most, "{held} of {most}");
        // The rest is the daemon itself, its tunnels, and the buffers for reading and TLS.
        assert!(resident(&w, 2) < (200 << 20), "{}", resident(&w, 2));
        assert!(w.node(2).is_running(), "{}", said(&says));
        drop(w.take(pid));
    }
    eventually("all is given back", || w.metric(2, "culvert_buffers_held_bytes", &[]) < 1e6);
    answered(&client, &server, 5);
    drop(w);
    drop(limit);
}

#[test]
fn the_tunnel_that_makes_the_node_hold_most_is_cut_by_name_before_there_is_no_room() {
    let (mut w, limit, [client, server, hostile]) = limited(96 << 20);
    // An innocent stream that is stalled too, because its application reads later.
    let innocent = connect(&client.netns, (server.v4, HOLD)).unwrap();
    innocent.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while (&innocent).write(&[1; 65536]).is_ok() {}
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    // What has been granted to each stream cannot be taken back: together, it is more than the node may hold.
    let upload = json!({
        "do": "upload", "authority": format!("{}:{HOLD}", server.v4), "tunnels": 1, "streams": 200, "bytes": 1 << 20,
    });
    for _ in 0..8 {
        misuse(&mut w, &hostile, &server, &cert, upload.clone());
    }
    eventually("one is cut", || cut(&w, "memory") >= 1.0);
    let line = w.log_line(2, "it is named", |line| line["reason"] == "memory");
    assert_eq!(line["identity"], spiffe("hostile"), "{line}");
    answered(&client, &server, 10);
    let innocent = w.json(2, "/connections").to_string().contains(&spiffe("client"));
    assert!(innocent, "the innocent's connection is still open");
    assert!(w.node(2).is_running());
    drop(w);
    drop(limit);
}

#[test]
fn four_thousand_silent_connections_cost_little_and_are_nobodys() {
    let (mut w, client, server, hostile) = world(&[]);
    answered(&client, &server, 1);
    let before = resident(&w, 2);
    let to = SocketAddr::new(server.v4, 15008);
    let silent: Vec<TcpStream> = inside(&hostile.netns, move || {
        (0..4000).filter_map(|_| TcpStream::connect_timeout(&to, PATIENCE).ok()).collect()
    });
    let grown = resident(&w, 2).saturating_sub(before);
    // On a busy machine the kernel does not take all of them.
    assert!(silent.len() > 2000, "{}", silent.len());
    assert!(grown < 24 << 20, "{} KiB for each", grown / 1024 / silent.len() as u64);
    answered(&client, &server, 20);
    let failures = |reason: &str| {
        w.metric(2, "culvert_connection_failures_total", &[&format!("reason=\"{reason}\""), "direction=\"inbound\""])
    };
    eventually("those that were taken are given up", || failures("peer_silent") > 100.0);
    assert!(failures("handshake_limit") > 1000.0, "{}", failures("handshake_limit"));
    assert_eq!(failures("largest_consumer") + failures("largest_peer") + failures("limit"), 0.0);
    let line = w.log_line(2, "it says why", |line| line["reason"] == "handshake_limit");
    assert!(line["error"].as_str().unwrap().contains(&hostile.v4.to_string()), "{line}");
    eventually("all places are free again", || is_reset_late(&hostile, to));
    drop(silent);
    assert!(w.node(2).is_running());
}

/// Whether a new silent connection is given time and ended only then.
fn is_reset_late(from: &Pod, to: SocketAddr) -> bool {
    let start = Instant::now();
    is_reset(&from.netns, to) || start.elapsed() > Duration::from_secs(1)
}

#[test]
fn idle_tunnels_of_one_identity_do_not_lock_others_out_of_a_pod() {
    let (mut w, client, server, hostile) = world(&[("CULVERT_MAX_CONNECTIONS", "100")]);
    let cert = certs::good(&w.ca(), &w.dir, "hostile");
    answered(&client, &server, 1);
    let (_, says) = misuse(&mut w, &hostile, &server, &cert, json!({"do": "idle", "tunnels": 150}));
    // What it could not open may be in its output, too, as an error with other words.
    let opened = || said(&says).lines().find_map(|line| line.strip_prefix("open ")?.parse::<usize>().ok());
    eventually("it has opened what it can", || opened().is_some());
    let open = opened().unwrap();
    assert!((60..=80).contains(&open), "{open}");
    answered(&client, &server, 20);
    let mut many: Vec<TcpStream> = (0..15).map(|_| connect(&client.netns, (server.v4, ECHO)).unwrap()).collect();
    many.iter_mut().for_each(round_trip);
    let line = w.log_line(2, "it says who", |line| line["reason"] == "largest_peer");
    assert!(line["error"].as_str().unwrap().contains(&spiffe("hostile")), "{line}");
}

#[test]
fn scrapers_and_parked_connections_hold_up_neither_a_denial_nor_readiness() {
    let (mut w, client, server, hostile) = world(&[]);
    // As many metrics as on a busy node: each service has its own labels.
    let vips: Vec<String> = (0..500).map(|n| format!("10.96.{}.{}", n / 250, n % 250 + 1)).collect();
    for (n, vip) in vips.iter().enumerate() {
        w.mesh.service(&format!("service-{n}"), &[vip], &json!({"80": ECHO}), &[&server]);
    }
    w.write_mesh();
    eventually("the services are known", || w.json(1, "/config_dump").to_string().contains("service-499"));
    for vip in &vips {
        round_trip(&mut connect(&client.netns, (vip.parse::<std::net::IpAddr>().unwrap(), 80)).unwrap());
    }
    let mut live = connect(&client.netns, (server.v4, ECHO)).unwrap();
    round_trip(&mut live);
    let node = [172, 30, 0, 2];
    let (stats, ready) = (SocketAddr::from((node, 15020)), SocketAddr::from((node, 15021)));
    let parked: Vec<TcpStream> = inside(&hostile.netns, move || {
        (0..256).filter_map(|_| TcpStream::connect_timeout(&ready, PATIENCE).ok()).collect()
    });
    for stream in &parked {
        let _ = (&*stream).write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\n\r\n");
    }
    let unread: Vec<TcpStream> = inside(&hostile.netns, move || {
        (0..60).filter_map(|_| TcpStream::connect_timeout(&stats, PATIENCE).ok()).collect()
    });
    for stream in &unread {
        let _ = (&*stream).write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
    }
    assert!(w.is_ready(2), "while 256 connections are parked");
    static STOP: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let scrapers: Vec<_> = (0..100)
        .map(|_| {
            let netns = hostile.netns.clone();
            std::thread::spawn(move || {
                inside(&netns, || {
                    while !STOP.load(std::sync::atomic::Ordering::Relaxed) {
                        let Ok(mut stream) = TcpStream::connect_timeout(&stats, PATIENCE) else { continue };
                        let _ = stream.set_read_timeout(Some(PATIENCE));
                        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
                        let _ = stream.read_to_end(&mut Vec::new());
                    }
                });
            })
        })
        .collect();
    for _ in 0..20 {
        assert!(w.is_ready(2), "under scrapes");
        round_trip(&mut live);
    }
    w.mesh.policy("no-echo", "Namespace", "Deny", json!({"destinationPorts": [ECHO]}));
    let start = Instant::now();
    w.write_mesh();
    let ended = live.read(&mut [0]);
    let took = start.elapsed();
    STOP.store(true, std::sync::atomic::Ordering::Relaxed);
    scrapers.into_iter().for_each(|scraper| scraper.join().unwrap());
    assert!(ended.is_err(), "{ended:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    drop((parked, unread));
    assert!(w.node(2).is_running());
}

#[test]
fn a_tunnel_ends_with_the_certificate_of_its_peer() {
    let (mut w, _, server, hostile) = world(&[]);
    let cert = certs::leaf(&w.ca(), &w.dir, "short", &[&spiffe("hostile")], -60, 6);
    let (_, says) =
        misuse(&mut w, &hostile, &server, &cert, json!({"do": "wait", "authority": format!("{}:{ECHO}", server.v4)}));
    eventually("it is answered", || said(&says).contains("status 200"));
    assert!(!said(&says).contains("goaway"), "{}", said(&says));
    eventually("it is closed", || said(&says).contains("closed"));
    let said = said(&says);
    assert!(said.contains("goaway 0") && said.contains("reset "), "{said}");
    let line = w.log_line(2, "its stream says why", |line| line["reason"] == "cert_expired");
    assert_eq!(line["src.identity"], spiffe("hostile"), "{line}");
}

#[test]
fn a_peer_that_refuses_streams_is_asked_again_on_the_same_tunnel() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    let refusing = w.add_pod("refusing", 2);
    w.mesh.workload(&refusing, "HBONE");
    let cert = certs::good(&w.ca(), &w.dir, "refusing");
    let ready = w.dir.join("refusing.ready");
    let mut command = Command::new("python3");
    command.arg(peer_script("refusing.py")).args([refusing.v4.to_string().as_str(), "15008"]);
    command.args([&cert.chain, &cert.key, &ready]);
    w.start_in(&refusing.netns, &mut command, "refusing.out");
    eventually("it listens", || ready.exists());
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.start_node(1, &[ONE_WORKER]);
    eventually("the client is captured", || w.state(1, "client").0 == "captured");
    assert!(is_reset(&client.netns, (refusing.v4, 80)));
    let counts = said(&w.dir.join("refusing.out"));
    let last = counts.lines().last().unwrap();
    assert_eq!(last, "tunnels 1 streams 5 closed 0", "{counts}");
    w.log_line(1, "it says why", |line| line["reason"] == "stream_refused");
}
