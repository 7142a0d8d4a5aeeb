//! The list of live connections, which the admin port shows.

use super::direction::Direction;
use crate::identity::TlsFacts;
use crate::mesh::{SpiffeName, Text};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// One live connection. Bytes are counted while it is open; everything else is set once.
#[derive(Debug)]
pub struct Connection {
    /// Uid of the pod that it belongs to.
    pub pod: Text,
    /// Direction of the connection.
    pub direction: Direction,
    /// `HBONE` if it goes through a tunnel, else `TCP`.
    pub protocol: &'static str,
    /// Address that opened it.
    pub source: SocketAddr,
    /// Outbound: the original destination. Inbound: the address in the pod that was connected to.
    pub destination: SocketAddr,
    /// Outbound: the address that the daemon connects to. Inbound: the application's address.
    pub actual: SocketAddr,
    /// The CONNECT authority, if it goes through a tunnel.
    pub authority: Option<String>,
    /// Host name of the service that was dialled, if it is known.
    pub service: Option<Text>,
    /// Identity of the source: inbound the one that TLS proved, outbound the pod's own.
    pub source_identity: Option<SpiffeName>,
    /// Identity of the destination: inbound the pod's own, outbound once the far end has proven it.
    pub destination_identity: OnceLock<SpiffeName>,
    /// Uid of the gateway's workload through which another network is reached.
    pub gateway: Option<Text>,
    /// Identity of the gateway, once it has proven it.
    pub gateway_identity: OnceLock<SpiffeName>,
    /// TLS version, key exchange and cipher, once there is a tunnel.
    pub tls: OnceLock<TlsFacts>,
    /// The rule that allowed it.
    pub rule: Option<String>,
    /// The daemon's port of the leg that it connected, or of the tunnel that carries the connection from here; 0 while
    /// there is none.
    pub leg_port: AtomicU16,
    /// When it was accepted.
    pub since: Instant,
    /// Bytes carried so far.
    pub bytes: ByteCounts,
}

/// Bytes of one connection. Each count is added to the traffic metrics as well.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// Bytes from the application to the far side.
    pub up: AtomicU64,
    /// Bytes from the far side to the application.
    pub down: AtomicU64,
    /// When the connection began; not known where nothing asks how long it took.
    pub begun: Option<Instant>,
    /// One more than the microseconds from then to the first byte of `up`; 0 before it.
    pub first_up: AtomicU32,
    /// The same of `down`.
    pub first_down: AtomicU32,
    /// The traffic metric that `up` is added to.
    pub up_metric: Counter,
    /// The traffic metric that `down` is added to.
    pub down_metric: Counter,
}

impl ByteCounts {
    fn note_first(&self, first: &AtomicU32) {
        if let Some(begun) = self.begun {
            let micros = u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX);
            first.store(micros.saturating_add(1), Ordering::Relaxed);
        }
    }

    /// How long the first byte of the answer took: after the first byte of the client, or, where the server speaks first,
    /// after the connection was open, which was at `open` after its begin.
    pub fn first_byte(&self, direction: Direction, open: Duration) -> Option<Duration> {
        let (client, server) = match direction {
            Direction::Outbound => (&self.first_up, &self.first_down),
            Direction::Inbound => (&self.first_down, &self.first_up),
        };
        let at = |first: &AtomicU32| {
            let micros = first.load(Ordering::Relaxed).checked_sub(1)?;
            Some(Duration::from_micros(u64::from(micros)))
        };
        let server = at(server)?;
        let asked = at(client).filter(|client| *client <= server).unwrap_or(open).max(open);
        Some(server.saturating_sub(asked))
    }
}

impl crate::hbone::Meter for ByteCounts {
    fn up(&self, bytes: usize) {
        if self.up.fetch_add(bytes as u64, Ordering::Relaxed) == 0 {
            self.note_first(&self.first_up);
        }
        self.up_metric.inc_by(bytes as u64);
    }

    fn down(&self, bytes: usize) {
        if self.down.fetch_add(bytes as u64, Ordering::Relaxed) == 0 {
            self.note_first(&self.first_down);
        }
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
    /// Adds a connection and returns its number, by which it is removed.
    pub fn add(&self, connection: &Arc<Connection>) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.all.lock().insert(id, connection.clone());
        id
    }

    /// Removes a connection.
    pub fn remove(&self, id: u64) {
        self.all.lock().remove(&id);
    }

    /// Number of live connections.
    pub fn len(&self) -> usize {
        self.all.lock().len()
    }

    /// All live connections with their numbers, the oldest first.
    pub fn list(&self) -> Vec<(u64, Arc<Connection>)> {
        let all = self.all.lock();
        all.iter().map(|(id, connection)| (*id, connection.clone())).collect()
    }
}
