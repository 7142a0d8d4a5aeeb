//! What the path of a connection needs to know about the pod that the connection belongs to.

use super::budget::PodUsage;
use super::capture_checks::CaptureChecks;
use super::choose::OwnSockets;
use super::dial::direct::{OpenLegs, SocketConfig};
use crate::dns::Resolver;
use crate::mesh::{FactKey, Snapshot, SpiffeName, Store, Text, Workload};
use crate::sys::netns::Netns;
use crate::task::{Drain, Signal};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// How long a connection waits for the facts about its own pod, before it is refused.
pub const FACTS_WAIT: Duration = Duration::from_secs(5);

/// A captured pod.
#[derive(Debug)]
pub struct Pod {
    /// Uid, as the enrolment source gave it.
    pub uid: Text,
    /// Number of this capture: a pod that is released and captured again gets a new one.
    pub capture: u64,
    /// Name of the pod.
    pub name: Text,
    /// Kubernetes namespace of the pod.
    pub namespace: Text,
    /// Uid under which an on-demand control plane can be asked for the pod's workload.
    pub mesh_uid: Text,
    /// Network namespace of the pod. The daemon opens all sockets for the pod in it.
    pub netns: Netns,
    /// Mark and options of those sockets.
    pub sockets: SocketConfig,
    /// Connections that the daemon has opened in the namespace and that are still open.
    pub legs: OpenLegs,
    /// The pod's DNS resolvers.
    pub resolver: Arc<Resolver>,
    /// Whether the pod's DNS is captured. Set once the daemon listens for it.
    pub dns: AtomicBool,
    /// Identity of the pod's workload. Set once the namespace has been verified to hold all of the workload's
    /// addresses; until then connections wait.
    pub identity: watch::Sender<Option<SpiffeName>>,
    /// Addresses of the pod's interfaces, as of the last check.
    pub addresses: ArcSwap<Vec<IpAddr>>,
    /// Ends the pod's connections. Each of them holds a [`Signal`] of it.
    pub drain: Drain,
    /// Counts the pod's connections, so that a release can wait until all have ended.
    pub active: TaskTracker,
    /// How many connections and streams of the pod are open, for the node's budget.
    pub usage: Arc<PodUsage>,
    /// Capture checks that are under way.
    pub capture_checks: CaptureChecks,
}

/// The captured pods, by namespace and name.
#[derive(Debug, Default)]
pub struct Pods(Mutex<HashMap<(Text, Text), Weak<Pod>>>);

impl Pods {
    /// Adds a pod. It is listed for as long as it exists.
    pub fn add(&self, pod: &Arc<Pod>) {
        let mut all = self.0.lock();
        all.retain(|_, pod| pod.strong_count() > 0);
        all.insert((pod.namespace.clone(), pod.name.clone()), Arc::downgrade(pod));
    }

    /// The pod with this uid.
    pub fn by_uid(&self, uid: &Text) -> Option<Arc<Pod>> {
        self.0.lock().values().filter_map(Weak::upgrade).find(|pod| pod.uid == *uid)
    }

    /// The pod of this namespace and name.
    pub fn find(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.0.lock().get(&(namespace.into(), name.into()))?.upgrade()
    }
}

impl Pod {
    /// The next capture number. Numbers are unique in the process, across all pods.
    pub fn next_capture() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// The pod's workload, found by the pod's name, if it has the identity that was verified for the pod.
    fn workload<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Arc<Workload>> {
        let identity = self.identity.borrow();
        let own = |w: &&Arc<Workload>| identity.as_ref().is_some_and(|identity| w.has_identity(identity));
        snapshot.workload_of_pod(&self.namespace, &self.name).filter(own)
    }

    /// The current facts and the pod's workload, if the workload is known and verified.
    pub fn facts_now(&self, mesh: &Store) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
        let snapshot = mesh.load();
        let workload = self.workload(&snapshot).cloned()?;
        Some((snapshot, workload))
    }

    /// Like [`Pod::facts_now`], but waits up to `FACTS_WAIT` for the workload to become known and verified.
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
                    // Only an on-demand control plane has to be asked. Its answer arrives as a change of the facts.
                    Err(_) = mesh.ask(&self.uid, uid) => return None,
                }
            }
        };
        tokio::time::timeout(FACTS_WAIT, wait).await.unwrap_or(None)
    }

    /// Runs a check on the addresses and ports that are the pod's own.
    pub fn with_own<T>(&self, workload: &Workload, check: impl FnOnce(OwnSockets<'_>) -> T) -> T {
        check(OwnSockets { workload, interfaces: &self.addresses.load(), daemon_ports: self.own_ports() })
    }

    /// Ports on which the daemon listens in this pod.
    pub fn own_ports(&self) -> &'static [u16] {
        crate::ports::in_pod(self.dns.load(Ordering::Relaxed))
    }

    /// A signal that fires when the pod's connections have to end.
    pub fn signal(&self) -> Signal {
        self.drain.signal()
    }
}
