//! The metrics of all parts, in groups. The daemon registers the groups that its configuration needs; `docs/metrics.md`
//! shows all of them.

use super::history;
use crate::config::{Config, MeshSource};
use crate::connection::budget::BudgetUse;
use crate::connection::report::Reporter;
use crate::connection::report::export::{self, Outbox};
use crate::connection::report::history::History;
use crate::node::kubelet_probes::HostProbeRules;
use crate::node::status::Board;
use crate::node::{PodSource, kubernetes, zds};
use crate::telemetry::changes::Changes;
use crate::{connection, control, dns, identity, otlp, sys, telemetry};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Metrics of all parts, also of those that this daemon does not need.
pub(super) struct Metrics {
    pub(super) reporter: Arc<Reporter>,
    pub(super) board: Arc<Board>,
    pub(super) mesh_file: Arc<control::file::Metrics>,
    pub(super) egress_file: Arc<control::file::Metrics>,
    pub(super) xds: Arc<control::xds::Metrics>,
    pub(super) identities: Arc<identity::metrics::Metrics>,
    pub(super) crl: Arc<identity::revoked::Metrics>,
    pub(super) dns: Arc<dns::Metrics>,
    pub(super) agent: Arc<zds::Metrics>,
    pub(super) kubernetes: Arc<kubernetes::watch::Metrics>,
    pub(super) probes: HostProbeRules,
    pub(super) plugin_in_place: Gauge,
    pub(super) changes: Arc<Changes>,
    pub(super) exported: Arc<export::Metrics>,
}

/// Metrics that are registered together.
pub(super) struct Group {
    /// What they are about.
    pub(super) title: &'static str,
    is_needed: fn(&Config) -> bool,
    register: fn(&Metrics, &mut Registry),
}

/// All metrics but those of the process.
pub(super) const GROUPS: [Group; 12] = [
    Group {
        title: "Connections and tunnels",
        is_needed: |_| true,
        register: |m, r| {
            m.reporter.metrics.register(r);
            r.register_collector(Box::new(m.reporter.pods.clone()));
        },
    },
    Group { title: "Pods", is_needed: |_| true, register: |m, r| m.board.register(r) },
    Group {
        title: "Enrolment by labels",
        is_needed: |c| matches!(c.node.source, PodSource::Kubernetes(_)),
        register: |m, r| {
            m.kubernetes.register(r);
            m.probes.register(r);
        },
    },
    Group {
        title: "The CNI plugin",
        is_needed: |c| matches!(&c.node.source, PodSource::Kubernetes(kubernetes) if kubernetes.cni.is_some()),
        register: |m, r| {
            let help = "1 while the CNI plugin is installed on the node, else 0. Alert on 0";
            r.register("culvert_cni_plugin_in_place", help, m.plugin_in_place.clone());
        },
    },
    Group {
        title: "Enrolment by the agent",
        is_needed: |c| matches!(c.node.source, PodSource::Agent(_)),
        register: |m, r| m.agent.register(r),
    },
    Group {
        title: "The control plane",
        is_needed: |c| matches!(c.mesh, MeshSource::Xds(_)),
        register: |m, r| m.xds.register(r),
    },
    Group {
        title: "The mesh file",
        is_needed: |c| matches!(c.mesh, MeshSource::File(_)),
        register: |m, r| m.mesh_file.register(control::file::Kind::Mesh, r),
    },
    Group {
        title: "The egress file",
        is_needed: |c| c.egress_file.is_some(),
        register: |m, r| m.egress_file.register(control::file::Kind::Egress, r),
    },
    Group { title: "Certificates", is_needed: |_| true, register: |m, r| m.identities.register(r) },
    Group { title: "Revocation", is_needed: |c| c.crl.is_some(), register: |m, r| m.crl.register(r) },
    Group { title: "DNS", is_needed: |_| true, register: |m, r| m.dns.register(r) },
    Group { title: "OpenTelemetry", is_needed: |c| c.otlp.is_some(), register: |m, r| m.exported.register(r) },
];

impl Metrics {
    /// Metrics at zero. `host_netns` and `ipv6` are the host's network namespace, and whether IPv6 is used there;
    /// `entries` is the size of the history, and `logs_stages` says whether the access log shows stages. `series` limits
    /// those with names from the mesh, and `otlp` is what is exported.
    pub(super) fn new(
        host_netns: PathBuf,
        ipv6: bool,
        entries: usize,
        logs_stages: bool,
        series: telemetry::series::Config,
        otlp: Option<&otlp::Config>,
    ) -> Self {
        let exported = Arc::<export::Metrics>::default();
        let outbox = otlp.map(|otlp| {
            let limits = |signal: &Option<otlp::SignalConfig>| signal.as_ref().map(|signal| signal.limits);
            let (spans, logs) = (limits(&otlp.traces), limits(&otlp.logs));
            Arc::new(Outbox::new(otlp.sampler.clone(), spans, logs, exported.clone()))
        });
        let (connections, changes) = history::bounds(entries);
        let changes = Arc::new(Changes::new(changes));
        let probes =
            HostProbeRules { host: host_netns, ipv6, in_place: Default::default(), spoofed: Default::default() };
        let metrics = connection::report::metrics::Metrics::new(series);
        Self {
            reporter: Arc::new(Reporter {
                metrics,
                history: History::new(connections),
                logs_stages,
                outbox,
                ..Reporter::default()
            }),
            board: Arc::new(Board::new(changes.clone())),
            mesh_file: Arc::new(control::file::Metrics::noting(changes.clone())),
            egress_file: Arc::new(control::file::Metrics::noting(changes.clone())),
            xds: Arc::new(control::xds::Metrics::noting(changes.clone())),
            identities: Arc::new(identity::metrics::Metrics::noting(changes.clone())),
            crl: Arc::new(identity::revoked::Metrics::noting(changes.clone())),
            dns: Arc::new(dns::Metrics::new(series)),
            agent: Arc::default(),
            kubernetes: Arc::default(),
            probes,
            plugin_in_place: Gauge::default(),
            changes,
            exported,
        }
    }

