//! Metrics of the connection to the control plane.

use crate::telemetry::changes::Changes;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Metrics of the client.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) terminations: Family<ReasonLabel, Counter>,
    pub(super) messages: Family<UrlLabel, Counter>,
    pub(super) bytes: Family<UrlLabel, Counter>,
    pub(super) refused: Family<UrlLabel, Counter>,
    pub(super) resources: Family<UrlLabel, Gauge>,
    pub(super) saved: Counter,
    pub(super) save_failures: Counter,
    /// Where changes are noted.
    pub(super) noted: Arc<Changes>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct UrlLabel {
    pub(super) url: &'static str,
}

impl Metrics {
    /// Metrics at zero, with a place where changes are noted.
    pub fn noting(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.terminations.get_or_create(&ReasonLabel { reason: "" }));
        for family in [&self.messages, &self.bytes, &self.refused] {
            drop(family.get_or_create(&UrlLabel { url: "" }));
        }
        drop(self.resources.get_or_create(&UrlLabel { url: "" }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Streams to the control plane that ended, by reason (unstable)";
        registry.register("istio_xds_connection_terminations", help, self.terminations.clone());
        let help = "Responses of the control plane, by resource type (unstable)";
        registry.register("istio_xds_message", help, self.messages.clone());
        let help = "Bytes of resources that the control plane sent, by resource type (unstable)";
        registry.register("istio_xds_message_bytes", help, self.bytes.clone());
        let help = "Resources of the control plane that were refused, or understood only in part. The log names them";
        registry.register("culvert_xds_resources_refused", help, self.refused.clone());
        // They appear from the start, so that alerts see the first one as a rise.
        for url in super::delta::TYPES {
            drop(self.refused.get_or_create(&UrlLabel { url }));
        }
        registry.register(
            "culvert_mesh_objects",
            "Workloads, services and policies that are known",
            self.resources.clone(),
        );
        registry.register("culvert_state_file_written", "Times that the state file was written", self.saved.clone());
        let help = "Times that the state file could not be written";
        registry.register("culvert_state_file_failures", help, self.save_failures.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_resources_are_counted_from_zero() {
        let (mut registry, mut text) = (Registry::default(), String::new());
        Metrics::default().register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let zero = |line: &&str| line.starts_with("culvert_xds_resources_refused_total{") && line.ends_with("} 0");
        assert_eq!(text.lines().filter(zero).count(), 2, "{text}");
    }
}
