//! `culvert demo` as its users run it, including interruptions.

use crate::world::{eventually, subject};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

fn namespaces(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("culvert-{pid}-"))).collect()
}

fn start(args: &[&str]) -> Child {
    Command::new(subject()).arg("demo").args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Processes whose command line contains the demonstration's folder.
fn children(pid: u32) -> Vec<i32> {
    let folder = format!("culvert-{pid}/");
    let all =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_string_lossy().parse().ok());
    let names_it = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&folder))
    };
    all.filter(names_it).collect()
}

fn nothing_is_left(pid: u32) {
    assert_eq!(namespaces(pid), Vec::<String>::new());
    assert_eq!(children(pid), Vec::<i32>::new());
    assert!(!Path::new(&format!("/run/culvert-{pid}")).exists());
}

#[test]
fn it_shows_the_whole_thing_and_leaves_nothing() {
    let child = start(&["--json", "--seconds", "1"]);
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let account: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(account["ok"], true, "{account}");
    assert_eq!(account["captured"], json!(["client", "dual", "forbidden", "server"]));
    assert_eq!(account["plaintext_bytes_on_wire"], 0);
    assert_eq!(account["ports_on_wire"], json!([15008]));
    assert_eq!(account["canaries_on_wire"], 0);
    assert!(account["canaries_on_wire_without_culvert"].as_u64().unwrap() > 0, "the watcher can see one: {account}");
    assert!(account["tunnelled"].as_u64().unwrap() > 0);
    assert_eq!(account["denied"], json!(["forbidden", "outside"]));
    assert_eq!(account["denied_by"], json!(["demo/no-forbidden rule[0]", "demo/mesh-only rule[0]"]));
    assert_eq!(account["identities"].as_array().unwrap().len(), 4, "{account}");
    for figure in ["rps", "p99_us", "gbps"] {
        assert!(account[figure].as_f64().unwrap() > 0.0, "{figure} in {account}");
    }
    nothing_is_left(pid);
}

#[test]
fn interrupted_or_with_a_dead_node_it_still_leaves_nothing() {
    for (what, signal) in [("Ctrl-C", Some(Signal::SIGINT)), ("SIGTERM", Some(Signal::SIGTERM)), ("a dead node", None)]
    {
        let child = start(&["--seconds", "3"]);
        let pid = child.id();
        eventually("both nodes are there", || children(pid).len() >= 2);
        match signal {
            Some(signal) => kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap(),
            None => {
                let node = *children(pid).last().unwrap();
                kill(Pid::from_raw(node), Signal::SIGKILL).unwrap();
            }
        }
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "{what}");
        assert!(!output.stderr.is_empty(), "{what}: it says that something was wrong");
        nothing_is_left(pid);
    }
}

#[test]
fn what_a_killed_demonstration_left_is_swept_by_the_next() {
    let mut child = start(&["--seconds", "3"]);
    let pid = child.id();
    eventually("both nodes are there", || children(pid).len() >= 2);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!namespaces(pid).is_empty());
    let next = start(&["--json", "--seconds", "1"]);
    assert!(next.wait_with_output().unwrap().status.success());
    nothing_is_left(pid);
}

#[test]
fn kept_running_it_shows_its_admin_pages_and_goes_with_ctrl_c_even_when_a_node_has_died() {
    let mut child = start(&["--keep", "--seconds", "1"]);
    let pid = child.id();
    let mut account = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    while !account.contains("Everything is as it should be.") {
        assert!(output.read_line(&mut account).unwrap() > 0, "it ended early:\n{account}");
    }
    for heading in [
        "Captured",
        "On the wire between the nodes",
        "Who reached whom",
        "Identities",
        "Denied",
        "Speed",
        "Admin pages",
    ] {
        assert!(account.contains(heading), "{heading} in\n{account}");
    }
    for line in account.lines().filter(|line| line.contains("ip netns exec")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let page = Command::new(words[0]).args(&words[1..]).output().unwrap();
        assert!(String::from_utf8_lossy(&page.stdout).contains("culvert"), "{line}");
    }
    kill(Pid::from_raw(*children(pid).last().unwrap()), Signal::SIGKILL).unwrap();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGINT).unwrap();
    assert!(child.wait().unwrap().success());
    nothing_is_left(pid);
}

#[test]
fn without_root_it_says_so() {
    let output =
        Command::new("setpriv").args(["--reuid=65534", "--clear-groups"]).arg(subject()).arg("demo").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("must run as root"), "{text}");
}
