//! The state of each pod, for the admin port and metrics. Every pod is in exactly one state.

use super::error::CaptureError;
use super::spec::PodSpec;
use crate::mesh::Text;
use crate::telemetry::changes::{Changes, What};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// State of a pod's capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaptureState {
    /// Enrolled, and not captured yet; with the reason.
    Pending(String),
    /// Redirected and verified in both directions.
    Captured,
    /// The last attempt failed, with the reason; the daemon tries again.
    Failed(String),
    /// No longer enrolled; its open connections have time to end.
    Releasing,
}

impl CaptureState {
    /// The word for the state on the admin port and in metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pending(_) => "pending",
            Self::Captured => "captured",
            Self::Failed(_) => "failed",
            Self::Releasing => "releasing",
        }
    }

    /// The state in one sentence, for the history.
    fn sentence(&self) -> String {
        match self {
            Self::Pending(reason) => format!("The pod is not captured yet: {reason}."),
            Self::Captured => "The pod is captured, and its redirection is verified.".into(),
            Self::Failed(reason) => format!("The pod could not be captured: {reason}. The daemon tries again."),
            Self::Releasing => "The pod is no longer enrolled: its open connections have time to end.".into(),
        }
    }

    /// The reason, if the state has one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Pending(reason) | Self::Failed(reason) => Some(reason),
            Self::Captured | Self::Releasing => None,
        }
    }
}

/// What is known about a pod beside its state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observations {
    /// Other rules in its network namespace that may take its traffic before ours.
    pub other_rules: Vec<String>,
    /// Why the other rules are unknown.
    pub unread: Option<String>,
    /// Why the inbound redirection could not be verified.
    pub inbound_unverified: Option<String>,
    /// Number of connections from the address of kubelet probes, which no policy applied to.
    pub probe_connections: u64,
    /// Number of UDP datagrams, other than questions to DNS servers, that left the pod: they are not tunnelled. `None` if
    /// they are not counted, because another agent writes the rules.
    pub untunnelled_udp: Option<u64>,
    /// Number of packets of further protocols, except ICMP, that left it.
    pub untunnelled_other: Option<u64>,
}

/// A pod and its state.
#[derive(Clone, Debug)]
pub struct PodStatus {
    /// The pod.
    pub spec: PodSpec,
    /// Its state.
    pub state: CaptureState,
    /// Since when it has this state.
    pub since: SystemTime,
    /// Whether the daemon listens in it, whatever the state of its rules.
    pub listening: bool,
    /// Whether its redirection is in place and verified, even if its workload is not known yet: its connections are
    /// carried, or wait.
    pub redirected: bool,
    /// Number of open pre-existing connections; they continue in plaintext.
    pub preexisting: usize,
    /// What else is known about it.
    pub observations: Observations,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The states of all pods.
#[derive(Debug, Default)]
pub struct Board {
    pods: Mutex<BTreeMap<Text, PodStatus>>,
    by_state: Family<StateLabel, Gauge>,
    failures: Family<ReasonLabel, Counter>,
    rewrites: Counter,
    repairs: Counter,
    uncaptured: Gauge,
    started: Counter,
    stopped: Counter,
    active: Gauge,
    pending: Gauge,
    changed: watch::Sender<u64>,
    noted: Arc<Changes>,
}

impl Board {
    /// An empty board, which notes the changes of states.
    pub fn new(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.failures.get_or_create(&ReasonLabel { reason: "" }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "culvert_pods",
            "Pods of this node by capture state. Alert on failed above 0",
            self.by_state.clone(),
        );
        let failures = "Failed attempts to capture a pod, by reason";
        registry.register("culvert_capture_failures", failures, self.failures.clone());
        let rewrites =
            "Times that the rules in a pod were written again, because something had changed them or on schedule";
        registry.register("culvert_redirection_rewrites", rewrites, self.rewrites.clone());
        let repairs = "Times that the rules in a pod were written again because another program had changed them";
        registry.register("culvert_redirection_repairs", repairs, self.repairs.clone());
        let uncaptured = "Pre-existing connections of captured pods, which continue in plaintext";
        registry.register("culvert_uncaptured_connections", uncaptured, self.uncaptured.clone());
        let started = "Pods captured (unstable)";
        registry.register("workload_manager_proxies_started", started, self.started.clone());
        let stopped = "Pods released or lost (unstable)";
        registry.register("workload_manager_proxies_stopped", stopped, self.stopped.clone());
        let active = "Pods whose traffic is carried (unstable)";
        registry.register("workload_manager_active_proxy_count", active, self.active.clone());
        let pending = "Pods that are pending or failed (unstable)";
        registry.register("workload_manager_pending_proxy_count", pending, self.pending.clone());
        self.count(&BTreeMap::new());
    }

