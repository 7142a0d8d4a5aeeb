//! Pods that are not enrolled any more, for instance because their label was removed, and stay captured for a moment.
//! Their annotation goes at once, but peers learn of that from the control plane, and open tunnels to the pod until
//! then. A pod that has ended, or whose sandbox has, leaves at once: nothing calls it any more.

use super::annotate::ENABLED;
use super::facts::PodFacts;
use crate::mesh::Text;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// How long a pod stays after its annotation has gone. A control plane takes a few tenths of a second to tell the peers.
const LINGER: Duration = Duration::from_secs(1);
/// How long it stays at most, even if its annotation cannot be removed.
const LINGER_MAX: Duration = Duration::from_secs(5);

/// The pods that stay captured for a moment.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    pods: HashMap<Text, Leave>,
}

/// When a pod began to leave.
#[derive(Debug)]
struct Leave {
    /// When it was no longer enrolled.
    began: Instant,
    /// When the API still said that it is captured.
    told: Instant,
}

impl Leave {
    fn ends(&self) -> Instant {
        (self.told + LINGER).min(self.began + LINGER_MAX)
    }
}

impl Lingering {
    /// Of the pods in `captured`, those that stay for now although they are not in `wanted`. `pods`: all pods of the
    /// API. A pod that a call does not name is forgotten.
    pub(super) fn update<'a>(
        &mut self,
        captured: impl Iterator<Item = &'a Text>,
        wanted: &HashSet<&Text>,
        pods: &'a HashMap<Text, PodFacts>,
    ) -> Vec<&'a PodFacts> {
        let now = Instant::now();
        let mut before = std::mem::take(&mut self.pods);
        let mut staying = Vec::new();
        let left = captured.filter(|uid| !wanted.contains(uid)).filter_map(|uid| pods.get(uid));
        for pod in left.filter(|pod| !pod.ended) {
            let mut leave = before.remove(&pod.uid).unwrap_or(Leave { began: now, told: now });
            if pod.annotation() == Some(ENABLED) {
                leave.told = now;
            }
            if now < leave.ends() {
                self.pods.insert(pod.uid.clone(), leave);
                staying.push(pod);
            }
        }
        staying
    }

    /// Whether a pod stays for now.
    pub(super) fn contains(&self, uid: &Text) -> bool {
        self.pods.contains_key(uid)
    }

    /// Waits until a pod may have stayed long enough; [`Self::update`] says so.
    pub(super) async fn due(&self) {
        match self.pods.values().map(Leave::ends).min() {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotation: Option<&str>) -> PodFacts {
        PodFacts { uid: "a".into(), status_annotation: annotation.map(Text::from), ..PodFacts::default() }
    }

    fn stays(lingering: &mut Lingering, enrolled: bool, pod: Option<PodFacts>) -> bool {
        let uid = Text::from("a");
        let pods: HashMap<Text, PodFacts> = pod.into_iter().map(|pod| (uid.clone(), pod)).collect();
        let wanted = if enrolled { HashSet::from([&uid]) } else { HashSet::new() };
        let is_there = lingering.update([&uid].into_iter(), &wanted, &pods).len() == 1;
        assert_eq!(lingering.contains(&uid), is_there);
        is_there
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_stays_a_moment_longer_than_its_annotation_and_not_for_ever() {
        let just_before = |time: Duration| time - Duration::from_millis(1);
        let mut lingering = Lingering::default();
        assert!(!stays(&mut lingering, true, Some(pod(Some(ENABLED)))), "it is enrolled");
        assert!(stays(&mut lingering, false, Some(pod(Some(ENABLED)))));
        tokio::time::advance(just_before(LINGER)).await;
        assert!(stays(&mut lingering, false, Some(pod(Some(ENABLED)))), "its annotation is still there");
        tokio::time::advance(just_before(LINGER)).await;
        assert!(stays(&mut lingering, false, Some(pod(None))), "the moment begins when the annotation goes");
        let begun = Instant::now();
        lingering.due().await;
        assert!(begun.elapsed() <= Duration::from_millis(2), "then it is time");
        assert!(!stays(&mut lingering, false, Some(pod(None))));
        // The annotation cannot be removed.
        let mut lingering = Lingering::default();
        let begun = Instant::now();
        while stays(&mut lingering, false, Some(pod(Some(ENABLED)))) {
            lingering.due().await;
            assert!(begun.elapsed() <= LINGER_MAX + Duration::from_millis(10));
        }
        assert!(begun.elapsed() >= LINGER_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_enrolled_again_leaves_later_by_a_time_of_its_own() {
        let mut lingering = Lingering::default();
        assert!(stays(&mut lingering, false, Some(pod(None))));
        tokio::time::advance(LINGER / 2).await;
        assert!(!stays(&mut lingering, true, Some(pod(None))));
        tokio::time::advance(LINGER / 2).await;
        assert!(stays(&mut lingering, false, Some(pod(None))), "not by the time of the first leave");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_or_has_ended_or_has_lost_its_sandbox_does_not_stay() {
        let ended = PodFacts { ended: true, ..pod(Some(ENABLED)) };
        for then in [None, Some(ended)] {
            let mut lingering = Lingering::default();
            assert!(stays(&mut lingering, false, Some(pod(Some(ENABLED)))));
            assert!(!stays(&mut lingering, false, then));
        }
        let mut lingering = Lingering::default();
        assert!(stays(&mut lingering, false, Some(pod(Some(ENABLED)))));
        let pods = HashMap::from([("a".into(), pod(Some(ENABLED)))]);
        assert!(lingering.update(std::iter::empty(), &HashSet::new(), &pods).is_empty());
        assert!(!lingering.contains(&"a".into()));
    }
}
