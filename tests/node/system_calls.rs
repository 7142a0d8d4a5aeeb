//! How many system calls two daemons make for a message and for a connection.

use crate::world::{Pod, World, apps, connect, eventually};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Operations that are counted together, so that what the daemons do on their own does not matter.
const OPERATIONS: usize = 300;

/// Most system calls of the workers of both daemons together for 1 KiB and its echo. It was 16 when this was written.
const EXCHANGE_MAX: usize = 20;

/// Most of them for a connection with one exchange, opened and closed. It was 73.
const CONNECTION_MAX: usize = 95;

/// Counts the system calls of a daemon's workers. Other threads start programs, and have nothing to do with messages.
struct Counter {
    strace: Child,
}

impl Counter {
    fn start(pid: u32) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let workers: Vec<PathBuf> =
            tasks.map(|task| task.path()).filter(|path| read(path.join("comm")).starts_with("culvert-w")).collect();
        let numbers = workers.iter().flat_map(|path| ["-p", path.file_name().unwrap().to_str().unwrap()]);
        let mut strace = Command::new("strace");
        strace.arg("-c").args(numbers).stdout(Stdio::null()).stderr(Stdio::piped());
        let strace = strace.spawn().expect("strace runs");
        let traced = format!("TracerPid:\t{}", strace.id());
        eventually("strace has attached to all workers", || {
            workers.iter().all(|path| read(path.join("status")).lines().any(|line| line == traced))
        });
        Self { strace }
    }

    /// The calls since the start.
    fn stop(mut self) -> (usize, String) {
        let pid = nix::unistd::Pid::from_raw(self.strace.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let lines: Vec<String> =
            BufReader::new(self.strace.stderr.take().unwrap()).lines().map(Result::unwrap).collect();
        self.strace.wait().unwrap();
        let total = lines.iter().rfind(|line| line.ends_with("total")).expect("strace prints a table");
        (total.split_whitespace().nth(3).unwrap().parse().unwrap(), lines.join("\n"))
    }
}

/// System calls of the workers of both daemons for each operation.
fn count(w: &World, mut operation: impl FnMut()) -> (usize, String) {
    // So that the tunnel is open, and everything has the size that it needs.
    for _ in 0..20 {
        operation();
    }
    let counters = [1, 2].map(|node| Counter::start(w.pid(node)));
    for _ in 0..OPERATIONS {
        operation();
    }
    let [(one, near), (two, far)] = counters.map(Counter::stop);
    ((one + two) / OPERATIONS, format!("{near}\n{far}"))
}

fn exchange(stream: &mut TcpStream, message: &mut [u8]) {
    stream.write_all(message).unwrap();
    stream.read_exact(message).unwrap();
}

fn open(client: &Pod, server: &Pod) -> TcpStream {
    let stream = connect(&client.netns, (server.v4, 8080)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

#[test]
fn a_message_and_a_connection_need_few() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::echo);
    w.start();
    let mut message = vec![7; 1024];
    let mut stream = open(&client, &server);
    let (each, calls) = count(&w, || exchange(&mut stream, &mut message));
    assert!(each <= EXCHANGE_MAX, "{each} system calls for 1 KiB and back:\n{calls}");
    let (each, calls) = count(&w, || {
        let mut stream = open(&client, &server);
        exchange(&mut stream, &mut message);
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
    assert!(each <= CONNECTION_MAX, "{each} system calls for a connection:\n{calls}");
}
