//! How long the stages of connections took, as a histogram for each stage and direction. Its series are few and known, so
//! counting needs neither a lock nor a search.

use super::direction::Direction;
use super::stages::{Stage, Stages};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the buckets, in microseconds; one more has none.
const BOUNDS: [u64; 11] = [100, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000];

/// Times of one stage in one direction.
#[derive(Debug, Default)]
struct Times {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_micros: AtomicU64,
}

/// Times of all stages, by direction.
#[derive(Clone, Debug, Default)]
pub struct StageTimes(Arc<[[Times; Stage::ALL.len()]; 2]>);

const DIRECTIONS: [Direction; 2] = [Direction::Outbound, Direction::Inbound];

impl StageTimes {
    /// Counts the stages of a connection.
    pub fn count(&self, direction: Direction, stages: &Stages) {
        let Some(of) = self.0.get(direction as usize) else { return };
        for (stage, took) in stages.all() {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            let bucket = BOUNDS.iter().take_while(|bound| micros > **bound).count();
            if let Some(times) = of.get(stage as usize) {
                times.sum_micros.fetch_add(micros, Ordering::Relaxed);
                if let Some(bucket) = times.buckets.get(bucket) {
                    bucket.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Collector for StageTimes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = |times: &Times| times.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        if self.0.iter().flatten().all(|times| counts(times).iter().all(|count| *count == 0)) {
            return Ok(());
        }
        let name = "culvert_connection_stage_seconds";
        let help = "Time that connections spent in each stage: queue, facts, certificate, policy, dial, tls, connect, first_byte";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (direction, stages) in DIRECTIONS.into_iter().zip(self.0.iter()) {
            for (stage, times) in Stage::ALL.into_iter().zip(stages) {
                let counts = counts(times);
                let count = counts.iter().sum();
                if count == 0 {
                    continue;
                }
                let bounds = BOUNDS.map(seconds).into_iter().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
                let labels = [("stage", stage.word()), ("direction", direction.word())];
                let mut encoder = family.encode_family(&labels)?;
                let sum = seconds(times.sum_micros.load(Ordering::Relaxed));
                encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

/// Microseconds as seconds. Precise up to 285 years.
#[allow(clippy::cast_precision_loss, reason = "a sum of that size is not exact to the microsecond, and need not be")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::registry::Registry;
    use std::time::Duration;

    #[test]
    fn times_are_counted_up_to_each_bound() {
        let (times, mut registry) = (StageTimes::default(), Registry::default());
        registry.register_collector(Box::new(times.clone()));
        for micros in [0, 100, 101, 10_000_000] {
            let mut stages = Stages::default();
            stages.add(Stage::Dial, Duration::from_micros(micros));
            times.count(Direction::Inbound, &stages);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for (le, count) in [("0.0001", 2), ("0.0005", 3), ("5.0", 3), ("+Inf", 4)] {
            let line = format!(
                "culvert_connection_stage_seconds_bucket{{le=\"{le}\",stage=\"dial\",direction=\"inbound\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert!(text.contains("_sum{stage=\"dial\",direction=\"inbound\"} 10.000201\n"), "{text}");
        assert!(!text.contains("queue") || !text.contains("stage=\"queue\""), "{text}");
    }
}
