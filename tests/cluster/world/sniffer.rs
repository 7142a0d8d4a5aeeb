//! Watches the wire of a node for the canary of the test application.

use super::{Cluster, eventually, root};
use serde_json::Value;
use std::fs;
use std::process::{Child, Command, Stdio};

/// The text that the test application puts into everything it sends.
const CANARY: &str = "CANARY-IN-CLEAR";

pub struct Sniffer {
    process: Child,
}

impl Sniffer {
    /// Watches what passes between a node and the switch.
    pub fn start(cluster: &Cluster, node: &str) -> Self {
        let folder = cluster.folder();
        let machine = fs::read_to_string(folder.join("machine.pid")).unwrap();
        let ready = folder.join("sniffer.up");
        let _ = fs::remove_file(&ready);
        let process = Command::new("nsenter")
            .args(["-t", machine.trim(), "-n", "python3"])
            .arg(root().join("tests/node/peers/sniff.py"))
            .args([&format!("to-{node}"), CANARY])
            .arg(&ready)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("the wire is watched", || (!ready.exists()).then(String::new));
        Self { process }
    }

    /// The number of frames that contained the canary in the clear. Fails if any frame was missed.
    pub fn found(mut self) -> u64 {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.process.stdout.take().unwrap(), &mut said).unwrap();
        self.process.wait().unwrap();
        let seen: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(seen["dropped"], 0, "frames were missed");
        assert!(seen["frames"].as_u64().unwrap() > 0, "nothing has passed");
        let found = seen["found"].as_u64().unwrap();
        if found > 0 {
            eprintln!("in clear: {}", seen["examples"]);
        }
        found
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
