//! What is handed on about connections that have ended, for traces and logs elsewhere. Here it is only put into a
//! bounded queue, as a few shared pointers; `otlp` takes it out, encodes and sends it on a thread of its own.

use super::history::Ended;
use crate::hbone::Authority;
use crate::identity::TlsFacts;
use crate::mesh::{Service, Workload};
use crate::telemetry::exemplar;
use crate::telemetry::queue::{Limits, Queue};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, ShouldSample};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Length of a `traceparent` header of version 00, and the least of any later one (W3C Trace Context section 3.2).
const TRACEPARENT_BYTES: usize = 55;

/// The place of a connection in a trace.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Its trace, its span, and whether that is sampled.
    pub context: SpanContext,
    /// The span of the connection that caused it; not valid if there is none.
    pub parent: SpanId,
}

impl Trace {
    /// The `traceparent` header for the connection's next leg.
    pub fn header(&self) -> String {
        let context = &self.context;
        let flags = context.trace_flags() & TraceFlags::SAMPLED;
        format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id())
    }

    /// Its trace, if the connection's span is exported.
    pub fn recorded(&self) -> Option<exemplar::TraceId> {
        let id = u128::from_be_bytes(self.context.trace_id().to_bytes());
        self.context.is_sampled().then(|| exemplar::TraceId::new(id))
    }
}

/// A connection that has ended, with what the history does not keep.
#[derive(Debug)]
pub struct Export {
    /// The connection.
    pub ended: Arc<Ended>,
    /// Workload of the source.
    pub source: Option<Arc<Workload>>,
    /// Workload of the destination.
    pub destination: Option<Arc<Workload>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// The CONNECT authority, if it went through a tunnel.
    pub authority: Option<Authority>,
    /// TLS version, key exchange and cipher of the tunnel.
    pub tls: Option<TlsFacts>,
    /// Its place in a trace.
    pub trace: Trace,
}

/// A kind of data that is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// A span for each leg.
    Traces,
    /// A log record for each leg.
    Logs,
}

impl Signal {
    /// The word in metrics and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Logs => "logs",
        }
    }
}

/// Labels of what was sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SignalLabel {
    signal: &'static str,
}

/// Labels of what was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DroppedLabels {
    signal: &'static str,
    reason: &'static str,
}

/// Why something was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// The queue was full.
    QueueFull,
    /// The collector could not be reached, or did not answer, for too long.
    Unsent,
    /// The collector refused it.
    Rejected,
    /// Too many connections failed before their route was known.
    Limited,
}

/// Counters of what is exported.
#[derive(Debug, Default)]
pub struct Metrics {
    sent: Family<SignalLabel, Counter>,
    failed: Family<SignalLabel, Counter>,
    dropped: Family<DroppedLabels, Counter>,
}

impl Metrics {
    /// Counts what the collector has accepted.
    pub fn sent(&self, signal: Signal, count: u64) {
        self.sent.get_or_create(&SignalLabel { signal: signal.word() }).inc_by(count);
    }

    /// Counts a request that failed.
    pub fn failed(&self, signal: Signal) {
        self.failed.get_or_create(&SignalLabel { signal: signal.word() }).inc();
    }

    /// Counts what nobody will get.
    pub fn dropped(&self, signal: Signal, why: Dropped, count: u64) {
        let reason = match why {
            Dropped::QueueFull => "queue_full",
            Dropped::Unsent => "unsent",
            Dropped::Rejected => "rejected",
            Dropped::Limited => "limited",
        };
        self.dropped.get_or_create(&DroppedLabels { signal: signal.word(), reason }).inc_by(count);
    }

    /// Registers all of them.
    pub fn register(&self, registry: &mut Registry) {
        let sent = "Spans and log records that the OpenTelemetry collector has accepted, by signal";
        registry.register("culvert_otlp_sent", sent, self.sent.clone());
        let failed = "Requests to the OpenTelemetry collector that failed, by signal. Most are sent again";
        registry.register("culvert_otlp_failed_requests", failed, self.failed.clone());
        let dropped = "Spans and log records that were dropped, by signal and reason: queue_full, unsent (the collector was away for too \
                       long), rejected (by the collector) or limited (too many connections failed before their route was \
                       known). Alert if this rises for another reason than limited, which any peer can cause";
        registry.register("culvert_otlp_dropped", dropped, self.dropped.clone());
        // They appear from the start, so that alerts see the first one as a rise.
        for signal in [Signal::Traces, Signal::Logs] {
            for why in [Dropped::QueueFull, Dropped::Unsent, Dropped::Rejected, Dropped::Limited] {
                self.dropped(signal, why, 0);
            }
        }
    }

    /// Gives each family a series, for the documents.
    pub fn fill_example(&self) {
        self.sent(Signal::Traces, 0);
        self.failed(Signal::Traces);
        self.dropped(Signal::Traces, Dropped::QueueFull, 0);
    }
}

/// Connections that wait to be sent.
#[derive(Debug)]
pub struct Outbox {
    /// Decides which traces are sampled.
    sampler: Sampler,
    /// Those that become spans; `None` if there are to be none.
    pub spans: Option<Queue<Arc<Export>>>,
    /// Those that become log records.
    pub logs: Option<Queue<Arc<Export>>>,
    /// What became of them.
    pub metrics: Arc<Metrics>,
}

