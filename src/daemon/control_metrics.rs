//! The metrics of `culvert control`, in groups.

use super::metrics::register_any_process;
use crate::control_plane::{ca, serve, watch};
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Metrics of all parts.
#[derive(Default)]
pub(super) struct ControlMetrics {
    pub(super) serve: Arc<serve::Metrics>,
    pub(super) watch: Arc<watch::Metrics>,
    pub(super) ca: Arc<ca::Metrics>,
}

/// Registers a group.
type Register = fn(&ControlMetrics, &mut Registry);

/// All of them but those of the process.
pub(super) const GROUPS: [(&str, Register); 3] = [
    ("Serving daemons", |m, r| m.serve.register(r)),
    ("Watching the cluster", |m, r| m.watch.register(r)),
    ("The certificate authority", |m, r| m.ca.register(r)),
];

impl ControlMetrics {
    /// A registry with everything.
    pub(super) fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        GROUPS.iter().for_each(|(_, register)| register(self, &mut registry));
        register_any_process(&mut registry);
        registry
    }

    /// A registry with one group, each family of which has a series.
    pub(super) fn example(&self, register: Register) -> Registry {
        self.serve.fill_example();
        self.watch.fill_example();
        self.ca.fill_example();
        let mut registry = Registry::default();
        register(self, &mut registry);
        registry
    }
}
