//! How much large transfers move through a tunnel, so that new streams can avoid one that is busy with them.

use std::time::Duration;
use tokio::time::Instant;

/// Time over which the rate is measured.
const PERIOD: Duration = Duration::from_millis(50);

/// Bytes per period from which a tunnel is busy: 128 Mbit/s.
const BUSY_BYTES: usize = 800 * 1024;

/// The rate of large transfers.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    begun: Instant,
    bytes: usize,
    /// Bytes of the period before.
    before: usize,
}

impl Rate {
    /// Nothing has moved yet.
    pub fn new() -> Self {
        Self { begun: Instant::now(), bytes: 0, before: 0 }
    }

    /// Counts bytes that moved now.
    pub fn count(&mut self, bytes: usize, now: Instant) {
        self.turn_over(now);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Whether large transfers keep the tunnel busy.
    pub fn is_busy(&mut self, now: Instant) -> bool {
        self.turn_over(now);
        self.before.max(self.bytes) >= BUSY_BYTES
    }

    fn turn_over(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.begun);
        if passed >= PERIOD {
            self.before = if passed < 2 * PERIOD { self.bytes } else { 0 };
            (self.begun, self.bytes) = (now, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_is_busy_while_much_moves_and_for_a_moment_after() {
        let mut rate = Rate::new();
        rate.count(BUSY_BYTES / 2, Instant::now());
        assert!(!rate.is_busy(Instant::now()));
        rate.count(BUSY_BYTES / 2, Instant::now());
        assert!(rate.is_busy(Instant::now()));
        tokio::time::advance(PERIOD).await;
        assert!(rate.is_busy(Instant::now()));
        tokio::time::advance(2 * PERIOD).await;
        assert!(!rate.is_busy(Instant::now()));
    }
}
