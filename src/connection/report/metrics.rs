//! Metrics of connections: traffic under the names and labels of Istio's dashboards, and culvert's own counters of
//! failures.

use super::direction::Direction;
use super::failure;
use super::stage_times::StageTimes;
use super::stages::{Stage, Stages};
use crate::connection::authorize::Refusal;
use crate::connection::authorize::egress::EgressDecision;
use crate::connection::choose;
use crate::mesh::Store;
use crate::mesh::egress::EgressAction;
use crate::telemetry::exemplar::TracedCounter;
use crate::telemetry::series::{self, Labels, OVERFLOW, Series};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Labels of traffic metrics, in ztunnel's order. An unknown value is `unknown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
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

impl Labels for TrafficLabels {
    fn overflow(&self) -> Self {
        let overflow = || OVERFLOW.to_owned();
        Self {
            reporter: self.reporter,
            source_workload: overflow(),
            source_canonical_service: overflow(),
            source_canonical_revision: overflow(),
            source_workload_namespace: overflow(),
            source_principal: overflow(),
            source_app: overflow(),
            source_version: overflow(),
            source_cluster: overflow(),
            destination_service: overflow(),
            destination_service_namespace: overflow(),
            destination_service_name: overflow(),
            destination_workload: overflow(),
            destination_canonical_service: overflow(),
            destination_canonical_revision: overflow(),
            destination_workload_namespace: overflow(),
            destination_principal: overflow(),
            destination_app: overflow(),
            destination_version: overflow(),
            destination_cluster: overflow(),
            request_protocol: self.request_protocol,
            response_flags: self.response_flags,
            connection_security_policy: self.connection_security_policy,
            source_region: overflow(),
            source_zone: overflow(),
            destination_region: overflow(),
            destination_zone: overflow(),
        }
    }
}

/// The value of labels whose value is not known.
pub(super) const UNKNOWN: &str = "unknown";

/// Traffic of one label set.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Connections whose route is known.
    pub opened: Counter,
    /// Connections that have ended, whether well or badly.
    pub closed: Counter,
    /// Connections that have ended badly.
    pub failed: Counter,
    /// Bytes from client to server.
    pub received: Counter,
    /// Bytes from server to client.
    pub sent: Counter,
}

impl Traffic {
    /// `counter`, if opened connections are shown for this label set.
    fn opened<'a>(&self, counter: &'a Counter) -> Option<&'a Counter> {
        (self.opened.get() > 0).then_some(counter)
    }

    /// `counter`, if it has counted anything.
    fn used<'a>(&self, counter: &'a Counter) -> Option<&'a Counter> {
        (counter.get() > 0).then_some(counter)
    }
}

/// Labels of a failure.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FailureLabels {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// A word of [`super::reason::Reason`].
    pub reason: &'static str,
    /// A word of [`super::failure::Fault::word`].
    pub fault: &'static str,
}

/// Labels of a tunnel that this node ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CutLabels {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// A word of [`crate::hbone::TunnelError::cut`].
    pub reason: &'static str,
}

/// Label of a decision about a destination outside the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EgressLabel {
    /// `allowed`, `logged`, `denied`, or `would_deny` by a dry-run policy.
    pub decision: &'static str,
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
    /// The mesh facts, by which idle label sets of workloads that are gone are found. Without them all idle ones go.
    pub mesh: OnceLock<Arc<Store>>,
    /// Traffic by source, destination and service.
    pub traffic: Series<TrafficLabels, Traffic>,
    /// Accepted sockets that are open.
    pub sockets: Family<ReporterLabel, Gauge>,
    /// Connections that were refused or ended because the peer's certificate is revoked.
    pub revoked: Family<ReporterLabel, Counter>,
    /// Tunnels that this node ended because of what their peer did.
    pub cut: Family<CutLabels, Counter>,
    /// Connections to port 15008 whose client left without sending anything.
    pub unused: Counter,
    /// Time spent in each stage.
    pub stages: StageTimes,
    /// Failures and refusals, including those before the route was known.
    pub failures: Family<FailureLabels, TracedCounter>,
    /// Decisions of egress policies.
    pub egress: Family<EgressLabel, Counter>,
    /// Connections to a workload with a waypoint that have not come through it.
    pub bypassed: Counter,
    /// Endpoints that failed.
    pub endpoints: choose::metrics::Metrics,
}

impl Metrics {
    /// Metrics at zero, with these limits of the traffic metrics.
    pub fn new(series: series::Config) -> Self {
        Self { traffic: Series::new(series), ..Self::default() }
    }

    /// Counts a peer that did not finish its handshake in time. Its tunnel ends before its identity is known.
    pub fn late_handshake(&self) {
        self.cut.get_or_create(&CutLabels { direction: "inbound", reason: "late_handshake" }).inc();
    }

