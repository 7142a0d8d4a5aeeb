//! The record of one connection. It begins when the socket is accepted and is written exactly once, whatever happens:
//! by [`Record::finish`], or when it is dropped.

use super::access_log;
use super::details::Details;
use super::direction::Direction;
use super::export::{Export, Outbox, Trace};
use super::failure::Failure;
use super::history::{Ended, History};
use super::live::{ByteCounts, Connection, LiveConnections};
use super::metrics::{CutLabels, FailureLabels, Metrics, ReporterLabel, Traffic, TrafficLabels, UNKNOWN};
use super::plaintext::Peer;
use super::pods::KnownPods;
use super::recent::RecentFailures;
use super::stages::{Stage, Stages};
use crate::connection::headers;
use crate::hbone::TunnelError;
use crate::mesh::{Service, SpiffeName, Text, Workload};
use crate::telemetry::exemplar::TraceId;
use crate::telemetry::limit::LogLimit;
use crate::telemetry::series::SeriesHandle;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// What all records of the process share.
#[derive(Debug, Default)]
pub struct Reporter {
    /// Metrics of connections.
    pub metrics: Metrics,
    /// The list of live connections.
    pub live: LiveConnections,
    /// The latest connections that have ended.
    pub history: History,
    /// The pods of this node, with their plaintext.
    pub pods: KnownPods,
    /// Failures of the last minutes.
    pub recent: RecentFailures,
    /// Limit for reports of connections that failed before their route was known, which any peer can cause. Beyond it
    /// they are only counted, so that they do not displace others from the log, the history and the export.
    pub early_failures: LogLimit,
    /// Limit for lines about tunnels that were cut.
    pub cut: LogLimit,
    /// Whether the access log shows the stages.
    pub logs_stages: bool,
    /// Where connections are handed on for traces and logs elsewhere, if they are.
    pub outbox: Option<Arc<Outbox>>,
}

impl Reporter {
    /// Reports the end of a tunnel. One that this node cut is counted and logged as a warning. Tunnels that end
    /// otherwise are common and logged at debug level.
    pub fn tunnel_ended(&self, direction: Direction, peer: SocketAddr, identity: &SpiffeName, error: &TunnelError) {
        let Some(reason) = error.cut() else {
            tracing::debug!(%error, %peer, %identity, "tunnel ended");
            return;
        };
        self.metrics.cut.get_or_create(&CutLabels { direction: direction.word(), reason }).inc();
        if let Some(suppressed) = self.cut.allow() {
            let direction = direction.word();
            tracing::warn!(%error, reason, direction, %peer, %identity, suppressed, "tunnel cut");
        }
    }
}

/// The record of one connection or stream.
#[derive(Debug)]
pub struct Record {
    reporter: Arc<Reporter>,
    pod: Text,
    direction: Direction,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    start: Instant,
    opened: Option<OpenRecord>,
    failure: Option<Failure>,
    finished: bool,
    /// The endpoints that were tried before, and why each was left.
    tried: Option<String>,
    stages: Stages,
    /// Whether the client has sent plaintext to the pod.
    is_plaintext: bool,
    /// Its place in a trace, once something asks for it.
    trace: Option<Box<Trace>>,
    /// Its trace, if that is recorded, here or by its peer.
    recorded: Option<TraceId>,
}

/// The part of a record that exists once the route is known.
#[derive(Debug)]
struct OpenRecord {
    id: u64,
    /// Whether the traffic metrics have counted it as opened.
    is_counted: bool,
    traffic: SeriesHandle<TrafficLabels, Traffic>,
    details: Details,
    connection: Arc<Connection>,
}

impl Record {
    /// Begins the record of a socket that was accepted at `start`. Until now it has waited for its worker.
    pub fn accepted(
        reporter: &Arc<Reporter>,
        pod: &Text,
        direction: Direction,
        source: SocketAddr,
        start: Instant,
    ) -> Self {
        let mut record = Self::begin(reporter, pod, direction, source);
        record.start = start;
        record.lap(Stage::Queue);
        record
    }

    /// A stage has ended.
    pub fn lap(&mut self, stage: Stage) {
        self.stages.lap(stage, self.start.elapsed());
    }

