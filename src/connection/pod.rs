//! What the path of a connection needs to know of the pod it belongs to.

use super::budget::PodUsage;
use super::capture_checks::CaptureChecks;
use super::choose::OwnSockets;
use super::dial::direct::{OpenLegs, SocketConfig};
use super::ports::own_ports;
use crate::dns::Resolver;
use crate::mesh::{FactKey, Snapshot, SpiffeName, Store, Text, Workload};
use crate::sys::netns::Netns;
use crate::task::{Drain, Signal};
use arc_swap::ArcSwap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
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
    pub usage: Arc<PodUsage>,
    /// Probe connections of capture verification that are expected.
    pub capture_checks: CaptureChecks,
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
