//! The state of enrolment by the Kubernetes API: the pods and namespaces, the pods' network namespaces, and whether
//! these are still the right ones.

use super::annotate::Annotator;
use super::daemonset::OwnDaemonSet;
use super::facts::{AnnotationFault, PodFacts};
use super::pod_netns::PodNetns;
use super::ready_before_enabled::ReadyBeforeEnabled;
use super::saved::SavedPods;
use super::scan::ScanResult;
use super::watch::Metrics;
use crate::mesh::Text;
use crate::node::capture::Capturer;
use crate::node::cni::PendingQuestion;
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
    pub plugin: Option<mpsc::Receiver<PendingQuestion>>,
    /// Held until each pod of the first list has had one attempt.
    pub ready: Option<Pending>,
    /// What is known of the daemon's own DaemonSet.
    pub own_set: Arc<OwnDaemonSet>,
}

pub(super) struct Running {
    pub(super) source: Enrolment,
    /// `None` before the first list.
    pub(super) pods: Option<HashMap<Text, PodFacts>>,
    pub(super) namespaces: Option<HashMap<Text, Labels>>,
    pub(super) netns_of: HashMap<Text, PodNetns>,
    /// Why a pod's network namespace is not known.
    pub(super) unlocated: HashMap<Text, CaptureState>,
    pub(super) annotator: Annotator,
    pub(super) scan: ScanSchedule,
    pub(super) ready: Option<Arc<Pending>>,
    /// Questions of the CNI plugin that wait for the API or for the capture, with their deadlines.
    pub(super) asked: Vec<(PendingQuestion, Instant)>,
    /// How often each pod that is not enrolled has been searched for rules of an earlier daemon.
    pub(super) cleaned: HashMap<Text, u32>,
    /// Connections in such pods have time to end until then: another daemon may be releasing the pods.
    pub(super) clean_from: Instant,
    /// Invalid annotations that have been logged, and when.
    pub(super) complained: HashMap<Text, (Vec<AnnotationFault>, Instant)>,
    /// Pods that are Ready before their peers know that they take tunnels.
    pub(super) ready_before_enabled: ReadyBeforeEnabled,
    pub(super) saved: SavedPods,
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
    pub(super) from_saved: bool,
    pub(super) next: Instant,
    pub(super) wait: Duration,
}

impl Default for ScanSchedule {
    fn default() -> Self {
        Self { results: mpsc::channel(1), running: None, from_saved: false, next: Instant::now(), wait: SCAN_EVERY }
    }
}

impl ScanSchedule {
    /// Scans soon, because news has come.
    pub(super) fn soon(&mut self) {
        self.wait = SCAN_EVERY;
        self.next = self.next.min(Instant::now() + SCAN_EVERY / 10);
    }
}

impl Running {
    /// The enrolled pods; `None` before both lists have come.
    pub(super) fn wanted(&self) -> Option<Vec<&PodFacts>> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let none = Labels::new();
        let is_in = |pod: &&PodFacts| {
            let labels = namespaces.get(&pod.namespace).unwrap_or(&none);
            self.source.config.enablement.enrols(pod, labels).is_ok()
        };
        Some(pods.values().filter(is_in).collect())
    }

    /// The addresses of a pod's present sandbox.
    pub(super) fn ips(&self, pod: &PodFacts) -> Vec<IpAddr> {
        match self.netns_of.get(&pod.uid) {
            Some(place) if place.path.is_none() && !place.ips.is_empty() => place.ips.clone(),
            _ => pod.ips.clone(),
        }
    }

    /// Takes a network namespace that was found by the scan that `began` at this time.
    pub(super) fn place(&mut self, uid: Text, netns: Netns, path: PathBuf, began: Option<Instant>) {
        let is_own = self.holds_pod_address(&uid);
        match self.netns_of.get_mut(&uid) {
            Some(place) if place.netns == netns => {
                (place.path, place.address_missing_since) = (Some(path), None);
                place.ips.clear();
            }
            // It became known after the scan began.
            Some(place) if began.is_none_or(|began| place.since > began) => {}
            // The runtime has handed this one over; the pod itself may have made the other one.
            Some(place) if place.handed_over && is_own != Some(false) => {
                if !std::mem::replace(&mut place.contested, true) {
                    tracing::warn!(
                        uid = &*uid, captured = %place.netns.path().display(), other = %path.display(),
                        "a process of the pod is in another network namespace that also holds its address; the one that the CNI plugin \
                         handed over stays captured"
                    );
                }
            }
            _ => {
                self.netns_of.insert(uid, PodNetns { path: Some(path), ..PodNetns::new(netns) });
            }
        }
    }

    /// Drops the network namespace of a pod if it does not hold the pod's address any more: the sandbox has ended.
    pub(super) fn drop_if_address_gone(&mut self, uid: &Text) {
        if self.holds_pod_address(uid) == Some(false) {
            self.netns_of.remove(uid);
        }
    }

    /// Whether a pod's network namespace holds one of the pod's addresses; `None` if that cannot be checked now.
    pub(super) fn holds_pod_address(&self, uid: &Text) -> Option<bool> {
        let told = self.pods.as_ref().and_then(|pods| pods.get(uid));
        let (place, pod) = (self.netns_of.get(uid)?, told.or_else(|| self.saved.get(uid))?);
        let mut known = pod.ips.iter().chain(&place.ips).peekable();
        known.peek()?;
        // An error now does not mean that the sandbox has ended.
        let held = place.netns.addresses().ok()?;
        Some(known.any(|ip| held.iter().any(|(held, _)| held == ip)))
    }

    /// Checks whether the paths still lead to the network namespaces.
    pub(super) fn check_netns(&mut self) {
        for place in self.netns_of.values_mut() {
            // An error such as too few file descriptors does not mean that the sandbox has ended.
            let lost = place.path.as_ref().is_some_and(|path| match Netns::open(path) {
                Ok(now) => now != place.netns,
                Err(NetnsError::Open { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
                Err(_) => false,
            });
            if lost {
                // The oldest process has ended. Another one may still run, or a new sandbox may come.
                place.path = None;
                self.scan.next = Instant::now();
            }
        }
        // No process leads there: when the pod's address has gone, the sandbox has ended.
        let unled = self.netns_of.iter().filter(|(_, place)| place.path.is_none()).map(|(uid, _)| uid.clone());
        for uid in unled.collect::<Vec<_>>() {
            let bare = self.holds_pod_address(&uid) == Some(false);
            let Some(place) = self.netns_of.get_mut(&uid) else { continue };
            let since = bare.then(|| place.address_missing_since.unwrap_or_else(Instant::now));
            place.address_missing_since = since;
            if since.is_some_and(|since| since.elapsed() >= ADDRESS_GONE) {
                let netns = place.netns.path().display().to_string();
                tracing::info!(
                    uid = &*uid,
                    netns,
                    "the pod's address has gone from its network namespace; giving it up"
                );
                self.netns_of.remove(&uid);
            }
        }
    }
}

pub(super) fn spec(pod: &PodFacts, netns: Netns) -> PodSpec {
    PodSpec { netns: NetnsRef::Handle(netns), ..described(pod) }
}

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
