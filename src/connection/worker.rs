//! A worker: one thread's tunnels and connections, and what all workers share.

use super::authorize::revoke::Permits;
use super::budget::{Budget, Reservation};
use super::choose::EndpointLists;
use super::config::Config;
use super::dial::Pool;
use super::pod::Pods;
use super::report::{Reporter, record::SocketCount};
use crate::hbone::{Buffers, Engine};
use crate::task::slots::Slots;
use crate::task::{Group, Ticks};
use crate::{identity, mesh};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Most handshakes under way on a node.
const HANDSHAKES_MAX: usize = 1024;

/// Most handshakes under way from one source address.
const HANDSHAKES_OF_ONE: usize = 256;

/// Memory that one handshake may use, in bytes.
const HANDSHAKE_BYTES: usize = 64 * 1024;

/// What all workers share. It is read far more often than it is written.
#[derive(Debug)]
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// Mesh facts.
    pub mesh: Arc<mesh::Store>,
    /// Certificates.
    pub identities: Arc<identity::CertificateStore>,
    /// Metrics, the list of live connections, and limits of log lines.
    pub reporter: Arc<Reporter>,
    /// The captured pods.
    pub pods: Pods,
    /// Live permits.
    pub permits: Arc<Permits>,
    /// Limits the connections and streams of the node.
    pub budget: Arc<Budget>,
    /// Endpoints of services, and how they stand with this node.
    pub endpoints: Arc<EndpointLists>,
    /// Accounts for what peers make the node buffer.
    pub buffers: Arc<Buffers>,
    /// Limits connections to HBONE ports whose peer has not proven its identity yet. No pod is charged for them.
    pub handshakes: Arc<Slots>,
}

impl Shared {
    /// The limit for handshakes: enough for many peers that connect at once, but together they use at most `bytes`.
    pub fn handshakes(bytes: usize) -> Arc<Slots> {
        let max = (bytes / HANDSHAKE_BYTES).clamp(HANDSHAKES_OF_ONE / 4, HANDSHAKES_MAX);
        Slots::new(max, HANDSHAKES_OF_ONE.min(max / 2))
    }
}

/// One worker.
#[derive(Debug)]
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// This worker's tunnels to peers.
    pub pool: Arc<Pool>,
    /// The data path: the sockets of this worker's tunnels, and of the connections that they carry.
    pub engine: Engine,
    /// This worker's connections and streams.
    pub tasks: Group,
    /// Ticks for dials that take long.
    pub ticks: Ticks,
    /// Number of connections that were given to this worker and have not ended.
    pub load: AtomicUsize,
}

/// Counts a connection in its worker's load; subtracts it again when it ends, in whatever way.
#[derive(Debug)]
pub struct LoadGuard(pub Arc<Worker>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A socket that was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub socket: std::net::TcpStream,
    /// Address that connected.
    pub peer: SocketAddr,
    /// When it was accepted.
    pub at: Instant,
}

/// Everything that counts a connection while it is open.
#[derive(Debug)]
pub struct Counted {
    /// In the load of its worker. A stream of a tunnel is not: the tunnel is.
    pub _load: Option<LoadGuard>,
    /// As a connection of its pod.
    pub _active: TaskTrackerToken,
    /// In the budget of the node.
    pub _reservation: Reservation,
    /// As work that the worker has to finish.
    pub _task: TaskTrackerToken,
    /// As an open socket that the pod's application connected.
    pub _socket: Option<SocketCount>,
}
