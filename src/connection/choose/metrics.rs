//! Metrics of endpoints that failed.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Label of an endpoint that failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EvidenceLabel {
    /// A word of [`super::Evidence::word`].
    pub reason: &'static str,
}

/// Metrics of endpoints that failed. Clones share the counters.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Endpoints that were set aside.
    pub set_aside: Family<EvidenceLabel, Counter>,
    /// Connections that were tried on another endpoint.
    pub retries: Family<EvidenceLabel, Counter>,
    /// Connections that were not, because there were too many.
    pub over_budget: Counter,
}

impl Metrics {
    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        for family in [&self.set_aside, &self.retries] {
            drop(family.get_or_create(&EvidenceLabel { reason: "" }));
        }
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Times that an endpoint was set aside because a connection to it failed. The reasons are refused, reset, \
                    timed_out, unreachable, handshake and going_away";
        registry.register("culvert_endpoint_set_asides", help, self.set_aside.clone());
        let help = "Connections that were tried on another endpoint because one failed before any byte was carried, by the \
                    same reasons";
        registry.register("culvert_connection_retries", help, self.retries.clone());
        let help = "Connections that were not tried on another endpoint because the budget of retries to the service was used up. \
                    Alert on a rate: most endpoints of a service fail";
        registry.register("culvert_connection_retries_over_budget", help, self.over_budget.clone());
    }
}
