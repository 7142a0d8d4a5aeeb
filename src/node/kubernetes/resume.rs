//! Keeps the pods captured that an earlier daemon had enrolled, until the Kubernetes API says which pods are enrolled;
//! and saves the enrolled pods.

use super::facts::PodFacts;
use super::saved::SavedPod;
use super::scan::SoughtPod;
use super::state::{EnrolmentLoop, spec};
use crate::mesh::Text;
use crate::sys::netns::Netns;
use std::path::PathBuf;
use tokio::time::Instant;

impl EnrolmentLoop {
    /// Saved pods whose network namespace is not known, while the API has sent none.
    pub(super) fn sought_saved(&self) -> Vec<SoughtPod> {
        let is_unlocated = |pod: &&PodFacts| self.netns_by_pod.get(&pod.uid).is_none_or(|known| known.path.is_none());
        self.saved_pods().into_iter().filter(is_unlocated).map(SoughtPod::from).collect()
    }

    fn saved_pods(&self) -> Vec<&PodFacts> {
        // If the API has sent the other pods and not this one, it no longer exists.
        let may_be = |pod: &&PodFacts| self.pods.as_ref().is_none_or(|pods| pods.contains_key(&pod.uid));
        self.saved.all().filter(may_be).collect()
    }

    /// Takes a network namespace that was found for a saved pod. It counts only if it is the one that was captured.
    pub(super) fn found_saved(&mut self, uid: Text, netns: Netns, path: PathBuf, began: Option<Instant>) {
        match self.saved.netns(&uid) {
            Some(id) if id == netns.id() => self.take_netns(uid, netns, path, began),
            Some(_) => self.forget_saved(&uid, "its processes are in a different network namespace now"),
            None => {}
        }
    }

    /// Forgets a saved pod, which then waits for the API. If it is captured it stays so: releasing it would pass its
    /// traffic.
    pub(super) fn forget_saved(&mut self, uid: &Text, why: &str) {
        if self.netns_by_pod.contains_key(uid) {
            return;
        }
        let Some(pod) = self.saved.remove(uid) else { return };
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        tracing::warn!(
            namespace,
            name,
            why,
            "a pod that was captured before the start is not captured again before the Kubernetes API answers"
        );
    }

    /// Captures the saved pods, until the API says which pods are enrolled.
    pub(super) fn apply_saved(&mut self) {
        let here = |pod: &PodFacts| self.netns_by_pod.get(&pod.uid).map(|known| spec(pod, known.netns.clone()));
        let specs = self.saved_pods().into_iter().filter_map(here).collect();
        self.enrolment.pods.apply(specs, None);
    }

    /// Forgets the saved pods, because the API has sent pods and namespaces. Network namespaces stay if they hold their
    /// pod's address.
    pub(super) fn drop_saved(&mut self) {
        for uid in self.saved.clear() {
            self.drop_if_address_gone(&uid);
        }
    }

    /// Saves the pods that are enrolled now.
    pub(super) fn save(&mut self, wanted: &[PodFacts]) {
        if !self.saved.is_due() {
            return;
        }
        let here = |pod: &PodFacts| Some(SavedPod::of(pod, &self.netns_by_pod.get(&pod.uid)?.netns, self.ips(pod)));
        let pods: Vec<SavedPod> = wanted.iter().filter_map(here).collect();
        self.saved.save(pods.into_iter(), &self.tasks);
    }
}
