//! How many connections to a service may be tried on another endpoint: a fifth of the connections of the last seconds,
//! and a few more, so that services with little traffic are not left without.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Length of a window in milliseconds. The current one and the one before it count.
const WINDOW: u64 = 10_000;

/// One retry is allowed for this many connections.
const CONNECTIONS_OF_A_RETRY: u64 = 5;

/// Retries that are allowed in two windows whatever the number of connections.
const RESERVE: u64 = 10;

/// Counts the connections and retries to one service. Times are milliseconds from any beginning.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// When the current window began.
    began: AtomicU64,
    /// Connections of the current window.
    connections: AtomicU64,
    windows: Mutex<Windows>,
}

#[derive(Debug, Default)]
struct Windows {
    /// Connections of the window before.
    connections_before: u64,
    retries: u64,
    retries_before: u64,
}

impl RetryBudget {
    /// Counts a connection.
    pub fn connection(&self, now: u64) {
        self.turn(now);
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry, if there is one left.
    pub fn take(&self, now: u64) -> bool {
        self.turn(now);
        let mut windows = self.windows.lock();
        let connections = windows.connections_before + self.connections.load(Ordering::Relaxed);
        let allowed = RESERVE + connections / CONNECTIONS_OF_A_RETRY;
        let is_left = windows.retries + windows.retries_before < allowed;
        windows.retries += u64::from(is_left);
        is_left
    }

    /// Begins a new window if the current one is over.
    fn turn(&self, now: u64) {
        if now.saturating_sub(self.began.load(Ordering::Relaxed)) < WINDOW {
            return;
        }
        let mut windows = self.windows.lock();
        let over = now.saturating_sub(self.began.load(Ordering::Relaxed)) / WINDOW;
        if over == 0 {
            return;
        }
        let (connections, retries) = (self.connections.swap(0, Ordering::Relaxed), windows.retries);
        let (connections_before, retries_before) = if over == 1 { (connections, retries) } else { (0, 0) };
        *windows = Windows { connections_before, retries: 0, retries_before };
        self.began.fetch_add(over * WINDOW, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_quiet_service_has_the_reserve_and_a_busy_one_a_fifth() {
        let budget = RetryBudget::default();
        let taken = |now| (0..10_000).filter(|_| budget.take(now)).count();
        budget.connection(5);
        assert_eq!(taken(5), 10);
        (0..1000).for_each(|_| budget.connection(6));
        assert_eq!(taken(7), 200);
        assert_eq!(taken(WINDOW + 1), 0, "the window before counts");
        assert_eq!(taken(3 * WINDOW), 10, "what is long ago does not");
    }

    proptest! {
        #[test]
        fn retries_are_never_a_storm(steps in prop::collection::vec((0..3000u64, 0..30u32), 1..200)) {
            let (budget, mut now, mut connections, mut retries) = (RetryBudget::default(), 0, 0u64, 0u64);
            for (pause, many) in steps {
                now += pause;
                for _ in 0..many {
                    budget.connection(now);
                    connections += 1;
                    // Every connection fails, and is tried on another endpoint twice.
                    retries += u64::from(budget.take(now)) + u64::from(budget.take(now));
                }
            }
            prop_assert!(retries <= connections / 5 + RESERVE * (1 + now / WINDOW), "{retries} for {connections}");
        }
    }
}
