//! Turns of scrapers: how often one source may read the metrics. Each has its own, so that none can use up another's.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// A source may scrape once in this time on average.
const EACH: Duration = Duration::from_secs(1);

/// And this often at once, for several scrapers behind one address.
const AT_ONCE: u32 = 5;

/// Maximum number of sources that are known at a time. They are forgotten after a few seconds. Beyond that, sources that
/// come are not limited: whoever has that many addresses must not keep others out.
const SOURCES_MAX: usize = 4096;

/// The turns of all sources.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<IpAddr, Instant>>);

impl Turns {
    /// Takes a turn, or says how long to wait for the next one. Scrapers on this machine, by loopback, always have one.
    pub(super) fn take(&self, source: IpAddr) -> Result<(), Duration> {
        if source.to_canonical().is_loopback() {
            return Ok(());
        }
        let (source, now) = (source.to_canonical(), Instant::now());
        let mut sources = self.0.lock();
        if sources.len() >= SOURCES_MAX && !sources.contains_key(&source) {
            sources.retain(|_, used_up_to| *used_up_to > now);
            if sources.len() >= SOURCES_MAX {
                return Ok(());
            }
        }
        // Each turn uses up some time. What is used up may be ahead of the clock by all turns at once but one.
        let used_up_to = sources.entry(source).or_insert(now);
        let ahead = used_up_to.saturating_duration_since(now);
        let most = EACH * (AT_ONCE - 1);
        if ahead > most {
            return Err(ahead - most);
        }
        *used_up_to = now + ahead + EACH;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn each_source_has_its_own_turns() {
        let turns = Turns::default();
        let (busy, other) = (address("10.0.0.1"), address("10.0.0.2"));
        assert_eq!((0..100).filter(|_| turns.take(busy).is_ok()).count(), AT_ONCE as usize);
        assert_eq!(turns.take(busy), Err(EACH), "it says when to come again");
        assert_eq!(turns.take(other), Ok(()), "another one's turns are not used up");
        tokio::time::advance(EACH).await;
        assert_eq!((turns.take(busy), turns.take(busy)), (Ok(()), Err(EACH)), "one comes back each second");
        tokio::time::advance(EACH * 100).await;
        assert_eq!(
            (0..100).filter(|_| turns.take(busy).is_ok()).count(),
            AT_ONCE as usize,
            "and not more than at first"
        );
        assert!((0..100).all(|_| turns.take(address("127.0.0.1")).is_ok() && turns.take(address("::1")).is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn many_sources_use_bounded_memory_and_are_forgotten() {
        let turns = Turns::default();
        let one_of_many = |n: u32| IpAddr::from((0x0a00_0000 + n).to_be_bytes());
        assert!((0..10_000).all(|n| turns.take(one_of_many(n)).is_ok()));
        assert_eq!(turns.0.lock().len(), SOURCES_MAX);
        tokio::time::advance(EACH * 2).await;
        assert_eq!(turns.take(one_of_many(9_999)), Ok(()));
        assert_eq!(turns.0.lock().len(), 1);
    }
}
