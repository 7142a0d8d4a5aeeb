//! The record of one connection. It begins when the socket is accepted and is written exactly once, whatever happens:
//! by [`Record::finish`], or when it is dropped.

use super::access_log;
use super::details::Details;
use super::direction::Direction;
use super::export::{Export, Outbox, Trace};
use super::failure::Failure;
use super::history::{Ended, Ends, History};
use super::known::{Begun, Known};
use super::labels::KnownLabels;
use super::live::{ByteCounts, Connection, LiveConnections};
use super::metrics::{CutLabels, FailureLabels, Metrics, ReporterLabel, TrafficLabels};
use super::plaintext::Peer;
use super::pods::KnownPods;
use super::recent::RecentFailures;
use super::stages::{Stage, Stages};
use crate::connection::headers;
use crate::hbone::{Meter, TunnelError};
use crate::identity::Proven;
use crate::mesh::{SpiffeName, Text};
use crate::telemetry::exemplar::TraceId;
use crate::telemetry::limit::LogLimit;
use prometheus_client::metrics::gauge::Gauge;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// What all records of the process share.
#[derive(Debug, Default)]
pub struct Reporter {
    /// Metrics of connections.
    pub metrics: Metrics,
    /// The traffic metrics that connections have used, by their facts.
    pub labels: KnownLabels,
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

/// The record of one connection or stream. What it knows of an open connection is in a [`Connection`], which it shares with
/// the list of live ones.
#[derive(Debug)]
pub struct Record {
    reporter: Arc<Reporter>,
    known: Known,
    stages: Stages,
    /// What few connections have.
    rare: Option<Box<Rare>>,
    finished: bool,
    /// Whether the traffic metrics have counted it as opened.
    is_counted: bool,
    /// Whether the client has sent plaintext to the pod.
    is_plaintext: bool,
}

/// What few open connections have.
#[derive(Debug, Default)]
struct Rare {
    failure: Option<Failure>,
    /// The endpoints that were tried before, and why each was left.
    tried: Option<Box<str>>,
    /// Its place in a trace, once something asks for it.
    trace: Option<Trace>,
    /// Its trace, if that is recorded, here or by its peer.
    recorded: Option<TraceId>,
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
        let mut record = Self::new(reporter, Begun { pod: pod.clone(), direction, source, destination: None, start });
        record.lap(Stage::Queue);
        record
    }

    /// A stage has ended.
    pub fn lap(&mut self, stage: Stage) {
        self.stages.lap(stage, self.known.elapsed());
    }

    /// Several stages have ended, and took these times.
    pub fn laps(&mut self, stages: impl IntoIterator<Item = (Stage, Option<Duration>)>) {
        self.stages.laps(stages, self.known.elapsed());
    }

    /// The last stage before the connection is open has ended.
    pub fn open(&mut self) {
        self.stages.open();
        if self.is_carried_in_plaintext() {
            let (pod, direction) = (self.known.pod(), self.known.direction());
            self.reporter.pods.plaintext_begins(pod, direction, &self.peer());
        }
    }

    /// The client has sent plaintext to the pod.
    pub fn arrived_in_plaintext(&mut self) {
        self.is_plaintext = true;
    }

    /// Begins a record.
    pub fn begin(reporter: &Arc<Reporter>, pod: &Text, direction: Direction, source: SocketAddr) -> Self {
        let start = Instant::now();
        Self::new(reporter, Begun { pod: pod.clone(), direction, source, destination: None, start })
    }

    fn new(reporter: &Arc<Reporter>, begun: Begun) -> Self {
        Self {
            reporter: reporter.clone(),
            known: Known::Begun(Box::new(begun)),
            stages: Stages::default(),
            rare: None,
            finished: false,
            is_counted: false,
            is_plaintext: false,
        }
    }

    /// The connection continues the trace that its peer's `traceparent` header names.
    pub fn traced(&mut self, traceparent: Option<&str>) {
        let trace = self.reporter.outbox.as_ref().map(|outbox| outbox.begin(traceparent));
        let own = trace.as_ref().and_then(Trace::recorded);
        let recorded = own.or_else(|| traceparent.and_then(TraceId::recorded));
        if trace.is_some() || recorded.is_some() || self.rare.is_some() {
            let rare = self.rare.get_or_insert_default();
            (rare.trace, rare.recorded) = (trace, recorded);
        }
    }

    /// The `traceparent` header for the next leg: of the connection's own span where there are spans, else of a trace
    /// that nothing records.
    pub fn traceparent(&mut self) -> String {
        if self.trace().is_none() {
            self.traced(None);
        }
        self.trace().map_or_else(headers::traceparent, Trace::header)
    }

