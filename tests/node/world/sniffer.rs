//! Watches the wire between the nodes for text that must not be on it in the clear.

use super::{World, eventually, peer_script};
use serde_json::{Value, json};
use std::fs;
use std::process::Command;

/// Counts frames on the wire that contain a text in the clear, until it is asked.
pub struct Sniffer {
    pid: u32,
    name: String,
}

impl Sniffer {
    pub fn start(w: &mut World, name: &str, canary: &str) -> Self {
        let ready = w.dir.join(name);
        let mut command = Command::new("python3");
        command.arg(peer_script("sniff.py")).args(["wire", canary]).arg(&ready);
        let pid = w.start_in(&w.ns("n1"), &mut command, &format!("{name}.out"));
        eventually("the wire is watched", || ready.exists());
        Self { pid, name: name.into() }
    }

    /// The number of frames, and of those that contain the text. `dropped` are the frames that were missed.
    pub fn seen(self, w: &mut World) -> Value {
        let mut process = w.take(self.pid);
        process.signal(nix::sys::signal::Signal::SIGTERM);
        process.wait();
        serde_json::from_str(&fs::read_to_string(w.dir.join(format!("{}.out", self.name))).unwrap()).unwrap()
    }

    /// The number of frames that contain the text. Fails if any frame was missed.
    pub fn found(self, w: &mut World) -> u64 {
        let seen = self.seen(w);
        assert_eq!(seen["dropped"], json!(0));
        seen["found"].as_u64().unwrap()
    }
}
