//! What is known of the daemon's own DaemonSet, and which parts of culvert stay on the node when the daemon ends.

use super::watch::WATCH_SECONDS;
use crate::node::config::KubernetesConfig;
use crate::task::backoff::Backoff;
use crate::telemetry::log::with_causes;
use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{WatchEvent, WatchParams};
use kube::{Api, Client};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Environment variable in a DaemonSet that enables the CNI plugin.
const CNI_CONF_DIR: &str = "CULVERT_CNI_CONF_DIR";
/// How long the API may take to answer whether the DaemonSet exists.
pub(super) const ASK: Duration = Duration::from_secs(3);
/// First and longest wait between watches.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What is known of the daemon's own DaemonSet. It may be deleted at the same moment as the daemon's permission to read
/// it.
#[derive(Debug, Default)]
pub struct OwnDaemonSet {
    /// It has existed, and could be read.
    existed: AtomicBool,
    /// The API has said that it is deleted, or is being deleted.
    gone: AtomicBool,
    /// A watch is open, so what the API has said still holds.
    watched: AtomicBool,
    /// Everything of culvert is to be removed from the node.
    nothing_stays: AtomicBool,
}

/// What to remove from the node when the daemon ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ShutdownPlan {
    /// Nothing: another daemon follows, or it is not known whether one does.
    Stays,
    /// The CNI plugin: the next daemon runs without it, and would not answer it.
    PluginGoes,
    /// The CNI plugin, so that no pod waits for a daemon. It is not certain that the captured pods may be released.
    WithoutPlugin(&'static str),
    /// Everything: certainly no daemon follows.
    Gone(&'static str),
}

impl OwnDaemonSet {
    /// Whether everything of culvert is to be removed from the node, as far as that is known.
    pub fn nothing_stays(&self) -> bool {
        self.nothing_stays.load(Ordering::Relaxed)
    }

    /// Records that everything of culvert is to be removed from the node.
    pub(super) fn nothing_is_to_stay(&self) {
        self.nothing_stays.store(true, Ordering::Relaxed);
    }

    /// Whether the API has said that the DaemonSet is deleted, and still says so.
    pub(super) fn is_reported_deleted(&self) -> bool {
        self.gone.load(Ordering::Relaxed) && self.watched.load(Ordering::Relaxed)
    }

    fn record(&self, gone: bool) {
        self.existed.store(true, Ordering::Relaxed);
        if self.gone.swap(gone, Ordering::Relaxed) != gone {
            match gone {
                true => {
                    tracing::info!(
                        "the DaemonSet is deleted: when this daemon ends, it removes everything of culvert from the node"
                    )
                }
                false => tracing::info!("the DaemonSet exists again"),
            }
        }
    }

    /// Follows the DaemonSet until the process ends. Without permission to watch it, less is known at the end, and less
    /// is removed.
    pub(super) async fn follow(self: Arc<Self>, client: Client, config: KubernetesConfig) {
        let api: Api<DaemonSet> = Api::namespaced(client, &config.enablement.own_namespace);
        if let Ok(Ok(Some(set))) = tokio::time::timeout(ASK, api.get_opt(&config.daemonset)).await {
            self.record(set.metadata.deletion_timestamp.is_some());
        }
        let params =
            WatchParams::default().fields(&format!("metadata.name={}", config.daemonset)).timeout(WATCH_SECONDS);
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        loop {
            let began = Instant::now();
            if let Ok(events) = api.watch_metadata(&params, "0").await {
                self.watched.store(true, Ordering::Relaxed);
                let mut events = std::pin::pin!(events);
                while let Some(Ok(event)) = events.next().await {
                    match event {
                        WatchEvent::Added(set) | WatchEvent::Modified(set) => {
                            self.record(set.metadata.deletion_timestamp.is_some());
                        }
                        WatchEvent::Deleted(_) => self.record(true),
                        WatchEvent::Bookmark(_) => {}
                        WatchEvent::Error(_) => break,
                    }
                }
                self.watched.store(false, Ordering::Relaxed);
            }
            if began.elapsed() > BACKOFF.1 {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next()).await;
        }
    }

    /// What to remove, by the answer of the API; `None` if none came in time.
    pub(super) fn plan(&self, asked: Option<&Result<Option<DaemonSet>, kube::Error>>) -> ShutdownPlan {
        let (existed, told) = (self.existed.load(Ordering::Relaxed), self.is_reported_deleted());
        match asked {
            Some(Ok(Some(set))) if set.metadata.deletion_timestamp.is_some() => ShutdownPlan::Gone("is being deleted"),
            Some(Ok(Some(set))) if !asks_for_plugin(set) => ShutdownPlan::PluginGoes,
            Some(Ok(Some(_))) => ShutdownPlan::Stays,
            // A DaemonSet with another name would not be found either.
            Some(Ok(None)) if existed => ShutdownPlan::Gone("does not exist any more"),
            Some(Ok(None)) => ShutdownPlan::WithoutPlugin("does not exist"),
            Some(Err(_)) | None if told => ShutdownPlan::Gone("has been deleted"),
            // The account, or its permissions, may have been deleted before the DaemonSet; or keys and permissions have
            // changed.
            Some(Err(kube::Error::Api(status))) if status.code == 401 => {
                ShutdownPlan::WithoutPlugin("has lost its account")
            }
            Some(Err(kube::Error::Api(status))) if status.code == 403 && existed => {
                ShutdownPlan::WithoutPlugin("has lost its rights")
            }
            // If it is not known, everything stays: pods that should be captured wait, rather than start without
            // capture.
            Some(Err(error)) => {
                tracing::warn!(
                    error = with_causes(error),
                    "cannot read the DaemonSet: everything of culvert stays on the node"
                );
                ShutdownPlan::Stays
            }
            None => {
                tracing::warn!("the Kubernetes API does not answer: everything of culvert stays on the node");
                ShutdownPlan::Stays
            }
        }
    }
}

/// Whether the daemons of a DaemonSet install the CNI plugin, and answer it.
fn asks_for_plugin(set: &DaemonSet) -> bool {
    let pod = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let variables =
        pod.into_iter().flat_map(|pod| &pod.containers).flat_map(|container| container.env.iter().flatten());
    variables.into_iter().any(|variable| variable.name == CNI_CONF_DIR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn asking(variable: &str) -> DaemonSet {
        serde_json::from_value(
            serde_json::json!({"metadata": {}, "spec": {"selector": {}, "template": {"spec": {"containers": [
                {"name": "c", "env": [{"name": "CULVERT_PODS", "value": "x"}, {"name": variable, "value": "/x"}]},
            ]}}}}),
        )
        .unwrap()
    }

    #[test]
    fn the_plugin_is_removed_if_the_next_daemon_does_not_answer_it() {
        let own = OwnDaemonSet::default();
        assert_eq!(own.plan(Some(&Ok(Some(asking(CNI_CONF_DIR))))), ShutdownPlan::Stays);
        assert_eq!(own.plan(Some(&Ok(Some(asking("CULVERT_CNI_SOCKET"))))), ShutdownPlan::PluginGoes);
        assert_eq!(own.plan(Some(&Ok(Some(DaemonSet::default())))), ShutdownPlan::PluginGoes);
    }

    #[test]
    fn pods_are_released_only_if_certainly_no_daemon_follows() {
        let refused = |code: u16| Some(Err(kube::Error::Api(Box::new(Status { code, ..Status::default() }))));
        let there = |going: bool| {
            let mut set = asking(CNI_CONF_DIR);
            set.metadata.deletion_timestamp = going.then(|| serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap());
            Some(Ok(Some(set)))
        };
        for (what, existed, told, asked, expected) in [
            ("an upgrade", true, false, there(false), ShutdownPlan::Stays),
            ("deleted and created again", true, true, there(false), ShutdownPlan::Stays),
            ("being deleted", false, false, there(true), ShutdownPlan::Gone("is being deleted")),
            ("deleted", true, false, Some(Ok(None)), ShutdownPlan::Gone("does not exist any more")),
            ("another name", false, false, Some(Ok(None)), ShutdownPlan::WithoutPlugin("does not exist")),
            ("rights gone with it", true, true, refused(403), ShutdownPlan::Gone("has been deleted")),
            ("account gone with it", true, true, refused(401), ShutdownPlan::Gone("has been deleted")),
            ("the API goes too", true, true, None, ShutdownPlan::Gone("has been deleted")),
            ("keys changed", true, false, refused(401), ShutdownPlan::WithoutPlugin("has lost its account")),
            ("rights changed", true, false, refused(403), ShutdownPlan::WithoutPlugin("has lost its rights")),
            ("never had rights", false, false, refused(403), ShutdownPlan::Stays),
            ("an API in trouble", true, false, refused(500), ShutdownPlan::Stays),
            ("an API that is away", true, false, None, ShutdownPlan::Stays),
        ] {
            let own = OwnDaemonSet::default();
            own.existed.store(existed, Ordering::Relaxed);
            own.gone.store(told, Ordering::Relaxed);
            own.watched.store(true, Ordering::Relaxed);
            assert_eq!(own.plan(asked.as_ref()), expected, "{what}");
        }
        // The API has said so, but the watch has ended: the DaemonSet may have been created again.
        let own = OwnDaemonSet::default();
        own.record(true);
        assert_eq!(own.plan(None), ShutdownPlan::Stays);
        assert_eq!(own.plan(refused(403).as_ref()), ShutdownPlan::WithoutPlugin("has lost its rights"));
    }
}