    /// Sets the destination.
    pub fn destination(&mut self, destination: SocketAddr) {
        // Not called once the route is known, which leads there.
        if let Known::Begun(begun) = &mut self.known {
            begun.destination = Some(destination);
        }
    }

    /// Sets the route. From now on the connection is counted and in the list of live connections.
    pub fn opened(&mut self, details: Details) -> Arc<Connection> {
        let connection = self.attempted(details);
        self.connected();
        connection
    }

    /// Notes that an endpoint was left, and why.
    pub fn tried(&mut self, endpoint: &str) {
        let tried = &mut self.rare.get_or_insert_default().tried;
        let before = tried.take().map(|before| before.into_string() + "; ").unwrap_or_default();
        *tried = Some((before + endpoint).into());
    }

    /// The far side is open, or its last attempt has failed: the connection is counted for this endpoint.
    pub fn connected(&mut self) {
        if let Known::Routed(connection) = &self.known
            && !std::mem::replace(&mut self.is_counted, true)
        {
            connection.traffic.opened.inc();
        }
    }

    /// Sets the route of an attempt, in place of that of an earlier one. From now on the connection is in the list of
    /// live connections.
    pub fn attempted(&mut self, details: Details) -> Arc<Connection> {
        let since = match &self.known {
            Known::Begun(begun) => begun.start,
            Known::Routed(earlier) => {
                self.reporter.live.remove(earlier.id);
                earlier.since
            }
        };
        let Reporter { live, metrics, labels, .. } = &*self.reporter;
        let traffic = labels.traffic(&metrics.traffic, self.known.direction(), &details);
        let connection = Arc::new(Connection {
            id: live.number(),
            pod: self.known.pod().clone(),
            direction: self.known.direction(),
            source: self.known.source(),
            destination: self.known.destination().unwrap_or(details.actual),
            traffic,
            details,
            proven: OnceLock::new(),
            leg_port: AtomicU16::new(0),
            since,
            bytes: ByteCounts::default(),
        });
        live.add(&connection);
        access_log::opened(&connection);
        self.is_counted = false;
        self.known = Known::Routed(connection.clone());
        connection
    }

    /// Sets what the far end of the connection's tunnel has proven.
    pub fn proven(&mut self, proven: &Arc<Proven>) {
        if let Known::Routed(connection) = &self.known {
            // Fails if it was set before; a connection has one tunnel.
            let _ = connection.proven.set(proven.clone());
        }
    }

    /// Sets how the connection ended, and writes the record.
    pub fn finish(mut self, result: Result<(), Failure>) {
        self.finished = true;
        if let Err(failure) = result {
            self.fail(failure);
        }
    }
}

impl Record {
    fn fail(&mut self, failure: Failure) {
        self.rare.get_or_insert_default().failure = Some(failure);
    }

    fn failure(&self) -> Option<&Failure> {
        self.rare.as_ref()?.failure.as_ref()
    }

    fn trace(&self) -> Option<&Trace> {
        self.rare.as_ref()?.trace.as_ref()
    }

    /// Whether the connection is open, and not in a tunnel.
    fn is_carried_in_plaintext(&self) -> bool {
        self.stages.is_open() && self.known.connection().is_some_and(|connection| !connection.is_encrypted())
    }

