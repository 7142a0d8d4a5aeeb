//! The loop of enrolment by the Kubernetes API. It takes what the API, the scans, the CNI plugin and the pods' states
//! say, compares the present state with the desired one, and makes up the difference.

use super::annotate::{self, Annotator};
use super::facts::{AnnotationFault, PodFacts};
use super::lingering::Lingering;
use super::plugin;
use super::pod_netns::PodNetns;
use super::ready_before_enabled::{self, ReadyBeforeEnabled};
use super::saved::SavedPods;
use super::state::{Enrolment, EnrolmentLoop, ScanSchedule, described, spec};
use super::watch::{self, ApiEvent};
use crate::mesh::Text;
use crate::node::selectors::Labels;
use crate::node::spec::{NetnsRef, PodSpec};
use crate::node::status::CaptureState;
use crate::task::{Group, Signal};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

/// Events of the API that may wait.
const QUEUE: usize = 256;
/// Time between checks of the paths that lead to network namespaces.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Shortest time between two log lines about the annotations of one pod.
const LOG_FAULTS_EVERY: Duration = Duration::from_secs(10);

/// Reason of the state of a pod whose sidecar is not redirected.
const NOT_REDIRECTED: &str = "its sidecar depends on istio-cni to redirect it (container istio-validation has failed), and culvert does not do \
     that: have the sidecar injected with istio-init (pilot.cni.enabled: false in istiod's values), or take it out and label the pod \
     istio.io/dataplane-mode=ambient";

impl Enrolment {
    /// Follows the API until the process ends.
    pub async fn run(mut self, drain: Signal) {
        let (send_event, mut events) = mpsc::channel(QUEUE);
        let tasks = Group::default();
        tasks.spawn(watch::pods(
            self.client.clone(),
            self.config.node_name.clone(),
            send_event.clone(),
            self.metrics.clone(),
        ));
        tasks.spawn(watch::namespaces(self.client.clone(), send_event, self.metrics.clone()));
        tasks.spawn(self.own_set.clone().follow(self.client.clone(), self.config.clone()));
        let annotator = Annotator::new(self.client.clone(), self.metrics.clone(), tasks.clone());
        let mut states = self.board.subscribe();
        let (ready, mut plugin) = (self.ready.take().map(Arc::new), self.plugin.take());
        let saved = SavedPods::read(self.config.saved_pods.clone(), &self.config.node_name).await;
        let mut running = EnrolmentLoop {
            enrolment: self,
            pods: None,
            namespaces: None,
            netns_by_pod: HashMap::new(),
            unlocated: HashMap::new(),
            annotator,
            scan: ScanSchedule::default(),
            ready,
            asked: Vec::new(),
            cleaned: HashMap::new(),
            clean_from: Instant::now(),
            logged_faults: HashMap::new(),
            ready_before_enabled: ReadyBeforeEnabled::default(),
            saved,
            lingering: Lingering::default(),
            tasks: tasks.clone(),
        };
        let mut role_changes = running.enrolment.capturer.role.subscribe();
        let mut checks = tokio::time::interval(CHECK_EVERY);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let sought = running.scan.running.is_none() && running.is_seeking();
            let asks = async {
                match &mut plugin {
                    Some(plugin) => plugin.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = drain.gentle() => break,
                Some(first) = events.recv() => {
                    running.take(first);
                    while let Ok(more) = events.try_recv() {
                        running.take(more);
                    }
                }
                Some(found) = running.scan.results.1.recv() => running.take_scan_results(found),
                outcome = running.annotator.outcome() => running.annotator.ended(outcome),
                result = running.saved.outcome() => running.saved.ended(result),
                Ok(()) = states.changed() => {}
                Ok(()) = role_changes.changed() => running.role_changed(),
                Some(asked) = asks => running.take_question(asked),
                _ = checks.tick() => running.check_netns(),
                () = running.lingering.due() => {}
                () = tokio::time::sleep_until(running.scan.next), if sought => running.start_scan(),
            }
            running.reconcile();
        }
        // These questions are not answered any more; the runtime asks again.
        drop(plugin);
        running.asked.clear();
        running.clean_up_at_end(&drain).await;
        tasks.cut();
        tasks.finished().await;
    }
}

