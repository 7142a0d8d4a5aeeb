//! The end of a daemon after which none comes: its DaemonSet is gone, or goes. Then nothing of it stays on the node, and the pods go on
//! without the mesh. Where that is not certain its rules stay: pods are refused rather than passed in plaintext. The plugin goes where
//! our account or rights have gone, so that new pods start.

use super::annotate;
use super::daemonset::{ASK, ShutdownPlan};
use super::state::Running;
use crate::node::config::KubernetesConfig;
use crate::node::{active_daemon, cleanup, cni, redirect};
use crate::task::Signal;
use crate::telemetry::log::brief;
use futures_util::{StreamExt, stream};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use std::time::Duration;

/// How long a daemon that takes our place may take to begin, and at most half of the time to end: a DaemonSet that gets another name, or
/// is deleted and made again, begins it when this one ends. Meanwhile pods are refused.
const SURE: Duration = Duration::from_secs(10);
/// Time between looks at whether it has.
const LOOK: Duration = Duration::from_millis(100);
/// How long the API may take to forget the annotations of the node's pods.
const FORGET: Duration = Duration::from_secs(3);
/// Pods that are seen to at once.
const AT_ONCE: usize = 8;

impl Running {
    /// Removes what would keep pods waiting, or all there is, where no daemon follows this one. An upgrade leaves everything.
    pub(super) async fn leave(&self, drain: &Signal) {
        let config = &self.source.config;
        let (name, namespace) = (&config.daemonset, &config.enablement.own_namespace);
        let api: Api<DaemonSet> = Api::namespaced(self.source.client.clone(), namespace);
        // Where the API has said it already there are better things to do in the time that is left.
        let within = if self.source.own_set.is_told_gone() { ASK / 3 } else { ASK };
        let asked = tokio::time::timeout(within, api.get_opt(name)).await.ok();
        let (gone, certain) = match self.source.own_set.plan(asked.as_ref()) {
            ShutdownPlan::Stays => return,
            ShutdownPlan::PluginGoes => return self.remove_plugin("goes on without it"),
            ShutdownPlan::WithoutPlugin(gone) => (gone, false),
            ShutdownPlan::Gone(gone) => (gone, true),
        };
        let followed = async {
            while !self.has_successor() {
                tokio::time::sleep(LOOK).await;
            }
        };
        let sure = SURE.min(self.source.capturer.config.release_deadline / 2);
        tracing::info!(daemonset = name, gone, within = %brief(sure), "waiting for a daemon that may take this one's place");
        // Of a DaemonSet of another name, or one that ends after this one.
        if tokio::time::timeout(sure, followed).await.is_ok() {
            return tracing::info!(daemonset = name, gone, "another daemon of this node goes on: everything stays");
        }
        let again = tokio::time::timeout(ASK / 3, api.get_opt(name)).await;
        if let Ok(Ok(Some(set))) = again
            && set.metadata.deletion_timestamp.is_none()
        {
            return tracing::info!(daemonset = name, "the DaemonSet is there again: everything stays");
        }
        self.remove_plugin(gone);
        if certain {
            tracing::info!(daemonset = name, gone, "no daemon follows: the node's pods go on without the mesh");
            self.uninstall(drain).await;
        } else {
            tracing::warn!(
                daemonset = name,
                gone,
                "rules in pods stay: where no daemon follows, run `culvert cleanup` on the node"
            );
        }
    }

    fn remove_plugin(&self, gone: &str) {
        let Some(cni) = &self.source.config.cni else { return };
        let daemonset = &self.source.config.daemonset;
        match cni.remove() {
            Ok(removed) => {
                let files: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
                tracing::info!(daemonset, gone, removed = files.join(", "), "the CNI plugin is removed");
            }
            Err(error) => tracing::error!(%error, "the CNI plugin could not be removed: new pods wait for a daemon"),
        }
    }

    fn has_successor(&self) -> bool {
        let capturer = &self.source.capturer;
        capturer.role.has_successor(&self.source.config.daemons_folder(&capturer.node_tag))
    }

    /// Lets all pods go: new connections at once, then, when those that are open have had their time, the rest.
    async fn uninstall(&self, drain: &Signal) {
        let netns_of: Vec<_> = self.netns_of.values().map(|place| place.netns.clone()).collect();
        let pass = async |netns| match redirect::let_pass(&netns).await {
            Ok(()) => {}
            // One that was not captured has no rules to be emptied.
            Err(error) => tracing::debug!(netns = %netns.path().display(), %error, "nothing to be emptied"),
        };
        stream::iter(netns_of).for_each_concurrent(AT_ONCE, pass).await;
        let forget = annotate::forget_all(self.source.client.clone(), &self.source.config.node_name);
        let annotations = async {
            let forgotten = tokio::time::timeout(FORGET, forget).await;
            if let Err(error) = forgotten.unwrap_or_else(|_| Err("no answer in time".into())) {
                let word = annotate::ANNOTATION;
                tracing::warn!(error, "the annotation {word} of this node's pods stays: peers send HBONE to them");
            }
        };
        let node = self.source.capturer.config.cleanup();
        let rules = async {
            drain.now().await;
            if self.has_successor() {
                return tracing::info!("another daemon of this node has begun: the rest stays");
            }
            let removed = node.remove_rules(false).await;
            if removed.unreadable > 0 {
                let namespaces = removed.unreadable;
                tracing::warn!(
                    namespaces,
                    "rules too many to be read are not removed: `culvert cleanup --all` does it"
                );
            }
            let mut outcomes = removed.ours;
            outcomes.extend(node.remove_probe_rules().await);
            self.source.own_set.nothing_is_to_stay();
            report(outcomes);
        };
        // An API that is silent takes none of the time that the rules need.
        tokio::join!(annotations, rules);
    }
}

impl KubernetesConfig {
    /// Removes what daemons and the CNI plugin of a node have met at; when no daemon uses it any more.
    pub fn remove_shared_files(&self, node_tag: &str) -> [cleanup::CleanupOutcome; 2] {
        let (socket, folder) = (&self.cni_socket, self.daemons_folder(node_tag));
        let said = |error: std::io::Error| error.to_string();
        [
            (socket.display().to_string(), cni::remove_socket(socket).map_err(said)),
            (folder.display().to_string(), active_daemon::remove_folder(&folder).map_err(said)),
        ]
    }
}

/// Says what has been removed, and what could not be.
pub fn report(outcomes: Vec<cleanup::CleanupOutcome>) {
    let mut removed = 0;
    for (what, outcome) in outcomes {
        match outcome {
            Ok(there) => removed += usize::from(there),
            Err(error) => tracing::error!(what, error, "could not be removed: run `culvert cleanup` on the node"),
        }
    }
    tracing::info!(removed, "removed from the node");
}
