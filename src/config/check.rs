//! Words → checked settings. Pure but for the limits of the process, which are given in. All faults are reported at
//! once, each with the names of the setting, the value and what is expected.

use super::args::{NodeArgs, flag_of};
use super::istio::{self, Environment, ProxyConfig};
use super::{CaSource, Config, Faults, MeshSource, kubernetes};
use crate::connection::dial::direct::SocketConfig;
use crate::connection::dial::pool::PoolConfig;
use crate::node::Source;
use crate::sys::socket::{Keepalive, LegOptions};
use crate::{admin, connection, hbone, node, ports, telemetry};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Unsent bytes in the kernel per leg: enough for a long link, few enough that small requests do not queue behind bulk.
const NOTSENT_LOWAT_BYTES: u32 = 256 * 1024;

/// Streams a peer may open towards us on one tunnel (the reference's value).
const SERVER_STREAMS: u32 = 200;

/// What the machine offers, as far as defaults depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Logical CPUs.
    pub cpus: usize,
    /// Files the process may open.
    pub open_files: u64,
}

/// Longest duration that makes sense anywhere; beyond it arithmetic with dates could overflow.
const LONGEST: Duration = Duration::from_secs(10 * 31_557_600);

pub(super) struct Checker {
    pub(super) faults: Vec<String>,
}

impl Checker {
    pub(super) fn read<T>(
        &mut self,
        name: &str,
        value: Option<&String>,
        default: T,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        let Some(text) = value.map(|v| v.trim()).filter(|v| !v.is_empty()) else { return default };
        match parse(text) {
            Ok(value) => value,
            Err(expected) => {
                self.faults.push(format!("{name} (--{}): {text:?} is not valid: expected {expected}", flag_of(name)));
                default
            }
        }
    }
}

/// Checks the settings of the daemon.
pub fn check(args: &NodeArgs, environment: &Environment, machine: Machine) -> Result<Config, Faults> {
    let mut c = Checker { faults: Vec::new() };
    istio::not_supported(&mut c, environment);
    let proxy = istio::proxy_config(&mut c, args, environment);
    let path = |value: &Option<String>| value.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from);
    let ipv6 = c.read("IPV6_ENABLED", args.ipv6.as_ref(), true, boolean);
    let grace = c.read("TERMINATION_GRACE_PERIOD_SECONDS", args.grace_period.as_ref(), None, |t| {
        integer(0..=86_400)(t).map(Some)
    });
    let grace_deadline = grace.map_or(5, |n: u64| if n > 10 { n - 5 } else { n.saturating_sub(1).max(1) });
    let deadline = Duration::from_secs(grace_deadline);
    let drain_deadline = c.read("CONNECTION_TERMINATION_DEADLINE", args.drain_deadline.as_ref(), deadline, duration);
    let mark = c.read("PACKET_MARK", args.packet_mark.as_ref(), 1337, packet_mark);
    let trust_domain = c.read("TRUST_DOMAIN", args.trust_domain.as_ref(), "cluster.local".into(), |t| {
        domains(t).and_then(|all| all.into_iter().next().ok_or_else(String::new))
    });
    let mut config = Config {
        mesh: istio::mesh_source(&mut c, args, environment, &proxy),
        ca: istio::ca_source(&mut c, args, environment, &proxy),
        crl: path(&args.crl_path),
        only_post_quantum: c.read("COMPLIANCE_POLICY", args.compliance_policy.as_ref(), false, compliance),
        node_name: args.node_name.clone().unwrap_or_default(),
        network: args.network.clone().unwrap_or_default(),
        own_pod: istio::own_pod(args),
        secret_ttl: c.read("SECRET_TTL", args.secret_ttl.as_ref(), Duration::from_secs(86_400), ttl),
        trust_domain_aliases: c.read(
            "CULVERT_TRUST_DOMAIN_ALIASES",
            args.trust_domain_aliases.as_ref(),
            Vec::new(),
            domains,
        ),
        trust_domain: trust_domain.clone(),
        drain_deadline,
        admin: admin::Config {
            admin_port: proxy.proxy_admin_port.unwrap_or(ports::ADMIN),
            stats_port: proxy.stats_port.unwrap_or(ports::STATS),
            ipv6,
        },
        connection: connection_config(&mut c, args, &proxy, machine, mark),
        dns: istio::dns(&mut c, args, environment, &proxy, (ipv6, mark)),
        node: node_config(&mut c, args, environment, (ipv6, mark, drain_deadline), trust_domain),
        log: telemetry::log::Config {
            filter: args.log.clone().filter(|f| !f.trim().is_empty()).unwrap_or_else(|| "info".into()),
            json: args.log_format.as_deref() == Some("json"),
        },
        settings: Default::default(),
    };
    config.settings = settings(args, &config);
    if let Err(error) = telemetry::log::check(&config.log.filter) {
        c.faults.push(format!("RUST_LOG (--log): {error}"));
    }
    if c.faults.is_empty() { Ok(config) } else { Err(Faults(c.faults)) }
}

