//! The end of a daemon after which none comes: its DaemonSet is gone, or goes. Then nothing of it stays on the node, and the pods go on
//! without the mesh. Where that is not certain its rules stay: pods are refused rather than passed in plaintext. The plugin goes where
//! our account or rights have gone, so that new pods start.

use super::watch::WATCH_SECONDS;
use super::{Running, annotate};
use crate::node::kubernetes::Config;
use crate::node::{active_daemon, cleanup, cni, redirect};
use crate::task::Signal;
use crate::task::backoff::Backoff;
use crate::telemetry::log::{brief, with_causes};
use futures_util::{StreamExt, stream};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{WatchEvent, WatchParams};
use kube::{Api, Client};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The variable by which a DaemonSet asks for the plugin.
const CNI_CONF_DIR: &str = "CULVERT_CNI_CONF_DIR";
/// How long the API may take to say whether our DaemonSet is there.
const ASK: Duration = Duration::from_secs(3);
/// How long a daemon that takes our place may take to begin, and at most half of the time to end: a DaemonSet that gets another name, or
/// is deleted and made again, begins it when this one ends. Meanwhile pods are refused.
const SURE: Duration = Duration::from_secs(10);
/// Time between looks at whether it has.
const LOOK: Duration = Duration::from_millis(100);
/// Waits between watches.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long the API may take to forget the annotations of the node's pods.
const FORGET: Duration = Duration::from_secs(3);
/// Pods that are seen to at once.
const AT_ONCE: usize = 8;

/// What is known of our DaemonSet. It may be deleted at the same moment as our rights to ask for it.
#[derive(Debug, Default)]
pub struct OwnSet {
    /// It has been there, and could be asked for.
    existed: AtomicBool,
    /// The API has told that it is gone, or goes.
    gone: AtomicBool,
    /// It is being watched: what has been told is true still.
    watched: AtomicBool,
    /// Nothing of ours is to stay on the node.
    nothing_stays: AtomicBool,
}

/// What follows from what the API says at the end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Another daemon follows, or nobody can tell.
    Stays,
    /// The next daemon does without the plugin: nobody would answer it.
    PluginGoes,
    /// No pod waits for a daemon any more; whether pods may be let go is not certain.
    WithoutPlugin(&'static str),
    /// Certainly none follows.
    Gone(&'static str),
}

impl OwnSet {
    /// Whether nothing of ours is to stay on the node, as far as that has been found out.
    pub fn nothing_stays(&self) -> bool {
        self.nothing_stays.load(Ordering::Relaxed)
    }

    /// Whether it is gone by what the API tells.
    fn is_told_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed) && self.watched.load(Ordering::Relaxed)
    }

    fn told(&self, gone: bool) {
        self.existed.store(true, Ordering::Relaxed);
        if self.gone.swap(gone, Ordering::Relaxed) != gone {
            match gone {
                true => {
                    tracing::info!("our DaemonSet is deleted: when this daemon ends nothing of it stays on the node")
                }
                false => tracing::info!("our DaemonSet is there again"),
            }
        }
    }

    /// Follows the DaemonSet until the process ends. Who may not watch it knows less at the end, and does less.
    pub(super) async fn follow(self: Arc<Self>, client: Client, config: Config) {
        let api: Api<DaemonSet> = Api::namespaced(client, &config.enablement.own_namespace);
        if let Ok(Ok(Some(set))) = tokio::time::timeout(ASK, api.get_opt(&config.daemonset)).await {
            self.told(set.metadata.deletion_timestamp.is_some());
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
                            self.told(set.metadata.deletion_timestamp.is_some());
                        }
                        WatchEvent::Deleted(_) => self.told(true),
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

    /// What follows from an answer of the API; none came within its time where there is none.
    fn end(&self, asked: Option<&Result<Option<DaemonSet>, kube::Error>>) -> End {
        let (existed, told) = (self.existed.load(Ordering::Relaxed), self.is_told_gone());
        match asked {
            Some(Ok(Some(set))) if set.metadata.deletion_timestamp.is_some() => End::Gone("is being deleted"),
            Some(Ok(Some(set))) if !asks_for_plugin(set) => End::PluginGoes,
            Some(Ok(Some(_))) => End::Stays,
            // One of another name would not be found either.
            Some(Ok(None)) if existed => End::Gone("does not exist any more"),
            Some(Ok(None)) => End::WithoutPlugin("does not exist"),
            Some(Err(_)) | None if told => End::Gone("has been deleted"),
            // Its account, or its rights, have been deleted before it; or keys and rights have changed.
            Some(Err(kube::Error::Api(status))) if status.code == 401 => End::WithoutPlugin("has lost its account"),
            Some(Err(kube::Error::Api(status))) if status.code == 403 && existed => {
                End::WithoutPlugin("has lost its rights")
            }
            // Whoever cannot tell leaves everything: pods that should be captured wait, rather than start without.
            Some(Err(error)) => {
                tracing::warn!(error = with_causes(error), "everything stays on the node: DaemonSet not readable");
                End::Stays
            }
            None => {
                tracing::warn!("everything stays on the node: the Kubernetes API does not answer");
                End::Stays
            }
        }
    }
}

