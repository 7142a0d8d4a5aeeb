//! Cubic for every namespace. A host whose default is another algorithm may keep it from namespaces; this allows it for
//! as long as the bench runs.

use std::fs;
use std::sync::OnceLock;

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// What the host allowed before, if that was changed.
static BEFORE: OnceLock<String> = OnceLock::new();

/// Cubic is allowed until this is dropped.
pub struct Allowed;

impl Allowed {
    pub fn new() -> Self {
        let before = fs::read_to_string(ALLOWED).unwrap();
        if !before.split_whitespace().any(|name| name == "cubic") {
            fs::write(ALLOWED, format!("{} cubic", before.trim())).unwrap_or_else(|e| panic!("{ALLOWED}: {e}"));
            let _ = BEFORE.set(before);
        }
        Self
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        restore();
    }
}

/// Allows again what was allowed before.
pub fn restore() {
    if let Some(before) = BEFORE.get() {
        let _ = fs::write(ALLOWED, before.trim());
    }
}
