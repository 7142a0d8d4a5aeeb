//! A pod's network namespace, how it was found, and since when it is known.

use crate::sys::netns::Netns;
use std::net::IpAddr;
use std::path::PathBuf;
use tokio::time::Instant;

/// A pod's namespace, and where it was found.
pub(super) struct PodNetns {
    pub(super) netns: Netns,
    /// Not known: the CNI plugin has handed it over, or the process that led there has ended. It is sought again; until
    /// another one is found the pod stays captured where it is.
    pub(super) path: Option<PathBuf>,
    /// Whether the CNI plugin has handed it over: no scan knows better as long as it holds the pod's address.
    pub(super) handed_over: bool,
    /// Addresses that the CNI plugin has told of; the API does so later, and of an earlier sandbox's until then.
    pub(super) ips: Vec<IpAddr>,
    /// Since when it holds none of the pod's addresses.
    pub(super) address_missing_since: Option<Instant>,
    /// Whether another namespace of the pod's processes has been named that holds its address as well.
    pub(super) contested: bool,
    /// When it became known. A scan that began before that knows nothing of it.
    pub(super) since: Instant,
}

impl PodNetns {
    /// One that has just become known.
    pub(super) fn new(netns: Netns) -> Self {
        let (path, handed_over, ips) = (None, false, Vec::new());
        Self { netns, path, handed_over, ips, address_missing_since: None, contested: false, since: Instant::now() }
    }
}
