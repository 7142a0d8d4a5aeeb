//! Turns settings as text into checked values. Pure, apart from the machine's limits, which are passed in. All faults
//! are reported at once.

use super::args::NodeArgs;
use super::checker::Checker;
use super::environment::Environment;
use super::istio::{self, ProxyConfig};
use super::parse::Threads;
use super::settings::{certificates, connections, history, mesh, node as node_settings, pods, process};
use super::{CaSource, Config, Faults, MeshSource, dedicated, kubernetes, opentelemetry};
use crate::connection::dial::direct::SocketConfig;
use crate::connection::dial::pool::PoolConfig;
use crate::node::{OwnWorkload, PodSource};
use crate::sys::socket::{Keepalive, LegOptions};
use crate::{admin, connection, hbone, node, ports, telemetry};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Unsent bytes in the kernel for each leg: enough for a long link, and few enough that small requests do not queue
/// behind bulk traffic.
const NOTSENT_LOWAT_BYTES: u32 = 256 * 1024;

/// Streams that a peer may open on one tunnel (ztunnel's value).
const SERVER_STREAMS: u32 = 200;

/// What the machine offers, as far as defaults depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Logical CPUs.
    pub cpus: usize,
    /// Files that the process may open.
    pub open_files: u64,
}

/// Values that several modules need.
#[derive(Clone, Copy)]
struct Shared {
    ipv6: bool,
    mark: u32,
    drain_deadline: Duration,
}

/// Checks the settings of the daemon.
pub fn check(args: &NodeArgs, environment: &Environment, machine: Machine) -> Result<Config, Faults> {
    let mut checker = Checker::new(args);
    let c = &mut checker;
    environment.check_refused(c);
    let proxy = istio::proxy_config(c, environment);
    let own = dedicated::own_workload(c);
    let mark = c.read(&pods::PACKET_MARK);
    let shared = Shared {
        ipv6: c.read(&connections::IPV6),
        // In dedicated mode the daemon has no right to mark packets.
        mark: if own.is_none() { mark } else { 0 },
        drain_deadline: drain_deadline(c),
    };
    let trust_domain = c.read(&certificates::TRUST_DOMAIN);
    let mut config = Config {
        mesh: istio::mesh_source(c, environment, &proxy),
        egress_file: egress_file(c),
        ca: istio::ca_source(c, environment, &proxy),
        crl: c.path(&certificates::CRL_PATH),
        only_post_quantum: c.read(&certificates::COMPLIANCE_POLICY),
        node_name: c.text(&node_settings::NODE_NAME).unwrap_or_default().to_owned(),
        network: c.text(&node_settings::NETWORK).unwrap_or_default().to_owned(),
        own_pod: istio::own_pod(c).filter(|_| own.is_none()),
        secret_ttl: c.read(&certificates::SECRET_TTL),
        trust_domain_aliases: c.read(&certificates::TRUST_DOMAIN_ALIASES),
        trust_domain: trust_domain.clone(),
        drain_deadline: shared.drain_deadline,
        admin: admin::Config {
            admin_port: proxy.proxy_admin_port.unwrap_or(ports::ADMIN),
            stats_port: proxy.stats_port.unwrap_or(ports::STATS),
            ipv6: shared.ipv6,
        },
        connection: connection_config(c, &proxy, machine, shared.mark),
        dns: istio::dns(c, environment, &proxy, shared.ipv6, shared.mark),
        node: node_config(c, environment, shared, trust_domain, own),
        history: c.read(&history::HISTORY),
        access_log_stages: c.read(&history::ACCESS_LOG_STAGES),
        otlp: None,
        log: log_config(c),
        series: telemetry::series::Config {
            max: c.read(&process::METRIC_SERIES_MAX),
            idle: c.read(&process::METRIC_SERIES_IDLE),
        },
        state_files: match c.path(&mesh::STATE_FILE) {
            Some(file) => vec![file.clone(), kubernetes::pods_state_file(&file)],
            None => Vec::new(),
        },
        settings: BTreeMap::new(),
    };
    config.otlp = opentelemetry::otlp(c, &config.node.cluster_id);
    config.settings = settings(args, &config);
    if checker.faults.is_empty() { Ok(config) } else { Err(Faults(checker.faults)) }
}