/// What was set, with the addresses and ports that came of it in place of Istio's proxy configuration, and without the token:
/// both may hold what is not to be shown.
fn settings(args: &NodeArgs, config: &Config) -> BTreeMap<String, String> {
    let set = args.set().into_iter().filter(|(name, _)| !["AUTH_TOKEN", "PROXY_CONFIG"].contains(name));
    let mut settings: BTreeMap<String, String> = set.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let ports = (config.admin.admin_port, config.admin.stats_port);
    settings.insert("PROXY_CONFIG".into(), format!("{{proxyAdminPort: {}, statsPort: {}}}", ports.0, ports.1));
    if let MeshSource::Xds(xds) = &config.mesh {
        settings.insert("XDS_ADDRESS".into(), xds.rpc.address.to_string());
    }
    if let CaSource::Istio(rpc) = &config.ca {
        settings.insert("CA_ADDRESS".into(), rpc.address.to_string());
    }
    settings
}

fn node_config(
    c: &mut Checker,
    args: &NodeArgs,
    environment: &Environment,
    (ipv6, mark, release_deadline): (bool, u32, Duration),
    trust_domain: String,
) -> node::Config {
    let path = |value: &Option<String>| value.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from);
    let proc = path(&args.proc).unwrap_or_else(|| istio::host_proc(environment));
    let source = kubernetes::pods_source(c, args, &proc);
    node::Config {
        redirect: !matches!(source, Source::Agent(_)),
        source,
        node_name: args.node_name.clone().unwrap_or_default(),
        host_netns: path(&args.host_netns).unwrap_or_else(|| proc.join("1/ns/net")),
        proc,
        // Who writes the mesh by hand need not name the cluster; then no fact is another cluster's.
        cluster_id: match path(&args.mesh_file) {
            Some(_) => istio::said_cluster_id(args, environment).unwrap_or_default(),
            None => istio::cluster_id(args, environment),
        },
        trust_domain,
        mark,
        end_earlier: c.read("CULVERT_END_EARLIER_CONNECTIONS", args.end_earlier.as_ref(), false, boolean),
        reuse_port: c.read("INPOD_PORT_REUSE", args.port_reuse.as_ref(), true, boolean),
        ipv6,
        release_deadline,
    }
}

fn connection_config(
    c: &mut Checker,
    args: &NodeArgs,
    proxy: &ProxyConfig,
    machine: Machine,
    mark: u32,
) -> connection::Config {
    let keepalive = Keepalive {
        time: c.read("KEEPALIVE_TIME", args.keepalive_time.as_ref(), Duration::from_secs(180), keepalive_time),
        interval: c.read(
            "KEEPALIVE_INTERVAL",
            args.keepalive_interval.as_ref(),
            Duration::from_secs(180),
            keepalive_time,
        ),
        retries: c.read("KEEPALIVE_RETRIES", args.keepalive_retries.as_ref(), 9, integer(1..=127)),
        user_timeout: c.read("USER_TIMEOUT_ENABLED", args.user_timeout.as_ref(), true, boolean),
    };
    let keepalive_on = c.read("KEEPALIVE_ENABLED", args.keepalive.as_ref(), true, boolean);
    let legs = LegOptions { keepalive: keepalive_on.then_some(keepalive), notsent_lowat: Some(NOTSENT_LOWAT_BYTES) };
    let window = integer(65_535..=2_147_483_647);
    // A connection takes two sockets; a fifth of the files is left for everything else.
    let default_limit = usize::try_from(machine.open_files / 10 * 4).unwrap_or(usize::MAX).max(16);
    connection::Config {
        workers: workers(c, args, proxy, machine),
        sockets: SocketConfig {
            mark,
            legs,
            keep_source: c.read("ENABLE_ORIG_SRC", args.keep_source.as_ref(), true, boolean),
        },
        hbone: hbone::Config {
            stream_window: c.read("HTTP2_STREAM_WINDOW_SIZE", args.stream_window.as_ref(), 4 << 20, &window),
            connection_window: c.read(
                "HTTP2_CONNECTION_WINDOW_SIZE",
                args.connection_window.as_ref(),
                16 << 20,
                &window,
            ),
            frame_size: c.read("HTTP2_FRAME_SIZE", args.frame_size.as_ref(), 1 << 20, integer(16_384..=16_777_215)),
            max_streams: SERVER_STREAMS,
            half_closed_silence: c.read(
                "CULVERT_HALF_CLOSED_TIMEOUT",
                args.half_closed.as_ref(),
                Duration::from_secs(3600),
                duration,
            ),
        },
        pool: PoolConfig {
            max_streams: c.read(
                "POOL_MAX_STREAMS_PER_CONNECTION",
                args.pool_streams.as_ref(),
                100,
                integer(1..=65_535),
            ),
            idle: c.read("POOL_UNUSED_RELEASE_TIMEOUT", args.pool_idle.as_ref(), Duration::from_secs(300), duration),
        },
        max_connections: c.read(
            "CULVERT_MAX_CONNECTIONS",
            args.max_connections.as_ref(),
            default_limit,
            integer(1..=10_000_000),
        ),
        localhost_app_tunnel: c.read("LOCALHOST_APP_TUNNEL", args.localhost_app_tunnel.as_ref(), true, boolean),
        response_baggage: c.read("ENABLE_RESPONSE_BAGGAGE", args.response_baggage.as_ref(), true, boolean),
    }
}

