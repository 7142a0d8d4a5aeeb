//! Settings, from text to checked values: the tables of settings ([`settings`]), the command line ([`args`]), and the
//! checker ([`check`]), which names every fault at once.
//!
//! The only module that reads the environment. Each module below declares its own plain `Config`; this is their sum.

pub mod args;
pub mod ask;
pub mod check;
mod checker;
pub mod command_line;
pub mod control;
pub mod dedicated;
mod duration;
pub mod environment;
mod istio;
pub mod kind;
mod kubernetes;
mod opentelemetry;
mod parse;
pub mod plugin;
pub mod setting;
pub mod settings;

use crate::control::xds;
use crate::{admin, connection, dns, node, otlp, rpc, telemetry};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Everything `culvert node` is set to.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where mesh facts come from.
    pub mesh: MeshSource,
    /// File of egress policies, where the other facts come from a control plane.
    pub egress_file: Option<PathBuf>,
    /// Where certificates come from.
    pub ca: CaSource,
    /// Life of the certificates that are requested.
    pub secret_ttl: Duration,
    /// File of CRLs.
    pub crl: Option<PathBuf>,
    /// Whether TLS offers and accepts post-quantum key exchange only.
    pub only_post_quantum: bool,
    /// Name of this node.
    pub node_name: String,
    /// Network of this node.
    pub network: String,
    /// Trust domain of the daemon's own pod.
    pub trust_domain: String,
    /// The daemon's own pod, where it runs in one.
    pub own_pod: Option<OwnPod>,
    /// Trust domains that are accepted beside each identity's own.
    pub trust_domain_aliases: Vec<String>,
    /// How long open connections may take to end when the process ends.
    pub drain_deadline: Duration,
    /// Admin, metrics and readiness ports.
    pub admin: admin::Config,
    /// Data plane.
    pub connection: connection::Config,
    /// Pods' DNS.
    pub dns: dns::Config,
    /// Capture of the node's pods.
    pub node: node::Config,
    /// Entries of the history.
    pub history: usize,
    /// Whether the access log shows how long stages took.
    pub access_log_stages: bool,
    /// Export to an OpenTelemetry collector, if there is any.
    pub otlp: Option<otlp::Config>,
    /// The log.
    pub log: telemetry::log::Config,
    /// Limits of metrics with names from the mesh.
    pub series: telemetry::series::Config,
    /// Files that outlive a daemon: the state file and the file of enrolled pods beside it. Also set where facts come
    /// from a file.
    pub state_files: Vec<PathBuf>,
    /// The settings that were given, by variable, without secrets. `culvert doctor` reads them from the daemon, to
    /// check the node by the same settings.
    pub settings: BTreeMap<String, String>,
}

/// Reads a duration as all settings do: `10s`, `1h30m`, `25` (seconds). `None` if the text is none.
pub fn parse_duration(text: &str) -> Option<Duration> {
    duration::parse(text)
}

impl Config {
    /// Settings of the control plane, where facts come from one.
    pub fn xds(&self) -> Option<&xds::Config> {
        match &self.mesh {
            MeshSource::Xds(xds) => Some(xds),
            MeshSource::File(_) => None,
        }
    }
}

/// Where mesh facts come from.
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

/// The daemon's own pod, whose metrics can be read through a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// Every fault of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}
