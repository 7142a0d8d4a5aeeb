//! The daemon's check of itself: a captured pod is Ready only when its status annotation says so, or its peers call it in
//! plaintext. Each pod is named once.

use super::select::PodFacts;
use crate::mesh::Text;
use crate::telemetry::limit::LogLimit;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::time::Instant;

/// How long a pod that was Ready before it was in may be captured without the annotation: it is labelled late, or this daemon
/// has just started.
const GRACE: Duration = Duration::from_secs(10);

/// What is known of the pods that are in.
#[derive(Debug, Default)]
pub(super) struct Late {
    seen: HashMap<Text, Seen>,
}

#[derive(Debug)]
struct Seen {
    /// Whether it was Ready when it was seen first.
    was_ready: bool,
    captured_since: Option<Instant>,
    named: bool,
}

impl Late {
    /// Looks at a pod that is in, of which the API has been `told` that it is captured, or has not; whether it is to be named.
    pub(super) fn is_late(&mut self, pod: &PodFacts, captured: bool, told: bool) -> bool {
        let begun = || Seen { was_ready: pod.ready, captured_since: None, named: false };
        let seen = self.seen.entry(pod.uid.clone()).or_insert_with(begun);
        seen.captured_since = captured.then(|| seen.captured_since.unwrap_or_else(Instant::now));
        let grace = if seen.was_ready { GRACE } else { Duration::ZERO };
        let waited = seen.captured_since.is_some_and(|since| since.elapsed() >= grace);
        pod.ready && !told && waited && !std::mem::replace(&mut seen.named, true)
    }

    /// Forgets pods that are not in any more.
    pub(super) fn retain(&mut self, is_in: impl Fn(&Text) -> bool) {
        self.seen.retain(|uid, _| is_in(uid));
    }
}

/// Names one.
pub(super) fn name(pod: &PodFacts) {
    static LIMIT: LazyLock<LogLimit> = LazyLock::new(LogLimit::default);
    let Some(suppressed) = LIMIT.allow() else { return };
    let (namespace, name) = (&*pod.namespace, &*pod.name);
    tracing::warn!(
        namespace,
        name,
        suppressed,
        "the pod was Ready before its status annotation said enabled: peers that called it by then may have sent plaintext"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_ready_first_is_named_once_and_one_that_is_labelled_late_has_a_grace() {
        let pod = |uid: &str, ready| PodFacts { uid: uid.into(), ready, ..PodFacts::default() };
        let mut late = Late::default();
        assert!(!late.is_late(&pod("new", false), false, false));
        assert!(!late.is_late(&pod("new", false), true, false), "it is not Ready");
        assert!(late.is_late(&pod("new", true), true, false));
        assert!(!late.is_late(&pod("new", true), true, false), "once");
        assert!(!late.is_late(&pod("good", false), true, true));
        assert!(!late.is_late(&pod("good", true), true, true));
        // Ready first, captured then: what its peers sent meanwhile was plaintext.
        assert!(!late.is_late(&pod("slow", false), false, false));
        assert!(!late.is_late(&pod("slow", true), false, false), "one that is not captured is another matter");
        assert!(late.is_late(&pod("slow", true), true, false));
        assert!(!late.is_late(&pod("labelled", true), true, false));
        tokio::time::advance(GRACE).await;
        assert!(late.is_late(&pod("labelled", true), true, false), "nobody writes it");
        late.retain(|uid| &**uid != "labelled");
        assert!(!late.is_late(&pod("labelled", true), true, false), "it is labelled anew");
    }
}
