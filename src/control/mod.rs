//! Where facts about the mesh come from, and keeping the store in step with it. A file, or a control plane.

pub mod file;
pub mod xds;
pub mod yaml;
mod yaml_policies;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Metrics of the sources of facts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Versions of the file that were taken.
    pub applied: Counter,
    /// Versions of the file that were refused.
    pub refused: Counter,
    /// 1 while the file on disk is refused and older facts are in force.
    pub stale: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let applied = "Versions of the mesh file that were applied";
        registry.register("culvert_mesh_file_applied", applied, self.applied.clone());
        let refused = "Versions of the mesh file that were refused; the previous facts stayed in force";
        registry.register("culvert_mesh_file_refused", refused, self.refused.clone());
        let stale = "1 while the mesh file on disk is refused and older facts are in force, else 0";
        registry.register("culvert_mesh_file_stale", stale, self.stale.clone());
    }
}
