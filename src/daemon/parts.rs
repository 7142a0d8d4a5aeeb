//! The parts of a running daemon that its pages and threads read.

use crate::config::Config;
use crate::connection::choose::EndpointLists;
use crate::connection::report::Reporter;
use crate::control::file;
use crate::control::xds::Freshness;
use crate::dns::Dns;
use crate::identity::CertificateStore;
use crate::identity::revoked::Revocations;
use crate::mesh::Store as Mesh;
use crate::node::status::Board;
use crate::telemetry::changes::Changes;
use std::sync::Arc;
use std::time::SystemTime;

/// The parts of a running daemon.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) mesh: Arc<Mesh>,
    pub(super) freshness: Arc<Freshness>,
    pub(super) identities: Arc<CertificateStore>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) reporter: Arc<Reporter>,
    pub(super) endpoints: Arc<EndpointLists>,
    pub(super) board: Arc<Board>,
    pub(super) dns: Arc<Dns>,
    pub(super) changes: Arc<Changes>,
    pub(super) mesh_file: Arc<file::Metrics>,
    pub(super) egress_file: Arc<file::Metrics>,
    /// When the daemon was started.
    pub(super) started: SystemTime,
}