    /// Counts a decision about a destination outside the mesh.
    pub fn egress(&self, decided: &Result<Option<EgressDecision>, Refusal>) {
        let decision = match decided {
            Ok(None) => return,
            Ok(Some(by)) => match by.action {
                EgressAction::Allow => "allowed",
                EgressAction::Log => "logged",
                EgressAction::Deny => "would_deny",
            },
            Err(_) => "denied",
        };
        self.egress.get_or_create(&EgressLabel { decision }).inc();
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        let traffic = self.traffic.of(&TrafficLabels::default());
        for counter in [&traffic.opened, &traffic.closed, &traffic.failed, &traffic.received, &traffic.sent] {
            counter.inc();
        }
        let (direction, reason) = ("inbound", "");
        drop(self.sockets.get_or_create(&ReporterLabel { reporter: "source" }));
        drop(self.revoked.get_or_create(&ReporterLabel { reporter: "source" }));
        drop(self.cut.get_or_create(&CutLabels { direction, reason }));
        drop(self.failures.get_or_create(&FailureLabels { direction, reason, fault: "" }));
        drop(self.egress.get_or_create(&EgressLabel { decision: "denied" }));
        let mut stages = Stages::default();
        stages.add(Stage::Queue, Duration::ZERO);
        self.stages.count(Direction::Inbound, &stages);
        self.endpoints.fill_example();
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(TrafficCollector {
            traffic: self.traffic.clone(),
            mesh: self.mesh.get().cloned(),
        }));
        registry.register_collector(Box::new(self.stages.clone()));
        let sockets = "Accepted sockets that are open (unstable)";
        registry.register("istio_tcp_sockets_open", sockets, self.sockets.clone());
        let revoked = "Connections refused or ended because the peer's certificate is revoked (unstable)";
        registry.register("istio_crl_policy_rejections", revoked, self.revoked.clone());
        let cut = "Tunnels that this node has cut because of what the peer did. The reasons are control_frames, memory, \
                   ping_timeout, rapid_reset, continuation_flood, empty_frames, window_overflow, flood, bad_frame and \
                   late_handshake";
        registry.register("culvert_tunnels_cut", cut, self.cut.clone());
        let unused = "Connections to port 15008 that the peer closed cleanly before it sent anything, as port scans and floods do. \
                      culvert doctor opens one for each pod";
        registry.register("culvert_tunnels_unused", unused, self.unused.clone());
        let failures = "Connections that failed, by reason, and by whose fault it was: peer, app, policy, mesh or us";
        registry.register("culvert_connection_failures", failures, self.failures.clone());
        // Those that an alert sees the first one of appear from the start.
        for (reason, _, fault) in failure::OF_ROOM {
            for direction in ["inbound", "outbound"] {
                let (reason, fault) = (reason.word(), fault.word());
                drop(self.failures.get_or_create(&FailureLabels { direction, reason, fault }));
            }
        }
        let egress = "Decisions of egress policies about connections to destinations outside the mesh: allowed, logged, denied, \
                      and would_deny by a dry-run policy. Open connections are decided again when the policies change";
        let bypassed = "Connections to a pod whose workload has a waypoint that have not come through it. They are refused if \
                        CULVERT_WAYPOINT_CHECK is enforce";
        registry.register("culvert_waypoint_bypassed", bypassed, self.bypassed.clone());
        registry.register("culvert_egress_decisions", egress, self.egress.clone());
        self.endpoints.register(registry);
    }
}

/// Writes the traffic metrics of a scrape.
#[derive(Debug)]
struct TrafficCollector {
    traffic: Series<TrafficLabels, Traffic>,
    mesh: Option<Arc<Store>>,
}