/// As the reference reckons: what is set, else by the container's limit and request, else a quarter of the CPUs.
fn workers(c: &mut Checker, args: &NodeArgs, proxy: &ProxyConfig, machine: Machine) -> usize {
    let limit = c.read("ZTUNNEL_RESOURCE_CPU_LIMIT", args.resource_cpu_limit.as_ref(), None, |t| cpus(t).map(Some));
    let request = c.read("ZTUNNEL_RESOURCE_CPU_REQUEST", args.resource_cpu_request.as_ref(), 0, cpus);
    let whole = c.read("ZTUNNEL_CPU_LIMIT", args.cpu_limit.as_ref(), machine.cpus, integer(1..=4096));
    let limit = limit.filter(|cpus| *cpus > 0);
    let cpus = limit.unwrap_or(whole);
    let share = |percent: usize| (cpus * percent).div_ceil(100).max(1);
    let parse = |text: &str| match text.strip_suffix('%') {
        Some(percent) => integer(1..=100)(percent).map(share),
        None => integer(0..=4096)(text).map(|n: usize| if n == 0 { cpus } else { n }),
    };
    let auto = if limit.is_some() { cpus.max(request) } else { share(25).max(request).max(2) };
    let default = proxy.concurrency.map_or(auto, |n| if n == 0 { cpus } else { n });
    c.read("ZTUNNEL_WORKER_THREADS", args.workers.as_ref(), default, parse)
}

/// A Kubernetes quantity of CPUs (`2`, `1.5`, `500m`), rounded up.
fn cpus(text: &str) -> Result<usize, String> {
    let expected = || "a number of CPUs such as 2, 1.5 or 500m".to_owned();
    let whole = |text: &str| text.parse::<usize>().ok().filter(|n| *n <= 4_096_000);
    let found = match (text.strip_suffix('m'), text.split_once('.')) {
        (Some(milli), _) => whole(milli).map(|milli| milli.div_ceil(1000)),
        (None, Some((cpus, part))) => {
            whole(part).and(whole(cpus)).map(|cpus| cpus + usize::from(part.bytes().any(|digit| digit != b'0')))
        }
        (None, None) => whole(text),
    };
    found.filter(|cpus| *cpus <= 4096).ok_or_else(expected)
}

fn compliance(text: &str) -> Result<bool, String> {
    if text == "pqc" { Ok(true) } else { Err("pqc".into()) }
}

/// The mark must lie within the bits that the rules look at, and must not be the one that brings replies back (0x111).
fn packet_mark(text: &str) -> Result<u32, String> {
    let expected = || "a number from 1 to 4095 other than 273".to_owned();
    integer(1..=0xfff)(text).ok().filter(|mark| *mark != 0x111).ok_or_else(expected)
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "true or false".into())
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    match super::duration::parse(text) {
        Some(duration) if !duration.is_zero() && duration <= LONGEST => Ok(duration),
        _ => Err("a duration above zero and up to 10years, such as 10s, 5m, 1h30m or 25 (seconds)".into()),
    }
}

fn ttl(text: &str) -> Result<Duration, String> {
    let expected = || "a duration from 10s to 10years".to_owned();
    duration(text).ok().filter(|d| *d >= Duration::from_secs(10)).ok_or_else(expected)
}

