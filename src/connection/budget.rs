//! How many connections a node carries, and who has to wait where it is nearly too many: above 80 % of what connections,
//! open files or memory allow, the newest connections of the pod that has most of them are refused. The others, the admin
//! port and capture go on with what is left.

use super::report::Failure;
use crate::sys::limits;
use crate::task::thread::beside;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// Time between looks at files and memory.
const LOOK: Duration = Duration::from_millis(500);
/// Files that a connection takes.
const FILES: u64 = 2;

/// What is scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scarce {
    /// Connections, as many as are set.
    Connections,
    /// Files the process may open.
    Files,
    /// Memory of the container.
    Memory,
}

impl std::fmt::Display for Scarce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Files => "open files",
            Self::Memory => "memory",
        })
    }
}

/// Connections of one pod that are open.
pub type Count = Arc<AtomicUsize>;

/// The connections of a node.
#[derive(Debug)]
pub struct Budget {
    max: usize,
    open: AtomicUsize,
    /// From here on the largest consumer waits.
    scarce_at: AtomicUsize,
    why: AtomicU8,
    /// From here on everybody does.
    full_at: AtomicUsize,
    pods: Mutex<Vec<Weak<AtomicUsize>>>,
}

/// One open connection or stream.
#[derive(Debug)]
pub struct Open {
    budget: Arc<Budget>,
    pod: Count,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
        self.pod.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the machine says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Files that are open, and that may be.
    pub files: Option<(u64, u64)>,
    /// Memory in use, and what may be, in bytes.
    pub memory: Option<(u64, u64)>,
}

impl Budget {
    /// Room for `max` connections.
    pub fn new(max: usize) -> Self {
        let why = AtomicU8::new(Scarce::Connections as u8);
        let scarce_at = AtomicUsize::new(share(max, 80));
        Self { max, open: AtomicUsize::new(0), scarce_at, why, full_at: AtomicUsize::new(max), pods: Mutex::default() }
    }

