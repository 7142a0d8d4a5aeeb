//! Detects pods that are Ready before their status annotation says that they are captured: peers that call such a pod
//! send plaintext. Each pod is counted once, and logged once, as soon as the log's rate limit allows.

use super::facts::PodFacts;
use crate::mesh::Text;
use crate::telemetry::limit::LogLimit;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::time::Instant;

/// How long a pod that was Ready before it was enrolled may be captured without the annotation. It was labelled late,
/// or this daemon has just started.
const GRACE: Duration = Duration::from_secs(10);

/// The enrolled pods, as far as they have been checked.
#[derive(Debug, Default)]
pub(super) struct ReadyBeforeEnabled {
    seen: HashMap<Text, PodRecord>,
}

#[derive(Debug)]
struct PodRecord {
    /// Whether the pod was Ready when it was first seen.
    was_ready: bool,
    captured_since: Option<Instant>,
    counted: bool,
    named: bool,
}

/// What to do about a pod now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Finding {
    /// Count it.
    pub(super) count: bool,
    /// Log it.
    pub(super) name: bool,
}

impl ReadyBeforeEnabled {
    /// Checks an enrolled pod. `told`: the API says that it is captured. `room`: whether the log takes a line now; if
    /// not, the pod is logged at a later check, whatever its state by then.
    pub(super) fn check(&mut self, pod: &PodFacts, captured: bool, told: bool, room: impl FnOnce() -> bool) -> Finding {
        let begun = || PodRecord { was_ready: pod.ready, captured_since: None, counted: false, named: false };
        let seen = self.seen.entry(pod.uid.clone()).or_insert_with(begun);
        seen.captured_since = captured.then(|| seen.captured_since.unwrap_or_else(Instant::now));
        let grace = if seen.was_ready { GRACE } else { Duration::ZERO };
        let waited = seen.captured_since.is_some_and(|since| since.elapsed() >= grace);
        let count = pod.ready && !told && waited && !seen.counted;
        seen.counted |= count;
        let name = seen.counted && !seen.named && room();
        seen.named |= name;
        Finding { count, name }
    }

    /// Forgets pods that are not enrolled any more.
    pub(super) fn retain(&mut self, is_in: impl Fn(&Text) -> bool) {
        self.seen.retain(|uid, _| is_in(uid));
    }
}

/// Whether the log's rate limit allows another line.
pub(super) fn room() -> bool {
    static LIMIT: LazyLock<LogLimit> = LazyLock::new(LogLimit::default);
    LIMIT.allow().is_some()
}

/// Logs a pod.
pub(super) fn name(pod: &PodFacts) {
    let (namespace, name) = (&*pod.namespace, &*pod.name);
    tracing::warn!(
        namespace,
        name,
        "the pod was Ready before its status annotation said enabled: peers that called it until then may have sent plaintext"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_ready_first_is_logged_once_and_one_that_is_labelled_late_has_a_grace_period() {
        let pod = |uid: &str, ready| PodFacts { uid: uid.into(), ready, ..PodFacts::default() };
        let mut all = ReadyBeforeEnabled::default();
        let mut is_late =
            |pod: &PodFacts, captured, told| all.check(pod, captured, told, || true) != Finding::default();
        assert!(!is_late(&pod("new", false), false, false));
        assert!(!is_late(&pod("new", false), true, false), "it is not Ready");
        assert!(is_late(&pod("new", true), true, false));
        assert!(!is_late(&pod("new", true), true, false), "once");
        assert!(!is_late(&pod("good", false), true, true));
        assert!(!is_late(&pod("good", true), true, true));
        // It was Ready first and captured afterwards: its peers sent plaintext in between.
        assert!(!is_late(&pod("slow", false), false, false));
        assert!(!is_late(&pod("slow", true), false, false), "it is not captured yet");
        assert!(is_late(&pod("slow", true), true, false));
        assert!(!is_late(&pod("labelled", true), true, false));
        tokio::time::advance(GRACE).await;
        assert!(is_late(&pod("labelled", true), true, false), "the annotation is still missing");
        all.retain(|uid| &**uid != "labelled");
        assert_eq!(
            all.check(&pod("labelled", true), true, false, || true),
            Finding::default(),
            "it has been labelled again"
        );
    }

    #[test]
    fn a_pod_is_counted_at_once_and_logged_when_the_rate_limit_allows() {
        let pod = |ready| PodFacts { uid: "a".into(), ready, ..PodFacts::default() };
        let mut late = ReadyBeforeEnabled::default();
        assert_eq!(late.check(&pod(false), true, false, || true), Finding::default());
        assert_eq!(late.check(&pod(true), true, false, || false), Finding { count: true, name: false });
        assert_eq!(late.check(&pod(true), true, false, || false), Finding::default());
        assert_eq!(
            late.check(&pod(true), true, true, || true),
            Finding { count: false, name: true },
            "although the API has it now"
        );
        assert_eq!(late.check(&pod(true), true, false, || true), Finding::default(), "once");
    }
}
