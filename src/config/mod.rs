//! Settings: words as the user wrote them ([`args`]), then checked values with every fault named ([`check`]).
//!
//! The only place that reads the environment. Each module below declares its own plain `Config`; this is their sum.

pub mod args;
pub mod check;

use crate::{connection, node, telemetry};
use std::path::PathBuf;
use std::time::Duration;

/// Everything `culvert node` is set to.
#[derive(Clone, Debug)]
pub struct Config {
    /// The mesh file.
    pub mesh_file: PathBuf,
    /// Directory of the built-in CA.
    pub ca_dir: PathBuf,
    /// Life of certificates.
    pub secret_ttl: Duration,
    /// Trust domains accepted beside each identity's own.
    pub trust_domain_aliases: Vec<String>,
    /// How long connections may take to finish when the process ends.
    pub drain_deadline: Duration,
    /// Data plane.
    pub connection: connection::Config,
    /// Pods.
    pub node: node::Config,
    /// Log.
    pub log: telemetry::log::Config,
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