    /// Learns of a pod that will have connections.
    pub fn join(&self, pod: &Count) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.retain(|known| known.strong_count() > 0);
        if !pods.iter().any(|known| known.as_ptr() == Arc::as_ptr(pod)) {
            pods.push(Arc::downgrade(pod));
        }
    }

    /// Room for one more connection or stream of a pod, for as long as the result is held.
    pub fn open(self: &Arc<Self>, pod: &Count) -> Result<Open, Failure> {
        let (all, own) = (self.open.fetch_add(1, Ordering::Relaxed), pod.fetch_add(1, Ordering::Relaxed));
        let open = Open { budget: self.clone(), pod: pod.clone() };
        if all >= self.full_at.load(Ordering::Relaxed) {
            return Err(Failure::Limit(all));
        }
        if all >= self.scarce_at.load(Ordering::Relaxed) && own > 0 && own >= self.largest(pod) {
            return Err(Failure::Largest { own, all, scarce: self.scarce() });
        }
        Ok(open)
    }

    /// The most connections that any other pod has.
    fn largest(&self, own: &Count) -> usize {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let others = pods.iter().filter(|pod| pod.as_ptr() != Arc::as_ptr(own)).filter_map(Weak::upgrade);
        others.map(|pod| pod.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    fn scarce(&self) -> Scarce {
        match self.why.load(Ordering::Relaxed) {
            why if why == Scarce::Files as u8 => Scarce::Files,
            why if why == Scarce::Memory as u8 => Scarce::Memory,
            _ => Scarce::Connections,
        }
    }

    /// Takes account of the machine. Files that are no connections are other pods' listeners, tunnels and the rest.
    pub fn take_account(&self, look: Look) {
        let open = self.open.load(Ordering::Relaxed);
        let (mut scarce_at, mut full_at, mut why) = (share(self.max, 80), self.max, Scarce::Connections);
        if let Some((used, max)) = look.files {
            let others = used.saturating_sub(FILES * open as u64);
            let room = |percent: u64| {
                usize::try_from((max * percent / 100).saturating_sub(others) / FILES).unwrap_or(usize::MAX)
            };
            full_at = full_at.min(room(95));
            if room(80) < scarce_at {
                (scarce_at, why) = (room(80), Scarce::Files);
            }
        }
        if look.memory.is_some_and(|(used, max)| used > max / 100 * 80) {
            (scarce_at, why) = (0, Scarce::Memory);
        }
        if look.memory.is_some_and(|(used, max)| used > max / 100 * 95) {
            full_at = 0;
        }
        self.why.store(why as u8, Ordering::Relaxed);
        self.scarce_at.store(scarce_at, Ordering::Relaxed);
        self.full_at.store(full_at, Ordering::Relaxed);
    }

    /// Looks at files and memory again and again.
    pub async fn watch(&self) {
        let max_files = limits::raise_open_files();
        let memory = limits::Memory::of_process();
        loop {
            // Beside the runtime: a hundred thousand take a while to count.
            let files = beside(limits::open_files).await.flatten().map(|open| (open as u64, max_files));
            self.take_account(Look { files, memory: memory.as_ref().and_then(limits::Memory::now) });
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn share(of: usize, percent: usize) -> usize {
    of.saturating_mul(percent).div_ceil(100).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_consumer_waits_first_and_all_others_go_on() {
        let budget = Arc::new(Budget::new(100));
        let [greedy, modest, third] = [(); 3].map(|()| Count::default());
        for pod in [&greedy, &greedy, &modest, &third] {
            budget.join(pod);
        }
        let mut held: Vec<Open> = (0..5).map(|_| budget.open(&modest).unwrap()).collect();
        let mut refused = None;
        for _ in 0..200 {
            match budget.open(&greedy) {
                Ok(open) => held.push(open),
                Err(failure) => refused = Some(failure),
            }
        }
        assert_eq!((greedy.load(Ordering::Relaxed), modest.load(Ordering::Relaxed)), (75, 5));
        assert!(
            matches!(refused, Some(Failure::Largest { own: 75, all: 80, scarce: Scarce::Connections })),
            "{refused:?}"
        );
        for _ in 0..20 {
            held.push(budget.open(&modest).unwrap());
        }
        assert!(matches!(budget.open(&third), Err(Failure::Limit(100))));
        held.clear();
        assert_eq!((greedy.load(Ordering::Relaxed), budget.open.load(Ordering::Relaxed)), (0, 0));
        assert!(budget.open(&greedy).is_ok(), "it recovers alone");
    }

    #[test]
    fn files_and_memory_count() {
        let budget = Arc::new(Budget::new(1000));
        let (one, other) = (Count::default(), Count::default());
        budget.join(&one);
        budget.join(&other);
        let held: Vec<Open> = (0..10).map(|_| budget.open(&one).unwrap()).collect();
        // 800 files for all, 780 of them are others': room for 10 connections.
        budget.take_account(Look { files: Some((800, 1000)), memory: None });
        assert!(matches!(budget.open(&one), Err(Failure::Largest { scarce: Scarce::Files, .. })));
        assert!(budget.open(&other).is_ok());
        budget.take_account(Look { files: Some((990, 1000)), memory: None });
        assert!(matches!(budget.open(&other), Err(Failure::Limit(_))));
        budget.take_account(Look { files: Some((30, 1000)), memory: Some((7900, 10_000)) });
        assert!(budget.open(&one).is_ok());
        budget.take_account(Look { files: Some((30, 1000)), memory: Some((8100, 10_000)) });
        assert!(matches!(budget.open(&one), Err(Failure::Largest { scarce: Scarce::Memory, .. })));
        assert!(budget.open(&other).is_ok());
        budget.take_account(Look::default());
        assert!(budget.open(&one).is_ok());
        drop(held);
    }
}
