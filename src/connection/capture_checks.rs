//! Capture checks: connections that the daemon makes to verify the redirection of a pod. The node module sends them;
//! this file recognises them when they arrive at the daemon's listeners, so that they are neither answered nor carried.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use tokio::sync::Notify;

/// Addresses that capture checks from inside a pod connect to: reserved for documentation (RFC 5737, RFC 3849), so that
/// no host has them. A connection to them is never carried, even if another daemon made it.
pub const CAPTURE_CHECK_IPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77))];

/// The capture checks of one pod that are under way. The outbound listener recognises a check by its original
/// destination. The other listeners recognise it by its source port, because NAT on the way may change its address.
#[derive(Debug, Default)]
pub struct CaptureChecks {
    expected: Mutex<HashMap<SocketAddr, Arc<Notify>>>,
    inbound: Mutex<HashMap<u16, ExpectedInbound>>,
}

/// A capture check from the node into the pod.
#[derive(Debug)]
struct ExpectedInbound {
    /// Addresses of the namespace that the check is sent from.
    own: Vec<IpAddr>,
    /// Notified when the check has arrived.
    arrived: Arc<Notify>,
}

impl CaptureChecks {
    /// Expects checks to `destinations` at the outbound listener, instead of any expected before. The result is
    /// notified when one of them arrives.
    pub fn expect(&self, destinations: &[SocketAddr]) -> Arc<Notify> {
        let arrived = Arc::new(Notify::new());
        let mut expected = self.expected.lock();
        expected.clear();
        expected.extend(destinations.iter().map(|to| (*to, arrived.clone())));
        arrived
    }

    /// Expects checks into the pod from these source ports, sent from a namespace that has the addresses `own`.
    /// `arrived` is notified when one of them arrives.
    pub fn expect_inbound(&self, ports: &[u16], own: &[IpAddr], arrived: &Arc<Notify>) {
        let mut inbound = self.inbound.lock();
        inbound
            .extend(ports.iter().map(|port| (*port, ExpectedInbound { own: own.to_vec(), arrived: arrived.clone() })));
    }

    /// Stops expecting checks from these source ports.
    pub fn forget_inbound(&self, ports: &[u16]) {
        let mut inbound = self.inbound.lock();
        ports.iter().for_each(|port| drop(inbound.remove(port)));
    }

    /// Whether a connection into the pod is a capture check that needs no further handling.
    pub fn take_inbound(&self, source: SocketAddr) -> bool {
        let inbound = self.inbound.lock();
        let Some(expected) = inbound.get(&source.port()) else { return false };
        expected.arrived.notify_one();
        // With another source address it is either a check that NAT has changed, or an unrelated connection that
        // happens to use the same port. It must be handled as a connection.
        expected.own.contains(&source.ip())
    }

    /// Stops expecting checks at the outbound listener.
    pub fn forget(&self) {
        self.expected.lock().clear();
    }

    /// Whether a connection at the outbound listener is a capture check, of this daemon or of another one.
    pub fn take(&self, destination: SocketAddr) -> bool {
        match self.expected.lock().remove(&destination) {
            Some(arrived) => {
                arrived.notify_one();
                true
            }
            None => CAPTURE_CHECK_IPS.contains(&destination.ip()),
        }
    }
}
