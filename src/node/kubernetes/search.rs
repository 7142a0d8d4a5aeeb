//! Searches the node's processes for the network namespaces of pods: enrolled ones, saved ones, and others in which an
//! earlier daemon may have left rules.

use super::facts::PodFacts;
use super::scan::{ScanResult, SoughtPod, scan};
use super::state::{EnrolmentLoop, SCAN_EVERY, Scanned, spec};
use crate::mesh::Text;
use crate::node::status::CaptureState;
use crate::task::thread;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// Longest time between scans, for a pod that takes long to start.
const SCAN_MAX: Duration = Duration::from_secs(5);

/// How often a pod that is not enrolled and has no visible processes is searched for rules of an earlier daemon.
const CLEAN_TIMES: u32 = 10;

impl EnrolmentLoop {
    /// Pods whose network namespace is not known.
    fn sought(&self) -> Vec<SoughtPod> {
        let is_located = |uid: &Text| self.netns_by_pod.get(uid).is_some_and(|known| known.path.is_some());
        let is_unlocated = |pod: &&&PodFacts| !pod.ips.is_empty() && !is_located(&pod.uid);
        // A uid of the API belongs to that pod alone, whether it is searched for or not.
        let is_real = |uid: &Text| self.pods.as_ref().is_some_and(|pods| pods.contains_key(uid));
        let sought = |pod: &&PodFacts| {
            let sought = SoughtPod::from(*pod);
            SoughtPod { static_uid: sought.static_uid.filter(|uid| !is_real(uid)), ..sought }
        };
        let Some(wanted) = self.wanted() else { return self.sought_saved() };
        let others = self.leftovers();
        wanted.iter().filter(is_unlocated).chain(others.iter()).map(sought).collect()
    }

    /// Whether any pod is to be searched for.
    pub(super) fn is_seeking(&self) -> bool {
        !self.sought().is_empty()
    }

    /// Pods that are not enrolled and may contain rules of an earlier daemon; each until it has been cleaned up.
    fn leftovers(&self) -> Vec<&PodFacts> {
        let Some(wanted) = self.wanted().filter(|_| self.enrolment.capturer.role.is_active()) else {
            return Vec::new();
        };
        let wanted: HashSet<&Text> = wanted.into_iter().map(|pod| &pod.uid).collect();
        let left = |pod: &&PodFacts| {
            let elsewhere = pod.host_network || pod.ended || pod.ips.is_empty() || wanted.contains(&pod.uid);
            !elsewhere
                && !self.lingering.contains(&pod.uid)
                && self.cleaned.get(&pod.uid).is_none_or(|times| *times < CLEAN_TIMES)
        };
        self.pods.iter().flat_map(HashMap::values).filter(left).collect()
    }

    /// Searches again for rules of another daemon. That one may be releasing a pod, whose connections have time to end.
    pub(super) fn role_changed(&mut self) {
        self.cleaned.clear();
        if self.enrolment.capturer.role.is_active() {
            self.clean_from = Instant::now() + self.enrolment.capturer.config.release_deadline;
        }
    }

    /// Starts a scan of the node's processes.
    pub(super) fn start_scan(&mut self) {
        let sought = self.sought();
        (self.scan.running, self.scan.for_saved) = (Some(Instant::now()), self.wanted().is_none());
        let (proc, host) = (self.enrolment.config.proc.clone(), self.enrolment.capturer.config.host_netns.clone());
        let results = self.scan.results.0.clone();
        self.tasks.spawn(async move {
            let scanned = thread::run_blocking(move || scan(&proc, &host, &sought)).await;
            // If this fails, the enrolment loop has ended.
            let _ = results.send(scanned.unwrap_or_default()).await;
        });
    }

    /// Takes the results of a scan.
    pub(super) fn take_scan_results(&mut self, found: Scanned) {
        let began = self.scan.running.take();
        let wanted = self.wanted().map(|all| all.into_iter().map(|pod| pod.uid.clone()).collect::<HashSet<Text>>());
        if wanted.is_some() && self.scan.for_saved {
            // The addresses it searched for may be out of date.
            self.scan.next = Instant::now();
            return;
        }
        let mut all = true;
        for (uid, found) in found {
            let Some(wanted) = &wanted else {
                match found {
                    ScanResult::Namespace(netns, path) => self.found_saved(uid, netns, path, began),
                    ScanResult::Refused(why) => self.forget_saved(&uid, &why),
                    ScanResult::Nothing => all = false,
                }
                continue;
            };
            if !wanted.contains(&uid) {
                self.remove_leftovers(&uid, found);
                continue;
            }
            match found {
                ScanResult::Namespace(netns, path) => {
                    self.unlocated.remove(&uid);
                    self.take_netns(uid, netns, path, began);
                    continue;
                }
                // Without a process, the network namespace stays for as long as it holds the pod's address: containers
                // come and go.
                _ if self.netns_by_pod.contains_key(&uid) => self.drop_if_address_gone(&uid),
                ScanResult::Refused(why) => drop(self.unlocated.insert(uid, CaptureState::Failed(why))),
                ScanResult::Nothing => {
                    let why = "no process of the pod is running yet, or the host's /proc is not visible";
                    self.unlocated.insert(uid, CaptureState::Pending(why.into()));
                }
            }
            all = false;
        }
        self.scan.wait = if all { SCAN_EVERY } else { (self.scan.wait * 2).min(SCAN_MAX) };
        self.scan.next = Instant::now() + self.scan.wait;
    }

    /// Removes the rules that an earlier daemon has left in a pod that is not enrolled.
    fn remove_leftovers(&mut self, uid: &Text, found: ScanResult) {
        let Some(pod) = self.pods.as_ref().and_then(|pods| pods.get(uid)) else { return };
        let times = self.cleaned.entry(uid.clone()).or_default();
        // If its processes are just starting, it is searched for again.
        *times = if matches!(found, ScanResult::Namespace(..)) { CLEAN_TIMES } else { *times + 1 };
        if let ScanResult::Namespace(netns, _) = found
            && self.enrolment.board.get(uid).is_none()
        {
            let spec = spec(pod, netns);
            let (capturer, from) = (self.enrolment.capturer.clone(), self.clean_from);
            self.tasks.spawn(async move {
                if Instant::now() < from {
                    capturer.stop_redirecting(&spec).await;
                    tokio::time::sleep_until(from).await;
                }
                capturer.remove_rules(&spec).await;
            });
        }
    }
}
