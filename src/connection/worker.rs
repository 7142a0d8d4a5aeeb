//! One worker: what its connections share with each other, and with those of all workers.

use super::authorize::revoke::Permits;
use super::budget::Budget;
use super::config::Config;
use super::dial::Pool;
use super::report::Reporter;
use crate::hbone::Buffers;
use crate::task::Group;
use crate::task::places::Places;
use crate::{identity, mesh};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// Handshakes at once on a node, and of one source address.
const HANDSHAKES_MAX: usize = 1024;
const HANDSHAKES_OF_ONE: usize = 256;
/// What one may hold.
const HANDSHAKE_BYTES: usize = 64 * 1024;

/// What all workers share; all of it read-mostly.
#[derive(Debug)]
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// Facts.
    pub mesh: Arc<mesh::Store>,
    /// Certificates.
    pub identities: Arc<identity::Store>,
    /// Metrics, live connections, log limits.
    pub reporter: Arc<Reporter>,
    /// Live permits.
    pub permits: Arc<Permits>,
    /// Room for connections and streams, on all workers.
    pub budget: Arc<Budget>,
    /// What peers make us hold.
    pub buffers: Arc<Buffers>,
    /// Places for connections to HBONE ports whose peer has not proven yet who it is; no pod is charged for them.
    pub handshakes: Arc<Places>,
}

impl Shared {
    /// Places for handshakes: enough for peers that all come at once, and so few that together they hold no more than `bytes`.
    pub fn handshakes(bytes: usize) -> Arc<Places> {
        let max = (bytes / HANDSHAKE_BYTES).clamp(HANDSHAKES_OF_ONE / 4, HANDSHAKES_MAX);
        Places::new(max, HANDSHAKES_OF_ONE.min(max / 2))
    }
}

/// One worker.
#[derive(Debug)]
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// This worker's tunnels.
    pub pool: Arc<Pool>,
    /// This worker's connections and streams.
    pub tasks: Group,
    /// Connections that it has been given and that have not ended.
    pub load: AtomicUsize,
}
