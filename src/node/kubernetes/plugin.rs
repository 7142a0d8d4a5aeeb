//! The questions of the CNI plugin, answered from what is known of pods; and the end of the plugin, with the last daemon.

use super::places::Place;
use super::{Running, Source};
use crate::mesh::Text;
use crate::node::cni::{Asked, Question, Verb, install};
use crate::node::kubernetes::select::PodFacts;
use crate::node::pods::NetnsRef;
use crate::node::status::PodStatus;
use crate::sys::netns::Netns;
use crate::telemetry::log::with_causes;
use k8s_openapi::api::apps::v1::DaemonSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long a question of the CNI plugin may wait; the plugin waits longer, and so hears why.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// How long the API may take to say whether our DaemonSet is there.
const ASK_OF_DAEMONSET: Duration = Duration::from_secs(3);

/// What can be said to a question by now.
struct Verdict {
    answer: Option<Result<(), String>>,
    /// What it waits for, where there is no answer yet.
    waits_for: String,
    /// A namespace that was handed over and not known.
    place: Option<(Text, Netns)>,
}

impl Running {
    /// Takes a question of the CNI plugin.
    pub(super) fn ask(&mut self, asked: Asked) {
        let Question { verb, name, namespace, .. } = &asked.question;
        match verb {
            Verb::Status => drop(asked.answer.send(Ok(()))),
            Verb::Del => {
                // Without its namespace it is of a sandbox that has gone long since; the pod's present one is another's.
                if let Some(netns) = &asked.netns {
                    self.places.retain(|_, place| place.netns != *netns);
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
                self.places.insert(uid, Place { handed_over: true, ips, ..Place::new(netns) });
            }
            match verdict.answer {
                Some(answer) => drop(asked.answer.send(answer)),
                None if Instant::now() >= deadline => drop(asked.answer.send(Err(verdict.waits_for))),
                None => self.asked.push((asked, deadline)),
            }
        }
        handed_over
    }

    fn verdict(&self, asked: &Asked) -> Verdict {
        let Question { verb, name, namespace, uid, .. } = &asked.question;
        let later = |waits_for: String| Verdict { answer: None, waits_for, place: None };
        let now = |answer| Verdict { answer: Some(answer), waits_for: String::new(), place: None };
        let (Some(pods), Some(namespaces)) = (&self.pods, &self.namespaces) else {
            return later("the Kubernetes API has not told of this node's pods yet".into());
        };
        let is_it = |pod: &&PodFacts| {
            // Without a uid the one of this name that has not ended is meant.
            let same = match uid {
                Some(uid) => *pod.uid == **uid || pod.static_uid.as_deref() == Some(uid),
                None => !pod.ended,
            };
            *pod.name == **name && *pod.namespace == **namespace && same
        };
        let (Some(pod), Some(labels)) = (pods.values().find(is_it), namespaces.get(namespace.as_str())) else {
            return later(format!("the Kubernetes API has not told of pod {namespace}/{name} yet"));
        };
        if self.source.config.enablement.is_in(pod, labels).is_err() {
            // Labels of a namespace that may be old are no reason to let a pod start without us.
            return match self.source.metrics.is_connected("namespaces") {
                true => now(Ok(())),
                false => later("the Kubernetes API does not tell of namespaces' labels just now".into()),
            };
        }
        let status = self.source.board.get(&pod.uid);
        let ours = |netns: &Netns| self.places.get(&pod.uid).is_some_and(|place| place.netns == *netns);
        if let (Verb::Add, Some(netns)) = (verb, asked.netns.as_ref().filter(|netns| !ours(netns))) {
            let place = Some((pod.uid.clone(), netns.clone()));
            return Verdict { answer: None, waits_for: "the pod is being captured".into(), place };
        }
        let there = |status: &PodStatus| match &asked.netns {
            Some(netns) => status.spec.netns == NetnsRef::Handle(netns.clone()),
            None => true,
        };
        match status {
            Some(status) if status.held && there(&status) => match (verb, self.annotator.has_enabled(pod)) {
                // Its peers must know before it runs; they hear of its address from the API, and of this with it.
                (Verb::Add, Err(why)) => later(why),
                _ => now(Ok(())),
            },
            Some(status) => later(status.state.reason().unwrap_or("the pod is being captured").to_owned()),
            None => later("the pod is being captured".into()),
        }
    }
}

impl Source {
    /// Finds out whether our DaemonSet can be asked for at all, so that losing the right to means something later.
    pub(super) async fn try_to_ask(client: kube::Client, config: install::Config, could_ask: Arc<AtomicBool>) {
        let api: kube::Api<DaemonSet> = kube::Api::namespaced(client, &config.own_namespace);
        let asked = tokio::time::timeout(ASK_OF_DAEMONSET, api.get_opt(&config.own_name)).await;
        could_ask.store(matches!(asked, Ok(Ok(Some(_)))), Ordering::Relaxed);
    }

    /// Removes the CNI plugin where no daemon follows this one. An upgrade leaves it: new pods then wait for the next daemon.
    pub(super) async fn leave(&self) {
        let Some(cni) = &self.config.cni else { return };
        let (name, namespace) = (&cni.own_name, &cni.own_namespace);
        let api: kube::Api<DaemonSet> = kube::Api::namespaced(self.client.clone(), namespace);
        let asked = tokio::time::timeout(ASK_OF_DAEMONSET, api.get_opt(name)).await;
        let gone = match &asked {
            Ok(Ok(Some(set))) if set.metadata.deletion_timestamp.is_some() => "is being deleted",
            Ok(Ok(None)) => "does not exist",
            // Its account, or its rights, have been deleted before it.
            Ok(Err(kube::Error::Api(status))) if status.code == 401 => "has lost its account",
            Ok(Err(kube::Error::Api(status))) if status.code == 403 && self.could_ask.load(Ordering::Relaxed) => {
                "has lost its rights"
            }
            Ok(Ok(Some(_))) => return,
            // Whoever cannot tell leaves it: pods that should be captured wait, rather than start without.
            Ok(Err(error)) => {
                return tracing::warn!(error = with_causes(error), "the CNI plugin stays: DaemonSet not readable");
            }
            Err(_) => return tracing::warn!("the CNI plugin stays: the Kubernetes API does not answer"),
        };
        match cni.remove() {
            Ok(removed) => {
                let files: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
                tracing::info!(daemonset = name, gone, removed = files.join(", "), "the CNI plugin is removed");
            }
            Err(error) => tracing::error!(%error, "the CNI plugin could not be removed: new pods wait for a daemon"),
        }
    }
}
