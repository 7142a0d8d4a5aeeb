//! Writes the status annotation of pods to the API when it differs from what it should be. The API returns the
//! annotation with the pods, so only the patches in flight are remembered.

use super::facts::{PodFacts, STATUS};
use super::watch::Metrics;
use crate::mesh::Text;
use crate::node::status::{CaptureState, PodStatus};
use crate::task::Group;
use crate::task::backoff::Backoff;
use crate::telemetry::limit::LogLimit;
use crate::telemetry::log::{brief, with_causes};
use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Deadline of one patch. It is shorter than the CNI plugin's wait for the same pod, so that there is time for a second
/// patch.
const DEADLINE: Duration = Duration::from_secs(5);
/// Most patches in flight.
const AT_ONCE: usize = 16;
/// The same for pods whose start waits for the patch: the other pods leave them room.
const AT_ONCE_AWAITED: usize = 2 * AT_ONCE;
/// First and longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Longest wait after a failure while a pod's start waits: the plugin must learn of an API that is there again.
const AWAITED_MAX: Duration = Duration::from_secs(1);
/// How long to wait for the API to return a value that it has accepted, before it is sent again.
const ECHO: Duration = Duration::from_secs(10);
/// Phrases of the API server for a pod that has another uid, or none: about the patch itself, and about its effect.
const OTHER_UID: [&str; 3] = ["metadata.uid", "uid mismatch", "UID in precondition"];

/// Value of a captured pod.
pub const ENABLED: &str = "enabled";
/// Value of a pod that will be captured, or no longer is.
pub const PENDING: &str = "pending";

/// The value that a pod's annotation should have; `Err` if it should stay as it is.
///
/// A pod that cannot be called yet (`unreachable`) gets no value before `enabled`: an earlier patch would only delay
/// that one.
///
/// A pod is `enabled` from its first capture on, for as long as the daemon accepts its connections. Peers then send
/// HBONE, and would send plaintext if the value went. The mesh need not know the pod yet: it learns of the pod only
/// when the pod has its address, and until then connections from peers wait. A pod that was enabled before the daemon
/// started stays so until its capture is known to fail.
pub fn wanted(status: Option<&PodStatus>, said: Option<&str>, unreachable: bool) -> Result<&'static str, ()> {
    match status {
        Some(PodStatus { state: CaptureState::Captured, .. } | PodStatus { redirected: true, listening: true, .. }) => {
            Ok(ENABLED)
        }
        _ if unreachable && said.is_none() => Err(()),
        Some(PodStatus { state: CaptureState::Failed(_), listening: false, .. }) => Ok(PENDING),
        _ if said.is_none() => Ok(PENDING),
        _ => Err(()),
    }
}

/// Name of the annotation.
pub const ANNOTATION: &str = STATUS;

/// Removes the annotation from all pods of a node.
pub async fn remove_all(client: Client, node: &str) -> Result<(), String> {
    let all: Api<Pod> = Api::all(client.clone());
    let params = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let listed = all.list(&params).await.map_err(|error| with_causes(&error))?;
    let said = listed.items.into_iter().filter(|pod| pod.annotations().contains_key(STATUS));
    let (client, patch) = (&client, json!({"metadata": {"annotations": {STATUS: null}}}));
    let each = stream::iter(said).map(async |pod| {
        let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        match api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(with_causes(&error)),
        }
    });
    each.buffer_unordered(AT_ONCE).fold(Ok(()), async |before: Result<(), String>, one| before.and(one)).await
}

/// Writes the annotations.
pub struct Annotator {
    client: Client,
    metrics: Arc<Metrics>,
    log_limit: LogLimit,
    tasks: Group,
    in_flight: HashMap<Text, PatchState>,
    results: (mpsc::Sender<PatchOutcome>, mpsc::Receiver<PatchOutcome>),
}

struct PatchState {
    value: Option<&'static str>,
    again_at: Option<Instant>,
    backoff: Backoff,
    /// Why the value could not be written; `Ok` once the API has accepted it.
    result: Result<(), String>,
    /// Whether the last attempt has failed.
    failed: bool,
}

