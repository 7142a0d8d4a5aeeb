//! Writes the roots into a ConfigMap of every namespace, where daemons mount them to verify the control plane, and keeps
//! them right if somebody changes or deletes one.
//!
//! Replicas do not fight. A ConfigMap that differs may be the work of another replica that knows newer roots. So before
//! one is overwritten, the roots are loaded anew from where they come from: whoever wrote newer ones had read them there,
//! so this replica then knows them too, and there is nothing left to write.

use super::authority::Authority;
use super::metrics::Metrics;
use crate::mesh::Text;
use crate::task::backoff::Backoff;
use crate::telemetry::limit::{LogLimit, shortened};
use crate::telemetry::log::with_causes;
use futures_util::Stream;
use futures_util::stream::{self, SelectAll, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Namespaces that get nothing: the API makes them, and no pods of users run there.
const EXCLUDED: [&str; 2] = ["kube-public", "kube-node-lease"];
/// Writes at the same time.
const AT_ONCE: usize = 8;
/// How long one write may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// Shortest and longest time between two rounds of writes. Somebody who changes a ConfigMap again and again causes one
/// write in each.
const ROUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long a namespace has to refuse the ConfigMap before a rotation of the root no longer waits for it.
const REFUSES_AFTER: Duration = Duration::from_secs(600);
/// How long a watch runs before it is started again.
const WATCH_SECONDS: u32 = 290;

/// What is published.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// Name of the ConfigMap.
    name: &'static str,
    /// Its entry.
    key: &'static str,
    /// What it is to hold; `None` if nothing is to be written.
    content: fn(&Authority) -> Option<Arc<str>>,
    /// Whether a rotation waits until it is everywhere.
    gates_rotation: bool,
}

/// The roots (source: istiod's namespace controller).
pub const ROOTS: Published =
    Published { name: "istio-ca-root-cert", key: "root-cert.pem", content: Authority::roots_pem, gates_rotation: true };

/// The revoked certificates that came with the user's CA (source: the same).
pub const CRL: Published =
    Published { name: "istio-ca-crl", key: "ca-crl.pem", content: Authority::crl_pem, gates_rotation: false };

/// A change that was seen.
#[derive(Debug)]
enum Seen {
    Namespaces(Event<PartialObjectMeta<Namespace>>),
    ConfigMaps(Event<ConfigMap>),
}

type Watches = SelectAll<Pin<Box<dyn Stream<Item = Result<Seen, watcher::Error>> + Send>>>;

/// Publishes for as long as it is awaited.
pub async fn run(client: Client, authority: Arc<Authority>, what: Published, metrics: Arc<Metrics>) {
    let mut watches = watches(&client, what.name);
    let (known, refusing, reached, limit) = Default::default();
    let mut publisher = Publisher { client, what, metrics, known, refusing, reached, limit };
    let (mut changes, mut backoff) = (authority.changes(), Backoff::new(ROUNDS.0, ROUNDS.1));
    let mut round_at = Instant::now();
    loop {
        let content = (what.content)(&authority);
        let wrong = content.as_deref().map(|content| publisher.known.wrong(content)).unwrap_or_default();
        publisher.say(&authority, content.clone(), &wrong);
        tokio::select! {
            seen = watches.next() => match seen {
                Some(Ok(seen)) => publisher.known.note(seen, what.key),
                Some(Err(error)) => publisher.report("the namespaces and their ConfigMaps", &error),
                None => return,
            },
            // The authority lives as long as this task.
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(round_at), if !wrong.is_empty() => {
                let done = publisher.round(&authority, wrong).await;
                if done {
                    backoff.reset();
                }
                round_at = Instant::now() + backoff.next().max(ROUNDS.0);
            }
        }
    }
}

