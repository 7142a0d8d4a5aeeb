//! A bounded list of the latest entries of a kind. Entries are pushed by threads that have other things to do, so a push
//! costs one short lock and formats nothing. Readers take the entries out in small parts, and look at them afterwards.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Entries that a reader takes while it holds the lock.
const PART: usize = 256;

/// How much a ring may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Entries. With 0 nothing is kept.
    pub entries: usize,
    /// Bytes of all entries together, as those who push count them.
    pub bytes: usize,
}

/// The latest entries. What is too old for the bounds is dropped.
#[derive(Debug)]
pub struct Ring<T> {
    bounds: Bounds,
    held: Mutex<Held<T>>,
}

#[derive(Debug)]
struct Held<T> {
    entries: VecDeque<(Arc<T>, usize)>,
    bytes: usize,
    dropped: u64,
}

impl<T> Ring<T> {
    /// An empty ring.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, held: Mutex::new(Held { entries: VecDeque::new(), bytes: 0, dropped: 0 }) }
    }

    /// Whether it keeps anything at all.
    pub fn is_on(&self) -> bool {
        self.bounds.entries > 0
    }

    /// Adds an entry of so many bytes.
    pub fn push(&self, entry: impl Into<Arc<T>>, bytes: usize) {
        if !self.is_on() {
            return;
        }
        let entry = entry.into();
        let mut gone = {
            let mut held = self.held.lock();
            held.entries.push_back((entry, bytes));
            held.bytes += bytes;
            held.excess(self.bounds)
        };
        // What an entry holds is released without the lock.
        while gone.is_some() {
            drop(gone);
            gone = self.held.lock().excess(self.bounds);
        }
    }

    /// Entries that were dropped because of later ones.
    pub fn dropped(&self) -> u64 {
        self.held.lock().dropped
    }

    /// The oldest entry.
    pub fn oldest(&self) -> Option<Arc<T>> {
        self.held.lock().entries.front().map(|(entry, _)| entry.clone())
    }

    /// Up to `limit` entries for which `keep` says so, the newest first. The lock is held for a small part at a time, and
    /// not while `keep` looks at an entry.
    pub fn newest(&self, limit: usize, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let (mut kept, mut before) = (Vec::new(), None);
        loop {
            let (part, first) = self.held.lock().part(before);
            if part.is_empty() {
                return kept;
            }
            before = Some(first);
            for entry in part.into_iter().filter(|entry| keep(entry)) {
                if kept.len() >= limit {
                    return kept;
                }
                kept.push(entry);
            }
        }
    }
}

impl<T> Held<T> {
    /// Takes out the oldest entry, if there is too much.
    fn excess(&mut self, bounds: Bounds) -> Option<Arc<T>> {
        if self.entries.len() <= bounds.entries && self.bytes <= bounds.bytes {
            return None;
        }
        let (entry, bytes) = self.entries.pop_front()?;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.dropped += 1;
        Some(entry)
    }

    /// The newest entries before the number `before`, the newest first, and the number of the oldest of them. Entries are
    /// numbered in the order in which they were pushed.
    fn part(&self, before: Option<u64>) -> (Vec<Arc<T>>, u64) {
        let first = self.dropped;
        let end = before.map_or(self.entries.len(), |before| {
            usize::try_from(before.saturating_sub(first)).unwrap_or(usize::MAX).min(self.entries.len())
        });
        let begin = end.saturating_sub(PART);
        let part = self.entries.range(begin..end).rev().map(|(entry, _)| entry.clone()).collect();
        (part, first + begin as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(ring: &Ring<usize>) -> Vec<usize> {
        ring.newest(usize::MAX, |_| true).into_iter().map(|entry| *entry).collect()
    }

    #[test]
    fn a_ring_keeps_the_latest_within_both_bounds_and_counts_the_rest() {
        let ring = Ring::new(Bounds { entries: 1_000, bytes: 10_000 });
        (0..5_000).for_each(|n| ring.push(n, 1));
        assert_eq!((all(&ring), ring.dropped()), ((4_000..5_000).rev().collect(), 4_000));
        assert_eq!(ring.oldest().as_deref(), Some(&4_000));
        (5_000..5_010).for_each(|n| ring.push(n, 1_000));
        assert_eq!((all(&ring), ring.dropped()), ((5_000..5_010).rev().collect(), 5_000), "bytes");
        ring.push(5_010, 10_001);
        assert_eq!((all(&ring), ring.dropped()), (Vec::new(), 5_011), "one that is too large by itself");
        assert_eq!(ring.newest(3, |_| true).len(), 0);
    }

    #[test]
    fn readers_get_the_newest_that_they_want() {
        let ring = Ring::new(Bounds { entries: 1_000, bytes: 10_000 });
        (0..1_000).for_each(|n| ring.push(n, 1));
        let even = |limit| ring.newest(limit, |n| n % 2 == 0).into_iter().map(|n| *n).collect::<Vec<_>>();
        assert_eq!(even(3), [998, 996, 994]);
        assert_eq!(even(usize::MAX).len(), 500);
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let ring = Ring::new(Bounds { entries: 0, bytes: 10_000 });
        ring.push(1, 1);
        assert_eq!((all(&ring), ring.dropped()), (Vec::new(), 0));
    }
}