/// Result of a patch.
#[derive(Debug)]
pub struct PatchOutcome {
    uid: Text,
    result: Result<(), PatchFailure>,
}

/// Why a patch was not accepted.
#[derive(Debug)]
enum PatchFailure {
    /// The pod is gone, or is another one with the same name: the patch is no longer needed.
    Gone,
    /// Any other error.
    Other(String),
}

impl PatchFailure {
    fn of(error: &kube::Error) -> Self {
        // These are the API server's phrases. Other conflicts, and what a webhook says, may pass.
        let of_uid = |text: &str| OTHER_UID.iter().any(|words| text.contains(words));
        match error {
            kube::Error::Api(status) if status.code == 404 => Self::Gone,
            kube::Error::Api(status) if matches!(status.code, 409 | 422) && of_uid(&status.message) => Self::Gone,
            error => Self::Other(with_causes(error)),
        }
    }
}

impl Annotator {
    /// No patches in flight.
    pub fn new(client: Client, metrics: Arc<Metrics>, tasks: Group) -> Self {
        Self {
            client,
            metrics,
            tasks,
            in_flight: HashMap::new(),
            log_limit: LogLimit::default(),
            results: mpsc::channel(AT_ONCE),
        }
    }

    /// Makes sure that a pod's annotation becomes `value`. `awaited`: the pod's start waits for it.
    pub fn ensure(&mut self, pod: &PodFacts, value: Option<&'static str>, awaited: bool) {
        if pod.annotation() == value {
            self.in_flight.remove(&pod.uid);
            return;
        }
        let now = Instant::now();
        if let Some(sent) = self.in_flight.get_mut(&pod.uid).filter(|sent| awaited && sent.failed) {
            sent.again_at = sent.again_at.map(|at| at.min(now + AWAITED_MAX));
        }
        match self.in_flight.get(&pod.uid) {
            Some(sent) if sent.value == value && sent.again_at.is_none_or(|at| now < at) => return,
            // One patch per pod at a time, so that the last value wins.
            Some(PatchState { again_at: None, .. }) => return,
            _ => {}
        }
        if self.patches_in_flight().count() >= if awaited { AT_ONCE_AWAITED } else { AT_ONCE } {
            return;
        }
        let sent = self.in_flight.entry(pod.uid.clone()).or_insert_with(|| PatchState {
            value,
            again_at: None,
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
            result: Ok(()),
            failed: false,
        });
        if sent.value != value || sent.result.is_ok() {
            sent.result = Err("the Kubernetes API has not accepted it yet".into());
        }
        (sent.value, sent.again_at) = (value, None);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let (uid, name, results) = (pod.uid.clone(), pod.name.clone(), self.results.0.clone());
        // With the uid, the patch cannot hit a later pod of the same name.
        let patch = json!({"metadata": {"uid": &*uid, "annotations": {STATUS: value}}});
        self.tasks.spawn(async move {
            let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
            let result = match tokio::time::timeout(DEADLINE, api.patch_status(&name, &params, &patch)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(PatchFailure::of(&error)),
                Err(_) => Err(PatchFailure::Other(format!("no answer within {} s", DEADLINE.as_secs()))),
            };
            // If this fails, the enrolment loop has ended.
            let _ = results.send(PatchOutcome { uid, result }).await;
        });
    }

    /// The patches in flight.
    fn patches_in_flight(&self) -> impl Iterator<Item = &PatchState> {
        self.in_flight.values().filter(|sent| sent.again_at.is_none())
    }

    /// Waits for the next patch to end; pass the result to [`Self::ended`].
    pub async fn outcome(&mut self) -> PatchOutcome {
        match self.results.1.recv().await {
            Some(outcome) => outcome,
            None => std::future::pending().await,
        }
    }