fn watches(client: &Client, name: &'static str) -> Watches {
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let namespaces = watcher::watcher(namespaces, config.clone()).default_backoff();
    let config_maps: Api<ConfigMap> = Api::all(client.clone());
    let config_maps = watcher::watcher(config_maps, config.fields(&format!("metadata.name={name}"))).default_backoff();
    let mut all: Watches = SelectAll::new();
    all.push(Box::pin(namespaces.map(|event| event.map(Seen::Namespaces))));
    all.push(Box::pin(config_maps.map(|event| event.map(Seen::ConfigMaps))));
    all
}

/// What the namespaces hold, as far as it was seen.
#[derive(Debug, Default)]
struct Known {
    namespaces: BTreeSet<Text>,
    /// The content by namespace; `None` for a ConfigMap without the entry.
    contents: BTreeMap<Text, Option<Text>>,
    /// Namespaces and contents of a list that is still arriving.
    arriving: (BTreeSet<Text>, BTreeMap<Text, Option<Text>>),
    /// Whether namespaces and ConfigMaps have been listed.
    listed: (bool, bool),
}

impl Known {
    fn note(&mut self, seen: Seen, key: &str) {
        match seen {
            Seen::Namespaces(event) => self.note_namespace(event),
            Seen::ConfigMaps(event) => self.note_config_map(event, key),
        }
    }

    fn note_namespace(&mut self, event: Event<PartialObjectMeta<Namespace>>) {
        // A namespace that is being deleted takes nothing new.
        let name = |namespace: &PartialObjectMeta<Namespace>| namespace.metadata.name.as_deref().map(Text::from);
        let ends = |namespace: &PartialObjectMeta<Namespace>| namespace.metadata.deletion_timestamp.is_some();
        match event {
            Event::Init => self.arriving.0.clear(),
            Event::InitApply(namespace) => self.arriving.0.extend(name(&namespace).filter(|_| !ends(&namespace))),
            Event::InitDone => {
                self.namespaces = std::mem::take(&mut self.arriving.0);
                self.listed.0 = true;
            }
            Event::Apply(namespace) if !ends(&namespace) => self.namespaces.extend(name(&namespace)),
            Event::Apply(namespace) | Event::Delete(namespace) => {
                if let Some(name) = name(&namespace) {
                    self.namespaces.remove(&name);
                    self.contents.remove(&name);
                }
            }
        }
    }

    fn note_config_map(&mut self, event: Event<ConfigMap>, key: &str) {
        let read = |mut map: ConfigMap| {
            let content = map.data.as_mut().and_then(|data| data.remove(key));
            Some((Text::from(map.metadata.namespace?), content.map(Text::from)))
        };
        match event {
            Event::Init => self.arriving.1.clear(),
            Event::InitApply(map) => self.arriving.1.extend(read(map)),
            Event::InitDone => {
                self.contents = std::mem::take(&mut self.arriving.1);
                self.listed.1 = true;
            }
            Event::Apply(map) => self.contents.extend(read(map)),
            Event::Delete(map) => drop(map.metadata.namespace.and_then(|name| self.contents.remove(name.as_str()))),
        }
    }

    /// The namespaces without this content, and whether they have another one. None before everything is listed.
    fn wrong(&self, content: &str) -> Vec<(Text, bool)> {
        if self.listed != (true, true) {
            return Vec::new();
        }
        let wanted = self.namespaces.iter().filter(|name| !EXCLUDED.contains(&&***name));
        let wrong = wanted.filter_map(|name| match self.contents.get(name) {
            Some(Some(held)) if **held == *content => None,
            other => Some((name.clone(), other.is_some())),
        });
        wrong.collect()
    }
}

/// A namespace in which the ConfigMap cannot be written, by a quota or a webhook of its owner.
struct Refusing {
    since: Instant,
    backoff: Backoff,
    try_at: Instant,
}

