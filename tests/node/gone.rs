//! The node of a peer disappears silently: no FIN and no reset ever arrives.

use crate::world::alive;
use crate::world::{PATIENCE, World, apps, connect, eventually, ip_in, output_in};
use serde_json::Value;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A client on the first node with an open connection to a server on the second, whose node then disappears with bytes
/// in flight.
fn cut_off() -> (World, TcpStream) {
    let mut w = World::new();
    let (_client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    w.start();
    let mut open = connect(&w.ns("client"), (server.v4, 9000)).unwrap();
    assert!(alive(&mut open));
    ip_in(&w.ns("n1"), "link set wire down\n");
    open.write_all(b"into the void").unwrap();
    eventually("nobody acknowledges it", || {
        let tunnel = tunnels(&w);
        // State, bytes to be read, unacknowledged bytes.
        tunnel
            .first()
            .and_then(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
            .is_some_and(|bytes| bytes > 0)
    });
    (w, open)
}

/// The client's sockets towards the server's tunnel port, whatever their state.
fn tunnels(w: &World) -> Vec<String> {
    let all = output_in(&w.ns("client"), "ss", &["-Htan", "dport", "=", "15008"]);
    all.lines().map(str::to_owned).collect()
}

#[test]
fn a_tunnel_to_a_node_that_is_gone_is_reset_and_nothing_of_it_is_left() {
    let (w, _open) = cut_off();
    // A PING is sent within 10 s, and has 20 s to be answered.
    let (end, is_cut) = (Instant::now() + 2 * PATIENCE, |line: &Value| line["message"] == "tunnel cut");
    while !w.log(1).iter().any(|line| is_cut(line) && line["reason"] == "ping_timeout") {
        assert!(Instant::now() < end, "no PING is overdue");
        std::thread::sleep(Duration::from_millis(50));
    }
    eventually("the kernel has forgotten it", || tunnels(&w).is_empty());
}

#[test]
fn what_a_killed_daemon_has_left_in_the_kernel_is_no_older_plaintext_connection() {
    let (mut w, open) = cut_off();
    w.take_node(1).kill();
    assert_eq!(tunnels(&w).len(), 1, "it is on its way for a while");
    drop(open);
    // As after culvert or ztunnel has been removed: no rules exempt the connections.
    output_in(&w.ns("client"), "nft", &["flush", "ruleset"]);
    w.start_node(1, &[]);
    w.wait_captured(1);
    assert_eq!(w.json(1, "/pods")[0]["uncapturedConnections"], 0, "{:?}", tunnels(&w));
    assert_eq!(w.metric(1, "culvert_uncaptured_connections", &[]), 0.0);
}