    /// Several stages have ended, and took these times.
    pub fn laps(&mut self, stages: impl IntoIterator<Item = (Stage, Option<Duration>)>) {
        self.stages.laps(stages, self.start.elapsed());
    }

    /// The last stage before the connection is open has ended.
    pub fn open(&mut self) {
        self.stages.open();
        if self.is_carried_in_plaintext() {
            self.reporter.pods.plaintext_begins(&self.pod, self.direction, &self.peer());
        }
    }

    /// The client has sent plaintext to the pod.
    pub fn arrived_in_plaintext(&mut self) {
        self.is_plaintext = true;
    }

    /// Begins a record.
    pub fn begin(reporter: &Arc<Reporter>, pod: &Text, direction: Direction, source: SocketAddr) -> Self {
        Self {
            reporter: reporter.clone(),
            pod: pod.clone(),
            direction,
            source,
            destination: None,
            start: Instant::now(),
            opened: None,
            failure: None,
            finished: false,
            tried: None,
            stages: Stages::default(),
            is_plaintext: false,
            trace: None,
            recorded: None,
        }
    }

    /// The connection continues the trace that its peer's `traceparent` header names.
    pub fn traced(&mut self, traceparent: Option<&str>) {
        self.trace = self.reporter.outbox.as_ref().map(|outbox| Box::new(outbox.begin(traceparent)));
        let own = self.trace.as_ref().and_then(|trace| trace.recorded());
        self.recorded = own.or_else(|| traceparent.and_then(TraceId::recorded));
    }

    /// The `traceparent` header for the next leg: of the connection's own span where there are spans, else of a trace
    /// that nothing records.
    pub fn traceparent(&mut self) -> String {
        if self.trace.is_none() {
            self.traced(None);
        }
        self.trace.as_ref().map_or_else(headers::traceparent, |trace| trace.header())
    }

    /// Sets the destination.
    pub fn destination(&mut self, destination: SocketAddr) {
        self.destination = Some(destination);
    }

    /// Sets the route. From now on the connection is counted and in the list of live connections.
    pub fn opened(&mut self, details: Details) -> Arc<Connection> {
        let connection = self.attempted(details);
        self.connected();
        connection
    }

    /// Notes that an endpoint was left, and why.
    pub fn tried(&mut self, endpoint: &str) {
        let before = self.tried.take().map(|before| before + "; ").unwrap_or_default();
        self.tried = Some(before + endpoint);
    }

    /// The far side is open, or its last attempt has failed: the connection is counted for this endpoint.
    pub fn connected(&mut self) {
        if let Some(opened) = self.opened.as_mut().filter(|opened| !opened.is_counted) {
            opened.is_counted = true;
            opened.traffic.opened.inc();
        }
    }

    /// Sets the route of an attempt, in place of that of an earlier one. From now on the connection is in the list of
    /// live connections.
    pub fn attempted(&mut self, details: Details) -> Arc<Connection> {
        if let Some(earlier) = self.opened.take() {
            self.reporter.live.remove(earlier.id);
        }
        let traffic = self.reporter.metrics.traffic.of(&labels(self.direction, &details));
        let (received, sent) = (traffic.received.clone(), traffic.sent.clone());
        // The metric `received` counts from client to server: outbound from the application, inbound towards it.
        let (up_metric, down_metric) = match self.direction {
            Direction::Outbound => (received, sent),
            Direction::Inbound => (sent, received),
        };
        let connection = Arc::new(Connection {
            pod: self.pod.clone(),
            direction: self.direction,
            protocol: if details.authority.is_some() { "HBONE" } else { "TCP" },
            source: self.source,
            destination: self.destination.unwrap_or(details.actual),
            actual: details.actual,
            authority: details.authority.clone(),
            service: details.service.as_ref().map(|service| service.key.hostname.clone()),
            source_identity: details.source_identity.clone(),
            destination_identity: details.destination_identity.clone().map(OnceLock::from).unwrap_or_default(),
            gateway: details.gateway.clone(),
            gateway_identity: OnceLock::new(),
            tls: OnceLock::new(),
            rule: details.rule.clone(),
            leg_port: AtomicU16::new(0),
            since: self.start,
            bytes: ByteCounts { begun: Some(self.start), up_metric, down_metric, ..ByteCounts::default() },
        });
        let id = self.reporter.live.add(&connection);
        self.opened = Some(OpenRecord { id, is_counted: false, traffic, details, connection: connection.clone() });
        if let Some(opened) = &self.opened {
            let (source, destination) = (self.source, self.destination);
            access_log::opened(self.direction, source, destination, &opened.details);
        }
        connection
    }

