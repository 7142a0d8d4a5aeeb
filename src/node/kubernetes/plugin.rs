//! Answers the requests of the CNI plugin from what is known about pods.

use super::facts::PodFacts;
use super::pod_netns::PodNetns;
use super::state::EnrolmentLoop;
use crate::mesh::Text;
use crate::node::cni::{PendingRequest, PluginRequest, Verb};
use crate::node::spec::NetnsRef;
use crate::node::status::PodStatus;
use crate::sys::netns::Netns;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long a request may wait. The plugin waits longer, so it receives the reason.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// Answer to plugins that wait for a daemon that is no longer active.
const TAKEN_OVER: &str = "this daemon is ending, or another daemon of this node has taken over; try again";

/// What can be answered to a request now.
struct Verdict {
    answer: Option<Result<(), String>>,
    /// What the answer waits for, if there is none yet.
    waits_for: String,
    /// A pod's network namespace that came with the request and is not known yet.
    new_netns: Option<(Text, Netns)>,
}

/// Whether a request is about this pod.
fn is_about(PluginRequest { name, namespace, uid, .. }: &PluginRequest, pod: &PodFacts) -> bool {
    // Without a uid, the request is about the pod of this name that has not ended.
    let same = match uid {
        Some(uid) => *pod.uid == **uid || pod.static_uid.as_deref() == Some(uid),
        None => !pod.ended,
    };
    *pod.name == **name && *pod.namespace == **namespace && same
}

/// Whether the pod's start waits for the answer to a request.
pub(super) fn starts(request: &PluginRequest, pod: &PodFacts) -> bool {
    request.verb == Verb::Add && is_about(request, pod)
}

impl EnrolmentLoop {
    /// Takes a request of the CNI plugin.
    pub(super) fn take_question(&mut self, asked: PendingRequest) {
        let PluginRequest { verb, name, namespace, .. } = &asked.request;
        match verb {
            Verb::Status => drop(asked.answer.send(Ok(()))),
            Verb::Del => {
                // Without a network namespace, the request is about a sandbox that went long ago. The pod's present
                // sandbox is another one.
                if let Some(netns) = &asked.netns {
                    self.netns_by_pod.retain(|_, known| known.netns != *netns);
                }
                drop(asked.answer.send(Ok(())));
            }
            Verb::Check => self.asked.push((asked, Instant::now() + ANSWER_WITHIN)),
            Verb::Add => {
                self.leave_old_sandbox(&asked);
                let same = |other: &PluginRequest| {
                    other.verb == Verb::Add && other.name == *name && other.namespace == *namespace
                };
                let (earlier, rest) =
                    std::mem::take(&mut self.asked).into_iter().partition(|(other, _)| same(&other.request));
                self.asked = rest;
                for (earlier, _) in earlier {
                    drop(
                        earlier.answer.send(Err("the container runtime has sent a newer request for this pod".into())),
                    );
                }
                self.asked.push((asked, Instant::now() + ANSWER_WITHIN));
            }
        }
    }

    /// Drops the network namespace of a pod that is not enrolled any more and now gets another sandbox.
    fn leave_old_sandbox(&mut self, asked: &PendingRequest) {
        let about = |pod: &&PodFacts| self.lingering.contains(&pod.uid) && is_about(&asked.request, pod);
        let uid = self.pods.iter().flat_map(HashMap::values).find(about).map(|pod| &pod.uid);
        if let Some(uid) = uid
            && self.netns_by_pod.get(uid).is_some_and(|known| asked.netns.as_ref() != Some(&known.netns))
        {
            self.netns_by_pod.remove(uid);
        }
    }

    /// Answers the requests that can be answered now, and those that have waited too long. Returns whether a request
    /// brought a network namespace that was not known.
    pub(super) fn answer_questions(&mut self) -> bool {
        let mut handed_over = false;
        for (asked, deadline) in std::mem::take(&mut self.asked) {
            if asked.answer.is_closed() {
                continue;
            }
            let verdict = self.verdict(&asked);
            if let Some((uid, netns)) = verdict.new_netns {
                let ips = asked.request.ips.clone();
                handed_over = true;
                self.netns_by_pod.insert(uid, PodNetns { handed_over: true, ips, ..PodNetns::new(netns) });
            }
            match verdict.answer {
                Some(answer) => drop(asked.answer.send(answer)),
                // It waits for the other daemon now. The runtime reaches that one when it asks again.
                None if !self.enrolment.capturer.role.is_active() => drop(asked.answer.send(Err(TAKEN_OVER.into()))),
                None if Instant::now() >= deadline => drop(asked.answer.send(Err(verdict.waits_for))),
                None => self.asked.push((asked, deadline)),
            }
        }
        handed_over
    }

    fn verdict(&self, asked: &PendingRequest) -> Verdict {
        let PluginRequest { verb, name, namespace, .. } = &asked.request;
        let later = |waits_for: String| Verdict { answer: None, waits_for, new_netns: None };
        let now = |answer| Verdict { answer: Some(answer), waits_for: String::new(), new_netns: None };
        let (Some(pods), Some(namespaces)) = (&self.pods, &self.namespaces) else {
            return later("the Kubernetes API has not sent this node's pods yet".into());
        };
        let pod = pods.values().find(|pod| is_about(&asked.request, pod));
        let (Some(pod), Some(labels)) = (pod, namespaces.get(namespace.as_str())) else {
            return later(format!("the Kubernetes API has not sent pod {namespace}/{name} yet"));
        };
        if self.enrolment.config.enablement.enrols(pod, labels).is_err() {
            // Labels of a namespace that may be out of date are no reason to start a pod without capture.
            return match self.enrolment.metrics.is_connected("namespaces") {
                true => now(Ok(())),
                false => later(
                    "the watch of namespaces in the Kubernetes API is interrupted, so their labels may be out of date"
                        .into(),
                ),
            };
        }
        let status = self.enrolment.board.get(&pod.uid);
        let ours = |netns: &Netns| self.netns_by_pod.get(&pod.uid).is_some_and(|known| known.netns == *netns);
        if let (Verb::Add, Some(netns)) = (verb, asked.netns.as_ref().filter(|netns| !ours(netns))) {
            let new_netns = Some((pod.uid.clone(), netns.clone()));
            return Verdict { answer: None, waits_for: "the pod is being captured".into(), new_netns };
        }
        let there = |status: &PodStatus| match &asked.netns {
            Some(netns) => status.spec.netns == NetnsRef::Handle(netns.clone()),
            None => true,
        };
        match status {
            Some(status) if status.redirected && there(&status) => {
                match (verb, self.annotator.is_enabled_in_api(pod)) {
                    // The pod's peers must know that it takes tunnels before it runs. The API announces its address
                    // together with this annotation.
                    (Verb::Add, Err(why)) => later(why),
                    _ => now(Ok(())),
                }
            }
            Some(status) => later(status.state.reason().unwrap_or("the pod is being captured").to_owned()),
            None => later("the pod is being captured".into()),
        }
    }
}
