//! `culvert doctor`: with no pod, one, two and many; with a daemon that does not answer; in a shell without settings.

use crate::istio::Istio;
use crate::world::{Agent, PATIENCE, World, eventually, inside, subject};
use std::io::Read;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// The output of doctor on a node, run without any setting. It must end by itself.
pub fn doctor(w: &World, node: u8) -> String {
    doctor_by(w, node, &[])
}

/// The same, through a program that executes it.
fn doctor_by(w: &World, node: u8, by: &[&str]) -> String {
    run_by(w, node, by, &["doctor"])
}

fn run_by(w: &World, node: u8, by: &[&str], what: &[&str]) -> String {
    let mut command = Command::new(by.first().map_or_else(subject, PathBuf::from));
    command
        .args(by.iter().skip(1))
        .args(by.first().map(|_| subject()))
        .args(what)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
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
        assert!(has(&said, "ok", &["settings", "settings of the daemon, read from its port 15000"]), "{said}");
        assert!(has(&said, "ok", &["network", "from files"]), "not by this shell's settings:\n{said}");
        assert!(has(&said, "", &["clock"]), "{said}");
        assert_eq!(has(&said, "note", &["no pod of this node"]), count == 0, "{said}");
        for pod in some {
            let label = format!("ns/{}", pod.name);
            assert!(has(&said, "ok", &[&format!("{label} is captured")]), "{said}");
            let whence = if count == 1 { "this node" } else { "ns/p" };
            assert!(has(&said, "ok", &["port 15008", &format!("{label} accepts tunnels from {whence}")]), "{said}");
        }
    }
    // Doctor's own connections do not count as failures.
    assert_eq!(w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
    assert!(
        !w.log(1).iter().any(|line| line["message"].as_str().is_some_and(|text| text.contains("connection failed")))
    );
    assert!(!w.json(1, "/config_dump").to_string().contains("hunter2"));
}

#[test]
fn a_daemon_that_takes_connections_and_says_nothing_does_not_hold_doctor_up() {
    let w = World::new();
    let ns = w.ns("n1");
    let _silent = inside(&ns, || TcpListener::bind(("127.0.0.1", 15000))).unwrap();
    let said = doctor(&w, 1);
    assert!(has(&said, "note", &["settings", "settings of this command", "no answer within"]), "{said}");
    assert!(has(&said, "FAIL", &["daemon", "does not answer on port 15000", "no answer within"]), "{said}");
    assert!(has(&said, "", &["kernel"]) && has(&said, "", &["sysctls"]), "{said}");
}

/// As with `kubectl exec` in Istio's chart: the pods are known by descriptors that the agent has handed over,
/// `/host/proc` is not mounted, and there is no shell.
#[test]
fn in_a_container_beside_an_agent_doctor_sees_the_pods_and_says_what_it_cannot_see() {
    let mut istio = Istio::new();
    let second = istio.w.mesh_pod("second", 1);
    istio.tell();
    istio.agent(1).know(&second);
    Agent::redirect(&second);
    istio.w.start_istio_container(1, &istio.plane, &istio.agents[0]);
    eventually("both are captured", || istio.w.try_get(1, 15000, "/pods").is_some());
    istio.w.wait_captured(1);
    // The pod's namespace has no path, and no process of the machine has it either.
    let children = format!("/proc/{0}/task/{0}/children", istio.w.pid(1));
    let daemon = std::fs::read_to_string(children).unwrap().trim().to_owned();
    let exec = ["nsenter", "--target", &daemon, "--pid", "--mount"];
    let said = doctor_by(&istio.w, 1, &exec);
    for (label, other) in [("ns/client", "ns/second"), ("ns/second", "ns/client")] {
        assert!(has(&said, "ok", &[&format!("{label} is captured")]), "{said}");
        assert!(has(&said, "ok", &["port 15008", &format!("{label} accepts tunnels from {other}")]), "{said}");
    }
    assert!(has(&said, "note", &["host", "cannot be read from here", "/host/proc"]), "{said}");
    assert!(!said.lines().any(|line| line.starts_with("FAIL")), "{said}");
    assert_eq!(istio.w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
    // The pods as a table, and as JSON from the admin port.
    let pods = run_by(&istio.w, 1, &exec, &["pods"]);
    let line = |name: &str| {
        pods.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in\n{pods}")).to_owned()
    };
    assert!(
        line("POD").contains("STATE")
            && line("ns/client").contains("captured")
            && line("ns/second").contains("captured")
    );
    let json: serde_json::Value = serde_json::from_str(&run_by(&istio.w, 1, &exec, &["pods", "--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 2);
    // One pod ends. Its addresses are removed before its end is announced.
    let addresses = format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", second.v4, second.v6);
    crate::world::ip_in(&second.netns, &addresses);
    Agent::stop_redirecting(&second);
    eventually("its end shows", || istio.w.state(1, "second").0 == "failed");
    let said = doctor_by(&istio.w, 1, &exec);
    assert!(has(&said, "note", &["ns/second is ending", "holds no address"]), "{said}");
    assert!(has(&said, "ok", &["port 15008", "ns/client accepts tunnels from this node"]), "{said}");
    assert!(!said.lines().any(|line| line.starts_with("FAIL")), "{said}");
}
