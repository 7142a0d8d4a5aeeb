//! Many connections, dead destinations, and limits.

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
    // 500 at once need more than one tunnel. Tunnels stay open until they have been idle for a while, and are not
    // leaks.
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
    // From now on it answers nothing, not even with a refusal.
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
    // A connect timeout is 10 s. Two in a row would take 20 s, all one after the other 1000 s.
    assert!(start.elapsed() < Duration::from_secs(18), "{:?}", start.elapsed());
    let failed = ["response_flags=\"NETWORK_POLICY\"", "reporter=\"source\""];
    eventually("each is counted", || w.metric(1, "istio_tcp_connections_failed_total", &failed) == 100.0);
    let line = w.log_line(1, "blocked", |l| l["reason"] == "tunnel_blocked");
    assert!(line["error"].as_str().unwrap().contains("maybe a NetworkPolicy is blocking HBONE port 15008"), "{line}");
}

#[test]
fn above_the_limit_the_largest_consumer_waits_first_and_then_all_and_the_admin_port_answers() {
    let (mut w, client, server) = world();
    let second = w.mesh_pod("second", 1);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[("CULVERT_MAX_CONNECTIONS", if node == 1 { "10" } else { "1000" })]);
        w.wait_captured(node);
    }
    eventually("the probes of capture have ended", || w.metric(1, "culvert_data_plane_tasks", &[]) == 0.0);
    let failures =
        |w: &World, reason: &str| w.metric(1, "culvert_connection_failures_total", &[&format!("reason=\"{reason}\"")]);
    let mut open: Vec<TcpStream> = (0..8).map(|_| connect(&client.netns, (server.v4, 9000)).unwrap()).collect();
    open.iter_mut().for_each(round_trip);
    assert!(is_reset(&client.netns, (server.v4, 9000)), "above 80 % the largest consumer waits");
    assert_eq!((failures(&w, "largest_consumer"), failures(&w, "limit")), (1.0, 0.0));
    let line = w.log_line(1, "it says why", |line| line["reason"] == "largest_consumer");
    assert!(line["error"].as_str().unwrap().contains("connections are above 80 %"), "{line}");
    open.extend((0..2).map(|_| connect(&second.netns, (server.v4, 9000)).unwrap()));
    open.iter_mut().for_each(round_trip);
    assert!(is_reset(&second.netns, (server.v4, 9000)), "what is full is full for all");
    assert_eq!(failures(&w, "limit"), 1.0);
    open.iter_mut().for_each(round_trip);
    drop(open);
    eventually("there is room again", || {
        let Ok(mut stream) = connect(&client.netns, (server.v4, 9000)) else { return false };
        stream.write_all(b"ping").is_ok() && stream.read_exact(&mut [0; 4]).is_ok()
    });
}

/// Opens connections until the daemon refuses, `most` at most, and keeps them open.
fn greed(ns: &str, to: std::net::SocketAddr, most: usize) -> Vec<TcpStream> {
    inside(ns, move || {
        let mut open = Vec::new();
        for _ in 0..most {
            let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE) else { continue };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            if stream.write_all(b"ping").is_ok() && stream.read_exact(&mut [0; 4]).is_ok() {
                open.push(stream);
            }
        }
        open
    })
}

#[test]
fn with_few_files_the_greedy_pod_is_refused_and_others_the_admin_port_and_capture_go_on() {
    let (mut w, client, server) = world();
    let (second, late) = (w.mesh_pod("second", 1), w.mesh_pod("late", 1));
    w.write_mesh();
    w.write_pods(2, &[&server]);
    w.start_node(2, &[]);
    w.wait_captured(2);
    w.write_pods(1, &[&client, &second]);
    w.start_node_by(&["prlimit", "--nofile=1024:1024", "--"].map(String::from), 1, &[]);
    eventually("both are captured", || ["client", "second"].iter().all(|pod| w.state(1, pod).0 == "captured"));
    let to = std::net::SocketAddr::new(server.v4, 9000);
    let held = greed(&client.netns, to, 700);
    assert!((100..420).contains(&held.len()), "{}", held.len());
    assert!(w.metric(1, "culvert_connection_failures_total", &["reason=\"largest_consumer\""]) > 100.0);
    assert!(open_files(&w, 1) < 1000, "{}", open_files(&w, 1));
    let others = greed(&second.netns, to, 20);
    assert_eq!(others.len(), 20, "another pod gets its own");
    w.write_pods(1, &[&client, &second, &late]);
    eventually("another pod is captured", || w.state(1, "late").0 == "captured");
    round_trip(&mut connect(&late.netns, to).unwrap());
    assert!(w.is_ready(1));
    drop(held);
    eventually("it recovers alone", || greed(&client.netns, to, 50).len() == 50);
    assert!(w.node(1).is_running());
}

/// A cgroup with a memory limit, of version 1 or 2. It is removed when dropped.
pub struct MemoryLimit(std::path::PathBuf);

impl MemoryLimit {
    pub fn new(w: &World, bytes: u64) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let find = |test: &dyn Fn(&[&str]) -> bool| {
            let lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            lines.into_iter().find(|words| test(words)).map(|words| words[1].to_owned())
        };
        let one = find(&|words| words[2] == "cgroup" && words[3].split(',').any(|option| option == "memory"));
        let (mount, file) = match one {
            Some(mount) => (mount, "memory.limit_in_bytes"),
            None => (find(&|words| words[2] == "cgroup2").expect("cgroups are mounted"), "memory.max"),
        };
        let folder = std::path::Path::new(&mount).join(w.prefix.trim_end_matches('-'));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(file), bytes.to_string()).expect("the memory controller is there");
        Self(folder)
    }

    /// A program and its arguments that start a daemon under the limit.
    pub fn join(&self) -> Vec<String> {
        let join = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", self.0.display());
        vec!["sh".into(), "-c".into(), join, "--".into()]
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

#[test]
fn with_little_memory_the_greedy_pod_is_refused_and_nobody_is_killed() {
    let mut w = World::new();
    let limit = MemoryLimit::new(&w, 24 << 20);
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    let second = w.mesh_pod("second", 1);
    w.write_mesh();
    w.write_pods(2, &[&server]);
    w.start_node(2, &[]);
    w.wait_captured(2);
    w.write_pods(1, &[&client, &second]);
    w.start_node_by(&limit.join(), 1, &[]);
    eventually("both are captured", || ["client", "second"].iter().all(|pod| w.state(1, pod).0 == "captured"));
    let to = std::net::SocketAddr::new(server.v4, 9000);
    let held = greed(&client.netns, to, 4000);
    assert!((500..4000).contains(&held.len()), "{}", held.len());
    assert!(w.node(1).is_running());
    let line = w.log_line(1, "it says why", |line| line["reason"] == "largest_consumer");
    assert!(line["error"].as_str().unwrap().contains("memory"), "{line}");
    round_trip(&mut connect(&second.netns, to).unwrap());
    assert!(w.is_ready(1));
    let pid = w.pid(1);
    drop(held);
    eventually("it recovers alone", || greed(&client.netns, to, 5).len() == 5);
    assert_eq!(w.pid(1), pid);
    assert!(w.node(1).is_running());
    drop(w);
    drop(limit);
}

#[test]
fn a_slow_reader_stalls_nobody_else() {
    let (mut w, client, server) = world();
    w.start();
    // The client asks for an echo that is far larger than all buffers, and reads nothing.
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