impl EnrolmentLoop {
    fn take(&mut self, event: ApiEvent) {
        self.scan.soon();
        let enablement = &self.enrolment.config.enablement;
        let of_pod = |mut pod: PodFacts| {
            enablement.prune(&mut pod.labels);
            (pod.uid.clone(), pod)
        };
        let of_namespace = |(name, mut labels): (Text, Labels)| {
            enablement.prune(&mut labels);
            (name, labels)
        };
        match event {
            ApiEvent::AllPods(all) => self.pods = Some(all.into_iter().map(of_pod).collect()),
            ApiEvent::Pod(pod) => self.pods.get_or_insert_default().extend([of_pod(pod)]),
            ApiEvent::PodGone(uid) => drop(self.pods.as_mut().map(|pods| pods.remove(&uid))),
            ApiEvent::AllNamespaces(all) => self.namespaces = Some(all.into_iter().map(of_namespace).collect()),
            ApiEvent::Namespace(name, labels) => {
                self.namespaces.get_or_insert_default().extend([of_namespace((name, labels))]);
            }
            ApiEvent::NamespaceGone(name) => drop(self.namespaces.as_mut().map(|all| all.remove(&name))),
        }
    }

    /// Makes the present state equal to the desired one.
    fn reconcile(&mut self) {
        let Some(wanted) = self.wanted() else {
            self.apply_saved();
            self.answer_questions();
            return;
        };
        let wanted: Vec<PodFacts> = wanted.into_iter().cloned().collect();
        self.drop_saved();
        if self.enrolment.capturer.mesh.load().synced.missing().is_none() {
            self.enrolment.capturer.role.set_ready();
        }
        let uids: HashSet<&Text> = wanted.iter().map(|pod| &pod.uid).collect();
        let lingering = self.lingering(&uids);
        self.netns_by_pod.retain(|uid, _| uids.contains(uid) || self.lingering.contains(uid));
        self.unlocated.retain(|uid, _| uids.contains(uid));
        let redirected = wanted.iter().chain(&lingering);
        self.enrolment.probed.set(redirected.map(|pod| (pod.uid.clone(), self.ips(pod))).collect());
        let located = |pod: &PodFacts| self.netns_by_pod.get(&pod.uid).map(|known| spec_in(pod, known));
        let (mut specs, mut shown): (Vec<PodSpec>, _) = (lingering.iter().filter_map(located).collect(), Vec::new());
        for pod in &wanted {
            log_faults(&mut self.logged_faults, pod);
            // From now on the pod may leave rules behind again.
            self.cleaned.remove(&pod.uid);
            match self.netns_by_pod.get(&pod.uid) {
                Some(known) => specs.push(spec_in(pod, known)),
                None => {
                    let why = match pod.ips.is_empty() {
                        true => CaptureState::Pending("it has no address yet: its sandbox does not exist".into()),
                        false => self.unlocated.get(&pod.uid).cloned().unwrap_or_else(|| {
                            CaptureState::Pending("its network namespace has not been found yet".into())
                        }),
                    };
                    let netns = NetnsRef::Path(PathBuf::new());
                    shown.push((PodSpec { netns, ..described(pod) }, why));
                }
            }
        }
        shown.extend(self.not_redirected());
        // Ready once each pod of the first list has been searched for, and each that was found has had its attempt.
        let all_searched = self.scan.running.is_none()
            && wanted.iter().all(|pod| {
                pod.ips.is_empty() || self.netns_by_pod.contains_key(&pod.uid) || self.unlocated.contains_key(&pod.uid)
            });
        self.enrolment.pods.apply(specs, self.ready.as_ref());
        self.enrolment.pods.show(shown);
        if all_searched {
            self.ready = None;
        }
        self.annotate(&wanted);
        self.save(&wanted);
        // A network namespace from the plugin has become a pod, whose questions may be answered now.
        if self.answer_questions() {
            self.reconcile();
        }
    }

