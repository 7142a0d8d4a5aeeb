//! How many connections a node carries, and which ones are refused when it is nearly full.
//!
//! Above 80 % of the allowed connections, open files or memory, only the largest consumer is refused: the newest
//! connections of the peer that has the most of them, to the pod that has the most of them. Everybody else, the admin
//! ports and captures of new pods use what is left. Above the limit of connections, or 95 % of files or memory, all new
//! connections are refused. But scarce memory leaves each pod a few connections, because connections may not be what
//! uses it.

use crate::hbone::Buffers;
use crate::mesh::Text;
use crate::sys::limits;
use crate::task::thread::run_blocking;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Time between two checks of open files and memory.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// Open files per connection: one for each leg.
const FILES_PER_CONNECTION: u64 = 2;

/// Memory per connection in bytes, without what it makes the node buffer. Memory in use beyond that belongs to
/// something else.
const BYTES_PER_CONNECTION: u64 = 16 * 1024;

/// Connections that each pod may have while memory is above [`SCARCE_PERCENT`], whatever uses it.
const FLOOR: usize = 32;

/// The same while memory is above [`FULL_PERCENT`].
const LAST_FLOOR: usize = 8;

/// Above this share of a resource, the largest consumer is refused.
const SCARCE_PERCENT: usize = 80;

/// Above this share of open files or memory, all new connections are refused.
const FULL_PERCENT: u64 = 95;

/// A resource that limits connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// The configured number of connections.
    Connections,
    /// Files that the process may open.
    Files,
    /// Memory of the container.
    Memory,
}

impl std::fmt::Display for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Files => "open files",
            Self::Memory => "memory",
        })
    }
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetRefusal {
    /// The node has no room for any further connection.
    #[error("this node has no room for more connections: {all} are open, and the limit is set by its {scarce}")]
    Full {
        /// Open connections of all pods.
        all: usize,
        /// The resource that is scarce.
        scarce: Resource,
    },
    /// The node is nearly full, and this pod has the most connections.
    #[error(
        "the node's {scarce} are above {SCARCE_PERCENT} %; this pod has the most connections ({own} of {all}), so its newest ones are refused"
    )]
    LargestPod {
        /// Open connections of the pod.
        own: usize,
        /// Open connections of all pods.
        all: usize,
        /// The resource that is scarce.
        scarce: Resource,
    },
    /// The node is nearly full, this pod has the most connections, and this peer has the most of them.
    #[error(
        "the node's {scarce} are above {SCARCE_PERCENT} %; this pod has the most connections, and {peer} the most of these ({of_peer} of {own}), so the newest ones of that peer are refused"
    )]
    LargestPeer {
        /// The peer's identity.
        peer: Text,
        /// Open connections of the peer to the pod.
        of_peer: usize,
        /// Open connections of the pod.
        own: usize,
        /// The resource that is scarce.
        scarce: Resource,
    },
}

/// The open connections of one pod, in all and by peer.
#[derive(Debug, Default)]
pub struct PodUsage {
    open: AtomicUsize,
    peers: Mutex<HashMap<Text, usize>>,
}

impl PodUsage {
    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    fn add_peer(&self, peer: &Text) {
        *self.peers.lock().entry(peer.clone()).or_default() += 1;
    }

    fn remove_peer(&self, peer: &Text) {
        let mut peers = self.peers.lock();
        let left = peers.get_mut(peer).map_or(0, |own| {
            *own = own.saturating_sub(1);
            *own
        });
        if left == 0 {
            peers.remove(peer);
        }
    }

    /// How many connections a peer has, if no other peer has more; otherwise `None`.
    fn count_if_largest(&self, peer: &Text) -> Option<usize> {
        let peers = self.peers.lock();
        let own = peers.get(peer).copied().unwrap_or(0);
        let others = peers.iter().filter(|(other, _)| *other != peer).map(|(_, count)| *count);
        (own >= others.max().unwrap_or(0)).then_some(own)
    }
}

/// Counts the connections of a node and decides which ones are refused.
#[derive(Debug)]
pub struct Budget {
    max: usize,
    buffers: Arc<Buffers>,
    open: AtomicUsize,
    /// From this number of connections on, the largest consumer is refused.
    scarce_at: AtomicUsize,
    /// The resource that set these limits.
    scarcest: AtomicU8,
    /// From this number on, all are refused.
    full_at: AtomicUsize,
    /// The same, by connections and files only. Not even [`Budget::floor`] exceeds it.
    hard_full_at: AtomicUsize,
    /// Connections that each pod may have, however scarce memory is.
    floor: AtomicUsize,
    /// The use of files and memory when it was last checked.
    usage: Mutex<MachineUsage>,
    pods: Mutex<Vec<Weak<PodUsage>>>,
}

