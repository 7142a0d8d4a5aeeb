//! The state of enrolment by the Kubernetes API: the pods and namespaces, the pods' network namespaces, and whether
//! these are still the right ones.

use super::annotate::Annotator;
use super::daemonset::OwnDaemonSet;
use super::facts::{AnnotationFault, PodFacts};
use super::lingering::Lingering;
use super::pod_netns::PodNetns;
use super::ready_before_enabled::ReadyBeforeEnabled;
use super::saved::SavedPods;
use super::scan::ScanResult;
use super::watch::Metrics;
use crate::mesh::Text;
use crate::node::capture::Capturer;
use crate::node::cni::PendingRequest;
use crate::node::config::KubernetesConfig;
use crate::node::kubelet_probes::ProbedPods;
use crate::node::pods::Pods;
use crate::node::selectors::Labels;
use crate::node::spec::{NetnsRef, PodSpec};
use crate::node::status::{Board, CaptureState};
use crate::sys::netns::{Netns, NetnsError};
use crate::task::Group;
use crate::task::ready::Pending;
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a network namespace without a process may lack the pod's address before it is given up.
const ADDRESS_GONE: Duration = Duration::from_secs(3);

/// Time between scans while the processes of a pod have not been found.
pub(super) const SCAN_EVERY: Duration = Duration::from_millis(500);

/// Enrolment by the Kubernetes API, and what it works with.
pub struct Enrolment {
    /// Settings.
    pub config: KubernetesConfig,
    /// The API.
    pub client: kube::Client,
    /// The set of pods.
    pub pods: Pods,
    /// The pods' states.
    pub board: Arc<Board>,
    /// Removes rules from pods that are not enrolled any more.
    pub capturer: Arc<Capturer>,
    /// Receives the pods whose kubelet probes are let through.
    pub probed: ProbedPods,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Questions of the CNI plugin, if it is installed.
    pub plugin: Option<mpsc::Receiver<PendingRequest>>,
    /// Held until each pod of the first list has had one attempt.
    pub ready: Option<Pending>,
    /// What is known of the daemon's own DaemonSet.
    pub own_set: Arc<OwnDaemonSet>,
}

/// The loop of enrolment and everything it knows.
pub(super) struct EnrolmentLoop {
    pub(super) enrolment: Enrolment,
    /// `None` before the first list.
    pub(super) pods: Option<HashMap<Text, PodFacts>>,
    pub(super) namespaces: Option<HashMap<Text, Labels>>,
    pub(super) netns_by_pod: HashMap<Text, PodNetns>,
    /// Why a pod's network namespace is not known.
    pub(super) unlocated: HashMap<Text, CaptureState>,
    pub(super) annotator: Annotator,
    pub(super) scan: ScanSchedule,
    pub(super) ready: Option<Arc<Pending>>,
    /// Questions of the CNI plugin that wait for the API or for the capture, with their deadlines.
    pub(super) asked: Vec<(PendingRequest, Instant)>,
    /// How often each pod that is not enrolled has been searched for rules of an earlier daemon.
    pub(super) cleaned: HashMap<Text, u32>,
    /// Connections in such pods have time to end until then: another daemon may be releasing the pods.
    pub(super) clean_from: Instant,
    /// Invalid annotations that have been logged, and when.
    pub(super) logged_faults: HashMap<Text, (Vec<AnnotationFault>, Instant)>,
    /// Pods that are Ready before their peers know that they take tunnels.
    pub(super) ready_before_enabled: ReadyBeforeEnabled,
    pub(super) saved: SavedPods,
    /// Pods that are not enrolled any more and stay captured for a moment.
    pub(super) lingering: Lingering,
    pub(super) tasks: Group,
}

/// What a scan has found for each pod.
pub(super) type Scanned = HashMap<Text, ScanResult>;

/// The schedule of scans.
pub(super) struct ScanSchedule {
    pub(super) results: (mpsc::Sender<Scanned>, mpsc::Receiver<Scanned>),
    /// When the running scan began.
    pub(super) running: Option<Instant>,
    /// Whether the running scan searches for saved pods.
    pub(super) for_saved: bool,
    pub(super) next: Instant,
    pub(super) wait: Duration,
}

impl Default for ScanSchedule {
    fn default() -> Self {
        Self { results: mpsc::channel(1), running: None, for_saved: false, next: Instant::now(), wait: SCAN_EVERY }
    }
}

impl ScanSchedule {
    /// Scans soon, because news has come.
    pub(super) fn soon(&mut self) {
        self.wait = SCAN_EVERY;
        self.next = self.next.min(Instant::now() + SCAN_EVERY / 10);
    }
}

