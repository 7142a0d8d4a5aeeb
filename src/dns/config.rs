//! Settings of DNS.

use crate::mesh::Text;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of DNS.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether DNS of pods is captured, for pods that do not say so themselves.
    pub capture: bool,
    /// Domain of the cluster.
    pub cluster_domain: Text,
    /// Namespace preferred among several that have a service of the same host name.
    pub preferred_namespace: Text,
    /// Time to live of our own answers.
    pub ttl: Duration,
    /// How many answers of its resolvers are cached for each pod.
    pub cache_entries: usize,
    /// Whether answers contain IPv6 addresses.
    pub ipv6: bool,
    /// `SO_MARK` of sockets.
    pub mark: u32,
    /// The procfs in which pods' processes are visible.
    pub proc: PathBuf,
}
