//! Failures of the last minutes by direction and reason, for people who look at a node now. The metrics count for as
//! long as the process lives, and say nothing about when.
//!
//! Counting is one atomic operation: there is a counter for each direction, reason and interval of time, and a counter
//! whose interval is over is begun anew by whoever counts next.

use super::direction::Direction;
use super::reason::Reason;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far back failures are counted.
pub const WINDOW: Duration = Duration::from_secs(300);

/// Length of an interval: how exactly the window ends.
const INTERVAL_SECONDS: u64 = 10;

/// Intervals of the window, with the one that is not over yet.
const INTERVALS: usize = 31;

/// Directions of a connection.
const DIRECTIONS: [Direction; 2] = [Direction::Outbound, Direction::Inbound];

/// Failed and refused connections of the last minutes.
#[derive(Debug)]
pub struct RecentFailures {
    start: Instant,
    /// By direction, reason and interval: the number of the interval in the upper half, the count in the lower one.
    counts: Box<[AtomicU64]>,
}

/// How many connections failed for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureCount {
    /// Direction of the connections.
    pub direction: Direction,
    /// Why they failed.
    pub reason: Reason,
    /// How many there were.
    pub count: u64,
}

impl Default for RecentFailures {
    fn default() -> Self {
        let size = DIRECTIONS.len() * Reason::ALL.len() * INTERVALS;
        Self { start: Instant::now(), counts: (0..size).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl RecentFailures {
    /// Counts a failure.
    pub fn count(&self, direction: Direction, reason: Reason) {
        self.count_in(direction, reason, self.interval());
    }

    /// The failures of the last [`WINDOW`], the most frequent first.
    pub fn list(&self) -> Vec<FailureCount> {
        self.list_at(self.interval())
    }

    /// The number of the current interval. The first one is 1, so that no count of it looks like none.
    fn interval(&self) -> u64 {
        self.start.elapsed().as_secs() / INTERVAL_SECONDS + 1
    }

    fn count_in(&self, direction: Direction, reason: Reason, interval: u64) {
        let at = first(direction, reason) + usize::try_from(interval).unwrap_or(0) % INTERVALS;
        let Some(cell) = self.counts.get(at) else { return };
        let counted = |before: u64| {
            let (its, count) = (before >> 32, before & u64::from(u32::MAX));
            // A thread that was late may not undo what a later interval has begun.
            let of_now = if its > interval { return None } else { its == interval };
            let count = if of_now { (count + 1).min(u64::from(u32::MAX)) } else { 1 };
            Some(interval << 32 | count)
        };
        // Fails only for a thread that was late by a whole window.
        let _ = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted);
    }

    fn list_at(&self, interval: u64) -> Vec<FailureCount> {
        let oldest = (interval + 1).saturating_sub(INTERVALS as u64);
        let mut all = Vec::new();
        for direction in DIRECTIONS {
            for reason in Reason::ALL.iter().copied() {
                let cells = self.counts.iter().skip(first(direction, reason)).take(INTERVALS);
                let values = cells.map(|cell| cell.load(Ordering::Relaxed));
                let count = values.filter(|value| value >> 32 >= oldest).map(|value| value & u64::from(u32::MAX)).sum();
                if count > 0 {
                    all.push(FailureCount { direction, reason, count });
                }
            }
        }
        all.sort_by_key(|one| std::cmp::Reverse(one.count));
        all
    }
}

/// Where the counters of a direction and reason begin.
fn first(direction: Direction, reason: Reason) -> usize {
    (direction as usize * Reason::ALL.len() + reason as usize) * INTERVALS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_for_the_window_and_forgotten_after_it() {
        let recent = RecentFailures::default();
        let refused = |count| FailureCount { direction: Direction::Inbound, reason: Reason::Denied, count };
        let drained = FailureCount { direction: Direction::Outbound, reason: Reason::Drained, count: 3 };
        assert_eq!(recent.list_at(1), []);
        for _ in 0..2 {
            recent.count_in(Direction::Inbound, Reason::Denied, 1);
        }
        for interval in [2, 30, 31] {
            recent.count_in(Direction::Outbound, Reason::Drained, interval);
        }
        assert_eq!(recent.list_at(31), [drained, refused(2)], "the whole window, the most frequent first");
        assert_eq!(recent.list_at(32), [drained], "the oldest interval is over");
        recent.count_in(Direction::Inbound, Reason::Denied, 32);
        assert_eq!(recent.list_at(32), [drained, refused(1)], "its counter is begun anew");
        recent.count_in(Direction::Inbound, Reason::Denied, 1);
        assert_eq!(recent.list_at(32), [drained, refused(1)], "a late thread changes nothing");
        assert_eq!(recent.list_at(100), []);
    }

    #[test]
    fn threads_count_together() {
        let recent = RecentFailures::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| recent.count_in(Direction::Outbound, Reason::Connect, 5)));
            }
        });
        assert_eq!(recent.list_at(5).iter().map(|one| one.count).sum::<u64>(), 4000);
    }
}
