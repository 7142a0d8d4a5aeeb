//! A pod's network namespace, and how it was found.

use crate::sys::netns::Netns;
use std::net::IpAddr;
use std::path::PathBuf;
use tokio::time::Instant;

/// A pod's network namespace, and how it was found.
pub(super) struct PodNetns {
    pub(super) netns: Netns,
    /// Path that leads to it. `None` if the CNI plugin has handed it over, or the process behind the path has ended. It
    /// is then searched for again; until another one is found, the pod stays captured in this one.
    pub(super) path: Option<PathBuf>,
    /// Whether the CNI plugin has handed it over. No scan replaces it while it holds the pod's address.
    pub(super) handed_over: bool,
    /// Addresses from the CNI plugin. The API sends them later, and until then may send those of an earlier sandbox.
    pub(super) ips: Vec<IpAddr>,
    /// Since when it has held none of the pod's addresses.
    pub(super) address_missing_since: Option<Instant>,
    /// Whether another network namespace of the pod's processes that holds its address as well has been logged.
    pub(super) contested: bool,
    /// When it became known. Scans that began earlier do not know it.
    pub(super) since: Instant,
}

impl PodNetns {
    /// A network namespace that has just become known.
    pub(super) fn new(netns: Netns) -> Self {
        let (path, handed_over, ips) = (None, false, Vec::new());
        Self { netns, path, handed_over, ips, address_missing_since: None, contested: false, since: Instant::now() }
    }
}