/// The settings that were given, without secrets. The addresses and ports that Istio's proxy configuration led to stand
/// in its place, because its text may contain secrets.
fn settings(args: &NodeArgs, config: &Config) -> BTreeMap<String, String> {
    let given = args.given().filter(|(setting, _)| !setting.is_secret);
    let mut settings: BTreeMap<String, String> =
        given.map(|(setting, text)| (setting.variable.to_owned(), text.to_owned())).collect();
    let mut put = |name: &str, value: String| drop(settings.insert(name.to_owned(), value));
    let (admin_port, stats_port) = (config.admin.admin_port, config.admin.stats_port);
    put(mesh::PROXY_CONFIG.about.variable, format!("{{proxyAdminPort: {admin_port}, statsPort: {stats_port}}}"));
    if let MeshSource::Xds(xds) = &config.mesh {
        put(mesh::XDS_ADDRESS.about.variable, xds.rpc.address.to_string());
    }
    if let CaSource::Istio(rpc) = &config.ca {
        put(certificates::CA_ADDRESS.about.variable, rpc.address.to_string());
    }
    settings
}

/// The egress file. A mesh file holds its egress policies itself.
fn egress_file(c: &mut Checker<'_>) -> Option<PathBuf> {
    let path = c.path(&mesh::EGRESS_FILE)?;
    if c.path(&mesh::MESH_FILE).is_some() {
        let what = "is set together with LOCAL_XDS_PATH; write its section `egress` into the mesh file instead";
        c.fault(&mesh::EGRESS_FILE.about, what);
    }
    Some(path)
}

/// The deadline for open connections: as set, or a little less than the grace period of the daemon's pod.
fn drain_deadline(c: &mut Checker<'_>) -> Duration {
    let is_set = c.given(&process::DRAIN_DEADLINE).is_some_and(|text| !text.trim().is_empty());
    match c.optional(&process::GRACE_PERIOD) {
        Some(grace) if !is_set => {
            Duration::from_secs(if grace > 10 { grace - 5 } else { grace.saturating_sub(1).max(1) })
        }
        _ => c.read(&process::DRAIN_DEADLINE),
    }
}

/// Settings of the log.
pub(super) fn log_config(c: &mut Checker<'_>) -> telemetry::log::Config {
    let filter = match c.text(&process::LOG) {
        Some(filter) if !filter.trim().is_empty() => filter.to_owned(),
        _ => c.read(&process::LOG),
    };
    if let Err(error) = telemetry::log::check(&filter) {
        c.fault(&process::LOG.about, &error.to_string());
    }
    telemetry::log::Config { filter, json: c.read(&process::LOG_FORMAT) }
}

fn node_config(
    c: &mut Checker<'_>,
    environment: &Environment,
    shared: Shared,
    trust_domain: String,
    own: Option<OwnWorkload>,
) -> node::Config {
    let proc = istio::host_proc(c, environment);
    let source = match own {
        Some(own) => PodSource::Own(own),
        None => kubernetes::pods_source(c, &proc),
    };
    node::Config {
        redirect: !matches!(source, PodSource::Agent(_) | PodSource::Own(_)),
        source,
        node_name: c.text(&node_settings::NODE_NAME).unwrap_or_default().to_owned(),
        host_netns: c.path(&pods::HOST_NETNS).unwrap_or_else(|| proc.join("1/ns/net")),
        proc,
        // With a mesh file the cluster need not be named, and then no fact belongs to another cluster.
        cluster_id: match c.path(&mesh::MESH_FILE) {
            Some(_) => istio::given_cluster_id(c, environment).unwrap_or_default(),
            None => istio::cluster_id(c, environment),
        },
        trust_domain,
        mark: shared.mark,
        end_preexisting: c.read(&pods::END_EARLIER_CONNECTIONS),
        reuse_port: c.read(&pods::PORT_REUSE),
        ipv6: shared.ipv6,
        socks: c.read(&connections::SOCKS),
        release_deadline: shared.drain_deadline,
    }
}