    /// Pods that are not enrolled any more and stay captured for a moment, in the network namespace that they have.
    fn lingering(&mut self, enrolled: &HashSet<&Text>) -> Vec<PodFacts> {
        let Some(pods) = &self.pods else { return Vec::new() };
        // Without the pod's address, the sandbox has ended.
        let captured = self.netns_by_pod.iter().filter(|(_, known)| known.address_missing_since.is_none());
        self.lingering.update(captured.map(|(uid, _)| uid), enrolled, pods).into_iter().cloned().collect()
    }

    /// Pods whose sidecar is not redirected; they are shown as failed.
    fn not_redirected(&self) -> Vec<(PodSpec, CaptureState)> {
        let all = self.pods.iter().flat_map(HashMap::values).filter(|pod| pod.is_not_redirected && !pod.ended);
        all.map(|pod| (described(pod), CaptureState::Failed(NOT_REDIRECTED.into()))).collect()
    }

    fn annotate(&mut self, wanted: &[PodFacts]) {
        if !self.enrolment.capturer.role.is_active() {
            return;
        }
        let Some(pods) = &self.pods else { return };
        let uids: HashSet<&Text> = wanted.iter().map(|pod| &pod.uid).collect();
        let states: BTreeMap<Text, _> =
            self.enrolment.board.list().into_iter().map(|status| (status.spec.uid.clone(), status)).collect();
        for pod in pods.values() {
            match uids.contains(&pod.uid) {
                true => {
                    let status = states.get(&pod.uid);
                    let awaited = self.asked.iter().any(|(asked, _)| plugin::starts(&asked.request, pod));
                    let unreachable = awaited || pod.ips.is_empty();
                    if let Ok(value) = annotate::wanted(status, pod.annotation(), unreachable) {
                        self.annotator.ensure(pod, Some(value), awaited);
                    }
                    let captured =
                        status.is_some_and(|status| status.redirected || status.state == CaptureState::Captured);
                    let told = self.annotator.is_enabled_in_api(pod).is_ok();
                    let news = self.ready_before_enabled.check(pod, captured, told, ready_before_enabled::room);
                    if news.count {
                        self.enrolment.metrics.count_ready_before_enabled();
                    }
                    if news.name {
                        ready_before_enabled::name(pod);
                    }
                }
                // A pod that is no longer enrolled loses its annotation. A pod that has ended keeps it: nothing calls
                // it any more.
                false if pod.annotation().is_some() && !pod.ended => self.annotator.ensure(pod, None, false),
                false => {}
            }
        }
        self.ready_before_enabled.retain(|uid| uids.contains(uid));
        self.annotator.retain(|uid| pods.contains_key(uid));
        self.cleaned.retain(|uid, _| pods.contains_key(uid));
        self.logged_faults.retain(|uid, _| pods.contains_key(uid));
    }
}

/// What capture needs to know about a pod in the network namespace that was found for it.
fn spec_in(pod: &PodFacts, known: &PodNetns) -> PodSpec {
    let mut spec = spec(pod, known.netns.clone());
    if known.path.is_none() && !known.ips.is_empty() {
        spec.ips.clone_from(&known.ips);
    }
    spec
}

/// Logs invalid annotations of a pod: once, and again if they change, but not too often.
fn log_faults(logged_faults: &mut HashMap<Text, (Vec<AnnotationFault>, Instant)>, pod: &PodFacts) {
    let said = logged_faults.get(&pod.uid);
    let is_said = |fault: &&AnnotationFault| said.is_some_and(|(said, _)| said.contains(fault));
    let news: Vec<&AnnotationFault> = pod.faults.iter().filter(|fault| !is_said(fault)).collect();
    if news.is_empty() || said.is_some_and(|(_, at)| at.elapsed() < LOG_FAULTS_EVERY) {
        return;
    }
    for (annotation, value) in news {
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        tracing::warn!(namespace, name, annotation, value, "the pod's annotation has an invalid value and is ignored");
    }
    logged_faults.insert(pod.uid.clone(), (pod.faults.clone(), Instant::now()));
}
