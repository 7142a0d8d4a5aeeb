//! How the daemon ends.

use crate::world::{Pod, World, alive, apps, ask, connect, eventually, inside};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::io::Read;
use std::net::TcpStream;

fn world(settings: &[(&str, &str)]) -> (World, Pod, Pod, TcpStream) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, settings);
        w.wait_captured(node);
    }
    let mut live = connect(&client.netns, (server.v4, 9000)).unwrap();
    assert!(alive(&mut live));
    (w, client, server, live)
}

fn message(w: &World, node: u8, text: &'static str) -> Value {
    w.log_line(node, text, |l| l["message"].as_str().is_some_and(|m| m.contains(text)))
}

#[test]
fn sigterm_lets_open_connections_finish_and_takes_no_new_ones() {
    for node in [1, 2] {
        let (mut w, client, server, mut live) = world(&[("CONNECTION_TERMINATION_DEADLINE", "1h")]);
        w.node(node).signal(Signal::SIGTERM);
        message(&w, node, "no new connections");
        eventually("new ones are refused", || ask(&client.netns, (server.v4, 9000), "x").is_err());
        assert!(alive(&mut live), "the open one goes on while node {node} ends");
        assert!(w.node(node).is_running());
        live.shutdown(std::net::Shutdown::Write).unwrap();
        live.read_to_end(&mut Vec::new()).expect("it ends in order");
        assert!(w.node(node).wait().success());
        message(&w, node, "every connection had finished");
    }
}

#[test]
fn at_the_deadline_what_is_left_is_cut_and_counted() {
    let (mut w, _, _, mut live) = world(&[("CONNECTION_TERMINATION_DEADLINE", "1s")]);
    w.node(1).signal(Signal::SIGTERM);
    assert!(live.read(&mut [0]).is_err(), "cut with a reset, not with what looks like an orderly end");
    assert!(w.node(1).wait().success());
    let line = message(&w, 1, "connections were cut");
    assert!(line["cut"].as_u64().unwrap() >= 1, "{line}");
}

#[test]
fn a_second_signal_ends_at_once() {
    let (mut w, _, _, _live) = world(&[("CONNECTION_TERMINATION_DEADLINE", "1h")]);
    w.node(1).signal(Signal::SIGTERM);
    message(&w, 1, "no new connections");
    w.node(1).signal(Signal::SIGINT);
    assert!(w.node(1).wait().success());
    message(&w, 1, "second signal: ending at once");
}

#[test]
fn quitquitquit_is_post_only_and_only_for_local_hosts() {
    let (mut w, _, _, live) = world(&[]);
    drop(live);
    let ask = |w: &World, method: &'static str, host: &'static str| {
        inside(&w.ns("n1"), move || crate::world::http(15000, method, "/quitquitquit", host)).unwrap().0
    };
    assert_eq!(ask(&w, "GET", "localhost"), 405);
    assert_eq!(ask(&w, "POST", "evil.example"), 403);
    assert!(w.node(1).is_running());
    assert_eq!(ask(&w, "POST", "localhost:15000"), 200);
    assert!(w.node(1).wait().success());
}
