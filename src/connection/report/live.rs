//! The list of live connections, which the admin port shows.

use super::details::Details;
use super::direction::Direction;
use super::metrics::{Traffic, TrafficLabels};
use crate::identity::{Proven, TlsFacts};
use crate::mesh::{SpiffeName, Text};
use crate::telemetry::series::SeriesHandle;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// One live connection. Its record, the list of live connections and what carries it share it. Bytes are counted while it
/// is open; everything else is set once.
#[derive(Debug)]
pub struct Connection {
    /// Its number in the list of live connections.
    pub id: u64,
    /// Uid of the pod that it belongs to.
    pub pod: Text,
    /// Direction of the connection.
    pub direction: Direction,
    /// Address that opened it.
    pub source: SocketAddr,
    /// Outbound: the original destination. Inbound: the address in the pod that was connected to.
    pub destination: SocketAddr,
    /// What is known since its route is.
    pub details: Details,
    /// What the far end of its tunnel has proven, once there is one.
    pub proven: OnceLock<Arc<Proven>>,
    /// The daemon's port of the leg that it connected, or of the tunnel that carries the connection from here; 0 while
    /// there is none.
    pub leg_port: AtomicU16,
    /// When it was accepted.
    pub since: Instant,
    /// Bytes carried so far.
    pub bytes: ByteCounts,
    /// The traffic metrics to which they are added as well.
    pub traffic: SeriesHandle<TrafficLabels, Traffic>,
}

/// Bytes of one connection.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// Bytes from the application to the far side.
    pub up: AtomicU64,
    /// Bytes from the far side to the application.
    pub down: AtomicU64,
    /// One more than the microseconds from the begin of the connection to the first byte of `up`; 0 before it.
    pub first_up: AtomicU32,
    /// The same of `down`.
    pub first_down: AtomicU32,
}

impl Connection {
    /// Identity of the destination, if it is known: inbound the pod's own, outbound once the far end has proven it.
    pub fn destination_identity(&self) -> Option<&SpiffeName> {
        match self.direction {
            Direction::Inbound => self.details.destination_identity.as_ref(),
            Direction::Outbound => self.proven.get().map(|proven| &proven.identity),
        }
    }

    /// Identity of the gateway to another network, once it has proven it.
    pub fn gateway_identity(&self) -> Option<&SpiffeName> {
        self.proven.get().and_then(|proven| proven.gateway.as_ref())
    }

    /// TLS version, key exchange and cipher, once there is a tunnel.
    pub fn tls(&self) -> Option<&TlsFacts> {
        self.proven.get().map(|proven| &proven.tls)
    }

    /// Whether it goes through a tunnel.
    pub fn is_encrypted(&self) -> bool {
        self.details.authority.is_some()
    }

    /// `HBONE` if it goes through a tunnel, else `TCP`.
    pub fn protocol(&self) -> &'static str {
        if self.is_encrypted() { "HBONE" } else { "TCP" }
    }

    /// How long the first byte of the answer took: after the first byte of the client, or, where the server speaks first,
    /// after the connection was open, which was at `open` after its begin.
    pub fn first_byte(&self, open: Duration) -> Option<Duration> {
        let ByteCounts { first_up, first_down, .. } = &self.bytes;
        let (client, server) = match self.direction {
            Direction::Outbound => (first_up, first_down),
            Direction::Inbound => (first_down, first_up),
        };
        let at = |first: &AtomicU32| {
            let micros = first.load(Ordering::Relaxed).checked_sub(1)?;
            Some(Duration::from_micros(u64::from(micros)))
        };
        let server = at(server)?;
        let asked = at(client).filter(|client| *client <= server).unwrap_or(open).max(open);
        Some(server.saturating_sub(asked))
    }

    fn count(&self, bytes: usize, count: &AtomicU64, first: &AtomicU32, metric: &Counter) {
        if count.fetch_add(bytes as u64, Ordering::Relaxed) == 0 {
            let micros = u32::try_from(self.since.elapsed().as_micros()).unwrap_or(u32::MAX);
            first.store(micros.saturating_add(1), Ordering::Relaxed);
        }
        metric.inc_by(bytes as u64);
    }
}

impl crate::hbone::Meter for Connection {
    fn up(&self, bytes: usize) {
        // The metric `received` counts from client to server: outbound from the application, inbound towards it.
        let metric = match self.direction {
            Direction::Outbound => &self.traffic.received,
            Direction::Inbound => &self.traffic.sent,
        };
        self.count(bytes, &self.bytes.up, &self.bytes.first_up, metric);
    }

    fn down(&self, bytes: usize) {
        let metric = match self.direction {
            Direction::Outbound => &self.traffic.sent,
            Direction::Inbound => &self.traffic.received,
        };
        self.count(bytes, &self.bytes.down, &self.bytes.first_down, metric);
    }

    fn total(&self) -> u64 {
        self.bytes.total()
    }
}

impl ByteCounts {
    /// All bytes, in both directions.
    pub fn total(&self) -> u64 {
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
    /// A number for a new connection.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a connection.
    pub fn add(&self, connection: &Arc<Connection>) {
        self.all.lock().insert(connection.id, connection.clone());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_each_connection_is_small() {
        let connection = size_of::<Connection>();
        assert!(connection <= 304, "{connection} bytes");
    }
}