    /// Sets the identity that the destination has proven, and that of the gateway on the way.
    pub fn proven(&mut self, destination: &SpiffeName, gateway: Option<&SpiffeName>) {
        if let Some(opened) = &mut self.opened {
            opened.details.destination_identity = Some(destination.clone());
            opened.details.gateway_identity = gateway.cloned();
            // Fails if it was set before; a connection has one destination.
            let _ = opened.connection.destination_identity.set(destination.clone());
            if let Some(gateway) = gateway {
                let _ = opened.connection.gateway_identity.set(gateway.clone());
            }
        }
    }

    /// Sets how the connection ended, and writes the record.
    pub fn finish(mut self, result: Result<(), Failure>) {
        self.failure = result.err();
        self.finished = true;
    }
}

impl Record {
    /// Whether the connection is open, and not in a tunnel.
    fn is_carried_in_plaintext(&self) -> bool {
        let is_plain = |opened: &OpenRecord| opened.details.authority.is_none();
        self.stages.is_open() && self.opened.as_ref().is_some_and(is_plain)
    }

    /// The far end, by the best name that is known.
    fn peer(&self) -> Peer {
        let details = self.opened.as_ref().map(|opened| &opened.details);
        let (workload, service, address) = match self.direction {
            Direction::Inbound => (details.and_then(|d| d.source_workload.as_ref()), None, self.source),
            Direction::Outbound => {
                let actual = details.map_or(self.destination.unwrap_or(self.source), |d| d.actual);
                (
                    details.and_then(|d| d.destination_workload.as_ref()),
                    details.and_then(|d| d.service.as_ref()),
                    actual,
                )
            }
        };
        match (workload, service) {
            (Some(workload), _) => Peer::Workload(workload.namespace.clone(), workload.shown_name().clone()),
            (None, Some(service)) => Peer::Service(service.key.hostname.clone()),
            (None, None) => Peer::Address(address.ip()),
        }
    }

    /// Counts the end of a plaintext connection. Towards the pod, plaintext has arrived whatever stood against it;
    /// outbound none was sent if it was refused.
    fn end_plaintext(&self) {
        let Some(failure) = &self.failure.as_ref().filter(|_| !self.stages.is_open()) else {
            if self.is_carried_in_plaintext() {
                self.reporter.pods.plaintext_ends(&self.pod, self.direction, &self.peer());
            }
            return;
        };
        let is_direct = self.opened.as_ref().is_some_and(|opened| opened.details.authority.is_none());
        if self.is_plaintext || (self.direction == Direction::Outbound && is_direct && failure.is_refusal()) {
            self.reporter.pods.plaintext(&self.pod, |ledger| ledger.refuse(self.direction, &self.peer()));
        }
    }

    /// The stage that failed, if one did, and the first byte.
    fn end_stages(&mut self) {
        if !self.stages.is_open() {
            if let Some(stage) = self.failure.as_ref().and_then(Failure::stage) {
                self.lap(stage);
            }
        } else if let Some(opened) = &self.opened
            && let Some(took) = opened.connection.bytes.first_byte(self.direction, self.stages.until())
        {
            self.stages.add(Stage::FirstByte, took);
        }
    }

