//! Settings: words as the user wrote them ([`args`]), then checked values with every fault named ([`check`]).
//!
//! The only place that reads the environment. Each module below declares its own plain `Config`; this is their sum.

pub mod args;
pub mod check;
mod duration;
pub mod istio;
mod kubernetes;
pub mod plugin;

use crate::control::xds;
use crate::{admin, connection, dns, node, rpc, telemetry};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Everything `culvert node` is set to.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where facts about the mesh come from.
    pub mesh: MeshSource,
    /// Where certificates come from.
    pub ca: CaSource,
    /// Life of certificates.
    pub secret_ttl: Duration,
    /// File of revoked certificates.
    pub crl: Option<PathBuf>,
    /// Whether only post-quantum key exchange is used.
    pub only_post_quantum: bool,
    /// Name of this node.
    pub node_name: String,
    /// Network of this node.
    pub network: String,
    /// Trust domain of the daemon's own pod.
    pub trust_domain: String,
    /// The daemon's own pod, where it is one.
    pub own_pod: Option<OwnPod>,
    /// Trust domains accepted beside each identity's own.
    pub trust_domain_aliases: Vec<String>,
    /// How long connections may take to finish when the process ends.
    pub drain_deadline: Duration,
    /// HTTP ports.
    pub admin: admin::Config,
    /// Data plane.
    pub connection: connection::Config,
    /// DNS of pods.
    pub dns: dns::Config,
    /// Pods.
    pub node: node::Config,
    /// Log.
    pub log: telemetry::log::Config,
    /// What was set, by variable, without what may be secret: `culvert doctor` looks at the node by the same.
    pub settings: BTreeMap<String, String>,
}

/// Beside the state file `file`: the pods that were enrolled.
pub fn pods_file(file: &str) -> PathBuf {
    format!("{file}.pods").into()
}

impl Config {
    /// Files that outlive a daemon.
    pub fn state_files(&self) -> Vec<PathBuf> {
        // Also where facts come from a file.
        let state = self.settings.get("CULVERT_STATE_FILE").filter(|path| !path.is_empty());
        state.into_iter().flat_map(|file| [PathBuf::from(file), pods_file(file)]).collect()
    }
}

/// Where facts about the mesh come from.
#[derive(Clone, Debug)]
pub enum MeshSource {
    /// A file.
    File(PathBuf),
    /// A control plane.
    Xds(Box<xds::Config>),
}

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum CaSource {
    /// The built-in CA in a directory.
    Builtin(PathBuf),
    /// Istio's CA.
    Istio(Box<rpc::Config>),
}

/// The daemon's own pod: its metrics can be read through a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// Faults of a configuration, all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}
