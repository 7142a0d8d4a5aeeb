//! Metrics of what is served.

use crate::control_plane::catalog::{Edition, Kind};
use crate::telemetry::limit::LogLimit;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the histogram's buckets, in seconds.
const BUCKETS: [f64; 9] = [0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0];

/// Metrics of the port for daemons.
#[derive(Debug)]
pub struct Metrics {
    pub(super) connections: Gauge,
    pub(super) not_served: Family<ReasonLabel, Counter>,
    pub(super) calls: Family<CallLabel, Counter>,
    pub(super) streams: Gauge,
    pub(super) resources: Family<TypeLabel, Gauge>,
    pub(super) resource_bytes: Family<TypeLabel, Gauge>,
    pub(super) responses: Family<TypeLabel, Counter>,
    pub(super) bytes: Family<TypeLabel, Counter>,
    pub(super) refused: Family<TypeLabel, Counter>,
    pub(super) push_seconds: Histogram,
    /// Limits of the log lines that a client can cause.
    pub(super) log: LogLimit,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct CallLabel {
    pub(super) call: &'static str,
    pub(super) status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TypeLabel {
    pub(super) of: &'static str,
}

/// The label of a type.
pub(super) fn of(kind: Kind) -> TypeLabel {
    TypeLabel { of: word(kind) }
}

/// A type in logs, dumps and labels.
pub(super) fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Address => "address",
        Kind::Authorization => "authorization",
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            connections: Gauge::default(),
            not_served: Family::default(),
            calls: Family::default(),
            streams: Gauge::default(),
            resources: Family::default(),
            resource_bytes: Family::default(),
            responses: Family::default(),
            bytes: Family::default(),
            refused: Family::default(),
            push_seconds: Histogram::new(BUCKETS),
            log: LogLimit::default(),
        }
    }
}

impl Metrics {
    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.calls.get_or_create(&CallLabel { call: "", status: "" }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Connections of daemons that are open";
        registry.register("culvert_control_connections", help, self.connections.clone());
        let help = "Connections that were closed before any call, by reason";
        registry.register("culvert_control_connections_not_served", help, self.not_served.clone());
        let help = "Calls that have ended, by status. Alert on a rise of Unauthenticated and PermissionDenied";
        registry.register("culvert_control_calls", help, self.calls.clone());
        let help = "Daemons that are connected: streams of mesh facts";
        registry.register("culvert_control_streams", help, self.streams.clone());
        let help = "Workloads and services, and policies, that are served";
        registry.register("culvert_control_resources", help, self.resources.clone());
        let help = "Bytes of all workloads and services, and of all policies. A daemon that begins gets each in one answer, \
                    which may have 200 MiB. Alert above 150 MiB";
        registry.register("culvert_control_resource_bytes", help, self.resource_bytes.clone());
        registry.register("culvert_control_responses", "Responses with mesh facts", self.responses.clone());
        registry.register("culvert_control_response_bytes", "Bytes of responses with mesh facts", self.bytes.clone());
        let help = "Responses of which a daemon refused a part. The log names the resources. Alert on a rise";
        registry.register("culvert_control_responses_refused", help, self.refused.clone());
        let help = "Time from a change to when it is sent to a daemon";
        registry.register("culvert_control_push_seconds", help, self.push_seconds.clone());
        // They appear from the start, so that alerts see the first one as a rise.
        for kind in Kind::ALL {
            drop(self.responses.get_or_create(&of(kind)));
            drop(self.bytes.get_or_create(&of(kind)));
            drop(self.refused.get_or_create(&of(kind)));
            drop(self.resources.get_or_create(&of(kind)));
            drop(self.resource_bytes.get_or_create(&of(kind)));
        }
        for reason in ["handshake", "silent", "full"] {
            drop(self.not_served.get_or_create(&ReasonLabel { reason }));
        }
    }

    pub(super) fn not_served(&self, reason: &'static str) {
        self.not_served.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn set_resources(&self, edition: &Edition) {
        for kind in Kind::ALL {
            for (family, value) in
                [(&self.resources, edition.of(kind).size()), (&self.resource_bytes, edition.bytes(kind))]
            {
                family.get_or_create(&of(kind)).set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        }
    }
}