/// Counts one open connection or stream until it is dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    pod: Arc<PodUsage>,
    peer: Option<Text>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
        self.pod.open.fetch_sub(1, Ordering::Relaxed);
        if let Some(peer) = &self.peer {
            self.pod.remove_peer(peer);
        }
    }
}

/// The use of resources that the budget does not count itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineUsage {
    /// Open files, and the limit of them; `None` if not known.
    pub files: Option<(u64, u64)>,
    /// Memory in use, and the limit of it, in bytes; `None` if there is no limit or it is not known.
    pub memory: Option<(u64, u64)>,
}

/// The shares of what limits connections that are in use, from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BudgetUse {
    /// Of the configured number of connections.
    pub connections: f64,
    /// Of open files, where their number is known.
    pub files: Option<f64>,
    /// Of memory, where it is limited.
    pub memory: Option<f64>,
}

impl Budget {
    /// A budget of `max` connections. `buffers` knows what peers make the node buffer.
    pub fn new(max: usize, buffers: Arc<Buffers>) -> Self {
        Self {
            max,
            buffers,
            open: AtomicUsize::new(0),
            scarce_at: AtomicUsize::new(percent_of(max, SCARCE_PERCENT)),
            scarcest: AtomicU8::new(Resource::Connections as u8),
            full_at: AtomicUsize::new(max),
            hard_full_at: AtomicUsize::new(max),
            floor: AtomicUsize::new(0),
            usage: Mutex::default(),
            pods: Mutex::default(),
        }
    }

    /// Adds a pod, so that it is compared with the others.
    pub fn register(&self, pod: &Arc<PodUsage>) {
        let mut pods = self.pods.lock();
        pods.retain(|known| known.strong_count() > 0);
        if !pods.iter().any(|known| known.as_ptr() == Arc::as_ptr(pod)) {
            pods.push(Arc::downgrade(pod));
        }
    }

    /// Reserves room for one more connection or stream of a pod, for as long as the result is held. `peer` is the
    /// identity at its other end, if it has proven one.
    pub fn reserve(self: &Arc<Self>, pod: &Arc<PodUsage>, peer: Option<&Text>) -> Result<Reservation, BudgetRefusal> {
        let (all, own) = (self.open.fetch_add(1, Ordering::Relaxed), pod.open.fetch_add(1, Ordering::Relaxed));
        if let Some(peer) = peer {
            pod.add_peer(peer);
        }
        let reservation = Reservation { budget: self.clone(), pod: pod.clone(), peer: peer.cloned() };
        if own < self.floor.load(Ordering::Relaxed) && all < self.hard_full_at.load(Ordering::Relaxed) {
            return Ok(reservation);
        }
        if all >= self.full_at.load(Ordering::Relaxed) {
            return Err(BudgetRefusal::Full { all, scarce: self.scarce() });
        }
        if all >= self.scarce_at.load(Ordering::Relaxed) && own > 0 && own >= self.largest_other(pod) {
            let scarce = self.scarce();
            let Some(peer) = peer else { return Err(BudgetRefusal::LargestPod { own, all, scarce }) };
            if let Some(of_peer) = pod.count_if_largest(peer) {
                return Err(BudgetRefusal::LargestPeer {
                    peer: peer.clone(),
                    of_peer: of_peer.saturating_sub(1),
                    own,
                    scarce,
                });
            }
        }
        Ok(reservation)
    }

    /// The number of connections of the largest other pod.
    fn largest_other(&self, own: &Arc<PodUsage>) -> usize {
        let pods = self.pods.lock();
        let others = pods.iter().filter(|pod| pod.as_ptr() != Arc::as_ptr(own)).filter_map(Weak::upgrade);
        others.map(|pod| pod.open()).max().unwrap_or(0)
    }

    fn scarce(&self) -> Resource {
        match self.scarcest.load(Ordering::Relaxed) {
            scarcest if scarcest == Resource::Files as u8 => Resource::Files,
            scarcest if scarcest == Resource::Memory as u8 => Resource::Memory,
            _ => Resource::Connections,
        }
    }

