//! Follows one kind of object. The library lists page by page and watches; here is what happens when it fails.

use super::WATCH_SECONDS;
use super::metrics::Metrics;
use super::object::{Event, Item, Key, Kind};
use crate::mesh::Text;
use crate::task::backoff::Backoff;
use crate::telemetry::log::{brief, with_causes};
use crate::telemetry::outage::Outage;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use kube::runtime::watcher::{self, Error};
use kube::{Api, Resource};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::time::Duration;
use tokio::time::Instant;

/// First and longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// A watch that has not failed for this long counts as connected, even without events.
const SETTLED: Duration = Duration::from_secs(8);
/// Objects of one page of a list; of kinds whose objects may be as large as the API permits, fewer.
const PAGE: u32 = 500;
const PAGE_OF_LARGE: u32 = 50;
/// How long the API must say that it does not know a kind before that is believed. It may not know it yet.
const ABSENT_AFTER: Duration = Duration::from_secs(2);
/// The same of a kind that it has known. An API server that begins must not be believed at once: policies would be lifted.
const REMOVED_AFTER: Duration = Duration::from_secs(300);

/// The events of the library.
type Events<K> = BoxStream<'static, Result<watcher::Event<K>, Error>>;

/// Where the objects of a kind come from.
pub struct Source<K> {
    kind: Kind,
    api: Api<K>,
    item: fn(Box<K>) -> Item,
}

impl<K: Resource + DeserializeOwned + Clone + Debug + Send + 'static> Source<K> {
    /// All objects of a kind.
    pub fn new(kind: Kind, api: Api<K>, item: fn(Box<K>) -> Item) -> Self {
        Self { kind, api, item }
    }

    fn events(&self) -> Events<K> {
        // The optional kinds are those whose objects may be large.
        let page = if self.kind.is_optional() { PAGE_OF_LARGE } else { PAGE };
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(page);
        watcher::watcher(self.api.clone(), config).boxed()
    }
}

/// Follows one kind.
pub struct Follow<K> {
    source: Source<K>,
    events: Events<K>,
    backoff: Backoff,
    outage: Outage,
    /// Whether the list is complete.
    listed: bool,
    /// Whether there has been a complete list.
    is_known: bool,
    /// Since when the API has said that it does not know the kind.
    unknown: Option<Instant>,
    connected: Gauge,
    failures: Counter,
}

impl<K: Resource + DeserializeOwned + Clone + Debug + Send + 'static> Follow<K> {
    /// The events of a kind. They never end.
    pub fn events(source: Source<K>, metrics: &Metrics) -> BoxStream<'static, Event> {
        let follow = Self {
            events: source.events(),
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
            outage: Outage::default(),
            listed: false,
            is_known: false,
            unknown: None,
            connected: metrics.connected(source.kind),
            failures: metrics.failures(source.kind),
            source,
        };
        stream::unfold(follow, |mut follow| async move { Some((follow.next().await, follow)) }).boxed()
    }

    async fn next(&mut self) -> Event {
        let kind = self.source.kind;
        loop {
            let next = tokio::select! {
                next = self.events.next() => next,
                () = tokio::time::sleep(SETTLED), if self.listed && self.connected.get() == 0 => {
                    self.is_there();
                    continue;
                }
            };
            let event = match next {
                Some(Ok(watcher::Event::Init)) => {
                    self.listed = false;
                    return Event::Begun(kind);
                }
                Some(Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object))) => {
                    Event::Set(kind, key(&object), (self.source.item)(Box::new(object)))
                }
                Some(Ok(watcher::Event::Delete(object))) => Event::Gone(kind, key(&object)),
                Some(Ok(watcher::Event::InitDone)) => {
                    (self.listed, self.is_known) = (true, true);
                    Event::Listed(kind)
                }
                Some(Err(error)) => match self.failed(&error).await {
                    Some(event) => return event,
                    None => continue,
                },
                // The library's stream never ends. If it does, it is started again.
                None => {
                    self.again().await;
                    continue;
                }
            };
            self.is_there();
            return event;
        }
    }

    /// Lists anew, after a while.
    async fn again(&mut self) {
        tokio::time::sleep(self.backoff.next()).await;
        self.events = self.source.events();
    }

    fn is_there(&mut self) {
        let resource = self.source.kind.name();
        if self.unknown.take().is_some() {
            tracing::info!(resource, "the Kubernetes API knows this kind of object now");
        }
        self.connected.set(1);
        self.backoff.reset();
        if let Some(away) = self.outage.over() {
            let away = brief(away);
            tracing::info!(resource, %away, "connected to the Kubernetes API again");
        }
    }

    async fn failed(&mut self, error: &Error) -> Option<Event> {
        self.connected.set(0);
        if self.source.kind.is_optional() && is_not_found(error) {
            return self.is_unknown().await;
        }
        self.unknown = None;
        self.failures.inc();
        let (resource, text) = (self.source.kind.name(), with_causes(error));
        match self.outage.failed() {
            None => tracing::debug!(resource, error = text, "the watch of the Kubernetes API is interrupted"),
            Some(away) => {
                let away = brief(away);
                tracing::warn!(
                    resource,
                    error = text,
                    %away,
                    "the watch of the Kubernetes API is interrupted; what is known stays served, and changes wait"
                );
            }
        }
        // The library goes on after an event that it cannot read, and nobody would know what it said. It takes most of
        // these for answers of the API.
        if matches!(error, Error::WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_))) {
            self.again().await;
        } else {
            tokio::time::sleep(self.backoff.next()).await;
        }
        None
    }

    /// The API does not know the kind: its definition is not installed, or not yet.
    async fn is_unknown(&mut self) -> Option<Event> {
        let (resource, was_known) = (self.source.kind.name(), self.is_known);
        match (self.unknown, was_known) {
            (Some(_), _) => {}
            (None, false) => {
                tracing::info!(resource, "the Kubernetes API does not know this kind of object; waiting for it");
            }
            (None, true) => {
                let after = brief(REMOVED_AFTER);
                tracing::warn!(
                    resource,
                    %after,
                    "the Kubernetes API does not know this kind of object any longer; its objects stay in force until it \
                     has said so for a while"
                );
            }
        }
        let since = *self.unknown.get_or_insert_with(Instant::now);
        self.again().await;
        let after = if was_known { REMOVED_AFTER } else { ABSENT_AFTER };
        if since.elapsed() < after {
            return None;
        }
        if was_known {
            tracing::warn!(resource, "the definition of this kind of object is gone, and so are its objects");
        }
        self.is_known = false;
        Some(Event::Absent(self.source.kind))
    }
}

fn key<K: Resource>(object: &K) -> Key {
    let text = |text: &Option<String>| Text::from(text.as_deref().unwrap_or_default());
    (text(&object.meta().namespace), text(&object.meta().name))
}

fn is_not_found(error: &Error) -> bool {
    let (Error::InitialListFailed(error) | Error::WatchStartFailed(error)) = error else { return false };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