impl Outbox {
    /// An empty outbox. A signal without limits is off.
    pub fn new(sampler: Sampler, spans: Option<Limits>, logs: Option<Limits>, metrics: Arc<Metrics>) -> Self {
        let sampler = if spans.is_some() { sampler } else { Sampler::AlwaysOff };
        Self { sampler, spans: spans.map(Queue::new), logs: logs.map(Queue::new), metrics }
    }

    /// Begins the span of a connection, in the trace that a `traceparent` header names; in a new one if there is none
    /// or it is not valid.
    pub fn begin(&self, traceparent: Option<&str>) -> Trace {
        let parent = TraceContextPropagator::new()
            .extract_with_context(&opentelemetry::Context::new(), &Header(traceparent.filter(|text| is_long(text))));
        let span = parent.span();
        let parent_span = span.span_context();
        let trace_id = Some(parent_span.trace_id()).filter(|_| parent_span.is_valid());
        let trace_id = trace_id.unwrap_or_else(|| TraceId::from(rand::random::<u128>().max(1)));
        let given = Some(&parent).filter(|_| parent_span.is_valid());
        let sampled = self.sampler.should_sample(given, trace_id, "connection", &SpanKind::Internal, &[], &[]);
        let is_sampled = sampled.decision == SamplingDecision::RecordAndSample;
        let span_id = SpanId::from(rand::random::<u64>().max(1));
        let flags = TraceFlags::default().with_sampled(is_sampled);
        let context = SpanContext::new(trace_id, span_id, flags, false, TraceState::default());
        Trace { context, parent: parent_span.span_id() }
    }

    /// The queues that a connection goes to.
    fn queues(&self, is_sampled: bool) -> [(Signal, Option<&Queue<Arc<Export>>>); 2] {
        [(Signal::Traces, self.spans.as_ref().filter(|_| is_sampled)), (Signal::Logs, self.logs.as_ref())]
    }

    /// Counts a connection that is not handed on, because too many like it have failed.
    pub fn limited(&self, trace: Option<&Trace>) {
        for (signal, queue) in self.queues(trace.is_some_and(|trace| trace.context.is_sampled())) {
            if queue.is_some() {
                self.metrics.dropped(signal, Dropped::Limited, 1);
            }
        }
    }

    /// Hands a connection on. This never waits; what does not fit is counted.
    pub fn push(&self, export: Export) {
        let export = Arc::new(export);
        for (signal, queue) in self.queues(export.trace.context.is_sampled()) {
            if queue.is_some_and(|queue| queue.push(export.clone()).is_err()) {
                self.metrics.dropped(signal, Dropped::QueueFull, 1);
            }
        }
    }
}

/// Whether a header is long enough. The library also reads ids that are too short.
fn is_long(traceparent: &str) -> bool {
    traceparent.len() >= TRACEPARENT_BYTES
}

/// A `traceparent` header in the library's eyes.
struct Header<'a>(Option<&'a str>);

impl Extractor for Header<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.filter(|_| key == "traceparent")
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    fn outbox(sampler: Sampler) -> Outbox {
        let limits = Limits { entries: 2, batch: 2, delay: std::time::Duration::from_secs(1) };
        Outbox::new(sampler, Some(limits), Some(limits), Arc::default())
    }

    #[test]
    fn a_leg_continues_the_trace_of_its_peer_or_begins_one() {
        let parent_based = || Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        for (sampler, given, is_sampled) in [
            (parent_based(), Some(SAMPLED), true),
            (parent_based(), Some(UNSAMPLED), false),
            (parent_based(), None, true),
            (Sampler::ParentBased(Box::new(Sampler::AlwaysOff)), None, false),
            (Sampler::AlwaysOn, Some(UNSAMPLED), true),
            (Sampler::AlwaysOff, Some(SAMPLED), false),
            (Sampler::TraceIdRatioBased(1.0), Some(UNSAMPLED), true),
            (Sampler::TraceIdRatioBased(0.0), None, false),
        ] {
            let trace = outbox(sampler.clone()).begin(given);
            assert_eq!(trace.context.is_sampled(), is_sampled, "{sampler:?} {given:?}");
            assert_eq!(trace.header().len(), SAMPLED.len());
            let example = trace.recorded().map(|id| id.to_string());
            assert_eq!(example, is_sampled.then(|| trace.context.trace_id().to_string()));
            let next = outbox(Sampler::AlwaysOn).begin(Some(&trace.header()));
            assert_eq!((next.context.trace_id(), next.parent), (trace.context.trace_id(), trace.context.span_id()));
            if given.is_some() {
                assert_eq!(&trace.header()[..35], &SAMPLED[..35]);
                assert_eq!(trace.parent.to_string(), "00f067aa0ba902b7");
            } else {
                assert_eq!(trace.parent, SpanId::INVALID);
            }
        }
    }

    #[test]
    fn a_header_that_is_not_valid_begins_a_new_trace() {
        for bad in [
            "",
            "00-1-2-01",
            "0000000000000000000000000000000000000000000000000000000",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            let trace = outbox(Sampler::AlwaysOn).begin(Some(bad));
            assert_eq!((trace.parent, trace.context.is_valid()), (SpanId::INVALID, true), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read(header in "\\PC{0,80}", dashes in "[0-9a-f-]{40,70}") {
            for text in [header, dashes] {
                prop_assert!(outbox(Sampler::AlwaysOn).begin(Some(&text)).context.is_valid());
            }
        }
    }
}