    /// Adapts the limits to the use of files and memory. Files beyond those of connections are listeners, tunnels and
    /// others; memory beyond that of connections is used by mesh facts and others. Both are assumed to stay in use.
    pub fn update(&self, usage: MachineUsage) {
        *self.usage.lock() = usage;
        let open = self.open.load(Ordering::Relaxed);
        let (mut scarce_at, mut full_at, mut scarcest) =
            (percent_of(self.max, SCARCE_PERCENT), self.max, Resource::Connections);
        let (mut floor, scarce) = (0, SCARCE_PERCENT as u64);
        // How many connections fit into `percent` of `max`, if each uses `each` and all together `more`, and `used` is
        // in use now.
        let room = |used: u64, max: u64, each: u64, percent: u64, more: u64| {
            let others = used.saturating_sub(each * open as u64 + more);
            let left = (max / 100 * percent).saturating_sub(others + more);
            usize::try_from(left / each).unwrap_or(usize::MAX)
        };
        if let Some((used, max)) = usage.files {
            let room = |percent| room(used * 100, max * 100, FILES_PER_CONNECTION * 100, percent, 0);
            full_at = full_at.min(room(FULL_PERCENT));
            if room(scarce) < scarce_at {
                (scarce_at, scarcest) = (room(scarce), Resource::Files);
            }
        }
        let hard_full_at = full_at;
        if let Some((used, max)) = usage.memory.filter(|(used, max)| *used > max / 100 * scarce) {
            let room = |percent| room(used, max, BYTES_PER_CONNECTION, percent, self.buffers.held() as u64);
            (floor, scarcest) = (FLOOR, Resource::Memory);
            scarce_at = scarce_at.min(room(scarce));
            if used > max / 100 * FULL_PERCENT {
                floor = LAST_FLOOR;
                full_at = full_at.min(room(FULL_PERCENT));
            }
        }
        self.scarcest.store(scarcest as u8, Ordering::Relaxed);
        self.scarce_at.store(scarce_at, Ordering::Relaxed);
        self.full_at.store(full_at, Ordering::Relaxed);
        self.hard_full_at.store(hard_full_at, Ordering::Relaxed);
        self.floor.store(floor, Ordering::Relaxed);
    }

    /// What is in use. Files and memory are those of the last check.
    #[allow(clippy::cast_precision_loss, reason = "a share needs no more digits")]
    pub fn used(&self) -> BudgetUse {
        let share = |(used, max): (u64, u64)| used as f64 / max.max(1) as f64;
        let MachineUsage { files, memory } = *self.usage.lock();
        BudgetUse {
            connections: share((self.open.load(Ordering::Relaxed) as u64, self.max as u64)),
            files: files.map(share),
            memory: memory.map(share),
        }
    }

    /// Checks open files and memory periodically. Never returns.
    pub async fn watch(&self) {
        let max_files = limits::raise_open_files();
        let memory = limits::Memory::of_process();
        loop {
            // On another thread: counting a hundred thousand files takes a while.
            let files = run_blocking(limits::open_files).await.flatten().map(|open| (open as u64, max_files));
            self.update(MachineUsage { files, memory: memory.as_ref().and_then(limits::Memory::now) });
            tokio::time::sleep(CHECK_EVERY).await;
        }
    }
}

