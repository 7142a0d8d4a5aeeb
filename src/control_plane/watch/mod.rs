//! Follows the objects of the Kubernetes API and publishes the facts that follow from them.
//!
//! ```text
//!   follow (one for each kind) ──► fold ──► every 20 ms: catalog, and statuses of policies
//! ```
//! While the API is away or silent, what is served stays; when it is back, objects that have vanished in the meantime
//! are removed. Nothing is served before every kind has been listed once.

#[cfg(test)]
mod corpus;
mod fold;
mod follow;
mod known;
pub mod measured;
mod metrics;
mod object;
mod outbox;

pub use metrics::Metrics;

use super::policies::status::Wanted;
use super::{Catalog, Cluster, Config, RunningPods, policies};
use crate::telemetry::limit::LogLimit;
use fold::Fold;
use follow::{Follow, Source};
use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll};
use kube::{Api, Client};
use object::{Event, Item, Kind, Policy, Watched};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// How long a watch runs before it is started again. A connection that is silently dead is noticed then.
const WATCH_SECONDS: u32 = 120;

/// The read timeout that the client of the API must have: longer than any watch. It ends connections to a server that
/// accepts them and sends nothing.
pub const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// How long changes are gathered before they are published.
const BATCH: Duration = Duration::from_millis(20);

/// Follows the API for as long as the process runs.
pub async fn run(
    client: Client,
    config: &Config,
    catalog: Arc<Catalog>,
    pods: Arc<RunningPods>,
    metrics: Arc<Metrics>,
    statuses: mpsc::Sender<Wanted>,
) {
    follow_cluster(client, &config.cluster, (catalog, pods, metrics), statuses).await;
}

async fn follow_cluster(
    client: Client,
    cluster: &Cluster,
    (catalog, pods, metrics): (Arc<Catalog>, Arc<RunningPods>, Arc<Metrics>),
    statuses: mpsc::Sender<Wanted>,
) {
    let mut events = all_kinds(&client, &metrics);
    let mut watch = Watch {
        fold: Fold::new(cluster, pods),
        catalog,
        metrics,
        left_out: LogLimit::default(),
        is_complete: false,
        due: None,
        pause: BATCH,
    };
    let mut has_writer = true;
    loop {
        let (due, has_statuses) = (watch.due, has_writer && !watch.fold.outbox.is_empty());
        tokio::select! {
            Some(event) = events.next() => watch.receive(event),
            () = at(due), if due.is_some() => watch.publish(),
            room = statuses.reserve(), if has_statuses => match room {
                Ok(room) => if let Some(wanted) = watch.fold.outbox.next() { room.send(wanted) },
                Err(_) => has_writer = false,
            },
        }
        if !has_writer {
            watch.fold.outbox.clear();
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// The events of all kinds.
fn all_kinds(client: &Client, metrics: &Metrics) -> SelectAll<BoxStream<'static, Event>> {
    let policy = |kind: Kind, of: policies::Kind, item: fn(Box<Policy>) -> Item| {
        let api: Api<Policy> = Api::all_with(client.clone(), &of.resource());
        Follow::events(Source::new(kind, api, item), metrics)
    };
    let mut all = SelectAll::new();
    all.push(typed(client, Kind::Pods, Item::Pod, metrics));
    all.push(typed(client, Kind::Services, Item::Service, metrics));
    all.push(typed(client, Kind::EndpointSlices, Item::Slice, metrics));
    all.push(typed(client, Kind::Nodes, Item::Node, metrics));
    all.push(typed(client, Kind::Namespaces, Item::Namespace, metrics));
    all.push(typed(client, Kind::Gateways, Item::Gateway, metrics));
    all.push(policy(Kind::AuthorizationPolicies, policies::Kind::Authorization, |policy| {
        Item::Authorization(Box::new(policy.content))
    }));
    all.push(policy(Kind::PeerAuthentications, policies::Kind::Authentication, |policy| {
        Item::Authentication(Box::new(policy.content))
    }));
    all
}

fn typed<T: Watched>(
    client: &Client,
    kind: Kind,
    item: fn(Box<object::Object<T>>) -> Item,
    metrics: &Metrics,
) -> BoxStream<'static, Event> {
    Follow::events(Source::new(kind, Api::all(client.clone()), item), metrics)
}

/// What is known, and when it is published next.
struct Watch {
    fold: Fold,
    catalog: Arc<Catalog>,
    metrics: Arc<Metrics>,
    left_out: LogLimit,
    /// Whether the catalog says that everything has been listed.
    is_complete: bool,
    /// When the next batch is due, if something has changed.
    due: Option<Instant>,
    /// How long changes are gathered: at least as long as the last batch took, so that other work gets half of the time.
    pause: Duration,
}

impl Watch {
    fn receive(&mut self, event: Event) {
        self.metrics.count_event();
        let kind = event.kind();
        self.fold.apply(event);
        self.metrics.set_objects(kind, self.fold.count(kind));
        self.say_faults();
        if self.due.is_none() && self.fold.is_complete() && self.fold.has_changes() {
            self.due = Some(Instant::now() + self.pause);
        }
    }

    fn say_faults(&mut self) {
        for faults in self.fold.take_faults() {
            self.metrics.count_left_out(faults.count);
            for fault in faults.named {
                if let Some(suppressed) = self.left_out.allow() {
                    tracing::warn!(suppressed, "a part of an object of the Kubernetes API is left out: {fault}");
                }
            }
        }
    }

    fn publish(&mut self) {
        let begun = Instant::now();
        self.due = None;
        let changes = self.fold.take_changes();
        self.metrics.count_batch(changes.len());
        self.metrics.set_closed(self.fold.closed());
        let count = changes.len();
        self.catalog.apply(changes);
        if !std::mem::replace(&mut self.is_complete, true) {
            self.catalog.set_complete();
            tracing::info!(resources = count, "every kind of object has been listed; daemons are served");
        }
        self.say_faults();
        self.pause = begun.elapsed().max(BATCH);
    }
}

#[cfg(test)]
mod tests;
