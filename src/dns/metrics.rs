//! Metrics of DNS: those of ztunnel, with its names and labels, for all pods; and requests by outcome, also for each
//! pod.

use crate::mesh::Workload;
use crate::telemetry::limit::LogLimit;
use crate::telemetry::series::{self, Labels, OVERFLOW, Series};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the histogram's buckets, in seconds (the same as in ztunnel).
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Labels of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Record type of the question.
    pub request_query_type: &'static str,
    /// `udp` or `tcp`.
    pub request_protocol: &'static str,
    /// Canonical name of the pod that sent the request.
    pub source_canonical_service: String,
    /// Its canonical revision.
    pub source_canonical_revision: String,
}

impl RequestLabels {
    /// Labels of a request by `source`, or by a pod whose workload is not known yet.
    pub fn new(query_type: &'static str, protocol: &'static str, source: Option<&Workload>) -> Self {
        Self {
            request_query_type: query_type,
            request_protocol: protocol,
            source_canonical_service: known(source.map_or("", |workload| &workload.canonical_name)),
            source_canonical_revision: known(source.map_or("", |workload| &workload.canonical_revision)),
        }
    }
}

impl Labels for RequestLabels {
    fn overflow(&self) -> Self {
        Self { source_canonical_service: OVERFLOW.into(), source_canonical_revision: OVERFLOW.into(), ..self.clone() }
    }
}

/// The text, or `unknown` if it is empty.
fn known(text: &str) -> String {
    if text.is_empty() { "unknown".to_owned() } else { text.to_owned() }
}

/// Labels of a host name that was resolved for a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
#[allow(missing_docs, reason = "each field is the label of the same name")]
pub struct OnDemandLabels {
    pub source_workload: String,
    pub source_canonical_service: String,
    pub source_canonical_revision: String,
    pub source_workload_namespace: String,
    pub source_principal: String,
    pub source_app: String,
    pub source_version: String,
    pub source_cluster: String,
    pub hostname: String,
}

impl Labels for OnDemandLabels {
    fn overflow(&self) -> Self {
        let overflow = || OVERFLOW.to_owned();
        Self {
            source_workload: overflow(),
            source_canonical_service: overflow(),
            source_canonical_revision: overflow(),
            source_workload_namespace: overflow(),
            source_principal: overflow(),
            source_app: overflow(),
            source_version: overflow(),
            source_cluster: overflow(),
            hostname: overflow(),
        }
    }
}

/// Metrics of the requests of one label set.
#[derive(Debug)]
pub struct RequestMetrics {
    /// All requests.
    pub all: Counter,
    upstream: Counter,
    upstream_failures: Counter,
    upstream_seconds: Histogram,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        let (all, upstream, upstream_failures) = Default::default();
        Self { all, upstream, upstream_failures, upstream_seconds: Histogram::new(BUCKETS) }
    }
}

impl RequestMetrics {
    /// Counts a forwarded request. `seconds` is the time until the answer, or `None` if there was none.
    pub fn upstream(&self, seconds: Option<f64>) {
        self.upstream.inc();
        match seconds {
            Some(seconds) => self.upstream_seconds.observe(seconds),
            None => {
                self.upstream_failures.inc();
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// How a request of a pod ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// Answered with records from the mesh facts.
    Mesh,
    /// Answered from the mesh facts: the name exists and has no such record.
    NoRecords,
    /// Answered from the mesh facts after the pod's resolvers gave a negative answer or none.
    Completed,
    /// Answered by the pod's resolvers.
    Forwarded,
    /// Answered from the cache of the resolvers' answers.
    Cached,
    /// The mesh facts were not available, so the pod's resolvers were asked.
    FailedOpen,
    /// None of the pod's resolvers answered.
    Failed,
    /// Refused, because too many requests of the pod were open.
    Limited,
    /// Not answered: it is not a request, or does not come from the pod.
    Ignored,
}

impl RequestOutcome {
    /// All outcomes.
    pub const ALL: [Self; 9] = [
        Self::Mesh,
        Self::NoRecords,
        Self::Completed,
        Self::Forwarded,
        Self::Cached,
        Self::FailedOpen,
        Self::Failed,
        Self::Limited,
        Self::Ignored,
    ];

    /// The word on the admin port, in metrics and in the log.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::NoRecords => "no_records",
            Self::Completed => "completed",
            Self::Forwarded => "forwarded",
            Self::Cached => "cached",
            Self::FailedOpen => "failed_open",
            Self::Failed => "failed",
            Self::Limited => "limited",
            Self::Ignored => "ignored",
        }
    }
}

/// Metrics of all pods together.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests by type and source.
    pub requests: Series<RequestLabels, RequestMetrics>,
    on_demand: Series<OnDemandLabels, Counter>,
    outcomes: Family<OutcomeLabel, Counter>,
    /// Limits the log lines about requests that no resolver answers, for all pods together.
    pub complaints: LogLimit,
}

impl Metrics {
    /// Metrics at zero, with these limits of those with names from the mesh.
    pub fn new(series: series::Config) -> Self {
        Self { requests: Series::new(series), on_demand: Series::new(series), ..Self::default() }
    }

