//! Connections that verify the redirection of a pod, and how they are recognised when they arrive.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use tokio::sync::Notify;

/// Where probes of capture go: addresses for documentation (RFC 5737, RFC 3849), which nobody has. A connection to
/// them is answered by nobody and never passed on, also when it is another daemon's probe.
pub const CAPTURE_CHECK_IPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77))];

/// Probe connections that are expected: at the outbound listener by their original destination, at the others by the port that
/// they come from, because somebody may translate their address on the way.
#[derive(Debug, Default)]
pub struct CaptureChecks {
    expected: Mutex<HashMap<SocketAddr, Arc<Notify>>>,
    inbound: Mutex<HashMap<u16, ExpectedInbound>>,
}

#[derive(Debug)]
struct ExpectedInbound {
    /// Addresses that it may come from.
    own: Vec<IpAddr>,
    /// Is notified when it has come.
    arrived: Arc<Notify>,
}

impl CaptureChecks {
    /// Expects connections to `destinations`; the notice comes when one of them has been captured.
    pub fn expect(&self, destinations: &[SocketAddr]) -> Arc<Notify> {
        let arrived = Arc::new(Notify::new());
        let mut expected = self.expected.lock();
        expected.clear();
        expected.extend(destinations.iter().map(|to| (*to, arrived.clone())));
        arrived
    }

    /// Expects connections into the pod from these ports, of whoever has `own`; the notice comes when one has been taken.
    pub fn expect_inbound(&self, ports: &[u16], own: &[IpAddr], arrived: &Arc<Notify>) {
        let mut inbound = self.inbound.lock();
        inbound
            .extend(ports.iter().map(|port| (*port, ExpectedInbound { own: own.to_vec(), arrived: arrived.clone() })));
    }

    /// Expects none of these any more.
    pub fn forget_inbound(&self, ports: &[u16]) {
        let mut inbound = self.inbound.lock();
        ports.iter().for_each(|port| drop(inbound.remove(port)));
    }

    /// Whether a connection into the pod is a probe of ours, and nothing more is to be done about it.
    pub fn take_inbound(&self, source: SocketAddr) -> bool {
        let inbound = self.inbound.lock();
        let Some(expected) = inbound.get(&source.port()) else { return false };
        expected.arrived.notify_one();
        // One with another address may be a probe that was translated, or somebody else's by chance: it goes on.
        expected.own.contains(&source.ip())
    }

    /// Expects none any more.
    pub fn forget(&self) {
        self.expected.lock().clear();
    }

    /// Whether a captured connection is a probe, ours or another daemon's.
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
