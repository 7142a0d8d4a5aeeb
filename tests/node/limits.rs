//! Many connections, dead destinations, bounds.

use crate::world::{PATIENCE, Pod, World, apps, connect, eventually, inside, is_reset, output_in};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

fn world() -> (World, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    (w, client, server)
}

fn round_trip(stream: &mut TcpStream) {
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
}

fn open_files(w: &World, node: u8) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", w.pid(node))).unwrap().count()
}

#[test]
fn ten_thousand_in_a_row_and_five_hundred_at_once_leave_nothing_behind() {
    let (mut w, client, server) = world();
    w.start();
    round_trip(&mut connect(&client.netns, (server.v4, 9000)).unwrap());
    let tasks = |w: &World| [1, 2].map(|node| w.metric(node, "culvert_data_plane_tasks", &[]));
    let live = |w: &World| [1, 2].map(|node| w.json(node, "/connections").as_array().unwrap().len());
    eventually("the first has ended", || live(&w) == [0, 0]);
    let (files, before) = ([1, 2].map(|node| open_files(&w, node)), tasks(&w));

    let to = std::net::SocketAddr::new(server.v4, 9000);
    inside(&client.netns, || {
        for _ in 0..10_000 {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            round_trip(&mut stream);
        }
        let mut all: Vec<TcpStream> = (0..500).map(|_| TcpStream::connect_timeout(&to, PATIENCE).unwrap()).collect();
        for stream in &mut all {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(b"ping").unwrap();
        }
        for stream in &mut all {
            stream.read_exact(&mut [0; 4]).unwrap();
        }
    });
    eventually("all have ended", || live(&w) == [0, 0]);
    // 500 at once need more tunnels than one; those stay open until they have been idle, and are not leaks.
    let tunnels = w.metric(1, "culvert_tunnels_open", &[]);
    assert!(tunnels <= 12.0, "{tunnels}");
    eventually("files and tasks are back", || {
        let files_now = [1, 2].map(|node| open_files(&w, node));
        let tasks_now = tasks(&w);
        (0..2).all(|i| files_now[i] <= files[i] + 12 && tasks_now[i] <= before[i] + tunnels)
    });
    for pod in [&client, &server] {
        let stuck = output_in(&pod.netns, "ss", &["-Htn", "state", "close-wait"]);
        assert_eq!(stuck, "", "{}", pod.name);
    }
    assert_eq!(w.metric(1, "istio_tcp_connections_failed_total", &[]), 0.0);
    assert_eq!(w.metric(2, "istio_tcp_connections_failed_total", &[]), 0.0);
}

#[test]
fn a_hundred_connections_to_a_dead_destination_fail_together() {
    let (mut w, client, _) = world();
    let dead = w.mesh_pod("dead", 2);
    w.start();
    // From now on nothing of it answers, not even with a refusal.
    let script =
        format!("table inet hole {{ chain f {{ type filter hook forward priority 0; ip daddr {} drop; }}; }}", dead.v4);
    let file = w.dir.join("hole.nft");
    std::fs::write(&file, script).unwrap();
    output_in(&w.ns("n2"), "nft", &["-f", file.to_str().unwrap()]);
    let start = Instant::now();
    let mut all: Vec<TcpStream> = (0..100).map(|_| connect(&client.netns, (dead.v4, 80)).unwrap()).collect();
    for stream in &mut all {
        assert!(stream.read(&mut [0]).is_err(), "each is reset");
    }
    // One connect timeout is 10 s; two in a row would be 20 s, and one after the other 1000 s.
    assert!(start.elapsed() < Duration::from_secs(18), "{:?}", start.elapsed());
    let failed = ["response_flags=\"NETWORK_POLICY\"", "reporter=\"source\""];
    eventually("each is counted", || w.metric(1, "istio_tcp_connections_failed_total", &failed) == 100.0);
    let line = w.log_line(1, "blocked", |l| l["reason"] == "tunnel_blocked");
    assert!(line["error"].as_str().unwrap().contains("maybe a NetworkPolicy is blocking HBONE port 15008"), "{line}");
}

#[test]
fn connections_above_the_limit_are_reset_and_counted_and_the_admin_port_answers() {
    let (mut w, client, server) = world();
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[("CULVERT_MAX_CONNECTIONS", if node == 1 { "10" } else { "1000" })]);
        w.wait_captured(node);
    }
    eventually("the probes of capture have ended", || w.metric(1, "culvert_data_plane_tasks", &[]) == 0.0);
    let mut open: Vec<TcpStream> = (0..10).map(|_| connect(&client.netns, (server.v4, 9000)).unwrap()).collect();
    open.iter_mut().for_each(round_trip);
    assert!(is_reset(&client.netns, (server.v4, 9000)));
    assert_eq!(w.metric(1, "culvert_connection_failures_total", &["reason=\"limit\""]), 1.0);
    open.iter_mut().for_each(round_trip);
    drop(open.pop());
    eventually("there is room again", || {
        let Ok(mut stream) = connect(&client.netns, (server.v4, 9000)) else { return false };
        stream.write_all(b"ping").is_ok() && stream.read_exact(&mut [0; 4]).is_ok()
    });
}

#[test]
fn a_slow_reader_stalls_nobody_else() {
    let (mut w, client, server) = world();
    w.start();
    // It asks for an echo of much more than all buffers hold, and reads nothing.
    let slow = connect(&client.netns, (server.v4, 9000)).unwrap();
    slow.set_nonblocking(true).unwrap();
    let chunk = vec![1; 1 << 20];
    let mut quick = connect(&client.netns, (server.v4, 9000)).unwrap();
    let (mut sent, mut full) = (0, 0);
    while full < 50 {
        match (&slow).write(&chunk) {
            Ok(n) => {
                sent += n;
                full = 0;
            }
            Err(_) => full += 1,
        }
        round_trip(&mut quick);
    }
    assert!(sent < 200 << 20, "back-pressure reaches the sender: {sent}");
    round_trip(&mut connect(&client.netns, (server.v4, 9000)).unwrap());
}