    /// The far end, by the best name that is known.
    fn peer(&self) -> Peer {
        let details = self.known.connection().map(|connection| &connection.details);
        let (workload, service, address) = match self.known.direction() {
            Direction::Inbound => (details.and_then(|d| d.source_workload.as_ref()), None, self.known.source()),
            Direction::Outbound => {
                let actual = details.map_or(self.known.destination().unwrap_or(self.known.source()), |d| d.actual);
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
        let (pod, direction) = (self.known.pod(), self.known.direction());
        let Some(failure) = self.failure().filter(|_| !self.stages.is_open()) else {
            if self.is_carried_in_plaintext() {
                self.reporter.pods.plaintext_ends(pod, direction, &self.peer());
            }
            return;
        };
        let is_direct = self.known.connection().is_some_and(|connection| !connection.is_encrypted());
        if self.is_plaintext || (direction == Direction::Outbound && is_direct && failure.is_refusal()) {
            self.reporter.pods.plaintext(pod, |ledger| ledger.refuse(direction, &self.peer()));
        }
    }

    /// The stage that failed, if one did, and the first byte.
    fn end_stages(&mut self) {
        if !self.stages.is_open() {
            if let Some(stage) = self.failure().and_then(Failure::stage) {
                self.lap(stage);
            }
        } else if let Some(connection) = self.known.connection()
            && let Some(took) = connection.first_byte(self.stages.until())
        {
            self.stages.add(Stage::FirstByte, took);
        }
    }

    /// Moves what the record knows into the history, and hands it on. A connection that ended well before its route was
    /// known was none: a tunnel, whose streams have their own records, or a capture check.
    fn keep(&mut self) {
        let (history, outbox) = (&self.reporter.history, self.reporter.outbox.as_ref());
        let connection = self.known.connection();
        if (!history.is_on() && outbox.is_none()) || (connection.is_none() && self.failure().is_none()) {
            return;
        }
        let bytes = connection.map_or((0, 0), |connection| {
            let bytes = &connection.bytes;
            (bytes.up.load(Ordering::Relaxed), bytes.down.load(Ordering::Relaxed))
        });
        let rare = self.rare.take().map(|rare| *rare).unwrap_or_default();
        let ended = Arc::new(Ended {
            at: SystemTime::now(),
            pod: self.known.pod().clone(),
            direction: self.known.direction(),
            source: self.known.source(),
            destination: self.known.destination(),
            ends: connection.map(|connection| Ends::of(&connection.details, connection.destination_identity())),
            failure: rare.failure,
            tried: rare.tried,
            bytes,
            duration: self.known.elapsed(),
            stages: self.stages,
        });
        if let Some(outbox) = outbox {
            let trace = rare.trace.unwrap_or_else(|| outbox.begin(None));
            let details = connection.map(|connection| &connection.details);
            outbox.push(Export {
                ended: ended.clone(),
                source: details.and_then(|details| details.source_workload.clone()),
                destination: details.and_then(|details| details.destination_workload.clone()),
                service: details.and_then(|details| details.service.clone()),
                authority: details.and_then(|details| details.authority.clone()),
                tls: connection.and_then(|connection| connection.tls().copied()),
                trace,
            });
        }
        history.push(ended);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.fail(Failure::Abandoned);
        }
        self.connected();
        self.end_stages();
        self.end_plaintext();
        // A failure is counted with its trace as the example.
        if self.failure().is_some() && self.trace().is_none() && self.reporter.outbox.is_some() {
            self.traced(None);
        }
        let (metrics, direction) = (&self.reporter.metrics, self.known.direction());
        metrics.stages.count(direction, &self.stages);
        if let Some(failure) = self.failure() {
            let labels =
                FailureLabels { direction: direction.word(), reason: failure.word(), fault: failure.fault().word() };
            metrics.failures.get_or_create(&labels).inc(self.rare.as_ref().and_then(|rare| rare.recorded));
            self.reporter.recent.count(direction, failure.reason());
            if failure.is_revocation() {
                metrics.revoked.get_or_create(&ReporterLabel { reporter: direction.reporter() }).inc();
            }
        }
        let Some(connection) = self.known.connection() else {
            // One that ended well is not kept, and does not use up the limit.
            let Some(failure) = self.failure() else { return };
            let Some(suppressed) = self.reporter.early_failures.allow() else {
                if let Some(outbox) = &self.reporter.outbox {
                    outbox.limited(self.trace());
                }
                return;
            };
            let (source, destination) = (self.known.source(), self.known.destination());
            access_log::failed_early(direction, source, destination, failure, suppressed);
            return self.keep();
        };
        self.reporter.live.remove(connection.id);
        let (traffic, response_flags) = (&connection.traffic, self.failure().map_or("-", Failure::flag));
        if response_flags == "-" {
            traffic.closed.inc();
        } else {
            let failed = metrics.traffic.of(&TrafficLabels { response_flags, ..traffic.labels().clone() });
            failed.closed.inc();
            failed.failed.inc();
        }
        let summary = access_log::Summary {
            duration: self.known.elapsed(),
            failure: self.failure(),
            tried: self.rare.as_ref().and_then(|rare| rare.tried.as_deref()),
            stages: self.reporter.logs_stages.then_some(&self.stages),
        };
        access_log::complete(&summary, connection);
        self.keep();
    }
}

impl Meter for Record {
    fn up(&self, bytes: usize) {
        if let Known::Routed(connection) = &self.known {
            connection.up(bytes);
        }
    }

    fn down(&self, bytes: usize) {
        if let Known::Routed(connection) = &self.known {
            connection.down(bytes);
        }
    }

    fn total(&self) -> u64 {
        self.known.connection().map_or(0, |connection| connection.total())
    }
}

/// Counts an accepted socket until it is dropped.
#[derive(Debug)]
pub struct SocketCount(Gauge);

impl SocketCount {
    /// Counts one socket.
    pub fn new(reporter: &Arc<Reporter>, direction: Direction) -> Self {
        let gauge = reporter.metrics.sockets.get_or_create_owned(&ReporterLabel { reporter: direction.reporter() });
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for SocketCount {
    fn drop(&mut self) {
        self.0.dec();
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
