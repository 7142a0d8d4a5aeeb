//! `culvert doctor`: with no pod, one, two, many; beside a daemon that does not answer; in a shell that knows no settings.

use crate::world::{PATIENCE, World, eventually, inside, subject};
use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What doctor says on a node, run without any setting; it must end by itself.
pub fn doctor(w: &World, node: u8) -> String {
    let mut command = Command::new(subject());
    command.arg("doctor").env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = inside(&w.ns(&format!("n{node}")), || command.spawn()).unwrap();
    let end = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("doctor does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    said
}

fn has(said: &str, verdict: &str, words: &[&str]) -> bool {
    said.lines().any(|line| line.starts_with(verdict) && words.iter().all(|word| line.contains(word)))
}

#[test]
fn doctor_ends_with_no_pod_one_two_and_many_and_takes_the_daemons_settings() {
    let mut w = World::new();
    let pods: Vec<_> = (0..12).map(|n| w.mesh_pod(&format!("p{n}"), 1)).collect();
    w.write_mesh();
    w.write_pods(1, &[]);
    let host = format!("/run/netns/{}", w.ns("n1"));
    w.start_node(1, &[("CULVERT_HOST_NETNS", &host), ("AUTH_TOKEN", "hunter2")]);
    eventually("the node is ready", || w.is_ready(1));
    for count in [0, 1, 2, 12] {
        let some: Vec<_> = pods.iter().take(count).collect();
        w.write_pods(1, &some);
        eventually("all are captured", || {
            let states = w.states(1);
            states.len() == count && states.iter().all(|(_, state, _)| state == "captured")
        });
        let said = doctor(&w, 1);
        assert!(has(&said, "ok", &["settings", "those of the daemon, which its port 15000 tells"]), "{said}");
        assert!(has(&said, "ok", &["network", "from files"]), "not by this shell's settings:\n{said}");
        assert!(has(&said, "", &["clock"]), "{said}");
        assert_eq!(has(&said, "note", &["no pod of this node"]), count == 0, "{said}");
        for pod in some {
            let label = format!("ns/{}", pod.name);
            assert!(has(&said, "ok", &[&format!("{label} is captured")]), "{said}");
            let whence = if count == 1 { "this node" } else { "ns/p" };
            assert!(has(&said, "ok", &["port 15008", &format!("{label} takes tunnels from {whence}")]), "{said}");
        }
    }
    assert!(!w.json(1, "/config_dump").to_string().contains("hunter2"));
}

#[test]
fn a_daemon_that_takes_connections_and_says_nothing_does_not_hold_doctor_up() {
    let w = World::new();
    let ns = w.ns("n1");
    let _silent = inside(&ns, || TcpListener::bind(("127.0.0.1", 15000))).unwrap();
    let said = doctor(&w, 1);
    assert!(has(&said, "note", &["settings", "those of this command", "no answer within"]), "{said}");
    assert!(has(&said, "FAIL", &["daemon", "does not answer on port 15000", "no answer within"]), "{said}");
    assert!(has(&said, "", &["kernel"]) && has(&said, "", &["sysctls"]), "{said}");
}
