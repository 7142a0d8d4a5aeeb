//! What the path of a connection needs to know of the pod it belongs to.

use super::choose::OwnSockets;
use super::dial::direct::{OpenLegs, SocketConfig};
use super::ports::own_ports;
use crate::dns::Resolver;
use crate::mesh::{FactKey, Snapshot, SpiffeName, Store, Text, Workload};
use crate::sys::netns::Netns;
use crate::task::{Drain, Signal};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

/// How long a connection waits for the facts about its own pod.
pub const FACTS_WAIT: Duration = Duration::from_secs(5);

/// A captured pod.
#[derive(Debug)]
pub struct Pod {
    /// Uid as whoever enrolled the pod gave it.
    pub uid: Text,
    /// Tells this capture of the pod from others.
    pub capture: u64,
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Its uid in the mesh, where it can be told before the mesh is asked.
    pub mesh_uid: Text,
    /// Its network namespace, in which all its sockets are made.
    pub netns: Netns,
    /// How they are made.
    pub sockets: SocketConfig,
    /// Connections that we have open in it.
    pub legs: OpenLegs,
    /// Its DNS resolvers.
    pub resolver: Arc<Resolver>,
    /// Whether its DNS is taken: from when that is listened for.
    pub dns: AtomicBool,
    /// Who it is: set once its namespace has been found to hold the addresses that its workload has. No connection goes
    /// before that.
    pub identity: watch::Sender<Option<SpiffeName>>,
    /// Addresses that its interfaces held when that was looked at.
    pub addresses: ArcSwap<Vec<IpAddr>>,
    /// Ends the pod's connections; kept by the pod so that its connections hear of it through it.
    pub drain: Drain,
    /// Counts the pod's connections, for waiting until they have ended.
    pub active: TaskTracker,
    /// Its connections and streams that are open, of the node's budget.
    pub open: super::budget::Count,
    /// Probe connections of capture verification that are expected.
    pub probes: Probes,
}

impl Pod {
    /// The number of the next capture, of whichever pod.
    pub fn next_capture() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// The facts about this pod: its workload, by pod name, if that is who the pod has been found to be.
    fn workload<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Arc<Workload>> {
        let identity = self.identity.borrow();
        let own = |w: &&Arc<Workload>| identity.as_ref().is_some_and(|identity| w.has_identity(identity));
        snapshot.workload_of_pod(&self.namespace, &self.name).filter(own)
    }

    /// The facts of now and this pod's workload among them, if it is known and checked.
    pub fn facts_now(&self, mesh: &Store) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        let snapshot = mesh.load();
        let workload = self.workload(&snapshot).cloned()?;
        Some((snapshot, workload))
    }

    /// The same; waits up to 5 s for it to become known and checked.
    pub async fn facts(&self, mesh: &Store) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        if let Some(known) = self.facts_now(mesh) {
            return Some(known);
        }
        let (mut changes, mut identity) = (mesh.subscribe(), self.identity.subscribe());
        let wait = async {
            loop {
                changes.mark_unchanged();
                identity.mark_unchanged();
                if let Some(known) = self.facts_now(mesh) {
                    return Some(known);
                }
                let uid = FactKey::Workload(self.mesh_uid.clone());
                tokio::select! {
                    changed = changes.changed() => changed.ok()?,
                    changed = identity.changed() => changed.ok()?,
                    // Asked where nobody tells us unasked; an answer is a change.
                    Err(_) = mesh.ask(&self.uid, uid) => return None,
                }
            }
        };
        tokio::time::timeout(FACTS_WAIT, wait).await.unwrap_or(None)
    }

    /// The addresses and ports that are this pod's own, for the time of a check.
    pub fn with_own<T>(&self, workload: &Workload, check: impl FnOnce(OwnSockets<'_>) -> T) -> T {
        check(OwnSockets { workload, interfaces: &self.addresses.load(), daemon_ports: self.own_ports() })
    }

    /// Our own ports in this pod.
    pub fn own_ports(&self) -> &'static [u16] {
        own_ports(self.dns.load(Ordering::Relaxed))
    }

    /// Hears when the pod's connections are to end.
    pub fn signal(&self) -> Signal {
        self.drain.signal()
    }
}

/// Where probes of capture go: addresses for documentation (RFC 5737, RFC 3849), which nobody has. A connection to
/// them is answered by nobody and never passed on, also when it is another daemon's probe.
pub const PROBE_IPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77))];

/// Whose probes are expected, and who hears of them.
type Expected = (Vec<IpAddr>, Arc<Notify>);

/// Probe connections that are expected: at the outbound listener by their original destination, at the others by the port that
/// they come from, because somebody may translate their address on the way.
#[derive(Debug, Default)]
pub struct Probes {
    expected: Mutex<HashMap<SocketAddr, Arc<Notify>>>,
    inbound: Mutex<HashMap<u16, Expected>>,
}

impl Probes {
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
        inbound.extend(ports.iter().map(|port| (*port, (own.to_vec(), arrived.clone()))));
    }

    /// Expects none of these any more.
    pub fn forget_inbound(&self, ports: &[u16]) {
        let mut inbound = self.inbound.lock();
        ports.iter().for_each(|port| drop(inbound.remove(port)));
    }

    /// Whether a connection into the pod is a probe of ours, and nothing more is to be done about it.
    pub fn take_inbound(&self, source: SocketAddr) -> bool {
        let inbound = self.inbound.lock();
        let Some((own, arrived)) = inbound.get(&source.port()) else { return false };
        arrived.notify_one();
        // One with another address may be a probe that was translated, or somebody else's by chance: it goes on.
        own.contains(&source.ip())
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
            None => PROBE_IPS.contains(&destination.ip()),
        }
    }
}
