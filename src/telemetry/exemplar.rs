//! Counters with an example: the trace of the last event that somebody records. Scrapers that ask for OpenMetrics get it
//! as an exemplar, and lead from a number to one case of it.

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::CounterWithExemplar;
use prometheus_client::metrics::{MetricType, TypedMetric};
use std::fmt;
use std::time::SystemTime;

/// The id of a trace that is recorded somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl TraceId {
    /// The trace with this id. The caller knows that it is recorded.
    pub fn new(id: u128) -> Self {
        Self(id)
    }

    /// The trace of a `traceparent` header (W3C Trace Context), if its sender records it: its sampled flag is set. Of
    /// other traces nobody could find anything.
    pub fn recorded(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hexadecimal = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_valid = hexadecimal(version, 2) && hexadecimal(span, 16) && hexadecimal(flags, 2);
        // Only later versions may have more parts, and ff is none.
        if !is_valid || version == "ff" || version == "00" && parts.next().is_some() {
            return None;
        }
        let id = u128::from_str_radix(trace, 16).ok().filter(|id| hexadecimal(trace, 32) && *id != 0)?;
        let is_sampled = u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1);
        is_sampled.then_some(Self(id))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TraceLabel {
    trace_id: String,
}

/// A counter with the last recorded trace as an example.
#[derive(Debug, Default)]
pub struct TracedCounter {
    count: Counter,
    /// The count of it is not used.
    example: CounterWithExemplar<TraceLabel>,
}

impl TracedCounter {
    /// Counts an event of a trace, if it is part of one that is recorded.
    pub fn inc(&self, trace: Option<TraceId>) {
        self.count.inc();
        if let Some(trace) = trace {
            self.example.inc_by(1, Some(TraceLabel { trace_id: trace.to_string() }), Some(SystemTime::now()));
        }
    }
}

impl TypedMetric for TracedCounter {
    const TYPE: MetricType = MetricType::Counter;
}

impl EncodeMetric for TracedCounter {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let (_, example) = self.example.get();
        encoder.encode_counter(&self.count.get(), example.as_ref())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::exposition::Format;
    use prometheus_client::metrics::family::Family;
    use prometheus_client::registry::Registry;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn only_a_trace_that_is_recorded_is_an_example() {
        let found = |text: &str| TraceId::recorded(text).map(|id| id.to_string());
        let expected = Some(TRACE.to_owned());
        assert_eq!(found(&format!("00-{TRACE}-00f067aa0ba902b7-01")), expected);
        assert_eq!(found(&format!("00-{TRACE}-00f067aa0ba902b7-03")), expected);
        assert_eq!(found(&format!("cc-{TRACE}-00f067aa0ba902b7-01-what-comes")), expected, "a later version");
        let zeros = "0".repeat(32);
        for bad in [
            "",
            "00",
            &format!("00-{TRACE}-00f067aa0ba902b7-00"),
            &format!("00-{TRACE}-00f067aa0ba902b7"),
            &format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            &format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            &format!("00-{zeros}-00f067aa0ba902b7-01"),
            &format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase()),
            &format!("00-+{}-00f067aa0ba902b7-01", &TRACE[1..]),
            &format!("00-{TRACE}-\"\n# x-01"),
        ] {
            assert_eq!(found(bad), None, "{bad}");
        }
    }

    #[test]
    fn scrapers_that_ask_for_openmetrics_get_the_last_trace() {
        let (mut registry, family) = (Registry::default(), Family::<Vec<(&str, &str)>, TracedCounter>::default());
        registry.register("failures", "Failures", family.clone());
        // A value that looks like an exemplar.
        let labels = vec![("reason", "a # {b=\"c\"} 1")];
        family.get_or_create(&labels).inc(TraceId::recorded(&format!("00-{TRACE}-00f067aa0ba902b7-01")));
        family.get_or_create(&labels).inc(None);
        let sample = "failures_total{reason=\"a # {b=\\\"c\\\"} 1\"} 2";
        let open_metrics = Format::OpenMetrics.render(&registry).unwrap();
        assert!(open_metrics.contains(&format!("{sample} # {{trace_id=\"{TRACE}\"}} 1.0 1")), "{open_metrics}");
        let text = Format::Text.render(&registry).unwrap();
        assert!(text.ends_with(&format!("{sample}\n")), "the Prometheus format has no exemplars: {text}");
    }
}
