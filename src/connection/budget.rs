//! How many connections a node carries, and who has to wait where it is nearly too many: above 80 % of what connections,
//! open files or memory allow, the newest connections are refused of the peer that has most of them in the pod that has
//! most of them. The others, the admin port and capture go on with what is left.

use crate::hbone::Buffers;
use crate::mesh::Text;
use crate::sys::limits;
use crate::task::thread::beside;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Time between looks at files and memory.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// Files that a connection takes.
const FILES_PER_CONNECTION: u64 = 2;
/// Memory that a connection takes beside what it makes us hold: what is in use less this is used by something else.
const BYTES_PER_CONNECTION: u64 = 48 * 1024;
/// Connections that each pod may have however scarce memory is, while it is above 80 %, and above 95 %: they are not what
/// uses it up.
const FLOOR: usize = 32;
const LAST_FLOOR: usize = 8;

/// What is scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Connections, as many as are set.
    Connections,
    /// Files the process may open.
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

/// Why there is no room.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetRefusal {
    /// The node has as many as it may have.
    #[error("too many connections: no more than the {all} that are open fit this node's {scarce}")]
    Full {
        /// Connections of all pods.
        all: usize,
        /// What there is too little of.
        scarce: Resource,
    },
    /// The node is nearly full, and this pod has the most.
    #[error(
        "the node's {scarce} are above 80 %, and of its {all} connections this pod has the most, {own}: its newest are refused"
    )]
    LargestPod {
        /// Connections of the pod.
        own: usize,
        /// Connections of all pods.
        all: usize,
        /// What there is too little of.
        scarce: Resource,
    },
    /// The node is nearly full, this pod has the most, and this peer has most of the pod's.
    #[error(
        "the node's {scarce} are above 80 %, and of the {own} connections of the pod that has the most of them, {peer} has the most, {of_peer}: its newest are refused"
    )]
    LargestPeer {
        /// The peer's identity.
        peer: Text,
        /// Connections of the peer to the pod.
        of_peer: usize,
        /// Connections of the pod.
        own: usize,
        /// What there is too little of.
        scarce: Resource,
    },
}

/// Connections of one pod that are open, and who has them.
#[derive(Debug, Default)]
pub struct PodUsage {
    open: AtomicUsize,
    peers: Mutex<HashMap<Text, usize>>,
}

impl PodUsage {
    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// One more of a peer.
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

    /// How many a peer has, where no other has more.
    fn count_if_largest(&self, peer: &Text) -> Option<usize> {
        let peers = self.peers.lock();
        let own = peers.get(peer).copied().unwrap_or(0);
        let others = peers.iter().filter(|(other, _)| *other != peer).map(|(_, count)| *count);
        (own >= others.max().unwrap_or(0)).then_some(own)
    }
}

/// The connections of a node.
#[derive(Debug)]
pub struct Budget {
    max: usize,
    buffers: Arc<Buffers>,
    open: AtomicUsize,
    /// From here on the largest consumer waits.
    scarce_at: AtomicUsize,
    scarcest: AtomicU8,
    /// From here on everybody does.
    full_at: AtomicUsize,
    /// The same but for memory: neither connections nor files allow more.
    hard_full_at: AtomicUsize,
    /// As many each pod may have whatever memory says.
    floor: AtomicUsize,
    pods: Mutex<Vec<Weak<PodUsage>>>,
}

/// One open connection or stream.
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

/// What the machine says.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineUsage {
    /// Files that are open, and that may be.
    pub files: Option<(u64, u64)>,
    /// Memory in use, and what may be, in bytes.
    pub memory: Option<(u64, u64)>,
}

impl Budget {
    /// Room for `max` connections; what their peers make us hold is in `buffers`.
    pub fn new(max: usize, buffers: Arc<Buffers>) -> Self {
        Self {
            max,
            buffers,
            open: AtomicUsize::new(0),
            scarce_at: AtomicUsize::new(percent_of(max, 80)),
            scarcest: AtomicU8::new(Resource::Connections as u8),
            full_at: AtomicUsize::new(max),
            hard_full_at: AtomicUsize::new(max),
            floor: AtomicUsize::new(0),
            pods: Mutex::default(),
        }
    }

    /// Learns of a pod that will have connections.
    pub fn register(&self, pod: &Arc<PodUsage>) {
        let mut pods = self.pods.lock();
        pods.retain(|known| known.strong_count() > 0);
        if !pods.iter().any(|known| known.as_ptr() == Arc::as_ptr(pod)) {
            pods.push(Arc::downgrade(pod));
        }
    }