struct Publisher {
    client: Client,
    what: Published,
    metrics: Arc<Metrics>,
    known: Known,
    /// Namespaces that refuse the ConfigMap. The others do not wait for them.
    refusing: BTreeMap<Text, Refusing>,
    /// Namespaces that have had the present content at some time. Their owners may remove it again and again.
    reached: (Option<Arc<str>>, BTreeSet<Text>),
    limit: LogLimit,
}

impl Publisher {
    /// Tells how many namespaces are without the content.
    fn say(&mut self, authority: &Authority, content: Option<Arc<str>>, wrong: &[(Text, bool)]) {
        if !self.what.gates_rotation {
            return;
        }
        self.metrics.unpublished.set(i64::try_from(wrong.len()).unwrap_or(i64::MAX));
        let (of, reached) = &mut self.reached;
        if *of != content {
            reached.clear();
            of.clone_from(&content);
        }
        let is_complete = content.is_some() && self.known.listed == (true, true);
        if is_complete {
            let wrong: BTreeSet<&Text> = wrong.iter().map(|(namespace, _)| namespace).collect();
            reached.retain(|namespace| self.known.namespaces.contains(namespace));
            reached.extend(self.known.namespaces.iter().filter(|namespace| !wrong.contains(namespace)).cloned());
        }
        let refuses =
            |namespace: &Text| self.refusing.get(namespace).is_some_and(|it| it.since.elapsed() >= REFUSES_AFTER);
        let is_missed = |(namespace, _): &(Text, bool)| {
            authority.config().has_daemons(namespace) || !(reached.contains(namespace) || refuses(namespace))
        };
        let is_everywhere = is_complete && !wrong.iter().any(is_missed);
        authority.set_published(content.filter(|_| is_everywhere));
    }

    /// Writes where the content is missing or another one. Returns whether it could be known what is right, and was
    /// written in the own namespace.
    async fn round(&mut self, authority: &Authority, wrong: Vec<(Text, bool)>) -> bool {
        // What is in other namespaces may be their owners' doing. The own one is written first, so it tells.
        let own = authority.config().namespace.clone();
        let differs = wrong.iter().any(|(namespace, exists)| *exists && *namespace == own);
        if differs && !authority.confirm().await {
            // What is in force may be older than what another replica has written.
            return false;
        }
        let Some(content) = (self.what.content)(authority) else { return false };
        let wrong = self.known.wrong(&content);
        let names: BTreeSet<&Text> = wrong.iter().map(|(namespace, _)| namespace).collect();
        self.refusing.retain(|namespace, _| names.contains(namespace));
        let (own, mut others): (Vec<_>, Vec<_>) = wrong.into_iter().partition(|(namespace, _)| *namespace == own);
        if !self.write_all(own, &content).await.is_empty() {
            return false;
        }
        let now = Instant::now();
        others.retain(|(namespace, _)| self.refusing.get(namespace).is_none_or(|it| it.try_at <= now));
        for namespace in self.write_all(others, &content).await {
            let new = || Refusing { since: now, backoff: Backoff::new(ROUNDS.0, ROUNDS.1), try_at: now };
            let refusing = self.refusing.entry(namespace).or_insert_with(new);
            refusing.try_at = Instant::now() + refusing.backoff.next();
        }
        true
    }

    /// Writes to these namespaces. Returns those where it failed.
    async fn write_all(&mut self, wrong: Vec<(Text, bool)>, content: &str) -> Vec<Text> {
        let this = &*self;
        let writes = stream::iter(wrong).map(|(namespace, exists)| async move {
            let written = this.write(&namespace, exists, content).await;
            (namespace, written)
        });
        let results: Vec<(Text, Result<(), String>)> = writes.buffer_unordered(AT_ONCE).collect().await;
        let mut failed = Vec::new();
        for (namespace, written) in results {
            match written {
                Ok(()) => drop(self.known.contents.insert(namespace, Some(content.into()))),
                Err(error) => {
                    self.metrics.publish_failures.inc();
                    if let Some(suppressed) = self.limit.allow() {
                        let name = self.what.name;
                        tracing::warn!(%namespace, name, error, suppressed, "the ConfigMap cannot be written; it is tried again");
                    }
                    failed.push(namespace);
                }
            }
        }
        failed
    }

