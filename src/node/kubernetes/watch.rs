//! Watches this node's pods and all namespaces (only their metadata) in the Kubernetes API, for as long as the daemon
//! runs. What is known stays known while the API is away.

use super::facts::PodFacts;
use crate::mesh::Text;
use crate::node::selectors::Labels;
use crate::task::backoff::Backoff;
use crate::telemetry::log::{brief, with_causes};
use crate::telemetry::outage::Outage;
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Error, Event};
use kube::{Api, Client};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// First and longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How long a watch runs before it is started again. A connection that is silently dead is noticed then.
pub const WATCH_SECONDS: u32 = 120;
/// How long a streamed list may take. A server that does not support streamed lists sends events and never says that
/// the list is complete.
const STREAMING: Duration = Duration::from_secs(15);
/// A watch that has not failed for this long counts as connected, even without events.
const SETTLED: Duration = Duration::from_secs(8);

/// An event of the API.
#[derive(Debug)]
pub enum ApiEvent {
    /// The complete list of this node's pods.
    AllPods(Vec<PodFacts>),
    /// A pod has been created or changed.
    Pod(PodFacts),
    /// A pod has been deleted.
    PodGone(Text),
    /// The complete list of namespaces.
    AllNamespaces(Vec<(Text, Labels)>),
    /// A namespace has been created or changed.
    Namespace(Text, Labels),
    /// A namespace has been deleted.
    NamespaceGone(Text),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource: &'static str,
}

/// Metrics of the watches.
#[derive(Debug, Default)]
pub struct Metrics {
    failures: Family<Resource, Counter>,
    connected: Family<Resource, Gauge>,
    patches_failed: Counter,
    late: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let failures = "Lists and watches of the Kubernetes API that failed or were interrupted";
        registry.register("culvert_kubernetes_watch_failures", failures, self.failures.clone());
        let connected =
            "1 while the Kubernetes API announces changes of the resource, else 0. Alert on 0 for ten minutes";
        registry.register("culvert_kubernetes_connected", connected, self.connected.clone());
        let failed = "Status annotations that could not be written";
        registry.register("culvert_kubernetes_patch_failures", failed, self.patches_failed.clone());
        let late = "Captured pods that were Ready before their status annotation said enabled; their peers may have sent \
                    plaintext until then. Alert on a rise where the CNI plugin is installed";
        registry.register("culvert_pods_ready_before_enabled", late, self.late.clone());
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.failures.get_or_create(&Resource { resource: "pods" }));
        drop(self.connected.get_or_create(&Resource { resource: "pods" }));
    }

    /// Whether the watch of a resource is connected.
    pub fn is_connected(&self, resource: &'static str) -> bool {
        self.connected.get_or_create(&Resource { resource }).get() == 1
    }

    /// Counts a captured pod that was Ready before its peers could know that it takes tunnels.
    pub fn count_ready_before_enabled(&self) {
        self.late.inc();
    }

    /// Counts a status annotation that could not be written.
    pub fn count_patch_failure(&self) {
        self.patches_failed.inc();
    }
}

type Events<K> = Pin<Box<dyn Stream<Item = Result<Event<K>, Error>> + Send>>;

/// Watches the pods of `node`.
pub async fn pods(client: Client, node: String, events_out: mpsc::Sender<ApiEvent>, metrics: Arc<Metrics>) {
    let api: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).timeout(WATCH_SECONDS);
    let events = |config| -> Events<Pod> { Box::pin(watcher::watcher(api.clone(), config)) };
    let mapping = EventMapping {
        resource: "pods",
        read: PodFacts::of,
        all: ApiEvent::AllPods,
        one: ApiEvent::Pod,
        gone: |pod: PodFacts| ApiEvent::PodGone(pod.uid),
    };
    follow(config, events, mapping, events_out, &metrics).await;
}

/// Watches all namespaces.
pub async fn namespaces(client: Client, events_out: mpsc::Sender<ApiEvent>, metrics: Arc<Metrics>) {
    let api: Api<PartialObjectMeta<Namespace>> = Api::all(client);
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let events = |config| -> Events<PartialObjectMeta<Namespace>> { Box::pin(watcher::watcher(api.clone(), config)) };
    let mapping = EventMapping {
        resource: "namespaces",
        read: |namespace: PartialObjectMeta<Namespace>| {
            let metadata = namespace.metadata;
            Some((Text::from(metadata.name?.as_str()), metadata.labels.unwrap_or_default()))
        },
        all: ApiEvent::AllNamespaces,
        one: |(name, labels)| ApiEvent::Namespace(name, labels),
        gone: |(name, _)| ApiEvent::NamespaceGone(name),
    };
    follow(config, events, mapping, events_out, &metrics).await;
}