    /// Registers the groups that a configuration needs, and the metrics of the process.
    pub(super) fn register(&self, config: &Config, readings: Read) -> Registry {
        let mut registry = Registry::default();
        for group in GROUPS.iter().filter(|group| (group.is_needed)(config)) {
            (group.register)(self, &mut registry);
        }
        register_process(&mut registry, readings);
        registry
    }

    /// A registry with one group, each family of which has a series.
    pub(super) fn example(&self, group: &Group) -> Registry {
        self.reporter.metrics.fill_example();
        self.reporter.pods.fill_example();
        self.board.fill_example();
        self.kubernetes.fill_example();
        self.xds.fill_example();
        self.identities.fill_example();
        self.dns.fill_example();
        self.exported.fill_example();
        let mut registry = Registry::default();
        (group.register)(self, &mut registry);
        registry
    }
}

/// Registers the metrics of the node's process.
pub(super) fn register_process(registry: &mut Registry, readings: Read) {
    register_any_process(registry);
    telemetry::process::register_as_ztunnel(registry);
    registry.register_collector(Box::new(Gauges(readings)));
}

/// Registers the metrics that every process of this program has.
pub(super) fn register_any_process(registry: &mut Registry) {
    let build = vec![("component", "culvert".to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let sources = telemetry::process::Sources {
        open_files: sys::limits::open_files,
        max_files: sys::limits::raise_open_files(),
        used: || sys::limits::usage().map(|used| (used.cpu_seconds, used.resident_bytes)),
        begun: since_1970.map_or(0.0, |time| time.as_secs_f64()),
    };
    telemetry::process::register(registry, sources, build);
}

/// Numbers that are read at each scrape.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Readings {
    /// Tunnels towards peers.
    pub(super) tunnels: usize,
    /// Tasks of the data plane.
    pub(super) tasks: usize,
    /// Endpoints that are set aside.
    pub(super) set_aside: usize,
    /// Bytes held for peers.
    pub(super) held_bytes: usize,
    /// The limit on them.
    pub(super) max_bytes: usize,
    /// The shares of what limits connections that are in use.
    pub(super) budget: BudgetUse,
    /// Time until an identity has no certificate, where one is held.
    pub(super) to_outage: Option<Duration>,
    /// Age of the facts of a control plane, where there are any.
    pub(super) mesh_age: Option<Duration>,
    /// How often connections were counted with `overflow` in place of their names, and DNS requests.
    pub(super) overflows: [u64; 2],
    /// Log lines dropped.
    pub(super) lines_dropped: usize,
}

/// Takes the readings.
pub(super) type Read = Box<dyn Fn() -> Readings + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabel {
    resource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLabel {
    of: &'static str,
}

struct Gauges(Read);

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let readings = (self.0)();
        let help = "Share of connections, open files and memory of the container that is in use, from 0 to 1. Above 0.8 the \
                    largest consumer is refused. Alert above 0.75";
        let mut family = encoder.encode_descriptor("culvert_budget_used_ratio", help, None, MetricType::Gauge)?;
        let BudgetUse { connections, files, memory } = readings.budget;
        for (resource, used) in [("connections", Some(connections)), ("files", files), ("memory", memory)] {
            let Some(used) = used else { continue };
            ConstGauge::new(used).encode(family.encode_family(&ResourceLabel { resource })?)?;
        }
        let help = "Connections and DNS requests that were counted with overflow in place of their names, because there were too many \
                    label sets (CULVERT_METRIC_SERIES_MAX). Alert on a rise";
        let mut family = encoder.encode_descriptor("culvert_metric_overflows", help, None, MetricType::Counter)?;
        for (of, count) in ["connections", "dns"].into_iter().zip(readings.overflows) {
            ConstCounter::new(count).encode(family.encode_family(&OfLabel { of })?)?;
        }
        let mut put = |name, help, value: u64| {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        put("culvert_tunnels_open", "Tunnels that are open towards peers", readings.tunnels as u64)?;
        let help = "Tasks of the data plane: connections, streams and tunnels";
        put("culvert_data_plane_tasks", help, readings.tasks as u64)?;
        let help = "Endpoints that new connections avoid for a while because connections to them failed";
        put("culvert_endpoints_set_aside", help, readings.set_aside as u64)?;
        let help = "Bytes held for peers: received and not delivered yet, or not read by them yet";
        put("culvert_buffers_held_bytes", help, readings.held_bytes as u64)?;
        let help = "Limit on the bytes held for peers, at which the largest tunnel of the peer (outbound: of the pod) that holds the most is cut";
        put("culvert_buffers_max_bytes", help, readings.max_bytes as u64)?;
        if let Some(left) = readings.to_outage {
            let help = "Seconds until the first identity of this node has no certificate if no renewal succeeds. Alert below an hour";
            put("culvert_seconds_to_certificate_outage", help, left.as_secs())?;
        }
        if let Some(age) = readings.mesh_age {
            let help =
                "Seconds since the control plane was last heard; 0 while it announces changes. Alert above an hour";
            put("culvert_mesh_age_seconds", help, age.as_secs())?;
        }
        let dropped = ConstCounter::new(readings.lines_dropped as u64);
        let help = "Log lines dropped because standard output was not read";
        dropped.encode(encoder.encode_descriptor("culvert_log_lines_dropped", help, None, dropped.metric_type())?)
    }
}