    /// How often a request was counted with `overflow` in place of its names.
    pub fn overflowed(&self) -> u64 {
        self.requests.overflowed() + self.on_demand.overflowed()
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        let requests = self.requests.of(&RequestLabels::default());
        requests.all.inc();
        requests.upstream.inc();
        requests.upstream_failures.inc();
        self.on_demand.of(&OnDemandLabels::default()).inc();
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let (requests, on_demand) = (self.requests.clone(), self.on_demand.clone());
        registry.register_collector(Box::new(RequestCollector { requests, on_demand }));
        let help = "DNS requests of pods by outcome: mesh, no_records, completed, forwarded, cached, failed_open, failed, \
                    limited or ignored. Alert on failed_open and failed";
        registry.register("culvert_dns_requests", help, self.outcomes.clone());
        // All outcomes appear from the start, so that alerts can rely on a zero.
        for outcome in RequestOutcome::ALL {
            drop(self.outcomes.get_or_create(&OutcomeLabel { outcome: outcome.word() }));
        }
    }

    /// The counters of one pod's requests.
    pub fn counts(&self) -> OutcomeCounts {
        let of_all =
            |outcome: &RequestOutcome| self.outcomes.get_or_create_owned(&OutcomeLabel { outcome: outcome.word() });
        OutcomeCounts(
            RequestOutcome::ALL.iter().map(|outcome| (*outcome, AtomicU64::new(0), of_all(outcome))).collect(),
        )
    }

    /// Counts a host name that was resolved for a connection of `source`.
    pub fn on_demand(&self, source: &Workload, hostname: &str) {
        let principal = source.identity().map(|identity| identity.to_string()).unwrap_or_default();
        let labels = OnDemandLabels {
            source_workload: known(&source.workload_name),
            source_canonical_service: known(&source.canonical_name),
            source_canonical_revision: known(&source.canonical_revision),
            source_workload_namespace: known(&source.namespace),
            source_principal: known(&principal),
            source_app: known(&source.canonical_name),
            source_version: known(&source.canonical_revision),
            source_cluster: known(&source.cluster_id),
            hostname: hostname.to_owned(),
        };
        self.on_demand.of(&labels).inc();
    }
}

/// Exports the metrics whose labels come from outside.
#[derive(Debug)]
struct RequestCollector {
    requests: Series<RequestLabels, RequestMetrics>,
    on_demand: Series<OnDemandLabels, Counter>,
}

impl Collector for RequestCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Counted = fn(&RequestMetrics) -> Option<&dyn EncodeMetric>;
        let put = |name, help, kind, counted: Counted| (name, help, kind, counted);
        let help = ["DNS requests of pods (unstable)", "DNS requests forwarded to pods' resolvers (unstable)"];
        let failures = "DNS requests that no resolver of the pod answered (unstable)";
        let seconds = "Seconds until a pod's resolver answered (unstable)";
        let families = [
            put("istio_dns_requests", help[0], MetricType::Counter, |of| Some(&of.all)),
            put("istio_dns_upstream_requests", help[1], MetricType::Counter, |of| {
                (of.upstream.get() > 0).then_some(&of.upstream)
            }),
            put("istio_dns_upstream_failures", failures, MetricType::Counter, |of| {
                (of.upstream_failures.get() > 0).then_some(&of.upstream_failures)
            }),
            put("istio_dns_upstream_request_duration_seconds", seconds, MetricType::Histogram, |of| {
                (of.upstream.get() > 0).then_some(&of.upstream_seconds)
            }),
        ];
        self.requests.show(
            families,
            |_| {},
            |(name, help, kind, counted), all| {
                let mut all = all.filter_map(|(labels, of)| Some((labels, counted(of)?))).peekable();
                if all.peek().is_none() {
                    return Ok(());
                }
                let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
                for (labels, metric) in all {
                    metric.encode(family.encode_family(labels)?)?;
                }
                Ok::<(), fmt::Error>(())
            },
        )?;
        let help = "Host names of workloads resolved for a connection (unstable)";
        self.on_demand.show(
            [()],
            |_| {},
            |(), all| {
                let mut all = all.peekable();
                if all.peek().is_none() {
                    return Ok(());
                }
                let mut family = encoder.encode_descriptor("istio_on_demand_dns", help, None, MetricType::Counter)?;
                for (labels, counter) in all {
                    counter.encode(family.encode_family(labels)?)?;
                }
                Ok(())
            },
        )
    }
}

/// One pod's requests by outcome. Each is counted for all pods as well.
#[derive(Debug)]
pub struct OutcomeCounts(Vec<(RequestOutcome, AtomicU64, Counter)>);

impl OutcomeCounts {
    /// Counts a request.
    pub fn add(&self, outcome: RequestOutcome) {
        if let Some((_, of_pod, of_all)) = self.0.iter().find(|(one, ..)| *one == outcome) {
            of_pod.fetch_add(1, Ordering::Relaxed);
            of_all.inc();
        }
    }

    /// The counters that are not zero, by outcome.
    pub fn list(&self) -> BTreeMap<&'static str, u64> {
        let all = self.0.iter().map(|(outcome, count, _)| (outcome.word(), count.load(Ordering::Relaxed)));
        all.filter(|(_, count)| *count > 0).collect()
    }
}