/// How the events of one kind of object are translated.
struct EventMapping<K, T> {
    resource: &'static str,
    read: fn(K) -> Option<T>,
    all: fn(Vec<T>) -> ApiEvent,
    one: fn(T) -> ApiEvent,
    gone: fn(T) -> ApiEvent,
}

/// One watch and its state.
struct Watch<'a, K, F> {
    resource: &'static str,
    config: watcher::Config,
    events: F,
    stream: Events<K>,
    /// Whether lists are requested as streams.
    streaming: bool,
    listed: bool,
    begun: Instant,
    backoff: Backoff,
    outage: Outage,
    connected: Gauge,
    failures: &'a Counter,
}

impl<K, F: Fn(watcher::Config) -> Events<K>> Watch<'_, K, F> {
    /// Starts again with ordinary lists.
    fn without_streaming(&mut self, why: &str) {
        tracing::info!(resource = self.resource, why, "requesting ordinary lists instead of streamed ones");
        self.streaming = false;
        self.stream = (self.events)(self.config.clone());
    }

    fn is_there(&mut self) {
        self.connected.set(1);
        self.backoff.reset();
        if let Some(away) = self.outage.over() {
            let away = brief(away);
            tracing::info!(resource = self.resource, %away, "connected to the Kubernetes API again");
        }
    }

    async fn failed(&mut self, error: &Error) {
        self.failures.inc();
        self.connected.set(0);
        if self.streaming && !self.listed && refuses_streaming(error) {
            return self.without_streaming("the Kubernetes API refuses streamed lists");
        }
        let (resource, error) = (self.resource, with_causes(error));
        match self.outage.failed() {
            None => tracing::debug!(resource, error, "the watch of the Kubernetes API is interrupted"),
            Some(away) => {
                let away = brief(away);
                tracing::warn!(
                    resource,
                    error,
                    %away,
                    "the watch of the Kubernetes API is interrupted; enrolled pods stay captured and their traffic goes on; new and \
                     relabelled pods wait"
                );
            }
        }
        tokio::time::sleep(self.backoff.next()).await;
        self.begun = Instant::now();
    }

    /// The next event; `None` if there was none because something else had to be done.
    async fn next(&mut self) -> Option<Event<K>> {
        let next = tokio::select! {
            next = self.stream.next() => next,
            () = tokio::time::sleep(SETTLED), if self.listed && self.connected.get() == 0 => {
                self.is_there();
                return None;
            }
            () = tokio::time::sleep_until(self.begun + STREAMING), if self.streaming && !self.listed => {
                self.without_streaming("the Kubernetes API does not say when a stream is complete");
                return None;
            }
        };
        match next {
            Some(Ok(event)) => return Some(event),
            Some(Err(error)) => self.failed(&error).await,
            // The library's stream never ends. If it does, it is started again.
            None => {
                let config = self.config.clone();
                self.stream = (self.events)(if self.streaming { config.streaming_lists() } else { config });
                tokio::time::sleep(self.backoff.next()).await;
            }
        }
        None
    }
}

async fn follow<K: Send + 'static, T>(
    config: watcher::Config,
    events: impl Fn(watcher::Config) -> Events<K>,
    mapping: EventMapping<K, T>,
    events_out: mpsc::Sender<ApiEvent>,
    metrics: &Metrics,
) {
    let label = Resource { resource: mapping.resource };
    let mut watch = Watch {
        resource: mapping.resource,
        stream: events(config.clone().streaming_lists()),
        config,
        events,
        streaming: true,
        listed: false,
        begun: Instant::now(),
        backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
        outage: Outage::default(),
        connected: metrics.connected.get_or_create(&label).clone(),
        failures: &metrics.failures.get_or_create(&label).clone(),
    };
    let mut all = Vec::new();
    loop {
        let Some(event) = watch.next().await else { continue };
        let news = match event {
            Event::Init => {
                (watch.listed, watch.begun) = (false, Instant::now());
                all.clear();
                None
            }
            Event::InitApply(object) => {
                all.extend((mapping.read)(object));
                None
            }
            Event::InitDone => {
                watch.listed = true;
                Some((mapping.all)(std::mem::take(&mut all)))
            }
            Event::Apply(object) => (mapping.read)(object).map(mapping.one),
            Event::Delete(object) => (mapping.read)(object).map(mapping.gone),
        };
        let Some(news) = news else { continue };
        watch.is_there();
        if events_out.send(news).await.is_err() {
            return;
        }
    }
}

/// Whether the server has refused a streamed list: it says that the request is invalid.
fn refuses_streaming(error: &Error) -> bool {
    matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}
