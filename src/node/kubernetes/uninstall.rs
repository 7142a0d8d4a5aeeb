//! The end of a daemon that no other one follows, because its DaemonSet is deleted: everything of culvert is removed
//! from the node, and the pods go on without the mesh. If that is not certain, the rules stay: pods are refused rather
//! than passed in plaintext. If the daemon's account or permissions are gone, the CNI plugin is removed, so that new
//! pods can start.

use super::annotate;
use super::daemonset::{ASK, ShutdownPlan};
use super::state::EnrolmentLoop;
use crate::node::config::KubernetesConfig;
use crate::node::{active_daemon, cleanup, cni, redirect};
use crate::task::Signal;
use crate::telemetry::log::brief;
use futures_util::{StreamExt, stream};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use std::time::Duration;

/// How long a successor may take to begin, at most half of the time that this daemon has to end. A DaemonSet that is
/// renamed, or deleted and created again, starts its daemon when this one ends. In between, pods are refused.
const WAIT_FOR_SUCCESSOR: Duration = Duration::from_secs(10);
/// Time between checks for a successor.
const CHECK_EVERY: Duration = Duration::from_millis(100);
/// How long the API may take to remove the annotations of the node's pods.
const REMOVE_ANNOTATIONS: Duration = Duration::from_secs(3);
/// Pods that are released at once.
const AT_ONCE: usize = 8;

impl EnrolmentLoop {
    /// Removes what would keep pods waiting, or everything, if no daemon follows. After an upgrade everything stays.
    pub(super) async fn clean_up_at_end(&self, drain: &Signal) {
        let config = &self.enrolment.config;
        let (name, namespace) = (&config.daemonset, &config.enablement.own_namespace);
        let api: Api<DaemonSet> = Api::namespaced(self.enrolment.client.clone(), namespace);
        // If the API has said so already, the time is better spent on the rest.
        let within = if self.enrolment.own_set.is_reported_deleted() { ASK / 3 } else { ASK };
        let asked = tokio::time::timeout(within, api.get_opt(name)).await.ok();
        let (gone, certain) = match self.enrolment.own_set.plan(asked.as_ref()) {
            ShutdownPlan::Stays => return,
            ShutdownPlan::PluginGoes => return self.remove_plugin("goes on without it"),
            ShutdownPlan::WithoutPlugin(gone) => (gone, false),
            ShutdownPlan::Gone(gone) => (gone, true),
        };
        let followed = async {
            while !self.has_successor() {
                tokio::time::sleep(CHECK_EVERY).await;
            }
        };
        let sure = WAIT_FOR_SUCCESSOR.min(self.enrolment.capturer.config.release_deadline / 2);
        tracing::info!(daemonset = name, gone, within = %brief(sure), "waiting for a daemon that may replace this one");
        // A daemon of a DaemonSet with another name, or one that ends after this one.
        if tokio::time::timeout(sure, followed).await.is_ok() {
            return tracing::info!(daemonset = name, gone, "another daemon of this node is running: everything stays");
        }
        let again = tokio::time::timeout(ASK / 3, api.get_opt(name)).await;
        if let Ok(Ok(Some(set))) = again
            && set.metadata.deletion_timestamp.is_none()
        {
            return tracing::info!(daemonset = name, "the DaemonSet exists again: everything stays");
        }
        self.remove_plugin(gone);
        if certain {
            tracing::info!(
                daemonset = name,
                gone,
                "no daemon replaces this one: releasing the node's pods, which continue without the mesh"
            );
            self.uninstall(drain).await;
        } else {
            tracing::warn!(
                daemonset = name,
                gone,
                "rules in pods stay: if no daemon follows, run `culvert cleanup` on the node"
            );
        }
    }

    fn remove_plugin(&self, gone: &str) {
        let Some(cni) = &self.enrolment.config.cni else { return };
        let daemonset = &self.enrolment.config.daemonset;
        match cni.remove() {
            Ok(removed) => {
                let files: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
                tracing::info!(daemonset, gone, removed = files.join(", "), "removed the CNI plugin");
            }
            Err(error) => tracing::error!(%error, "cannot remove the CNI plugin: new pods wait for a daemon"),
        }
    }

    fn has_successor(&self) -> bool {
        let capturer = &self.enrolment.capturer;
        capturer.role.has_successor(&self.enrolment.config.daemons_folder(&capturer.node_tag))
    }

    /// Releases all pods: new connections at once, the rest when open connections have had their time.
    async fn uninstall(&self, drain: &Signal) {
        let netns_by_pod: Vec<_> = self.netns_by_pod.values().map(|known| known.netns.clone()).collect();
        let pass = async |netns| match redirect::stop_redirecting(&netns).await {
            Ok(()) => {}
            // A pod that was not captured has no chains to empty.
            Err(error) => tracing::debug!(netns = %netns.path().display(), %error, "no rules to empty"),
        };
        stream::iter(netns_by_pod).for_each_concurrent(AT_ONCE, pass).await;
        let forget = annotate::remove_all(self.enrolment.client.clone(), &self.enrolment.config.node_name);
        let annotations = async {
            let forgotten = tokio::time::timeout(REMOVE_ANNOTATIONS, forget).await;
            if let Err(error) = forgotten.unwrap_or_else(|_| Err("no answer in time".into())) {
                let word = annotate::ANNOTATION;
                tracing::warn!(
                    error,
                    "cannot remove the annotation {word} of this node's pods: peers go on sending HBONE to them"
                );
            }
        };
        let node = self.enrolment.capturer.config.cleanup();
        let rules = async {
            drain.now().await;
            if self.has_successor() {
                return tracing::info!("another daemon of this node has started: the rest stays");
            }
            let removed = node.remove_rules(false).await;
            if removed.unreadable > 0 {
                let namespaces = removed.unreadable;
                tracing::warn!(
                    namespaces,
                    "some pods have too many rules to read, and keep them: `culvert cleanup --all` removes them"
                );
            }
            let mut outcomes = removed.ours;
            outcomes.extend(node.remove_probe_rules().await);
            self.enrolment.own_set.nothing_is_to_stay();
            report(outcomes);
        };
        // The rules do not wait for an API that does not answer.
        tokio::join!(annotations, rules);
    }
}

impl KubernetesConfig {
    /// Removes the socket, and the folder in which the daemons of the node agree on the active one, once no daemon uses
    /// them.
    pub fn remove_shared_files(&self, node_tag: &str) -> [cleanup::CleanupOutcome; 2] {
        let (socket, folder) = (&self.cni_socket, self.daemons_folder(node_tag));
        let said = |error: std::io::Error| error.to_string();
        [
            (socket.display().to_string(), cni::remove_socket(socket).map_err(said)),
            (folder.display().to_string(), active_daemon::remove_folder(&folder).map_err(said)),
        ]
    }
}

/// Logs what has been removed, and what could not be.
pub fn report(outcomes: Vec<cleanup::CleanupOutcome>) {
    let mut removed = 0;
    for (what, outcome) in outcomes {
        match outcome {
            Ok(there) => removed += usize::from(there),
            Err(error) => tracing::error!(what, error, "cannot remove this: run `culvert cleanup` on the node"),
        }
    }
    tracing::info!(removed, "removed rules and files of culvert from the node");
}
