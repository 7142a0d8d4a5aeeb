//! Metrics of the process: open files, CPU time, memory, start and build.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Where the numbers of the process come from. The functions are called at each scrape.
#[derive(Clone, Copy, Debug)]
pub struct Sources {
    /// Counts open files.
    pub open_files: fn() -> Option<usize>,
    /// The limit of them.
    pub max_files: u64,
    /// CPU time in seconds, and resident memory in bytes where that is known.
    pub used: fn() -> Option<(f64, Option<u64>)>,
    /// When the process began, in seconds since 1970.
    pub begun: f64,
}

/// Registers the process metrics.
pub fn register(registry: &mut Registry, sources: Sources, build: Vec<(&'static str, String)>) {
    registry.register_collector(Box::new(ProcessCollector(sources)));
    registry.register("culvert_build", "Version of this process", Info::new(build));
}

/// Registers the version of a node's proxy as Istio does.
pub fn register_as_ztunnel(registry: &mut Registry) {
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
struct ProcessCollector(Sources);

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let open = ConstGauge::new((self.0.open_files)().map_or(-1, |open| whole(open as u64)));
        let max = ConstGauge::new(whole(self.0.max_files));
        let begun = ConstGauge::new(self.0.begun);
        let mut put = |name, help, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        put("process_open_fds", "Files that this process has open", &open)?;
        put("process_max_fds", "Files that this process may have open", &max)?;
        put("process_start_time_seconds", "When this process began, in seconds since 1970", &begun)?;
        let Some((cpu, memory)) = (self.0.used)() else { return Ok(()) };
        put("process_cpu_seconds", "CPU time that this process has used, in seconds", &ConstCounter::new(cpu))?;
        if let Some(bytes) = memory {
            let help = "Memory of this process that is resident, in bytes";
            put("process_resident_memory_bytes", help, &ConstGauge::new(whole(bytes)))?;
        }
        Ok(())
    }
}
