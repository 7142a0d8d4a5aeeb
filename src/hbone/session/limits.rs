//! How much work a peer may cause that carries no bytes. Every limit grows again with time or with what this node asks
//! for, so no long-lived tunnel uses one up.

use tokio::time::Instant;

/// Control frames that a peer may send at once, beyond those that our own frames call for.
const CONTROL_BURST: u64 = 20_000;

/// The rate at which this allowance grows again, per second.
const CONTROL_PER_SECOND: u64 = 2_000;

/// Streams that a peer may open and reset, or break the rules of, before they were answered.
const RESET_BURST: u64 = 1_000;

/// The rate at which this allowance grows again, per second.
const RESET_PER_SECOND: u64 = 200;

/// DATA frames without payload that do not end a stream. There is no use for them.
const EMPTY_BURST: u64 = 1_000;

/// The rate at which this allowance grows again, per second.
const EMPTY_PER_SECOND: u64 = 10;

/// An allowance that is used up by events and grows again with time.
#[derive(Debug)]
pub struct Allowance {
    left: u64,
    most: u64,
    per_second: u64,
    since: Instant,
}

impl Allowance {
    fn new(most: u64, per_second: u64) -> Self {
        Self { left: most, most, per_second, since: Instant::now() }
    }

    /// The allowance for control frames.
    pub fn control() -> Self {
        Self::new(CONTROL_BURST, CONTROL_PER_SECOND)
    }

    /// The allowance for streams that are reset before they were answered.
    pub fn resets() -> Self {
        Self::new(RESET_BURST, RESET_PER_SECOND)
    }

    /// The allowance for empty DATA frames.
    pub fn empty() -> Self {
        Self::new(EMPTY_BURST, EMPTY_PER_SECOND)
    }

    /// Adds to the allowance.
    pub fn earn(&mut self, events: u64) {
        self.left = self.left.saturating_add(events).min(self.most);
    }

    /// Takes one event off; `false` if the allowance is used up.
    pub fn take(&mut self) -> bool {
        if self.left == 0 {
            let passed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
            let earned = passed.saturating_mul(self.per_second) / 1000;
            if earned > 0 {
                self.since = Instant::now();
                self.earn(earned);
            }
        }
        let enough = self.left > 0;
        self.left = self.left.saturating_sub(1);
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn an_allowance_ends_and_grows_again() {
        let mut allowance = Allowance::new(10, 2);
        assert_eq!((0..20).filter(|_| allowance.take()).count(), 10);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!((0..20).filter(|_| allowance.take()).count(), 4);
        allowance.earn(100);
        assert_eq!((0..20).filter(|_| allowance.take()).count(), 10, "never more than at the beginning");
    }
}
