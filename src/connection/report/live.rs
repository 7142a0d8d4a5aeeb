//! The list of live connections, for the admin port.

use super::direction::Direction;
use crate::identity::TlsFacts;
use crate::mesh::{SpiffeName, Text};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// One live connection.
#[derive(Debug)]
pub struct Connection {
    /// Uid of the pod it belongs to.
    pub pod: Text,
    /// Which way it goes.
    pub direction: Direction,
    /// `HBONE` or `TCP`: how the leg outside the pod is carried.
    pub protocol: &'static str,
    /// Who opened it.
    pub source: SocketAddr,
    /// What it was opened to (outbound), or the application's address (inbound).
    pub destination: SocketAddr,
    /// Where our leg goes.
    pub actual: SocketAddr,
    /// What was asked for at the tunnel's end.
    pub authority: Option<String>,
    /// Host name of the service that was asked for, where it is known.
    pub service: Option<Text>,
    /// Identity of the source, proven or, outbound, our own.
    pub source_identity: Option<SpiffeName>,
    /// Identity of the destination: inbound our own, outbound once it has been proven.
    pub destination_identity: OnceLock<SpiffeName>,
    /// What TLS agreed on, once there is a tunnel.
    pub tls: OnceLock<TlsFacts>,
    /// The rule that let it in.
    pub rule: Option<String>,
    /// When it was opened.
    pub since: Instant,
    /// Bytes so far.
    pub bytes: ByteCounts,
}

/// Bytes of one connection, counted here and in the metrics at once.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// Application to tunnel.
    pub up: AtomicU64,
    /// Tunnel to application.
    pub down: AtomicU64,
    /// Metric of bytes up.
    pub up_metric: Counter,
    /// Metric of bytes down.
    pub down_metric: Counter,
}

impl crate::hbone::Meter for ByteCounts {
    fn up(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
        self.up_metric.inc_by(bytes as u64);
    }

    fn down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
        self.down_metric.inc_by(bytes as u64);
    }

    fn total(&self) -> u64 {
        self.up.load(Ordering::Relaxed).wrapping_add(self.down.load(Ordering::Relaxed))
    }
}

/// All live connections.
#[derive(Debug, Default)]
pub struct LiveConnections {
    next: AtomicU64,
    all: Mutex<BTreeMap<u64, Arc<Connection>>>,
}

impl LiveConnections {
    /// Adds one; remove it with the number given.
    pub fn add(&self, connection: &Arc<Connection>) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.all.lock().insert(id, connection.clone());
        id
    }

    /// Removes one.
    pub fn remove(&self, id: u64) {
        self.all.lock().remove(&id);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.lock().len()
    }

    /// All of now, the oldest first.
    pub fn list(&self) -> Vec<(u64, Arc<Connection>)> {
        let all = self.all.lock();
        all.iter().map(|(id, connection)| (*id, connection.clone())).collect()
    }
}