    async fn write(&self, namespace: &str, exists: bool, content: &str) -> Result<(), String> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let (name, data) = (self.what.name, json!({self.what.key: content}));
        let labels = json!({"istio.io/config": "true"});
        let write = async {
            if exists {
                let patch = json!({"metadata": {"labels": labels}, "data": data});
                return api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop);
            }
            let object = json!({"metadata": {"name": name, "labels": labels}, "data": data});
            let object: ConfigMap = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
            api.create(&PostParams::default(), &object).await.map(drop)
        };
        match tokio::time::timeout(DEADLINE, write).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(shortened(with_causes(&error))),
            Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
        }
    }

    fn report(&self, what: &str, error: &watcher::Error) {
        if let Some(suppressed) = self.limit.allow() {
            let error = shortened(with_causes(error));
            tracing::warn!(error, suppressed, "the watch of {what} is interrupted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::super::{Config, Source, rotate};
    use super::*;
    use crate::task::Group;

    fn config() -> Config {
        let day = Duration::from_secs(24 * 3600);
        Config {
            source: Source::Secrets,
            namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            names: vec!["localhost".into()],
            audiences: Vec::new(),
            trusted: Vec::new(),
            default_life: day,
            max_life: day,
        }
    }

    fn path(namespace: &str) -> String {
        format!("/api/v1/namespaces/{namespace}/configmaps/{}", ROOTS.name)
    }

    struct Replica {
        authority: Arc<Authority>,
        metrics: Arc<Metrics>,
    }

    fn replica(api: &FakeApi, tasks: &Group) -> Replica {
        let metrics = Arc::<Metrics>::default();
        let authority = Authority::new(api.client(), &config(), metrics.clone()).unwrap();
        tasks.spawn(authority.clone().run());
        tasks.spawn(run(api.client(), authority.clone(), ROOTS, metrics.clone()));
        Replica { authority, metrics }
    }

    fn namespaces(api: &FakeApi, names: &[&str]) {
        for name in names {
            api.put(&format!("/api/v1/namespaces/{name}"), json!({"metadata": {}}));
        }
    }

    fn held(api: &FakeApi, namespace: &str) -> Option<String> {
        api.get(&path(namespace))?["data"][ROOTS.key].as_str().map(str::to_owned)
    }

    /// Lets the paused clock run until something holds.
    async fn until(what: &str, holds: impl Fn() -> bool) {
        let within = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(600), within).await.unwrap_or_else(|_| panic!("{what}"));
    }

    #[tokio::test(start_paused = true)]
    async fn every_namespace_has_the_roots_and_keeps_them() {
        let (api, tasks) = (FakeApi::default(), Group::default());
        namespaces(&api, &["istio-system", "shop", "kube-system", "kube-public", "kube-node-lease"]);
        api.put(&path("shop"), json!({"data": {ROOTS.key: "old", "other": "stays"}}));
        let one = replica(&api, &tasks);
        let right = |namespace: &str| {
            one.authority.roots_pem().is_some_and(|roots| held(&api, namespace).as_deref() == Some(&roots))
        };
        until("all have them", || ["istio-system", "shop", "kube-system"].iter().all(|name| right(name))).await;
        assert!(held(&api, "kube-public").is_none() && held(&api, "kube-node-lease").is_none());
        assert_eq!(api.get(&path("shop")).unwrap()["data"]["other"], "stays");
        namespaces(&api, &["late"]);
        until("so has a new one", || right("late")).await;
        api.delete(&path("shop"));
        until("a deleted one comes back", || right("shop")).await;
        for change in [json!({"data": {ROOTS.key: "mine"}}), json!({"data": {}}), json!({})] {
            api.put(&path("shop"), change);
            until("a changed one is put right", || right("shop")).await;
        }
        // Nothing is written for a namespace that ends, or one that has ended.
        api.put("/api/v1/namespaces/late", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        api.delete(&path("late"));
        let writes = api.count("POST", "configmaps");
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(api.count("POST", "configmaps"), writes);
        assert_eq!((one.metrics.unpublished.get(), one.metrics.publish_failures.get()), (0, 0));
        tasks.cut();
    }

    #[tokio::test(start_paused = true)]
    async fn two_replicas_do_not_fight_over_what_only_one_of_them_knows() {
        let (api, tasks) = (FakeApi::default(), Group::default());
        namespaces(&api, &["istio-system", "shop"]);
        let (one, two) = (replica(&api, &tasks), replica(&api, &tasks));
        let everywhere =
            |roots: &Arc<str>| ["istio-system", "shop"].iter().all(|name| held(&api, name).as_deref() == Some(roots));
        until("published", || one.authority.roots_pem().is_some_and(|roots| everywhere(&roots))).await;
        for _ in 0..3 {
            let writes = api.count("PATCH", "configmaps");
            rotate::run(api.client(), &config(), true).await.unwrap();
            // The one learns of it first.
            assert!(one.authority.confirm().await);
            let new = one.authority.roots_pem().unwrap();
            until("both know and all have it", || everywhere(&new) && two.authority.roots_pem() == Some(new.clone()))
                .await;
            tokio::time::sleep(Duration::from_secs(300)).await;
            assert!(everywhere(&new), "it stays");
            assert!(
                api.count("PATCH", "configmaps") - writes <= 4,
                "each namespace is written by each replica at most once"
            );
        }
        tasks.cut();
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_written_is_tried_again_and_holds_up_no_other() {
        let (api, tasks) = (FakeApi::default(), Group::default());
        namespaces(&api, &["istio-system", "shop", "closed", "closed-too"]);
        api.hook(|method, path, _| match method.as_str() == "POST" && path.contains("/closed") {
            true => Answer::Is(403, json!({"kind": "Status", "code": 403, "message": "exceeded quota"})),
            false => Answer::Go,
        });
        let one = replica(&api, &tasks);
        until("the others have them", || held(&api, "shop").is_some() && held(&api, "istio-system").is_some()).await;
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(!one.authority.is_published(), "it may yet succeed");
        tokio::time::sleep(Duration::from_secs(300)).await;
        let tried = api.count("POST", "/closed/");
        assert!((5..60).contains(&tried), "{tried} times in ten minutes");
        assert_eq!(one.metrics.unpublished.get(), 2);
        namespaces(&api, &["new"]);
        let begun = Instant::now();
        until("a new one does not wait for them", || held(&api, "new").is_some()).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        until("a rotation does not wait for them for ever", || one.authority.is_published()).await;
        api.hook(|_, _, _| Answer::Go);
        until("it has them in the end", || held(&api, "closed").is_some()).await;
        tasks.cut();
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_overwritten_while_it_cannot_be_known_what_is_right() {
        let (api, tasks) = (FakeApi::default(), Group::default());
        namespaces(&api, &["istio-system", "shop"]);
        let one = replica(&api, &tasks);
        until("published", || held(&api, "shop").is_some()).await;
        api.hook(|_, path, _| match path.contains("/secrets/") {
            true => Answer::Is(503, json!({"kind": "Status", "code": 503, "message": "away"})),
            false => Answer::Go,
        });
        // Another replica, which writes its own namespace first.
        for namespace in ["istio-system", "shop"] {
            api.put(&path(namespace), json!({"data": {ROOTS.key: "newer"}}));
        }
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(held(&api, "shop").as_deref(), Some("newer"));
        api.hook(|_, _, _| Answer::Go);
        until("now it is known", || held(&api, "shop").as_deref() == one.authority.roots_pem().as_deref()).await;
        tasks.cut();
    }
}