impl EnrolmentLoop {
    /// The enrolled pods; `None` before both lists have come.
    pub(super) fn wanted(&self) -> Option<Vec<&PodFacts>> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let none = Labels::new();
        let is_in = |pod: &&PodFacts| {
            let labels = namespaces.get(&pod.namespace).unwrap_or(&none);
            self.enrolment.config.enablement.enrols(pod, labels).is_ok()
        };
        Some(pods.values().filter(is_in).collect())
    }

    /// The addresses of a pod's present sandbox.
    pub(super) fn ips(&self, pod: &PodFacts) -> Vec<IpAddr> {
        match self.netns_by_pod.get(&pod.uid) {
            Some(known) if known.path.is_none() && !known.ips.is_empty() => known.ips.clone(),
            _ => pod.ips.clone(),
        }
    }

    /// Takes a network namespace that was found by the scan that `began` at this time.
    pub(super) fn take_netns(&mut self, uid: Text, netns: Netns, path: PathBuf, began: Option<Instant>) {
        let is_own = self.holds_pod_address(&uid);
        match self.netns_by_pod.get_mut(&uid) {
            Some(known) if known.netns == netns => {
                (known.path, known.address_missing_since) = (Some(path), None);
                known.ips.clear();
            }
            // It became known after the scan began.
            Some(known) if began.is_none_or(|began| known.since > began) => {}
            // The runtime has handed this one over; the pod itself may have made the other one.
            Some(known) if known.handed_over && is_own != Some(false) => {
                if !std::mem::replace(&mut known.contested, true) {
                    tracing::warn!(
                        uid = &*uid, captured = %known.netns.path().display(), other = %path.display(),
                        "a process of the pod is in another network namespace that also holds its address; the one that the CNI plugin \
                         handed over stays captured"
                    );
                }
            }
            _ => {
                self.netns_by_pod.insert(uid, PodNetns { path: Some(path), ..PodNetns::new(netns) });
            }
        }
    }

    /// Drops the network namespace of a pod if it does not hold the pod's address any more: the sandbox has ended.
    pub(super) fn drop_if_address_gone(&mut self, uid: &Text) {
        if self.holds_pod_address(uid) == Some(false) {
            self.netns_by_pod.remove(uid);
        }
    }

    /// Whether a pod's network namespace holds one of the pod's addresses; `None` if that cannot be checked now.
    pub(super) fn holds_pod_address(&self, uid: &Text) -> Option<bool> {
        let of_api = self.pods.as_ref().and_then(|pods| pods.get(uid));
        let (known, pod) = (self.netns_by_pod.get(uid)?, of_api.or_else(|| self.saved.get(uid))?);
        let mut own = pod.ips.iter().chain(&known.ips).peekable();
        own.peek()?;
        // An error now does not mean that the sandbox has ended.
        let held = known.netns.addresses().ok()?;
        Some(own.any(|ip| held.iter().any(|(held, _)| held == ip)))
    }

    /// Checks whether the paths still lead to the network namespaces.
    pub(super) fn check_netns(&mut self) {
        for known in self.netns_by_pod.values_mut() {
            // An error such as too few file descriptors does not mean that the sandbox has ended.
            let lost = known.path.as_ref().is_some_and(|path| match Netns::open(path) {
                Ok(now) => now != known.netns,
                Err(NetnsError::Open { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
                Err(_) => false,
            });
            if lost {
                // The oldest process has ended. Another one may still run, or a new sandbox may come.
                known.path = None;
                self.scan.next = Instant::now();
            }
        }
        // No process leads there: when the pod's address has gone, the sandbox has ended.
        let without_path =
            self.netns_by_pod.iter().filter(|(_, known)| known.path.is_none()).map(|(uid, _)| uid.clone());
        for uid in without_path.collect::<Vec<_>>() {
            let address_missing = self.holds_pod_address(&uid) == Some(false);
            let Some(known) = self.netns_by_pod.get_mut(&uid) else { continue };
            let since = address_missing.then(|| known.address_missing_since.unwrap_or_else(Instant::now));
            known.address_missing_since = since;
            if since.is_some_and(|since| since.elapsed() >= ADDRESS_GONE) {
                let netns = known.netns.path().display().to_string();
                tracing::info!(
                    uid = &*uid,
                    netns,
                    "the pod's address has gone from its network namespace; giving it up"
                );
                self.netns_by_pod.remove(&uid);
            }
        }
    }
}

/// What capture needs to know about a pod in this network namespace.
pub(super) fn spec(pod: &PodFacts, netns: Netns) -> PodSpec {
    PodSpec { netns: NetnsRef::Handle(netns), ..described(pod) }
}

/// What is shown of a pod whose network namespace is not known.
pub(super) fn described(pod: &PodFacts) -> PodSpec {
    PodSpec {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        uid: pod.uid.clone(),
        netns: NetnsRef::Path(PathBuf::new()),
        ips: pod.ips.clone(),
        settings: pod.settings.clone(),
        powers: Some(pod.powers),
    }
}