    /// Room for one more connection or stream of a pod, for as long as the result is held; `peer` is who has proven to be
    /// at its other end.
    pub fn reserve(self: &Arc<Self>, pod: &Arc<PodUsage>, peer: Option<&Text>) -> Result<Reservation, BudgetRefusal> {
        let (all, own) = (self.open.fetch_add(1, Ordering::Relaxed), pod.open.fetch_add(1, Ordering::Relaxed));
        if let Some(peer) = peer {
            pod.add_peer(peer);
        }
        let open = Reservation { budget: self.clone(), pod: pod.clone(), peer: peer.cloned() };
        if own < self.floor.load(Ordering::Relaxed) && all < self.hard_full_at.load(Ordering::Relaxed) {
            return Ok(open);
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
        Ok(open)
    }

    /// The most connections that any other pod has.
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

    /// Takes account of the machine. Files that are no connections are other pods' listeners, tunnels and the rest; memory
    /// that connections do not use is the mesh's facts and the rest.
    pub fn update(&self, usage: MachineUsage) {
        let open = self.open.load(Ordering::Relaxed);
        let (mut scarce_at, mut full_at, mut scarcest) = (percent_of(self.max, 80), self.max, Resource::Connections);
        let mut floor = 0;
        // How many connections fit into a share of `max`, where `used` of it is used now.
        let room = |used: u64, max: u64, each: u64, percent: u64, more: u64| {
            let others = used.saturating_sub(each * open as u64 + more);
            let left = (max / 100 * percent).saturating_sub(others + more);
            usize::try_from(left / each).unwrap_or(usize::MAX)
        };
        if let Some((used, max)) = usage.files {
            let room = |percent| room(used * 100, max * 100, FILES_PER_CONNECTION * 100, percent, 0);
            full_at = full_at.min(room(95));
            if room(80) < scarce_at {
                (scarce_at, scarcest) = (room(80), Resource::Files);
            }
        }
        let hard_full_at = full_at;
        if let Some((used, max)) = usage.memory.filter(|(used, max)| *used > max / 100 * 80) {
            let room = |percent| room(used, max, BYTES_PER_CONNECTION, percent, self.buffers.held() as u64);
            (floor, scarcest) = (FLOOR, Resource::Memory);
            scarce_at = scarce_at.min(room(80));
            if used > max / 100 * 95 {
                floor = LAST_FLOOR;
                full_at = full_at.min(room(95));
            }
        }
        self.scarcest.store(scarcest as u8, Ordering::Relaxed);
        self.scarce_at.store(scarce_at, Ordering::Relaxed);
        self.full_at.store(full_at, Ordering::Relaxed);
        self.hard_full_at.store(hard_full_at, Ordering::Relaxed);
        self.floor.store(floor, Ordering::Relaxed);
    }

    /// Looks at files and memory again and again.
    pub async fn watch(&self) {
        let max_files = limits::raise_open_files();
        let memory = limits::Memory::of_process();
        loop {
            // Beside the runtime: a hundred thousand take a while to count.
            let files = beside(limits::open_files).await.flatten().map(|open| (open as u64, max_files));
            self.update(MachineUsage { files, memory: memory.as_ref().and_then(limits::Memory::now) });
            tokio::time::sleep(CHECK_EVERY).await;
        }
    }
}

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
        assert!(budget.reserve(&greedy, None).is_ok(), "it recovers alone");
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
        assert!(victim.peers.lock().is_empty(), "nothing is kept of who has gone");
    }

    #[test]
    fn files_count() {
        let budget = budget(1000);
        let (one, other) = (Arc::<PodUsage>::default(), Arc::<PodUsage>::default());
        budget.register(&one);
        budget.register(&other);
        let held: Vec<Reservation> = (0..10).map(|_| budget.reserve(&one, None).unwrap()).collect();
        // 800 files for all, 780 of them are others': room for 10 connections.
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
        // However long it lasts, and whoever is the largest by then.
        held.truncate(FLOOR - 1);
        for _ in 0..10 {
            drop(budget.reserve(&one, None).unwrap());
        }
        budget.update(MachineUsage { files: None, memory: Some((97 * MIB, 100 * MIB)) });
        assert!(matches!(budget.reserve(&one, None).err(), Some(BudgetRefusal::Full { scarce: Resource::Memory, .. })));
        assert!(budget.reserve(&other, None).is_ok());
        // A floor of memory makes no files.
        budget.update(MachineUsage { files: Some((990, 1000)), memory: Some((85 * MIB, 100 * MIB)) });
        assert!(matches!(budget.reserve(&other, None).err(), Some(BudgetRefusal::Full { .. })));
        budget.update(MachineUsage::default());
        assert!(budget.reserve(&one, None).is_ok());
    }
}
