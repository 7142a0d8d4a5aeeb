//! What is said of something that is away: that it is, again while it stays away, and that it is back.

use std::time::Duration;
use tokio::time::Instant;

/// Time between log lines while it stays away.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Something that may be away.
#[derive(Debug, Default)]
pub struct Outage {
    /// Since when it has been away, and when that was said last.
    away: Option<(Instant, Instant)>,
}

impl Outage {
    /// It has failed. `Some(time)` if that is to be said now: it has been away for this time.
    pub fn failed(&mut self) -> Option<Duration> {
        let now = Instant::now();
        match &mut self.away {
            Some((_, said)) if now.duration_since(*said) < SAY_AGAIN => None,
            away => {
                let since = away.map_or(now, |(since, _)| since);
                *away = Some((since, now));
                Some(now.duration_since(since))
            }
        }
    }

    /// It works. `Some(time)` if it was away before, for this time.
    pub fn over(&mut self) -> Option<Duration> {
        self.away.take().map(|(since, _)| since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_said_once_a_minute_and_its_end_once() {
        let mut outage = Outage::default();
        let second = Duration::from_secs(1);
        assert_eq!((outage.over(), outage.failed(), outage.failed()), (None, Some(Duration::ZERO), None));
        advance(SAY_AGAIN - second).await;
        assert_eq!(outage.failed(), None);
        advance(second).await;
        assert_eq!((outage.failed(), outage.failed()), (Some(SAY_AGAIN), None));
        advance(second).await;
        assert_eq!((outage.over(), outage.over()), (Some(SAY_AGAIN + second), None));
        assert_eq!(outage.failed(), Some(Duration::ZERO), "another one is said at once");
    }
}
