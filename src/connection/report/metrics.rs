//! Traffic metrics under the names and labels that dashboards of Istio ambient read, and our own counters of failures.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Traffic labels, in the order of the reference. A value that is not known is `unknown`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
#[allow(missing_docs, reason = "each field is the label of the same name")]
pub struct TrafficLabels {
    pub reporter: &'static str,
    pub source_workload: String,
    pub source_canonical_service: String,
    pub source_canonical_revision: String,
    pub source_workload_namespace: String,
    pub source_principal: String,
    pub source_app: String,
    pub source_version: String,
    pub source_cluster: String,
    pub destination_service: String,
    pub destination_service_namespace: String,
    pub destination_service_name: String,
    pub destination_workload: String,
    pub destination_canonical_service: String,
    pub destination_canonical_revision: String,
    pub destination_workload_namespace: String,
    pub destination_principal: String,
    pub destination_app: String,
    pub destination_version: String,
    pub destination_cluster: String,
    pub request_protocol: &'static str,
    pub response_flags: &'static str,
    pub connection_security_policy: &'static str,
    pub source_region: String,
    pub source_zone: String,
    pub destination_region: String,
    pub destination_zone: String,
}

/// Labels of a failure.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FailureLabels {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// A word of [`super::reason::Reason`].
    pub reason: &'static str,
    /// Whose fault: a word of [`super::failure::Fault::word`].
    pub fault: &'static str,
}

/// Labels of a tunnel that we ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CutLabels {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// A word of [`crate::hbone::TunnelError::cut`].
    pub reason: &'static str,
}

/// Label of a socket gauge.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReporterLabel {
    /// `source` or `destination`.
    pub reporter: &'static str,
}

/// Metrics of connections.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections whose route is known.
    pub opened: Family<TrafficLabels, Counter>,
    /// Connections that have ended, well or not.
    pub closed: Family<TrafficLabels, Counter>,
    /// Connections that have ended badly.
    pub failed: Family<TrafficLabels, Counter>,
    /// Bytes from client to server.
    pub received: Family<TrafficLabels, Counter>,
    /// Bytes from server to client.
    pub sent: Family<TrafficLabels, Counter>,
    /// Accepted sockets that are open.
    pub sockets: Family<ReporterLabel, Gauge>,
    /// Connections refused or ended because the peer's certificate is revoked.
    pub revoked: Family<ReporterLabel, Counter>,
    /// Tunnels that we ended because of what their peer did.
    pub cut: Family<CutLabels, Counter>,
    /// Failures, early ones included.
    pub failures: Family<FailureLabels, Counter>,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let opened = "TCP connections opened";
        registry.register("istio_tcp_connections_opened", opened, self.opened.clone());
        let closed = "TCP connections closed";
        registry.register("istio_tcp_connections_closed", closed, self.closed.clone());
        let failed = "TCP connections that ended with a failure (unstable)";
        registry.register("istio_tcp_connections_failed", failed, self.failed.clone());
        let received = "Bytes from client to server";
        registry.register("istio_tcp_received_bytes", received, self.received.clone());
        registry.register("istio_tcp_sent_bytes", "Bytes from server to client", self.sent.clone());
        let sockets = "Accepted sockets that are open (unstable)";
        registry.register("istio_tcp_sockets_open", sockets, self.sockets.clone());
        let revoked = "Connections refused or ended because the peer's certificate is revoked (unstable)";
        registry.register("istio_crl_policy_rejections", revoked, self.revoked.clone());
        let cut = "Tunnels that this node has ended because of what their peer did, by reason";
        registry.register("culvert_tunnels_cut", cut, self.cut.clone());
        let failures = "Connections that failed, by reason and whose fault it was";
        registry.register("culvert_connection_failures", failures, self.failures.clone());
    }
}
