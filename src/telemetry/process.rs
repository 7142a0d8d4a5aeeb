//! Metrics of the process: open files and build.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Registers the process metrics. `open_files` is called at each scrape and counts open files; `max_files` is the
/// limit.
pub fn register(
    registry: &mut Registry,
    open_files: fn() -> Option<usize>,
    max_files: u64,
    build: Vec<(&'static str, String)>,
) {
    registry.register_collector(Box::new(ProcessCollector { open_files, max_files }));
    registry.register("culvert_build", "Version of this process", Info::new(build));
    // Istio's dashboards count ztunnels by this metric.
    let istio = Family::<BuildLabels, Gauge>::default();
    let tag = concat!("culvert-", env!("CARGO_PKG_VERSION"));
    istio.get_or_create(&BuildLabels { component: "ztunnel", tag }).set(1);
    registry.register(
        "istio_build",
        "Version of this node's proxy, under the metric name that Istio's dashboards use",
        istio,
    );
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    component: &'static str,
    tag: &'static str,
}

#[derive(Debug)]
struct ProcessCollector {
    open_files: fn() -> Option<usize>,
    max_files: u64,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let open = ConstGauge::new((self.open_files)().map_or(-1, |n| i64::try_from(n).unwrap_or(i64::MAX)));
        let max = ConstGauge::new(i64::try_from(self.max_files).unwrap_or(i64::MAX));
        let mut put = |name, help, gauge: &ConstGauge<i64>| {
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        put("process_open_fds", "Files that this process has open", &open)?;
        put("process_max_fds", "Files that this process may have open", &max)
    }
}