/// `percent` of `of`, rounded up, and at least 1.
fn percent_of(of: usize, percent: usize) -> usize {
    of.saturating_mul(percent).div_ceil(100).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(max: usize) -> Arc<Budget> {
        Arc::new(Budget::new(max, Buffers::new(usize::MAX)))
    }

    #[test]
    fn the_largest_consumer_waits_first_and_all_others_go_on() {
        let budget = budget(100);
        let [greedy, modest, third] = [(); 3].map(|()| Arc::<PodUsage>::default());
        for pod in [&greedy, &greedy, &modest, &third] {
            budget.register(pod);
        }
        let mut held: Vec<Reservation> = (0..5).map(|_| budget.reserve(&modest, None).unwrap()).collect();
        let mut refused = None;
        for _ in 0..200 {
            match budget.reserve(&greedy, None) {
                Ok(open) => held.push(open),
                refusal => refused = refusal.err(),
            }
        }
        assert_eq!((greedy.open(), modest.open()), (75, 5));
        assert_eq!(refused, Some(BudgetRefusal::LargestPod { own: 75, all: 80, scarce: Resource::Connections }));
        for _ in 0..20 {
            held.push(budget.reserve(&modest, None).unwrap());
        }
        assert_eq!(
            budget.reserve(&third, None).err(),
            Some(BudgetRefusal::Full { all: 100, scarce: Resource::Connections })
        );
        held.clear();
        assert_eq!((greedy.open(), budget.open.load(Ordering::Relaxed)), (0, 0));
        assert!(budget.reserve(&greedy, None).is_ok(), "it recovers by itself");
    }

    #[test]
    fn of_one_pod_the_peer_that_has_most_waits_and_its_other_peers_go_on() {
        let budget = budget(1000);
        let victim = Arc::<PodUsage>::default();
        budget.register(&victim);
        let (greedy, modest) = (Text::from("spiffe://td/ns/a/sa/greedy"), Text::from("spiffe://td/ns/a/sa/modest"));
        let mut held: Vec<Reservation> = (0..10).map(|_| budget.reserve(&victim, Some(&modest)).unwrap()).collect();
        let mut refused = None;
        for _ in 0..2000 {
            match budget.reserve(&victim, Some(&greedy)) {
                Ok(open) => held.push(open),
                refusal => refused = refusal.err(),
            }
        }
        let expected =
            BudgetRefusal::LargestPeer { peer: greedy.clone(), of_peer: 790, own: 800, scarce: Resource::Connections };
        assert_eq!(refused, Some(expected));
        held.extend((0..100).map(|_| budget.reserve(&victim, Some(&modest)).unwrap()));
        held.clear();
        assert!(victim.peers.lock().is_empty(), "nothing is kept about peers that have left");
    }

    #[test]
    fn files_count() {
        let budget = budget(1000);
        let (one, other) = (Arc::<PodUsage>::default(), Arc::<PodUsage>::default());
        budget.register(&one);
        budget.register(&other);
        let held: Vec<Reservation> = (0..10).map(|_| budget.reserve(&one, None).unwrap()).collect();
        // Of the 800 files at 80 %, 780 are not for connections: there is room for 10 connections.
        budget.update(MachineUsage { files: Some((800, 1000)), memory: None });
        assert!(matches!(
            budget.reserve(&one, None).err(),
            Some(BudgetRefusal::LargestPod { scarce: Resource::Files, .. })
        ));
        assert!(budget.reserve(&other, None).is_ok());
        budget.update(MachineUsage { files: Some((990, 1000)), memory: None });
        assert!(matches!(
            budget.reserve(&other, None).err(),
            Some(BudgetRefusal::Full { scarce: Resource::Files, .. })
        ));
        budget.update(MachineUsage::default());
        assert!(budget.reserve(&one, None).is_ok());
        drop(held);
    }

    #[test]
    fn memory_that_something_else_uses_leaves_each_pod_its_floor() {
        const MIB: u64 = 1 << 20;
        let budget = budget(100_000);
        let (one, other) = (Arc::<PodUsage>::default(), Arc::<PodUsage>::default());
        budget.register(&one);
        budget.register(&other);
        let mut held: Vec<Reservation> = (0..100).map(|_| budget.reserve(&one, None).unwrap()).collect();
        budget.update(MachineUsage { files: None, memory: Some((79 * MIB, 100 * MIB)) });
        assert!(budget.reserve(&one, None).is_ok());
        budget.update(MachineUsage { files: None, memory: Some((85 * MIB, 100 * MIB)) });
        assert!(matches!(
            budget.reserve(&one, None).err(),
            Some(BudgetRefusal::LargestPod { scarce: Resource::Memory, .. })
        ));
        assert!(budget.reserve(&other, None).is_ok());
        // However long this lasts, and whichever pod is the largest by then.
        held.truncate(FLOOR - 1);
        for _ in 0..10 {
            drop(budget.reserve(&one, None).unwrap());
        }
        budget.update(MachineUsage { files: None, memory: Some((97 * MIB, 100 * MIB)) });
        assert!(matches!(budget.reserve(&one, None).err(), Some(BudgetRefusal::Full { scarce: Resource::Memory, .. })));
        assert!(budget.reserve(&other, None).is_ok());
        // The floor does not apply to files.
        budget.update(MachineUsage { files: Some((990, 1000)), memory: Some((85 * MIB, 100 * MIB)) });
        assert!(matches!(budget.reserve(&other, None).err(), Some(BudgetRefusal::Full { .. })));
        budget.update(MachineUsage::default());
        assert!(budget.reserve(&one, None).is_ok());
    }
}
