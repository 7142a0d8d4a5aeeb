//! How many certificates one caller may ask for.
//!
//! Each costs a signature here, or with cert-manager an object of the Kubernetes API, which stays there for a while.

use crate::mesh::Text;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// The time for which callers are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Most certificates in that time: for a daemon, which needs one for each service account of its pods, and for a pod.
const OF_DAEMON: u32 = 1_000;
const OF_POD: u32 = 10;

/// Counts what callers ask for. Only callers that are running pods are counted, so there are no more than these.
#[derive(Debug, Default)]
pub struct Quota(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Since when, and how often, by the caller's uid.
    of: HashMap<Text, (Instant, u32)>,
    /// When there are this many, those of whom nothing counts any more are forgotten.
    room: usize,
}

impl Quota {
    /// Counts one. Whether the caller may have it.
    pub fn take(&self, caller: &Text, is_daemon: bool) -> bool {
        let (now, most) = (Instant::now(), if is_daemon { OF_DAEMON } else { OF_POD });
        let is_over = |since: Instant| now.duration_since(since) >= WINDOW;
        let mut counts = self.0.lock();
        if counts.of.len() >= counts.room.max(1_000) {
            counts.of.retain(|_, (since, _)| !is_over(*since));
            counts.room = 2 * counts.of.len();
        }
        let (since, count) = counts.of.entry(caller.clone()).or_insert((now, 0));
        if is_over(*since) {
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        *count <= most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_asks_too_often_waits_and_nobody_else_does() {
        let quota = Quota::default();
        let granted = |caller: &str, is_daemon: bool| {
            let caller = caller.into();
            (0..2_000).filter(|_| quota.take(&caller, is_daemon)).count()
        };
        assert_eq!((granted("pod", false), granted("other", false), granted("daemon", true)), (10, 10, 1_000));
        tokio::time::advance(WINDOW / 2).await;
        assert_eq!((granted("pod", false), granted("third", false)), (0, 10));
        tokio::time::advance(WINDOW / 2).await;
        assert_eq!((granted("pod", false), granted("third", false)), (10, 0));
        for n in 0..10_000 {
            assert!(quota.take(&n.to_string().as_str().into(), false));
            tokio::time::advance(WINDOW / 100).await;
        }
        assert!(quota.0.lock().of.len() <= 1_000, "those who asked long ago are forgotten");
    }
}
