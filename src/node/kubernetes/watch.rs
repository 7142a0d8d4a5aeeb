//! Hearing of this node's pods and of all namespaces (their metadata alone) from the Kubernetes API, for as long as the
//! daemon runs. What was heard stays known while the API is away.

use super::select::{Labels, PodFacts};
use crate::mesh::Text;
use crate::task::backoff::Backoff;
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

/// Waits after failures.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How long a watch runs before it is begun anew; a connection that is silently dead is noticed after that.
const WATCH_SECONDS: u32 = 120;
/// A server that does not know the streaming of lists begins to tell and never says that this was all.
const STREAMING: Duration = Duration::from_secs(15);
/// A watch that has not failed for this long is there, also when nothing is told.
const SETTLED: Duration = Duration::from_secs(8);

/// What is told. A `None` before a list says that what follows, up to the next `None`, is all there is.
#[derive(Debug)]
pub enum Told {
    /// All pods of this node.
    AllPods(Vec<PodFacts>),
    /// A pod has come or changed.
    Pod(PodFacts),
    /// A pod has gone.
    NoPod(Text),
    /// All namespaces.
    AllNamespaces(Vec<(Text, Labels)>),
    /// A namespace has come or changed.
    Namespace(Text, Labels),
    /// A namespace has gone.
    NoNamespace(Text),
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
}

impl Metrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        let failures = "Lists and watches of the Kubernetes API that failed or were cut";
        registry.register("culvert_kubernetes_watch_failures", failures, self.failures.clone());
        let connected = "1 while the Kubernetes API tells of changes, else 0";
        registry.register("culvert_kubernetes_connected", connected, self.connected.clone());
        let failed = "Status annotations that could not be written";
        registry.register("culvert_kubernetes_patch_failures", failed, self.patches_failed.clone());
    }

    /// Counts a status annotation that could not be written.
    pub fn patch_failed(&self) {
        self.patches_failed.inc();
    }
}

type Events<K> = Pin<Box<dyn Stream<Item = Result<Event<K>, Error>> + Send>>;

/// Follows the pods of `node`.
pub async fn pods(client: Client, node: String, told: mpsc::Sender<Told>, metrics: Arc<Metrics>) {
    let api: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).timeout(WATCH_SECONDS);
    let events = |config| -> Events<Pod> { Box::pin(watcher::watcher(api.clone(), config)) };
    let meaning = Meaning {
        resource: "pods",
        read: PodFacts::of,
        all: Told::AllPods,
        one: Told::Pod,
        gone: |pod: PodFacts| Told::NoPod(pod.uid),
    };
    follow(config, events, meaning, told, &metrics).await;
}

/// Follows all namespaces.
pub async fn namespaces(client: Client, told: mpsc::Sender<Told>, metrics: Arc<Metrics>) {
    let api: Api<PartialObjectMeta<Namespace>> = Api::all(client);
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let events = |config| -> Events<PartialObjectMeta<Namespace>> { Box::pin(watcher::watcher(api.clone(), config)) };
    let meaning = Meaning {
        resource: "namespaces",
        read: |namespace: PartialObjectMeta<Namespace>| {
            let metadata = namespace.metadata;
            Some((Text::from(metadata.name?.as_str()), metadata.labels.unwrap_or_default()))
        },
        all: Told::AllNamespaces,
        one: |(name, labels)| Told::Namespace(name, labels),
        gone: |(name, _)| Told::NoNamespace(name),
    };
    follow(config, events, meaning, told, &metrics).await;
}

/// What the events of one kind of object mean.
struct Meaning<K, T> {
    resource: &'static str,
    read: fn(K) -> Option<T>,
    all: fn(Vec<T>) -> Told,
    one: fn(T) -> Told,
    gone: fn(T) -> Told,
}

async fn follow<K: Send + 'static, T>(
    config: watcher::Config,
    events: impl Fn(watcher::Config) -> Events<K>,
    meaning: Meaning<K, T>,
    told: mpsc::Sender<Told>,
    metrics: &Metrics,
) {
    let resource = meaning.resource;
    let label = Resource { resource };
    let connected = metrics.connected.get_or_create(&label).clone();
    let failures = metrics.failures.get_or_create(&label).clone();
    let (mut backoff, mut streaming, mut said) = (Backoff::new(BACKOFF.0, BACKOFF.1), true, None::<String>);
    let mut stream = events(config.clone().streaming_lists());
    let (mut listed, mut all): (bool, Option<Vec<T>>) = (false, None);
    let mut begun = tokio::time::Instant::now();
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            () = tokio::time::sleep(SETTLED), if listed && all.is_none() && connected.get() == 0 => {
                connected.set(1);
                if said.take().is_some() {
                    tracing::info!(resource, "the Kubernetes API is there again");
                }
                continue;
            }
            () = tokio::time::sleep_until(begun + STREAMING), if streaming && !listed => {
                tracing::info!(resource, "the Kubernetes API does not stream lists; lists are asked for");
                streaming = false;
                stream = events(config.clone());
                continue;
            }
        };
        let news = match next {
            Some(Ok(Event::Init)) => {
                (listed, all) = (false, Some(Vec::new()));
                begun = tokio::time::Instant::now();
                None
            }
            Some(Ok(Event::InitApply(object))) => {
                all.get_or_insert_default().extend((meaning.read)(object));
                None
            }
            Some(Ok(Event::InitDone)) => {
                listed = true;
                Some((meaning.all)(all.take().unwrap_or_default()))
            }
            Some(Ok(Event::Apply(object))) => (meaning.read)(object).map(meaning.one),
            Some(Ok(Event::Delete(object))) => (meaning.read)(object).map(meaning.gone),
            Some(Err(error)) => {
                failures.inc();
                connected.set(0);
                if streaming && !listed && refuses_streaming(&error) {
                    tracing::info!(resource, "the Kubernetes API refuses to stream lists; lists are asked for");
                    streaming = false;
                    stream = events(config.clone());
                    continue;
                }
                let error = why(&error);
                if said.as_ref() != Some(&error) {
                    tracing::warn!(
                        resource,
                        error,
                        "the Kubernetes API does not tell of changes; what is enrolled stays so"
                    );
                    said = Some(error);
                }
                tokio::time::sleep(backoff.next()).await;
                begun = tokio::time::Instant::now();
                None
            }
            // The library's stream never ends; if it does, it is begun anew.
            None => {
                stream = events(if streaming { config.clone().streaming_lists() } else { config.clone() });
                tokio::time::sleep(backoff.next()).await;
                None
            }
        };
        let Some(news) = news else { continue };
        backoff.reset();
        connected.set(1);
        if said.take().is_some() {
            tracing::info!(resource, "the Kubernetes API is there again");
        }
        if told.send(news).await.is_err() {
            return;
        }
    }
}

/// Whether a server has refused the initial list by watch: it says that the request is invalid.
fn refuses_streaming(error: &Error) -> bool {
    matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}

/// An error with all its causes, in one line.
pub fn why(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        cause = error.source();
    }
    text
}
