//! The questions of the CNI plugin, answered from what is known of pods.

use super::facts::PodFacts;
use super::pod_netns::PodNetns;
use super::state::Running;
use crate::mesh::Text;
use crate::node::cni::{PendingQuestion, Question, Verb};
use crate::node::spec::NetnsRef;
use crate::node::status::PodStatus;
use crate::sys::netns::Netns;
use std::time::Duration;
use tokio::time::Instant;

/// How long a question of the CNI plugin may wait; the plugin waits longer, and so hears why.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// What is said to whoever waits for a daemon that has not the turn any more.
const TAKEN_OVER: &str = "this daemon is ending, or another daemon of this node has taken over; try again";

/// What can be said to a question by now.
struct Verdict {
    answer: Option<Result<(), String>>,
    /// What it waits for, where there is no answer yet.
    waits_for: String,
    /// A namespace that was handed over and not known.
    place: Option<(Text, Netns)>,
}

/// Whether a question is about this pod.
fn is_about(Question { name, namespace, uid, .. }: &Question, pod: &PodFacts) -> bool {
    // Without a uid the one of this name that has not ended is meant.
    let same = match uid {
        Some(uid) => *pod.uid == **uid || pod.static_uid.as_deref() == Some(uid),
        None => !pod.ended,
    };
    *pod.name == **name && *pod.namespace == **namespace && same
}

/// Whether the pod's start waits for the answer to a question.
pub(super) fn starts(question: &Question, pod: &PodFacts) -> bool {
    question.verb == Verb::Add && is_about(question, pod)
}

impl Running {
    /// Takes a question of the CNI plugin.
    pub(super) fn ask(&mut self, asked: PendingQuestion) {
        let Question { verb, name, namespace, .. } = &asked.question;
        match verb {
            Verb::Status => drop(asked.answer.send(Ok(()))),
            Verb::Del => {
                // Without its namespace it is of a sandbox that has gone long since; the pod's present one is another's.
                if let Some(netns) = &asked.netns {
                    self.netns_of.retain(|_, place| place.netns != *netns);
                }
                drop(asked.answer.send(Ok(())));
            }
            Verb::Check => self.asked.push((asked, Instant::now() + ANSWER_WITHIN)),
            Verb::Add => {
                let same =
                    |other: &Question| other.verb == Verb::Add && other.name == *name && other.namespace == *namespace;
                let (earlier, rest) =
                    std::mem::take(&mut self.asked).into_iter().partition(|(other, _)| same(&other.question));
                self.asked = rest;
                for (earlier, _) in earlier {
                    drop(earlier.answer.send(Err("the runtime has asked again for this pod".into())));
                }
                self.asked.push((asked, Instant::now() + ANSWER_WITHIN));
            }
        }
    }

    /// Answers those questions that can be answered by now, and those whose time is over; whether a namespace has come with
    /// one that was not known.
    pub(super) fn answer(&mut self) -> bool {
        let mut handed_over = false;
        for (asked, deadline) in std::mem::take(&mut self.asked) {
            if asked.answer.is_closed() {
                continue;
            }
            let verdict = self.verdict(&asked);
            if let Some((uid, netns)) = verdict.place {
                let ips = asked.question.ips.clone();
                handed_over = true;
                self.netns_of.insert(uid, PodNetns { handed_over: true, ips, ..PodNetns::new(netns) });
            }
            match verdict.answer {
                Some(answer) => drop(asked.answer.send(answer)),
                // It waits for what is the other one's now: the runtime finds that one when it asks again.
                None if !self.source.capturer.role.is_active() => drop(asked.answer.send(Err(TAKEN_OVER.into()))),
                None if Instant::now() >= deadline => drop(asked.answer.send(Err(verdict.waits_for))),
                None => self.asked.push((asked, deadline)),
            }
        }
        handed_over
    }

    fn verdict(&self, asked: &PendingQuestion) -> Verdict {
        let Question { verb, name, namespace, .. } = &asked.question;
        let later = |waits_for: String| Verdict { answer: None, waits_for, place: None };
        let now = |answer| Verdict { answer: Some(answer), waits_for: String::new(), place: None };
        let (Some(pods), Some(namespaces)) = (&self.pods, &self.namespaces) else {
            return later("the Kubernetes API has not told of this node's pods yet".into());
        };
        let pod = pods.values().find(|pod| is_about(&asked.question, pod));
        let (Some(pod), Some(labels)) = (pod, namespaces.get(namespace.as_str())) else {
            return later(format!("the Kubernetes API has not told of pod {namespace}/{name} yet"));
        };
        if self.source.config.enablement.enrols(pod, labels).is_err() {
            // Labels of a namespace that may be old are no reason to let a pod start without us.
            return match self.source.metrics.is_connected("namespaces") {
                true => now(Ok(())),
                false => later("the Kubernetes API does not tell of namespaces' labels just now".into()),
            };
        }
        let status = self.source.board.get(&pod.uid);
        let ours = |netns: &Netns| self.netns_of.get(&pod.uid).is_some_and(|place| place.netns == *netns);
        if let (Verb::Add, Some(netns)) = (verb, asked.netns.as_ref().filter(|netns| !ours(netns))) {
            let place = Some((pod.uid.clone(), netns.clone()));
            return Verdict { answer: None, waits_for: "the pod is being captured".into(), place };
        }
        let there = |status: &PodStatus| match &asked.netns {
            Some(netns) => status.spec.netns == NetnsRef::Handle(netns.clone()),
            None => true,
        };
        match status {
            Some(status) if status.redirected && there(&status) => match (verb, self.annotator.has_enabled(pod)) {
                // Its peers must know before it runs; they hear of its address from the API, and of this with it.
                (Verb::Add, Err(why)) => later(why),
                _ => now(Ok(())),
            },
            Some(status) => later(status.state.reason().unwrap_or("the pod is being captured").to_owned()),
            None => later("the pod is being captured".into()),
        }
    }
}