    /// Sets a pod's state, and logs it if it changes.
    pub fn set(&self, spec: &PodSpec, state: CaptureState) {
        let mut pods = self.pods.lock();
        let before = pods.get(&spec.uid).map(|status| status.state.clone());
        if before.as_ref() == Some(&state) {
            return;
        }
        let (namespace, name, uid) = (&*spec.namespace, &*spec.name, &*spec.uid);
        match &state {
            CaptureState::Captured => {
                self.started.inc();
                tracing::info!(namespace, name, uid, "pod captured");
            }
            CaptureState::Failed(reason) => {
                tracing::error!(namespace, name, uid, reason, "pod not captured; trying again")
            }
            CaptureState::Pending(reason) => tracing::info!(namespace, name, uid, reason, "pod pending"),
            CaptureState::Releasing => tracing::info!(namespace, name, uid, "pod releasing"),
        }
        self.note(spec, &state.sentence());
        if before == Some(CaptureState::Captured) {
            self.stopped.inc();
        }
        let before = pods.get(&spec.uid);
        let (listening, redirected, preexisting, observations) = before.map_or_else(Default::default, |status| {
            (status.listening, status.redirected, status.preexisting, status.observations.clone())
        });
        let since = SystemTime::now();
        pods.insert(
            spec.uid.clone(),
            PodStatus { spec: spec.clone(), state, since, listening, redirected, preexisting, observations },
        );
        self.count(&pods);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Counts a failed attempt.
    pub fn count_failure(&self, error: &CaptureError) {
        self.failures.get_or_create(&ReasonLabel { reason: error.word() }).inc();
    }

    /// Counts a write of a pod's rules that was not the first. `repair`: another program had changed them.
    pub fn count_rewrite(&self, repair: bool) {
        self.rewrites.inc();
        if repair {
            self.repairs.inc();
        }
    }

    /// Sets whether the daemon listens in a pod.
    pub fn set_listening(&self, uid: &Text, listening: bool) {
        let mut pods = self.pods.lock();
        if let Some(status) = pods.get_mut(uid).filter(|status| status.listening != listening) {
            status.listening = listening;
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// Sets whether a pod's redirection is in place.
    pub fn set_redirected(&self, uid: &Text, redirected: bool) {
        let mut pods = self.pods.lock();
        if let Some(status) = pods.get_mut(uid).filter(|status| status.redirected != redirected) {
            status.redirected = redirected;
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// Sets the number of a pod's open pre-existing connections.
    pub fn set_preexisting(&self, uid: &Text, preexisting: usize) {
        let mut pods = self.pods.lock();
        if let Some(status) = pods.get_mut(uid) {
            status.preexisting = preexisting;
        }
        self.count(&pods);
    }

    /// Sets what else is known about a pod.
    pub fn set_observations(&self, uid: &Text, observations: &Observations) {
        let mut pods = self.pods.lock();
        if let Some(status) = pods.get_mut(uid).filter(|status| status.observations != *observations) {
            status.observations = observations.clone();
        }
    }

    /// A receiver that sees every change.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Removes a pod.
    pub fn remove(&self, uid: &Text) {
        let mut pods = self.pods.lock();
        if let Some(status) = pods.remove(uid) {
            self.note(&status.spec, "The pod is released: nothing of it is captured any more.");
        }
        self.count(&pods);
        self.changed.send_modify(|n| *n += 1);
    }

    fn note(&self, spec: &PodSpec, text: &str) {
        self.noted.note(What::Capture, format!("{}/{}", spec.namespace, spec.name), text);
    }

    /// The state of one pod.
    pub fn get(&self, uid: &Text) -> Option<PodStatus> {
        self.pods.lock().get(uid).cloned()
    }

    /// All pods and their states.
    pub fn list(&self) -> Vec<PodStatus> {
        self.pods.lock().values().cloned().collect()
    }

    fn count(&self, pods: &BTreeMap<Text, PodStatus>) {
        let count = |state| {
            let count = pods.values().filter(|status| status.state.word() == state).count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.by_state.get_or_create(&StateLabel { state }).set(count);
            count
        };
        let preexisting: usize = pods.values().map(|status| status.preexisting).sum();
        self.uncaptured.set(i64::try_from(preexisting).unwrap_or(i64::MAX));
        self.active.set(count("captured") + count("releasing"));
        self.pending.set(count("pending") + count("failed"));
    }
}
