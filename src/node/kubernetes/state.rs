//! What enrolment by Kubernetes works with and knows: the pods and namespaces of the API, the network namespaces of the pods,
//! and how to tell whether these are still the right ones.

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

/// How long a namespace that has no process may be without the pod's address before it is given up.
const ADDRESS_GONE: Duration = Duration::from_secs(3);

/// Time between scans while a pod is sought whose processes are not there (yet).
pub(super) const SCAN_EVERY: Duration = Duration::from_millis(500);

/// What the source works with.
pub struct Enrolment {
    /// Settings.
    pub config: KubernetesConfig,
    /// The API.
    pub client: kube::Client,
    /// The set of pods.
    pub pods: Pods,
    /// Their states.
    pub board: Arc<Board>,
    /// Cleans up what is not captured any more.
    pub capturer: Arc<Capturer>,
    /// ApiEvent whose kubelet probes are to be let through.
    pub probed: ProbedPods,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Questions of the CNI plugin, where there is one.
    pub plugin: Option<mpsc::Receiver<PendingQuestion>>,
    /// Given up when each pod of the first list has had one attempt.
    pub ready: Option<Pending>,
    /// What is known of our DaemonSet.
    pub own_set: Arc<OwnDaemonSet>,
}

pub(super) struct Running {
    pub(super) source: Enrolment,
    /// `None` until the first list.
    pub(super) pods: Option<HashMap<Text, PodFacts>>,
    pub(super) namespaces: Option<HashMap<Text, Labels>>,
    pub(super) netns_of: HashMap<Text, PodNetns>,
    /// Why a pod has no place, as far as that is known.
    pub(super) unlocated: HashMap<Text, CaptureState>,
    pub(super) annotator: Annotator,
    pub(super) scan: ScanSchedule,
    pub(super) ready: Option<Arc<Pending>>,
    /// Questions of the CNI plugin that wait for the API, or for the capture.
    pub(super) asked: Vec<(PendingQuestion, Instant)>,
    /// Pods whose leftovers have been looked for, and how often.
    pub(super) cleaned: HashMap<Text, u32>,
    /// Until when connections in them have their time: another daemon may be letting go of them.
    pub(super) clean_from: Instant,
    /// What has been said of pods' annotations, and when.
    pub(super) complained: HashMap<Text, (Vec<AnnotationFault>, Instant)>,
    /// Pods that are Ready before their peers know that they take tunnels.
    pub(super) ready_before_enabled: ReadyBeforeEnabled,
    pub(super) saved: SavedPods,
    pub(super) tasks: Group,
}

/// What was found of each pod.
pub(super) type Scanned = HashMap<Text, ScanResult>;

/// Where the search is.
pub(super) struct ScanSchedule {
    pub(super) results: (mpsc::Sender<Scanned>, mpsc::Receiver<Scanned>),
    /// When the scan that runs began.
    pub(super) running: Option<Instant>,
    /// Whether it looks for what is remembered.
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
    /// There is news: what is sought may be found now.
    pub(super) fn soon(&mut self) {
        self.wait = SCAN_EVERY;
        self.next = self.next.min(Instant::now() + SCAN_EVERY / 10);
    }
}

impl Running {
    /// Pods that are in; nothing before both lists are there.
    pub(super) fn wanted(&self) -> Option<Vec<&PodFacts>> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let none = Labels::new();
        let is_in = |pod: &&PodFacts| {
            let labels = namespaces.get(&pod.namespace).unwrap_or(&none);
            self.source.config.enablement.enrols(pod, labels).is_ok()
        };
        Some(pods.values().filter(is_in).collect())
    }

    /// The addresses of a pod, by whoever knows of its present sandbox.
    pub(super) fn ips(&self, pod: &PodFacts) -> Vec<IpAddr> {
        match self.netns_of.get(&pod.uid) {
            Some(place) if place.path.is_none() && !place.ips.is_empty() => place.ips.clone(),
            _ => pod.ips.clone(),
        }
    }

    /// Takes a namespace that a scan has found, which `began` before.
    pub(super) fn place(&mut self, uid: Text, netns: Netns, path: PathBuf, began: Option<Instant>) {
        let is_own = self.holds_pod_address(&uid);
        match self.netns_of.get_mut(&uid) {
            Some(place) if place.netns == netns => {
                (place.path, place.address_missing_since) = (Some(path), None);
                place.ips.clear();
            }
            // A later one than the scan knows of.
            Some(place) if began.is_none_or(|began| place.since > began) => {}
            // What led to it has been told by the runtime; what leads elsewhere, the pod may have made itself.
            Some(place) if place.handed_over && is_own != Some(false) => {
                if !std::mem::replace(&mut place.contested, true) {
                    tracing::warn!(
                        uid = &*uid, captured = %place.netns.path().display(), other = %path.display(),
                        "a process of the pod is in another namespace that holds its address as well; the one that the CNI \
                         plugin handed over stays captured"
                    );
                }
            }
            _ => {
                self.netns_of.insert(uid, PodNetns { path: Some(path), ..PodNetns::new(netns) });
            }
        }
    }

    /// Gives up the place of a pod whose address it does not hold any more: the sandbox has ended.
    pub(super) fn drop_if_address_gone(&mut self, uid: &Text) {
        if self.holds_pod_address(uid) == Some(false) {
            self.netns_of.remove(uid);
        }
    }

    /// Whether the place of a pod holds an address of the pod; `None` where that cannot be said now.
    pub(super) fn holds_pod_address(&self, uid: &Text) -> Option<bool> {
        let told = self.pods.as_ref().and_then(|pods| pods.get(uid));
        let (place, pod) = (self.netns_of.get(uid)?, told.or_else(|| self.saved.get(uid))?);
        let mut known = pod.ips.iter().chain(&place.ips).peekable();
        known.peek()?;
        // What cannot be looked at now is no sign of an end.
        let held = place.netns.addresses().ok()?;
        Some(known.any(|ip| held.iter().any(|(held, _)| held == ip)))
    }

    /// Looks at whether what led to the namespaces still does.
    pub(super) fn check_netns(&mut self) {
        for place in self.netns_of.values_mut() {
            // That it cannot be looked at now (no descriptors left, say) is no sign of an end.
            let lost = place.path.as_ref().is_some_and(|path| match Netns::open(path) {
                Ok(now) => now != place.netns,
                Err(NetnsError::Open { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
                Err(_) => false,
            });
            if lost {
                // Its oldest process has ended: another one may still be there, or a new sandbox comes.
                place.path = None;
                self.scan.next = Instant::now();
            }
        }
        // No process leads there: when the pod's address goes, so has the sandbox.
        let unled = self.netns_of.iter().filter(|(_, place)| place.path.is_none()).map(|(uid, _)| uid.clone());
        for uid in unled.collect::<Vec<_>>() {
            let bare = self.holds_pod_address(&uid) == Some(false);
            let Some(place) = self.netns_of.get_mut(&uid) else { continue };
            let since = bare.then(|| place.address_missing_since.unwrap_or_else(Instant::now));
            place.address_missing_since = since;
            if since.is_some_and(|since| since.elapsed() >= ADDRESS_GONE) {
                let netns = place.netns.path().display().to_string();
                tracing::info!(uid = &*uid, netns, "the pod's address has gone from its namespace; it is let go");
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