fn connection_config(c: &mut Checker<'_>, proxy: &ProxyConfig, machine: Machine, mark: u32) -> connection::Config {
    let keepalive = Keepalive {
        time: c.read(&connections::KEEPALIVE_TIME),
        interval: c.read(&connections::KEEPALIVE_INTERVAL),
        retries: c.read(&connections::KEEPALIVE_RETRIES),
        user_timeout: c.read(&connections::USER_TIMEOUT),
    };
    let keepalive = c.read(&connections::KEEPALIVE).then_some(keepalive);
    // A connection needs two sockets; a fifth of the files remains for everything else.
    let default_limit = usize::try_from(machine.open_files / 10 * 4).unwrap_or(usize::MAX).max(16);
    connection::Config {
        workers: workers(c, proxy, machine),
        sockets: SocketConfig {
            mark,
            legs: LegOptions { keepalive, notsent_lowat: Some(NOTSENT_LOWAT_BYTES) },
            keep_source: c.read(&connections::KEEP_SOURCE) && mark != 0,
        },
        hbone: hbone::Config {
            stream_window: c.read(&connections::STREAM_WINDOW),
            connection_window: c.read(&connections::CONNECTION_WINDOW),
            frame_size: c.read(&connections::FRAME_SIZE),
            max_streams: SERVER_STREAMS,
            half_closed_silence: c.read(&connections::HALF_CLOSED),
        },
        pool: PoolConfig { max_streams: c.read(&connections::POOL_STREAMS), idle: c.read(&connections::POOL_IDLE) },
        max_connections: c.read_or(&connections::MAX_CONNECTIONS, default_limit),
        set_aside_max: c.read(&connections::SET_ASIDE_MAX),
        waypoint_check: c.read(&connections::WAYPOINT_CHECK),
        localhost_app_tunnel: c.read(&connections::LOCALHOST_APP_TUNNEL),
        response_baggage: c.read(&connections::RESPONSE_BAGGAGE),
    }
}