    /// Records the result of a patch.
    pub fn ended(&mut self, PatchOutcome { uid, result }: PatchOutcome) {
        let Some(sent) = self.in_flight.get_mut(&uid) else { return };
        sent.failed = matches!(result, Err(PatchFailure::Other(_)));
        let wait = match result {
            Ok(()) => {
                sent.result = Ok(());
                ECHO
            }
            Err(PatchFailure::Gone) => {
                sent.result =
                    Err("the Kubernetes API says that the pod is gone, or is another one with the same name".into());
                ECHO
            }
            Err(PatchFailure::Other(error)) => {
                self.metrics.count_patch_failure();
                let wait = sent.backoff.next();
                // While the API is away, every patch fails, again and again; the watches report that.
                if self.metrics.is_connected("pods")
                    && let Some(suppressed) = self.log_limit.allow()
                {
                    let retry = brief(wait);
                    tracing::warn!(
                        uid = &*uid, error, %retry, suppressed,
                        "cannot write the pod's status annotation; peers may not know yet that the pod is in the mesh"
                    );
                }
                sent.result = Err(error);
                wait
            }
        };
        sent.again_at = Some(Instant::now() + wait);
    }

    /// Whether the API says that a pod is captured; the error says why not, as far as that is known.
    pub fn is_enabled_in_api(&self, pod: &PodFacts) -> Result<(), String> {
        if pod.annotation() == Some(ENABLED) {
            return Ok(());
        }
        let result = match self.in_flight.get(&pod.uid) {
            Some(sent) if sent.value == Some(ENABLED) => sent.result.clone(),
            Some(PatchState { again_at: None, .. }) => Err("another value is being written first".into()),
            _ => match self.patches_in_flight().count() {
                0 => Err("it is about to be written".into()),
                others => Err(format!("{others} other annotations are being written first")),
            },
        };
        result
            .map_err(|why| format!("the pod is captured, but its status annotation {STATUS} is not written yet: {why}"))
    }