impl Running {
    /// Removes what would keep pods waiting, or all there is, where no daemon follows this one. An upgrade leaves everything.
    pub(super) async fn leave(&self, drain: &Signal) {
        let config = &self.source.config;
        let (name, namespace) = (&config.daemonset, &config.enablement.own_namespace);
        let api: Api<DaemonSet> = Api::namespaced(self.source.client.clone(), namespace);
        // Where the API has said it already there are better things to do in the time that is left.
        let within = if self.source.own_set.is_told_gone() { ASK / 3 } else { ASK };
        let asked = tokio::time::timeout(within, api.get_opt(name)).await.ok();
        let (gone, certain) = match self.source.own_set.end(asked.as_ref()) {
            End::Stays => return,
            End::PluginGoes => return self.remove_plugin("goes on without it"),
            End::WithoutPlugin(gone) => (gone, false),
            End::Gone(gone) => (gone, true),
        };
        let followed = async {
            while !self.is_followed() {
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

    fn is_followed(&self) -> bool {
        let capturer = &self.source.capturer;
        capturer.turn.is_followed(&self.source.config.turns(&capturer.whose))
    }

    /// Lets all pods go: new connections at once, then, when those that are open have had their time, the rest.
    async fn uninstall(&self, drain: &Signal) {
        let places: Vec<_> = self.places.values().map(|place| place.netns.clone()).collect();
        let pass = async |netns| match redirect::let_pass(&netns).await {
            Ok(()) => {}
            // One that was not captured has no rules to be emptied.
            Err(error) => tracing::debug!(netns = %netns.path().display(), %error, "nothing to be emptied"),
        };
        stream::iter(places).for_each_concurrent(AT_ONCE, pass).await;
        let forget = annotate::forget_all(self.source.client.clone(), &self.source.config.node_name);
        let annotations = async {
            let forgotten = tokio::time::timeout(FORGET, forget).await;
            if let Err(error) = forgotten.unwrap_or_else(|_| Err("no answer in time".into())) {
                let word = annotate::WORD;
                tracing::warn!(error, "the annotation {word} of this node's pods stays: peers send HBONE to them");
            }
        };
        let node = self.source.capturer.config.remains();
        let rules = async {
            drain.now().await;
            if self.is_followed() {
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
            outcomes.extend(node.remove_probes().await);
            self.source.own_set.nothing_stays.store(true, Ordering::Relaxed);
            report(outcomes);
        };
        // An API that is silent takes none of the time that the rules need.
        tokio::join!(annotations, rules);
    }
}

impl Config {
    /// Removes what daemons and the CNI plugin of a node have met at; when no daemon uses it any more.
    pub fn remove_meeting_places(&self, whose: &str) -> [cleanup::Outcome; 2] {
        let (socket, turns) = (&self.cni_socket, self.turns(whose));
        let said = |error: std::io::Error| error.to_string();
        [
            (socket.display().to_string(), cni::remove_socket(socket).map_err(said)),
            (turns.display().to_string(), active_daemon::forget(&turns).map_err(said)),
        ]
    }
}

/// Says what has been removed, and what could not be.
pub fn report(outcomes: Vec<cleanup::Outcome>) {
    let mut removed = 0;
    for (what, outcome) in outcomes {
        match outcome {
            Ok(there) => removed += usize::from(there),
            Err(error) => tracing::error!(what, error, "could not be removed: run `culvert cleanup` on the node"),
        }
    }
    tracing::info!(removed, "removed from the node");
}

/// Whether the daemons of a DaemonSet install the plugin, and answer it.
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
    fn the_plugin_goes_where_the_next_daemon_does_not_answer_it() {
        let own = OwnSet::default();
        assert_eq!(own.end(Some(&Ok(Some(asking(CNI_CONF_DIR))))), End::Stays);
        assert_eq!(own.end(Some(&Ok(Some(asking("CULVERT_CNI_SOCKET"))))), End::PluginGoes);
        assert_eq!(own.end(Some(&Ok(Some(DaemonSet::default())))), End::PluginGoes);
    }

    #[test]
    fn pods_are_let_go_only_where_it_is_certain() {
        let refused = |code: u16| Some(Err(kube::Error::Api(Box::new(Status { code, ..Status::default() }))));
        let there = |going: bool| {
            let mut set = asking(CNI_CONF_DIR);
            set.metadata.deletion_timestamp = going.then(|| serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap());
            Some(Ok(Some(set)))
        };
        for (what, existed, told, asked, expected) in [
            ("an upgrade", true, false, there(false), End::Stays),
            ("deleted and made anew", true, true, there(false), End::Stays),
            ("being deleted", false, false, there(true), End::Gone("is being deleted")),
            ("deleted", true, false, Some(Ok(None)), End::Gone("does not exist any more")),
            ("another name", false, false, Some(Ok(None)), End::WithoutPlugin("does not exist")),
            ("rights gone with it", true, true, refused(403), End::Gone("has been deleted")),
            ("account gone with it", true, true, refused(401), End::Gone("has been deleted")),
            ("the API goes too", true, true, None, End::Gone("has been deleted")),
            ("keys changed", true, false, refused(401), End::WithoutPlugin("has lost its account")),
            ("rights changed", true, false, refused(403), End::WithoutPlugin("has lost its rights")),
            ("never had rights", false, false, refused(403), End::Stays),
            ("an API in trouble", true, false, refused(500), End::Stays),
            ("an API that is away", true, false, None, End::Stays),
        ] {
            let own = OwnSet::default();
            own.existed.store(existed, Ordering::Relaxed);
            own.gone.store(told, Ordering::Relaxed);
            own.watched.store(true, Ordering::Relaxed);
            assert_eq!(own.end(asked.as_ref()), expected, "{what}");
        }
        // It has been told, and the watch has ended: it may have been made again.
        let own = OwnSet::default();
        own.told(true);
        assert_eq!(own.end(None), End::Stays);
        assert_eq!(own.end(refused(403).as_ref()), End::WithoutPlugin("has lost its rights"));
    }
}
