//! Metrics of what is known of the cluster.

use super::object::Kind;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource: &'static str,
}

impl From<Kind> for Resource {
    fn from(kind: Kind) -> Self {
        Self { resource: kind.name() }
    }
}

/// When the last event came.
#[derive(Clone, Debug, Default)]
struct LastEvent(Arc<Mutex<Option<Instant>>>);

impl Collector for LastEvent {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(at) = *self.0.lock() else { return Ok(()) };
        let age = ConstGauge::new(at.elapsed().as_secs_f64());
        let help = "Seconds since the Kubernetes API announced something. It rises in a quiet cluster too";
        let name = "culvert_control_last_event_age_seconds";
        age.encode(encoder.encode_descriptor(name, help, None, age.metric_type())?)
    }
}

/// Metrics of what is known of the cluster.
#[derive(Debug, Default)]
pub struct Metrics {
    objects: Family<Resource, Gauge>,
    failures: Family<Resource, Counter>,
    connected: Family<Resource, Gauge>,
    batches: Counter,
    changes: Counter,
    left_out: Counter,
    closed: Gauge,
    last_event: LastEvent,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Objects of the Kubernetes API that are known, by kind";
        registry.register("culvert_control_objects", help, self.objects.clone());
        let help = "Lists and watches of the Kubernetes API that failed or were interrupted, by kind";
        registry.register("culvert_control_watch_failures", help, self.failures.clone());
        let help = "1 while the Kubernetes API announces changes of the kind, else 0. Alert on 0 for ten minutes";
        registry.register("culvert_control_watch_connected", help, self.connected.clone());
        let help = "Batches of changes that were published";
        registry.register("culvert_control_batches", help, self.batches.clone());
        let help = "Changes of workloads, services and policies that were published";
        registry.register("culvert_control_changes", help, self.changes.clone());
        let help =
            "Values of objects that were left out because they make no sense or are too many. The log names them";
        registry.register("culvert_control_values_left_out", help, self.left_out.clone());
        let help =
            "Namespaces with too many policies, where every connection is refused. The log names them. Alert above 0";
        registry.register("culvert_control_closed_namespaces", help, self.closed.clone());
        registry.register_collector(Box::new(self.last_event.clone()));
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        let label = Resource::from(Kind::Pods);
        drop(self.objects.get_or_create(&label));
        drop(self.failures.get_or_create(&label));
        drop(self.connected.get_or_create(&label));
        self.count_event();
    }

    /// Counts an event.
    pub(super) fn count_event(&self) {
        *self.last_event.0.lock() = Some(Instant::now());
    }

    /// Sets how many objects of a kind are known.
    pub(super) fn set_objects(&self, kind: Kind, count: usize) {
        self.objects.get_or_create(&kind.into()).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts a batch.
    pub(super) fn count_batch(&self, changes: usize) {
        self.batches.inc();
        self.changes.inc_by(changes as u64);
    }

    /// Counts values that were left out.
    pub(super) fn count_left_out(&self, count: u64) {
        self.left_out.inc_by(count);
    }

    /// Sets how many namespaces have too many policies.
    pub(super) fn set_closed(&self, count: usize) {
        self.closed.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts the failures of a kind.
    pub(super) fn failures(&self, kind: Kind) -> Counter {
        self.failures.get_or_create(&kind.into()).clone()
    }

    /// Whether a kind is connected.
    pub(super) fn connected(&self, kind: Kind) -> Gauge {
        self.connected.get_or_create(&kind.into()).clone()
    }
}
