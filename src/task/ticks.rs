//! A timer that many tasks share.

use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(100);

/// Ticks for tasks that rarely wait long enough to see one. A timer of their own would cost each of them a wake-up of the
/// runtime; this one is set once for all that begin to wait within a tick, and not while none does.
#[derive(Debug, Default)]
pub struct Ticks {
    wanted: Notify,
    tick: Notify,
}

impl Ticks {
    /// Completes at the next tick.
    pub fn next(&self) -> Notified<'_> {
        self.wanted.notify_one();
        self.tick.notified()
    }

    /// Ticks for as long as it is awaited.
    pub async fn run(&self) {
        loop {
            self.wanted.notified().await;
            tokio::time::sleep(TICK).await;
            self.tick.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn those_that_wait_share_a_tick_and_later_ones_see_the_next() {
        let (ticks, start) = (Ticks::default(), Instant::now());
        let waits = async {
            tokio::join!(ticks.next(), ticks.next());
            assert_eq!(start.elapsed(), TICK);
            ticks.next().await;
            assert_eq!(start.elapsed(), 2 * TICK);
        };
        tokio::select! {
            () = waits => {}
            () = ticks.run() => unreachable!("it ticks for as long as it is awaited"),
        }
    }
}