/// The number of worker threads, by ztunnel's rules: as set, else from the container's limit and request, else a
/// quarter of the CPUs.
fn workers(c: &mut Checker<'_>, proxy: &ProxyConfig, machine: Machine) -> usize {
    let limit = c.optional(&connections::RESOURCE_CPU_LIMIT).filter(|cpus| *cpus > 0);
    let request = c.read(&connections::RESOURCE_CPU_REQUEST);
    let cpus = c.read_or(&connections::CPU_LIMIT, machine.cpus);
    let cpus = limit.unwrap_or(cpus);
    let count = |threads| match threads {
        Threads::Count(0) => cpus,
        Threads::Count(count) => count,
        Threads::Percent(percent) => (cpus * percent).div_ceil(100).max(1),
    };
    let automatic = match limit {
        Some(_) => cpus.max(request),
        None => count(Threads::Percent(25)).max(request).max(2),
    };
    let default = proxy.concurrency.map_or(automatic, |concurrency| count(Threads::Count(concurrency)));
    c.optional(&connections::WORKERS).map_or(default, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine { cpus: 16, open_files: 20_000 };

    fn args(more: &[(&str, &str)]) -> NodeArgs {
        let base = [("LOCAL_XDS_PATH", "/m"), ("CULVERT_PODS_FILE", "/p"), ("CULVERT_CA_DIR", "/c")];
        NodeArgs::from(&[&base[..], more].concat()[..])
    }

    fn checked(more: &[(&str, &str)]) -> Config {
        check(&args(more), &Environment::default(), MACHINE).unwrap()
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let args = NodeArgs::from(
            &[
                ("KEEPALIVE_ENABLED", "yes"),
                ("KEEPALIVE_TIME", "10h"),
                ("KEEPALIVE_INTERVAL", "500ms"),
                ("SECRET_TTL", "100000years"),
                ("POOL_UNUSED_RELEASE_TIMEOUT", "soon"),
                ("HTTP2_FRAME_SIZE", "10"),
                ("RUST_LOG", "a=b=c"),
                ("XDS_ADDRESS", "http://istiod"),
                ("PROXY_CONFIG", "{concurrency: many}"),
                ("INSTANCE_IP", "here"),
                ("ZTUNNEL_RESOURCE_CPU_LIMIT", "many"),
                ("COMPLIANCE_POLICY", "fips"),
                ("LOG_FORMAT", "yaml"),
            ][..],
        );
        let environment =
            [("ISTIO_METAJSON_A", "{"), ("CA_HEADER_A B", "hunter2"), ("ENABLE_PROXY", "false"), ("FAKE_CA", "false")];
        let Faults(faults) = check(&args, &environment[..].into(), MACHINE).unwrap_err();
        for name in [
            "XDS_ADDRESS (--xds-address): \"http://istiod\"",
            "ISTIO_METAJSON_A: is not JSON",
            "CA_HEADER_A B: is not an HTTP header",
            "ENABLE_PROXY: \"false\" is not supported",
            "PROXY_CONFIG (--proxy-config):",
            "INSTANCE_IP (--instance-ip): \"here\"",
            "ZTUNNEL_RESOURCE_CPU_LIMIT (--resource-cpu-limit): \"many\"",
            "COMPLIANCE_POLICY (--compliance-policy): \"fips\"",
            "KEEPALIVE_ENABLED (--keepalive): \"yes\"",
            "KEEPALIVE_TIME (--keepalive-time): \"10h\"",
            "KEEPALIVE_INTERVAL (--keepalive-interval): \"500ms\"",
            "SECRET_TTL (--secret-ttl): \"100000years\"",
            "POOL_UNUSED_RELEASE_TIMEOUT (--pool-idle): \"soon\"",
            "HTTP2_FRAME_SIZE (--frame-size): \"10\"",
            "RUST_LOG (--log):",
            "LOG_FORMAT (--log-format): \"yaml\" is not valid: expected text, plain or json",
        ] {
            assert!(faults.iter().any(|f| f.starts_with(name)), "{name} in {faults:#?}");
        }
        assert_eq!(faults.len(), 16, "{faults:#?}");
        assert!(!faults.join("\n").contains("hunter2"), "{faults:#?}");
    }

    #[test]
    fn egress_policies_come_from_one_file() {
        let with = |more: &[(&str, &str)]| {
            let args = NodeArgs::from(&[&[("CULVERT_EGRESS_FILE", "/e")], more].concat()[..]);
            check(&args, &Environment::default(), MACHINE).map(|config| config.egress_file)
        };
        assert_eq!(with(&[]), Ok(Some(PathBuf::from("/e"))));
        let Faults(faults) = with(&[("LOCAL_XDS_PATH", "/m")]).unwrap_err();
        let expected = "CULVERT_EGRESS_FILE (--egress-file): is set together with LOCAL_XDS_PATH; write its section";
        assert!(faults[0].starts_with(expected) && faults.len() == 1, "{faults:?}");
    }

    #[test]
    fn defaults_and_deadlines() {
        let config = checked(&[]);
        assert_eq!((config.connection.workers, config.connection.max_connections), (4, 8000));
        assert_eq!(config.drain_deadline, Duration::from_secs(5));
        for (grace, seconds) in [("30", 25), ("10", 9), ("1", 1), ("0", 1)] {
            let config = checked(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]);
            assert_eq!(config.drain_deadline, Duration::from_secs(seconds), "{grace}");
        }
        // As ztunnel reads them: seconds where there is no unit, and M is a minute.
        let config = checked(&[
            ("KEEPALIVE_TIME", "1M"),
            ("KEEPALIVE_INTERVAL", "10"),
            ("CONNECTION_TERMINATION_DEADLINE", "3m31"),
            ("POOL_UNUSED_RELEASE_TIMEOUT", "30S"),
        ]);
        let keepalive = config.connection.sockets.legs.keepalive.unwrap();
        let all = [keepalive.time, keepalive.interval, config.drain_deadline, config.connection.pool.idle];
        assert_eq!(all.map(|duration| duration.as_secs()), [60, 10, 211, 30]);
        for (workers, expected) in [("0", 16), ("3", 3), ("50%", 8), ("1%", 1)] {
            let config = checked(&[("ZTUNNEL_WORKER_THREADS", workers)]);
            assert_eq!(config.connection.workers, expected, "{workers}");
        }
    }

    #[test]
    fn the_address_of_the_control_plane_is_the_one_that_the_help_names() {
        let words = mesh::XDS_ADDRESS.about.default_text().unwrap();
        for environment in [&[][..], &[("KUBERNETES_SERVICE_HOST", "10.96.0.1")]] {
            let config = check(&NodeArgs::default(), &environment.into(), MACHINE).unwrap();
            let address = config.xds().unwrap().rpc.address.to_string();
            assert!(words.contains(address.trim_end_matches('/')), "{address}: {words}");
        }
    }

    #[test]
    fn dns_is_answered_unless_ztunnels_metadata_says_otherwise() {
        let capture = |more: &[(&str, &str)], environment: &[(&str, &str)]| {
            check(&args(more), &environment.into(), MACHINE)
                .map(|config| config.dns.capture)
                .map_err(|faults| faults.to_string())
        };
        assert_eq!(capture(&[], &[]), Ok(true));
        assert_eq!(capture(&[], &[("ISTIO_META_DNS_CAPTURE", "TRUE")]), Ok(true));
        assert_eq!(capture(&[], &[("ISTIO_META_DNS_CAPTURE", "false")]), Ok(false));
        assert_eq!(capture(&[], &[("ISTIO_META_DNS_CAPTURE", "anything")]), Ok(false), "as ztunnel reads it");
        assert_eq!(capture(&[("ISTIO_META_DNS_CAPTURE", "false")], &[]), Ok(false));
        assert_eq!(capture(&[("PROXY_CONFIG", "proxyMetadata: {DNS_CAPTURE: \"false\"}")], &[]), Ok(false));
        let metadata = [("PROXY_CONFIG", "proxyMetadata: {DNS_CAPTURE: \"false\"}")];
        assert_eq!(capture(&metadata, &[("ISTIO_META_DNS_CAPTURE", "")]), Ok(true), "the variable takes precedence");
        assert_eq!(capture(&[], &[("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053")]), Ok(true));
        let elsewhere = capture(&[], &[("ISTIO_META_DNS_PROXY_ADDR", "0.0.0.0:53")]).unwrap_err();
        assert!(elsewhere.contains("ISTIO_META_DNS_PROXY_ADDR: \"0.0.0.0:53\""), "{elsewhere}");
        let bad = [("CLUSTER_DOMAIN", "bad domain"), ("CULVERT_DNS_TTL", "0s"), ("CULVERT_DNS_CACHE_ENTRIES", "many")];
        let faults = capture(&bad, &[]).unwrap_err();
        for name in [
            "CLUSTER_DOMAIN (--cluster-domain)",
            "CULVERT_DNS_TTL (--dns-ttl)",
            "CULVERT_DNS_CACHE_ENTRIES (--dns-cache)",
        ] {
            assert!(faults.contains(name), "{name} in {faults}");
        }
    }

    #[test]
    fn the_environment_of_istios_chart_says_all() {
        let args = [
            ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
            ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
            ("NODE_NAME", "node-1"),
            ("INSTANCE_IP", "10.0.0.9"),
            ("SERVICE_ACCOUNT", "ztunnel"),
            ("ZTUNNEL_RESOURCE_CPU_LIMIT", "2500m"),
            ("ZTUNNEL_RESOURCE_CPU_REQUEST", "500m"),
        ];
        let environment = [
            ("ISTIO_META_CLUSTER_ID", "c1"),
            ("ISTIO_METAJSON_LABELS", r#"{"a": "b"}"#),
            ("XDS_HEADER_X-Tenant", "secret"),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("INPOD_ENABLED", "true"),
        ];
        let config = check(&NodeArgs::from(&args[..]), &environment[..].into(), MACHINE).unwrap();
        let MeshSource::Xds(xds) = &config.mesh else { panic!("{:?}", config.mesh) };
        assert_eq!(xds.rpc.address.to_string(), "https://istiod.istio-system.svc:15012/");
        assert_eq!(xds.node_id, "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local");
        assert_eq!(xds.metadata["CLUSTER_ID"], "c1");
        assert_eq!(xds.metadata["LABELS"]["a"], "b");
        assert_eq!((xds.rpc.headers.len(), xds.rpc.cluster_id.as_str()), (1, "c1"));
        assert!(!format!("{xds:?}").contains("secret"));
        assert!(matches!(&config.ca, CaSource::Istio(rpc) if rpc.address == xds.rpc.address && rpc.headers.is_empty()));
        assert!(matches!(&config.node.source, PodSource::Agent(path) if path.ends_with("ztunnel.sock")));
        assert_eq!((config.node.redirect, config.connection.workers), (false, 3));
        assert!(config.own_pod.is_some());
        // The settings that it shows lead to the same configuration, without the environment.
        let more = [("AUTH_TOKEN", "hunter2"), ("PROXY_CONFIG", "{proxyAdminPort: 1234}")];
        let args = NodeArgs::from(&[&args[..], &more].concat()[..]);
        let shown = check(&args, &environment[..].into(), MACHINE).unwrap().settings;
        assert!(!format!("{shown:?}").contains("hunter2"));
        let again = check(&NodeArgs::of(&shown), &Environment::default(), MACHINE).unwrap();
        assert_eq!(again.admin.admin_port, 1234);
        assert!(matches!(&again.mesh, MeshSource::Xds(again) if again.rpc.address == xds.rpc.address));
        assert!(matches!(&again.node.source, PodSource::Agent(path) if path.ends_with("ztunnel.sock")));
        assert_eq!(again.settings, shown);
    }
}