    /// Forgets pods that no longer exist.
    pub fn retain(&mut self, is_there: impl Fn(&Text) -> bool) {
        self.in_flight.retain(|uid, _| is_there(uid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::spec::{NetnsRef, PodSpec, Settings};
    use crate::node::status::Observations;
    use std::time::SystemTime;

    #[test]
    fn a_captured_pod_is_enabled_and_stays_so_until_its_capture_fails() {
        let status = |state, listening| PodStatus {
            spec: PodSpec {
                name: "a".into(),
                namespace: "n".into(),
                service_account: "s".into(),
                uid: "u".into(),
                netns: NetnsRef::Path("".into()),
                ips: Vec::new(),
                settings: Settings::default(),
                powers: None,
            },
            state,
            since: SystemTime::now(),
            listening,
            redirected: false,
            preexisting: 0,
            observations: Observations::default(),
        };
        let failed = || CaptureState::Failed("why".into());
        let pending = || CaptureState::Pending("why".into());
        for (what, said, unreachable, expected) in [
            (Some(status(CaptureState::Captured, true)), None, false, Ok(ENABLED)),
            (Some(status(CaptureState::Captured, true)), Some(PENDING), false, Ok(ENABLED)),
            (Some(status(pending(), false)), None, false, Ok(PENDING)),
            (Some(PodStatus { redirected: true, ..status(pending(), true) }), Some(PENDING), false, Ok(ENABLED)),
            (Some(PodStatus { redirected: true, ..status(pending(), false) }), Some(PENDING), false, Err(())),
            (Some(status(pending(), true)), Some(PENDING), false, Err(())),
            (Some(status(pending(), true)), Some(ENABLED), false, Err(())),
            (Some(status(failed(), true)), Some(ENABLED), false, Err(())),
            (Some(status(failed(), false)), Some(ENABLED), false, Ok(PENDING)),
            (None, None, false, Ok(PENDING)),
            (None, Some(ENABLED), false, Err(())),
            (Some(status(CaptureState::Captured, true)), None, true, Ok(ENABLED)),
            (Some(status(pending(), false)), None, true, Err(())),
            (Some(status(failed(), false)), None, true, Err(())),
            (Some(status(failed(), false)), Some(ENABLED), true, Ok(PENDING)),
            (None, None, true, Err(())),
        ] {
            assert_eq!(wanted(what.as_ref(), said, unreachable), expected, "{what:?} {said:?} {unreachable}");
        }
    }

    #[test]
    fn only_some_answers_of_the_api_mean_that_a_pod_is_gone() {
        for (code, message, gone) in [
            (404, "pods \"a\" not found", true),
            (409, "uid mismatch: the provided object specified uid 1, and no existing object was found", true),
            (409, "Precondition failed: UID in precondition: 1, UID in object meta: 2", true),
            (422, "Pod \"a\" is invalid: metadata.uid: Invalid value: \"1\": field is immutable", true),
            (409, "the object has been modified; please apply your changes to the latest version", false),
            (409, "admission webhook \"a.b.c\" denied the request: not now", false),
            (422, "Pod \"a\" is invalid: spec: Forbidden", false),
            (500, "metadata.uid", false),
            (403, "", false),
        ] {
            let status = kube::core::Status { code, message: message.into(), ..Default::default() };
            let failure = PatchFailure::of(&kube::Error::Api(Box::new(status)));
            assert_eq!(matches!(failure, PatchFailure::Gone), gone, "{code} {message}: {failure:?}");
        }
    }

    #[tokio::test]
    async fn a_pod_whose_start_waits_has_room_for_its_patch_and_the_reason_is_known() {
        // Nothing is sent before this test awaits anything.
        let client = Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        let mut annotator = Annotator::new(client, Arc::default(), Group::default());
        let pod = |n: usize| PodFacts { uid: n.to_string().as_str().into(), ..PodFacts::default() };
        let why = |annotator: &Annotator, pod: &PodFacts| annotator.is_enabled_in_api(pod).unwrap_err();
        assert!(why(&annotator, &pod(0)).ends_with("it is about to be written"));
        (0..100).for_each(|n| annotator.ensure(&pod(n), Some(PENDING), false));
        assert_eq!(annotator.patches_in_flight().count(), AT_ONCE);
        let (first, last) = (pod(0), pod(99));
        annotator.ensure(&last, Some(ENABLED), false);
        assert!(why(&annotator, &last).ends_with("16 other annotations are being written first"));
        annotator.ensure(&last, Some(ENABLED), true);
        assert!(why(&annotator, &last).ends_with("has not accepted it yet"));
        annotator.ensure(&first, Some(ENABLED), true);
        assert!(why(&annotator, &first).ends_with("another value is being written first"));
        (100..200).for_each(|n| annotator.ensure(&pod(n), Some(ENABLED), true));
        assert_eq!(annotator.patches_in_flight().count(), AT_ONCE_AWAITED, "these are limited too");
    }

    #[tokio::test(start_paused = true)]
    async fn while_a_start_waits_for_it_a_patch_that_failed_is_tried_again_soon() {
        let client = Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        let mut annotator = Annotator::new(client, Arc::default(), Group::default());
        let pod = PodFacts { uid: "u".into(), ..PodFacts::default() };
        for _ in 0..10 {
            annotator.ensure(&pod, Some(ENABLED), false);
            let result = Err(PatchFailure::Other("away".into()));
            annotator.ended(PatchOutcome { uid: pod.uid.clone(), result });
            tokio::time::advance(BACKOFF.1).await;
        }
        let in_flight = |annotator: &Annotator| annotator.patches_in_flight().count();
        annotator.ensure(&pod, Some(ENABLED), false);
        let result = Err(PatchFailure::Other("away".into()));
        annotator.ended(PatchOutcome { uid: pod.uid.clone(), result });
        tokio::time::advance(2 * AWAITED_MAX).await;
        annotator.ensure(&pod, Some(ENABLED), false);
        assert_eq!(in_flight(&annotator), 0, "nobody waits for it");
        annotator.ensure(&pod, Some(ENABLED), true);
        assert_eq!(in_flight(&annotator), 0, "not at once");
        tokio::time::advance(AWAITED_MAX).await;
        annotator.ensure(&pod, Some(ENABLED), true);
        assert_eq!(in_flight(&annotator), 1, "a start waits for it");
        // What the API has accepted is not sent again and again while it has not said so itself.
        annotator.ended(PatchOutcome { uid: pod.uid.clone(), result: Ok(()) });
        tokio::time::advance(2 * AWAITED_MAX).await;
        annotator.ensure(&pod, Some(ENABLED), true);
        assert_eq!(in_flight(&annotator), 0);
    }
}