/// Takes out of `idle` the label sets whose workloads are all in the mesh.
fn keep_living(mesh: &Store, idle: &mut Vec<Arc<TrafficLabels>>) {
    let snapshot = mesh.load();
    let living: HashSet<(&str, &str)> =
        snapshot.workloads().map(|workload| (&*workload.namespace, &*workload.workload_name)).collect();
    let lives = |namespace: &str, name: &str| name == UNKNOWN || living.contains(&(namespace, name));
    idle.retain(|labels| {
        !lives(&labels.source_workload_namespace, &labels.source_workload)
            || !lives(&labels.destination_workload_namespace, &labels.destination_workload)
    });
}

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Counted = fn(&Traffic) -> Option<&Counter>;
        let put = |name, help, counted: Counted| (name, help, counted);
        let families = [
            put("istio_tcp_connections_opened", "TCP connections opened", |t| t.opened(&t.opened)),
            put("istio_tcp_connections_closed", "TCP connections closed, with or without a failure", |t| {
                t.used(&t.closed)
            }),
            put("istio_tcp_connections_failed", "TCP connections that ended with a failure (unstable)", |t| {
                t.used(&t.failed)
            }),
            put("istio_tcp_received_bytes", "Bytes from client to server", |t| t.opened(&t.received)),
            put("istio_tcp_sent_bytes", "Bytes from server to client", |t| t.opened(&t.sent)),
        ];
        let keep = |idle: &mut Vec<_>| {
            if let Some(mesh) = &self.mesh {
                keep_living(mesh, idle);
            }
        };
        self.traffic.show(families, keep, |(name, help, counted), all| {
            let mut all = all.filter_map(|(labels, traffic)| Some((labels, counted(traffic)?))).peekable();
            if all.peek().is_none() {
                return Ok(());
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, counter) in all {
                counter.encode(family.encode_family(labels)?)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::report::{Details, Direction, Failure, Record, Reporter};
    use crate::hbone::Meter;
    use crate::mesh::snapshot::tests::workload;
    use crate::mesh::{Facts, Workload};
    use std::time::Duration;

    #[test]
    fn lack_of_room_is_counted_from_zero() {
        let (metrics, mut registry, mut text) = (Metrics::default(), Registry::default(), String::new());
        metrics.register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for reason in ["limit", "largest_consumer", "largest_peer", "handshake_limit"] {
            let of = format!("direction=\"inbound\",reason=\"{reason}\"");
            let zero = |line: &str| line.contains(&of) && line.ends_with("} 0");
            assert!(text.lines().any(zero), "{reason}: {text}");
        }
    }

    /// Scrapes after a sweep over many workloads, with one connection still open.
    #[test]
    fn series_of_a_sweep_are_seen_once_and_go_and_an_open_connection_keeps_its_own() {
        let traffic = Series::new(series::Config { max: 10_000, idle: Duration::ZERO });
        let reporter = Arc::new(Reporter { metrics: Metrics { traffic, ..Metrics::default() }, ..Reporter::default() });
        let mut registry = Registry::default();
        reporter.metrics.register(&mut registry);
        let open = |name: &str| {
            let (from, to) = ("10.0.0.1:4711".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
            let mut record = Record::begin(&reporter, &"pod".into(), Direction::Outbound, from);
            let connection = record.opened(Details {
                source_workload: None,
                source_identity: None,
                destination_workload: Some(Arc::new(workload("a", name, "10.0.0.2"))),
                destination_identity: None,
                service: None,
                actual: to,
                authority: None,
                gateway: None,
                rule: None,
            });
            (record, connection)
        };
        let scrape = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            let of = |name: &str| {
                let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
                lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).collect::<Vec<_>>()
            };
            let names = ["opened", "closed", "failed"].map(|name| format!("istio_tcp_connections_{name}_total"));
            (names.map(|name| of(&name).len()), of("istio_tcp_sent_bytes_total").iter().sum::<u64>())
        };
        let (kept, connection) = open("kept");
        for n in 0..300 {
            let (record, _) = open(&format!("swept-{n}"));
            record.finish(if n < 100 { Err(Failure::LocalWorkload("x".into())) } else { Ok(()) });
        }
        assert_eq!(scrape(), ([301, 300, 100], 0));
        connection.down(7);
        assert_eq!(scrape(), ([1, 0, 0], 7), "open connections are still counted");
        drop(connection);
        kept.finish(Ok(()));
        assert_eq!(scrape(), ([1, 1, 0], 7));
        assert_eq!(scrape(), ([0, 0, 0], 0));
    }

    #[test]
    fn idle_series_stay_while_their_workloads_are_in_the_mesh() {
        let mesh = Store::new("n1".into(), "c1".into(), false);
        let labels = |source: &str, destination: &str| {
            Arc::new(TrafficLabels {
                source_workload: source.into(),
                source_workload_namespace: "a".into(),
                destination_workload: destination.into(),
                destination_workload_namespace: "a".into(),
                ..TrafficLabels::default()
            })
        };
        let of = |name: &str, ip: &str| Workload { workload_name: name.into(), ..workload("a", name, ip) };
        mesh.replace(Facts { workloads: vec![of("one", "10.0.0.1"), of("two", "10.0.0.2")], ..Facts::default() });
        let pairs = [("one", "two"), (UNKNOWN, "two"), ("one", UNKNOWN), ("one", "gone"), ("gone", "two")];
        let mut idle: Vec<_> = pairs.iter().map(|(source, destination)| labels(source, destination)).collect();
        idle.push(Arc::new(labels("one", "two").overflow()));
        keep_living(&mesh, &mut idle);
        let may_go = idle.iter().map(|labels| (&*labels.source_workload, &*labels.destination_workload));
        assert_eq!(may_go.collect::<Vec<_>>(), [("one", "gone"), ("gone", "two"), (OVERFLOW, OVERFLOW)]);
    }
}