    /// Moves what the record knows into the history, and hands it on. A connection that ended well before its route was
    /// known was none: a tunnel, whose streams have their own records, or a capture check.
    fn keep(&mut self, opened: Option<OpenRecord>) {
        let (history, outbox) = (&self.reporter.history, self.reporter.outbox.as_ref());
        let duration = self.start.elapsed();
        if (!history.is_on() && outbox.is_none()) || (opened.is_none() && self.failure.is_none()) {
            return;
        }
        let bytes = opened.as_ref().map_or((0, 0), |opened| {
            let bytes = &opened.connection.bytes;
            (bytes.up.load(Ordering::Relaxed), bytes.down.load(Ordering::Relaxed))
        });
        let (details, tls) = opened.map(|opened| (opened.details, opened.connection.tls.get().copied())).unzip();
        let export = outbox.map(|_| details.as_ref().map(Shared::of).unwrap_or_default());
        let ended = Arc::new(Ended {
            at: SystemTime::now(),
            pod: self.pod.clone(),
            direction: self.direction,
            source: self.source,
            destination: self.destination,
            ends: details.map(Into::into),
            failure: self.failure.take(),
            tried: self.tried.take(),
            bytes,
            duration,
            stages: self.stages,
        });
        if let (Some(outbox), Some(Shared { source, destination, service, authority })) = (outbox, export) {
            let trace = self.trace.take().map_or_else(|| outbox.begin(None), |trace| *trace);
            let (ended, tls) = (ended.clone(), tls.flatten());
            outbox.push(Export { ended, source, destination, service, authority, tls, trace });
        }
        history.push(ended);
    }
}

/// What the history does not keep of a connection's details.
#[derive(Default)]
struct Shared {
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    authority: Option<String>,
}

impl Shared {
    fn of(details: &Details) -> Self {
        Self {
            source: details.source_workload.clone(),
            destination: details.destination_workload.clone(),
            service: details.service.clone(),
            authority: details.authority.clone(),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.failure = Some(Failure::Abandoned);
        }
        self.connected();
        self.end_stages();
        self.end_plaintext();
        // A failure is counted with its trace as the example.
        if self.failure.is_some() && self.trace.is_none() && self.reporter.outbox.is_some() {
            self.traced(None);
        }
        let metrics = &self.reporter.metrics;
        metrics.stages.count(self.direction, &self.stages);
        if let Some(failure) = &self.failure {
            let (direction, reason, fault) = (self.direction.word(), failure.word(), failure.fault().word());
            metrics.failures.get_or_create(&FailureLabels { direction, reason, fault }).inc(self.recorded);
            self.reporter.recent.count(self.direction, failure.reason());
            if failure.is_revocation() {
                metrics.revoked.get_or_create(&ReporterLabel { reporter: self.direction.reporter() }).inc();
            }
        }
        let Some(opened) = self.opened.take() else {
            // One that ended well is not kept, and does not use up the limit.
            let Some(failure) = &self.failure else { return };
            let Some(suppressed) = self.reporter.early_failures.allow() else {
                if let Some(outbox) = &self.reporter.outbox {
                    outbox.limited(self.trace.as_deref());
                }
                return;
            };
            access_log::failed_early(self.direction, self.source, self.destination, failure, suppressed);
            return self.keep(None);
        };
        self.reporter.live.remove(opened.id);
        let response_flags = self.failure.as_ref().map_or("-", Failure::flag);
        if response_flags == "-" {
            opened.traffic.closed.inc();
        } else {
            let failed = metrics.traffic.of(&TrafficLabels { response_flags, ..opened.traffic.labels().clone() });
            failed.closed.inc();
            failed.failed.inc();
        }
        let summary = access_log::Summary {
            direction: self.direction,
            source: self.source,
            destination: self.destination,
            bytes: &opened.connection.bytes,
            duration: self.start.elapsed(),
            failure: self.failure.as_ref(),
            tried: self.tried.as_deref(),
            stages: self.reporter.logs_stages.then_some(&self.stages),
        };
        access_log::complete(&summary, &opened.details);
        self.keep(Some(opened));
    }
}

/// Counts an accepted socket until it is dropped.
#[derive(Debug)]
pub struct SocketCount {
    reporter: Arc<Reporter>,
    label: ReporterLabel,
}

impl SocketCount {
    /// Counts one socket.
    pub fn new(reporter: &Arc<Reporter>, direction: Direction) -> Self {
        let label = ReporterLabel { reporter: direction.reporter() };
        reporter.metrics.sockets.get_or_create(&label).inc();
        Self { reporter: reporter.clone(), label }
    }
}

impl Drop for SocketCount {
    fn drop(&mut self) {
        self.reporter.metrics.sockets.get_or_create(&self.label).dec();
    }
}