/// A day is what resolvers keep at most.
pub(super) fn dns_ttl(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(86_400);
    let whole = |d: &Duration| range.contains(d) && d.subsec_nanos() == 0;
    duration(text).ok().filter(whole).ok_or_else(|| "whole seconds from 1s to 1day".into())
}

/// What the kernel takes for `TCP_KEEPIDLE` and `TCP_KEEPINTVL`: whole seconds up to 32767 (tcp(7)).
fn keepalive_time(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(32_767);
    let whole = |d: &Duration| range.contains(d) && d.subsec_nanos() == 0;
    duration(text).ok().filter(whole).ok_or_else(|| "whole seconds from 1s to 32767s".into())
}

fn domains(text: &str) -> Result<Vec<String>, String> {
    let all: Vec<String> = text.split(',').map(|d| d.trim().to_owned()).collect();
    let fine = |d: &String| crate::mesh::SpiffeName::new(d, "a", "a").is_ok();
    if all.iter().all(fine) { Ok(all) } else { Err("trust domains in lower case, comma-joined".into()) }
}

pub(super) fn integer<T>(range: std::ops::RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String>
where
    T: FromStr + PartialOrd + std::fmt::Display,
{
    move |text| match text.parse::<T>() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err(format!("a number from {} to {}", range.start(), range.end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine { cpus: 16, open_files: 20_000 };

    fn base() -> NodeArgs {
        let path = |p: &str| Some(p.to_owned());
        NodeArgs { mesh_file: path("/m"), pods_file: path("/p"), ca_dir: path("/c"), ..NodeArgs::default() }
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let word = |w: &str| Some(w.to_owned());
        let args = NodeArgs {
            keepalive: word("yes"),
            keepalive_time: word("10h"),
            keepalive_interval: word("500ms"),
            secret_ttl: word("100000years"),
            pool_idle: word("soon"),
            frame_size: word("10"),
            log: word("a=b=c"),
            xds_address: word("http://istiod"),
            proxy_config: word("{concurrency: many}"),
            instance_ip: word("here"),
            resource_cpu_limit: word("many"),
            compliance_policy: word("fips"),
            ..NodeArgs::default()
        };
        let environment = [
            ("ISTIO_METAJSON_A", "{"),
            ("CA_HEADER_A B", "hunter2"),
            ("PROXY_MODE", "dedicated"),
            ("FAKE_CA", "false"),
        ];
        let Faults(faults) = check(&args, &environment[..].into(), MACHINE).unwrap_err();
        for name in [
            "XDS_ADDRESS (--xds-address): \"http://istiod\"",
            "ISTIO_METAJSON_A: is not JSON",
            "CA_HEADER_A B: is no HTTP header",
            "PROXY_MODE: \"dedicated\" is not supported",
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
        ] {
            assert!(faults.iter().any(|f| f.starts_with(name)), "{name} in {faults:#?}");
        }
        assert_eq!(faults.len(), 15, "{faults:#?}");
        assert!(!faults.join("\n").contains("hunter2"), "{faults:#?}");
    }

    #[test]
    fn defaults_and_deadlines() {
        let config = check(&base(), &Environment::default(), MACHINE).unwrap();
        assert_eq!((config.connection.workers, config.connection.max_connections), (4, 8000));
        assert_eq!(config.drain_deadline, Duration::from_secs(5));
        for (grace, seconds) in [("30", 25), ("10", 9), ("1", 1), ("0", 1)] {
            let args = NodeArgs { grace_period: Some(grace.into()), ..base() };
            assert_eq!(
                check(&args, &Environment::default(), MACHINE).unwrap().drain_deadline,
                Duration::from_secs(seconds),
                "{grace}"
            );
        }
        // As the reference reads them: seconds where there is no unit, and M is a minute.
        let word = |w: &str| Some(w.to_owned());
        let args = NodeArgs {
            keepalive_time: word("1M"),
            keepalive_interval: word("10"),
            drain_deadline: word("3m31"),
            pool_idle: word("30S"),
            ..base()
        };
        let config = check(&args, &Environment::default(), MACHINE).unwrap();
        let keepalive = config.connection.sockets.legs.keepalive.unwrap();
        let all = [keepalive.time, keepalive.interval, config.drain_deadline, config.connection.pool.idle];
        assert_eq!(all.map(|duration| duration.as_secs()), [60, 10, 211, 30]);
        for (workers, expected) in [("0", 16), ("3", 3), ("50%", 8), ("1%", 1)] {
            let args = NodeArgs { workers: Some(workers.into()), ..base() };
            assert_eq!(
                check(&args, &Environment::default(), MACHINE).unwrap().connection.workers,
                expected,
                "{workers}"
            );
        }
    }

    #[test]
    fn dns_is_taken_unless_the_references_metadata_says_otherwise() {
        let capture = |args: NodeArgs, environment: &[(&str, &str)]| {
            check(&args, &environment.into(), MACHINE)
                .map(|config| config.dns.capture)
                .map_err(|faults| faults.to_string())
        };
        let flag = |value: &str| NodeArgs { dns_capture: Some(value.into()), ..base() };
        let proxy = |text: &str| NodeArgs { proxy_config: Some(text.into()), ..base() };
        assert_eq!(capture(base(), &[]), Ok(true));
        assert_eq!(capture(base(), &[("ISTIO_META_DNS_CAPTURE", "TRUE")]), Ok(true));
        assert_eq!(capture(base(), &[("ISTIO_META_DNS_CAPTURE", "false")]), Ok(false));
        assert_eq!(capture(base(), &[("ISTIO_META_DNS_CAPTURE", "anything")]), Ok(false), "as the reference reads it");
        assert_eq!(capture(flag("false"), &[]), Ok(false));
        assert_eq!(capture(proxy("proxyMetadata: {DNS_CAPTURE: \"false\"}"), &[]), Ok(false));
        assert_eq!(capture(base(), &[("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053")]), Ok(true));
        let elsewhere = capture(base(), &[("ISTIO_META_DNS_PROXY_ADDR", "0.0.0.0:53")]).unwrap_err();
        assert!(elsewhere.contains("ISTIO_META_DNS_PROXY_ADDR: \"0.0.0.0:53\""), "{elsewhere}");
        let bad = NodeArgs {
            cluster_domain: Some("bad domain".into()),
            dns_ttl: Some("0s".into()),
            dns_cache: Some("many".into()),
            ..base()
        };
        let faults = capture(bad, &[]).unwrap_err();
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
        let word = |w: &str| Some(w.to_owned());
        let args = NodeArgs {
            ca_address: word("istiod.istio-system.svc:15012"),
            xds_address: word("istiod.istio-system.svc:15012"),
            grace_period: word("30"),
            pod_name: word("ztunnel-x"),
            pod_namespace: word("istio-system"),
            node_name: word("node-1"),
            instance_ip: word("10.0.0.9"),
            service_account: word("ztunnel"),
            resource_cpu_limit: word("2500m"),
            resource_cpu_request: word("500m"),
            ..NodeArgs::default()
        };
        let environment = [
            ("ISTIO_META_CLUSTER_ID", "c1"),
            ("ISTIO_METAJSON_LABELS", r#"{"a": "b"}"#),
            ("XDS_HEADER_X-Tenant", "secret"),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("INPOD_ENABLED", "true"),
        ];
        let config = check(&args, &environment[..].into(), MACHINE).unwrap();
        let MeshSource::Xds(xds) = &config.mesh else { panic!("{:?}", config.mesh) };
        assert_eq!(xds.rpc.address.to_string(), "https://istiod.istio-system.svc:15012/");
        assert_eq!(xds.node_id, "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local");
        assert_eq!(xds.metadata["CLUSTER_ID"], "c1");
        assert_eq!(xds.metadata["LABELS"]["a"], "b");
        assert_eq!((xds.rpc.headers.len(), xds.rpc.cluster_id.as_str()), (1, "c1"));
        assert!(!format!("{xds:?}").contains("secret"));
        assert!(matches!(&config.ca, CaSource::Istio(rpc) if rpc.address == xds.rpc.address && rpc.headers.is_empty()));
        assert!(matches!(&config.node.source, Source::Agent(path) if path.ends_with("ztunnel.sock")));
        assert_eq!((config.node.redirect, config.connection.workers), (false, 3));
        assert!(config.own_pod.is_some());
        // From what it shows of its settings the same can be made, without the environment.
        let args = NodeArgs { auth_token: word("hunter2"), proxy_config: word("{proxyAdminPort: 1234}"), ..args };
        let shown = check(&args, &environment[..].into(), MACHINE).unwrap().settings;
        assert!(!format!("{shown:?}").contains("hunter2"));
        let again = check(&NodeArgs::of(&shown), &Environment::default(), MACHINE).unwrap();
        assert_eq!(again.admin.admin_port, 1234);
        assert!(matches!(&again.mesh, MeshSource::Xds(again) if again.rpc.address == xds.rpc.address));
        assert!(matches!(&again.node.source, Source::Agent(path) if path.ends_with("ztunnel.sock")));
        assert_eq!(again.settings, shown);
    }
}
