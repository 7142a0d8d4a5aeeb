//! What is counted: by the names and labels of the reference for all pods, and by outcome for each pod.

use crate::mesh::Workload;
use crate::telemetry::limit::LogLimit;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the histogram's buckets, in seconds (those of the reference).
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Labels of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    /// Record type asked for.
    pub request_query_type: &'static str,
    /// `udp` or `tcp`.
    pub request_protocol: &'static str,
    /// Canonical name of the pod that asks.
    pub source_canonical_service: String,
    /// Its canonical revision.
    pub source_canonical_revision: String,
}

impl Labels {
    /// Of a request of this type by a pod, if it is known by now who it is.
    pub fn new(query_type: &'static str, protocol: &'static str, source: Option<&Workload>) -> Self {
        Self {
            request_query_type: query_type,
            request_protocol: protocol,
            source_canonical_service: known(source.map_or("", |workload| &workload.canonical_name)),
            source_canonical_revision: known(source.map_or("", |workload| &workload.canonical_revision)),
        }
    }
}

/// What is not known has a word for it.
fn known(text: &str) -> String {
    if text.is_empty() { "unknown".to_owned() } else { text.to_owned() }
}

/// Labels of a host name resolved for a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// How a request of a pod has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered from the facts of the mesh.
    Mesh,
    /// Answered from the facts: the name is there, and has no such record.
    NoRecords,
    /// The pod's resolvers denied the name or did not answer, and the mesh knew it.
    Completed,
    /// Answered by the pod's resolvers.
    Forwarded,
    /// Answered by what they had answered before.
    Cached,
    /// The mesh could not say whether the name is one of its own: the pod's resolvers were asked.
    FailedOpen,
    /// None of the pod's resolvers answered.
    Failed,
    /// Refused: too many requests of the pod were open.
    Limited,
    /// No request at all.
    Ignored,
}

impl Outcome {
    /// All of them.
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
#[derive(Debug)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_seconds: Family<Labels, Histogram>,
    on_demand: Family<OnDemandLabels, Counter>,
    outcomes: Family<OutcomeLabel, Counter>,
    /// Bounds the log lines about requests that nobody answers, of all pods together.
    pub complaints: LogLimit,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            on_demand: Family::default(),
            outcomes: Family::default(),
            complaints: LogLimit::default(),
        }
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("istio_dns_requests", "DNS requests of pods (unstable)", self.requests.clone());
        let help = "DNS requests passed on to pods' resolvers (unstable)";
        registry.register("istio_dns_upstream_requests", help, self.upstream_requests.clone());
        let help = "DNS requests that no resolver of the pod answered (unstable)";
        registry.register("istio_dns_upstream_failures", help, self.upstream_failures.clone());
        let help = "Time until a pod's resolver answered (unstable)";
        registry.register("istio_dns_upstream_request_duration_seconds", help, self.upstream_seconds.clone());
        let help = "Host names of workloads resolved for a connection (unstable)";
        registry.register("istio_on_demand_dns", help, self.on_demand.clone());
        let help = "DNS requests of pods by how they ended";
        registry.register("culvert_dns_requests", help, self.outcomes.clone());
        // An alarm on these must be able to see them at zero.
        for outcome in Outcome::ALL {
            drop(self.outcomes.get_or_create(&OutcomeLabel { outcome: outcome.word() }));
        }
    }

    /// The counter of requests with these labels, to be kept.
    pub fn requests(&self, labels: &Labels) -> Counter {
        self.requests.get_or_create_owned(labels)
    }

    /// Counters of a pod's requests.
    pub fn counts(&self) -> Counts {
        let of_all = |outcome: &Outcome| self.outcomes.get_or_create_owned(&OutcomeLabel { outcome: outcome.word() });
        Counts(Outcome::ALL.iter().map(|outcome| (*outcome, AtomicU64::new(0), of_all(outcome))).collect())
    }

    /// Counts what was passed on, with how long the answer took; `None`: there was none.
    pub fn upstream(&self, labels: &Labels, seconds: Option<f64>) {
        self.upstream_requests.get_or_create(labels).inc();
        match seconds {
            Some(seconds) => self.upstream_seconds.get_or_create(labels).observe(seconds),
            None => {
                self.upstream_failures.get_or_create(labels).inc();
            }
        }
    }

    /// Counts a host name resolved for a connection of `source`.
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
        self.on_demand.get_or_create(&labels).inc();
    }
}

/// Requests of one pod by how they ended, each counted for all pods as well.
#[derive(Debug)]
pub struct Counts(Vec<(Outcome, AtomicU64, Counter)>);

impl Counts {
    /// Counts one.
    pub fn add(&self, outcome: Outcome) {
        if let Some((_, of_pod, of_all)) = self.0.iter().find(|(one, ..)| *one == outcome) {
            of_pod.fetch_add(1, Ordering::Relaxed);
            of_all.inc();
        }
    }

    /// Those that are not zero, by their words.
    pub fn list(&self) -> BTreeMap<&'static str, u64> {
        let all = self.0.iter().map(|(outcome, count, _)| (outcome.word(), count.load(Ordering::Relaxed)));
        all.filter(|(_, count)| *count > 0).collect()
    }
}