/// The labels of a connection's traffic.
fn labels(direction: Direction, details: &Details) -> TrafficLabels {
    let known = |text: Option<&str>| match text {
        Some(text) if !text.is_empty() => text.to_owned(),
        _ => UNKNOWN.to_owned(),
    };
    let (source, destination) = (details.source_workload.as_deref(), details.destination_workload.as_deref());
    let service = details.service.as_deref();
    let tls = details.source_identity.is_some();
    let principal = |identity: Option<&SpiffeName>| known(identity.map(ToString::to_string).as_deref());
    // Behind a gateway, the workload may stand for many, of which each has its own identity.
    let destination_identity =
        destination.filter(|_| details.gateway.is_none()).and_then(|workload| workload.identity().ok());
    TrafficLabels {
        reporter: direction.reporter(),
        source_workload: known(source.map(|w| &*w.workload_name)),
        source_canonical_service: known(source.map(|w| &*w.canonical_name)),
        source_canonical_revision: known(source.map(|w| &*w.canonical_revision)),
        source_workload_namespace: known(source.map(|w| &*w.namespace)),
        source_principal: principal(details.source_identity.as_ref()),
        source_app: known(source.map(|w| &*w.canonical_name)),
        source_version: known(source.map(|w| &*w.canonical_revision)),
        source_cluster: known(source.map(|w| &*w.cluster_id)),
        destination_service: known(service.map(|s| &*s.key.hostname)),
        destination_service_namespace: known(service.map(|s| &*s.key.namespace)),
        destination_service_name: known(service.map(|s| &*s.name)),
        destination_workload: known(destination.map(|w| &*w.workload_name)),
        destination_canonical_service: known(destination.map(|w| &*w.canonical_name)),
        destination_canonical_revision: known(destination.map(|w| &*w.canonical_revision)),
        destination_workload_namespace: known(destination.map(|w| &*w.namespace)),
        destination_principal: principal(destination_identity.as_ref()),
        destination_app: known(destination.map(|w| &*w.canonical_name)),
        destination_version: known(destination.map(|w| &*w.canonical_revision)),
        destination_cluster: known(destination.map(|w| &*w.cluster_id)),
        request_protocol: "tcp",
        response_flags: "-",
        connection_security_policy: if tls { "mutual_tls" } else { "unknown" },
        source_region: known(source.map(|w| &*w.locality.region)),
        source_zone: known(source.map(|w| &*w.locality.zone)),
        destination_region: known(destination.map(|w| &*w.locality.region)),
        destination_zone: known(destination.map(|w| &*w.locality.zone)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::accept::AcceptError;
    use crate::connection::report::export;
    use crate::telemetry::queue::Limits;
    use crate::telemetry::ring::Bounds;
    use opentelemetry_sdk::trace::Sampler;
    use prometheus_client::registry::Registry;

    #[test]
    fn early_failures_beyond_the_limit_are_only_counted() {
        let limits = Limits { entries: 1_000, batch: 1_000, delay: Duration::from_secs(1) };
        let (metrics, mut registry) = (Arc::<export::Metrics>::default(), Registry::default());
        metrics.register(&mut registry);
        let outbox = Arc::new(Outbox::new(Sampler::AlwaysOn, Some(limits), Some(limits), metrics));
        let history = History::new(Bounds { entries: 1_000, bytes: 1 << 20 });
        let reporter = Arc::new(Reporter { history, outbox: Some(outbox.clone()), ..Reporter::default() });
        for _ in 0..500 {
            let source = SocketAddr::from(([10, 0, 0, 1], 1));
            Record::begin(&reporter, &"uid".into(), Direction::Inbound, source).finish(Err(AcceptError::Silent.into()));
        }
        let [_, (_, failed)] = reporter.history.rings();
        let kept = failed.newest(usize::MAX, |_| true).len();
        assert!((20..500).contains(&kept), "{kept}");
        let queues = [&outbox.spans, &outbox.logs].map(|queue| queue.as_ref().map_or(0, |queue| queue.len()));
        assert_eq!(queues, [kept, kept]);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for signal in ["traces", "logs"] {
            let counted =
                format!("culvert_otlp_dropped_total{{signal=\"{signal}\",reason=\"limited\"}} {}\n", 500 - kept);
            assert!(text.contains(&counted), "{counted}{text}");
        }
        assert_eq!(reporter.recent.list().iter().map(|failures| failures.count).sum::<u64>(), 500);
    }
}
