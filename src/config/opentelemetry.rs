//! Settings of the export to an OpenTelemetry collector. What may contain a secret is never repeated in a fault.

use super::checker::Checker;
use super::kind::{Kind, Number, Words};
use super::setting::{About, Setting};
use super::settings::node;
use super::settings::opentelemetry::{self as settings, Root};
use crate::otlp::transport::{Endpoint, Protocol};
use crate::otlp::{Config, SignalConfig};
use crate::rpc::tls::Roots;
use crate::telemetry::queue::Limits;
use http::header::HeaderName;
use http::{HeaderValue, Uri};
use opentelemetry_sdk::trace::Sampler;
use std::time::Duration;

/// The settings of one signal.
struct Signal {
    exporter: &'static Setting<Words<bool>>,
    endpoint: &'static Setting<super::kind::Text>,
    path: &'static str,
    protocol: &'static Setting<Words<Protocol>>,
    headers: &'static Setting<super::kind::Text>,
    timeout: &'static Setting<Number<u64>>,
    certificate: &'static Setting<super::kind::File>,
    entries: &'static Setting<Number<usize>>,
    batch: &'static Setting<Number<usize>>,
    delay: &'static Setting<Number<u64>>,
}

static TRACES: Signal = Signal {
    exporter: &settings::TRACES_EXPORTER,
    endpoint: &settings::TRACES_ENDPOINT,
    path: "v1/traces",
    protocol: &settings::TRACES_PROTOCOL,
    headers: &settings::TRACES_HEADERS,
    timeout: &settings::TRACES_TIMEOUT,
    certificate: &settings::TRACES_CERTIFICATE,
    entries: &settings::BSP_MAX_QUEUE_SIZE,
    batch: &settings::BSP_MAX_EXPORT_BATCH_SIZE,
    delay: &settings::BSP_SCHEDULE_DELAY,
};

static LOGS: Signal = Signal {
    exporter: &settings::LOGS_EXPORTER,
    endpoint: &settings::LOGS_ENDPOINT,
    path: "v1/logs",
    protocol: &settings::LOGS_PROTOCOL,
    headers: &settings::LOGS_HEADERS,
    timeout: &settings::LOGS_TIMEOUT,
    certificate: &settings::LOGS_CERTIFICATE,
    entries: &settings::BLRP_MAX_QUEUE_SIZE,
    batch: &settings::BLRP_MAX_EXPORT_BATCH_SIZE,
    delay: &settings::BLRP_SCHEDULE_DELAY,
};

/// Reads them all. `None` if nothing is exported.
pub(super) fn otlp(c: &mut Checker<'_>, cluster_id: &str) -> Option<Config> {
    let sampler = sampler(c);
    let resource = resource(c, cluster_id);
    let (traces, logs) = (signal(c, &TRACES), signal(c, &LOGS));
    let is_off = c.read(&settings::SDK_DISABLED) || (traces.is_none() && logs.is_none());
    (!is_off).then_some(Config { traces, logs, sampler, resource })
}

fn sampler(c: &mut Checker<'_>) -> Sampler {
    let (is_parent_based, root) = c.read_or(&settings::SAMPLER, (true, Root::All));
    let ratio = c.read(&settings::SAMPLER_ARG);
    let root = match root {
        Root::All => Sampler::AlwaysOn,
        Root::None => Sampler::AlwaysOff,
        Root::Share => Sampler::TraceIdRatioBased(ratio),
    };
    if is_parent_based { Sampler::ParentBased(Box::new(root)) } else { root }
}

/// What is known of this daemon, and what is set.
fn resource(c: &mut Checker<'_>, cluster_id: &str) -> Vec<(String, String)> {
    let mut all = vec![("service.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
    let mut put = |key: &str, value: &str| {
        all.retain(|(other, _)| other != key);
        if !value.is_empty() {
            all.push((key.to_owned(), value.to_owned()));
        }
    };
    put("k8s.cluster.name", cluster_id);
    for (key, setting) in [
        ("k8s.node.name", &node::NODE_NAME),
        ("k8s.namespace.name", &node::POD_NAMESPACE),
        ("k8s.pod.name", &node::POD_NAME),
    ] {
        put(key, c.text(setting).unwrap_or_default());
    }
    put("service.name", c.text(&settings::SERVICE_NAME).unwrap_or_default());
    match pairs(c.text(&settings::RESOURCE_ATTRIBUTES).unwrap_or_default()) {
        Some(given) => {
            let is_named = c.given(&settings::SERVICE_NAME).is_some_and(|name| !name.is_empty());
            for (key, value) in given.iter().filter(|(key, _)| key != "service.name" || !is_named) {
                put(key, value);
            }
        }
        None => {
            c.fault(&settings::RESOURCE_ATTRIBUTES.about, "is not valid: expected key=value pairs, separated by commas")
        }
    }
    all
}

/// The settings of one signal. `None` if it is not exported.
fn signal(c: &mut Checker<'_>, signal: &Signal) -> Option<SignalConfig> {
    let is_on = c.read_or(signal.exporter, true);
    let protocol = own_or(c, signal.protocol, &settings::PROTOCOL).unwrap_or(Protocol::Http);
    let timeout = own_or(c, signal.timeout, &settings::TIMEOUT).unwrap_or(10_000);
    let entries = c.read(signal.entries);
    let limits = Limits {
        entries,
        batch: c.read(signal.batch).min(entries),
        delay: Duration::from_millis(c.read(signal.delay)),
    };
    let (own, common) = (signal.headers, &settings::HEADERS);
    let headers = headers(c, if c.text(own).is_some() { own } else { common });
    let roots = c.path(signal.certificate).or_else(|| c.path(&settings::CERTIFICATE));
    let roots = roots.map_or(Roots::System, Roots::File);
    let uri = match (c.text(signal.endpoint), c.text(&settings::ENDPOINT)) {
        (Some(own), _) => endpoint(c, &signal.endpoint.about, own, ""),
        (None, Some(common)) => {
            let path = if protocol == Protocol::Http { signal.path } else { "" };
            endpoint(c, &settings::ENDPOINT.about, common, path)
        }
        (None, None) => None,
    };
    let endpoint = Endpoint { uri: uri?, protocol, headers, timeout: Duration::from_millis(timeout), roots };
    is_on.then_some(SignalConfig { endpoint, limits })
}

/// The value of a signal's own setting, or else of the common one.
fn own_or<K: Kind>(c: &mut Checker<'_>, own: &Setting<K>, common: &Setting<K>) -> Option<K::Value> {
    let common = c.optional(common);
    c.optional(own).or(common)
}

/// Reads an address, and adds a path.
fn endpoint(c: &mut Checker<'_>, about: &About, text: &str, path: &str) -> Option<Uri> {
    let text = text.trim();
    let whole = if path.is_empty() { text.to_owned() } else { format!("{}/{path}", text.trim_end_matches('/')) };
    let uri = whole.parse::<Uri>().ok().filter(|uri| {
        let has_scheme = matches!(uri.scheme_str(), Some("http" | "https"));
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        has_scheme && !uri.host().unwrap_or_default().is_empty() && !authority.contains('@') && uri.query().is_none()
    });
    if uri.is_none() {
        // It may contain a password, and is not repeated.
        c.fault(
            about,
            "is not valid: expected http://host:port or https://host:port, perhaps with a path, without user and query",
        );
    }
    uri
}

/// Headers that belong to the transport. One from outside would make every request wrong.
const RESERVED: [&str; 6] = ["connection", "content-length", "content-type", "host", "te", "transfer-encoding"];

/// Reads headers.
fn headers(c: &mut Checker<'_>, setting: &Setting<super::kind::Text>) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = Vec::new();
    for (name, value) in pairs(c.text(setting).unwrap_or_default()).unwrap_or_else(|| vec![Default::default()]) {
        match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            (Ok(name), Ok(_)) if RESERVED.contains(&name.as_str()) => {
                c.fault(&setting.about, &format!("the header {name} is not allowed: the exporter sets it"));
            }
            (Ok(name), Ok(mut value)) => {
                value.set_sensitive(true);
                headers.push((name, value));
            }
            // The value may be a secret and is not repeated.
            _ => c.fault(&setting.about, "is not valid: expected name=value pairs, separated by commas"),
        }
    }
    headers
}

/// Reads `key=value` pairs, separated by commas, with percent-encoding (W3C Baggage, without its properties).
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let read = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let (key, value) = (decoded(key.trim())?, decoded(value.trim())?);
        (!key.is_empty()).then_some((key, value))
    };
    text.split(',').filter(|pair| !pair.trim().is_empty()).map(read).collect()
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::args::NodeArgs;

    fn read(given: &[(&str, &str)]) -> (Option<Config>, Vec<String>) {
        let args = NodeArgs::from(given);
        let mut checker = Checker::new(&args);
        let config = otlp(&mut checker, "c1");
        (config, checker.faults)
    }

    #[test]
    fn nothing_is_exported_unless_there_is_an_endpoint() {
        for given in [
            &[][..],
            &[("OTEL_TRACES_EXPORTER", "otlp"), ("OTEL_EXPORTER_OTLP_HEADERS", "a=b")],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1"), ("OTEL_SDK_DISABLED", "true")],
            &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:1"), ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            let (config, faults) = read(given);
            assert!(config.is_none() && faults.is_empty(), "{given:?}: {config:?} {faults:?}");
        }
    }

    #[test]
    fn a_signal_has_its_own_settings_or_the_common_ones() {
        let (config, faults) = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c:4318/base/"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://[::1]:4317"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1%2C2, b = x=y"),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "c=3"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "100"),
            ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "200"),
            ("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", "/roots"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "10"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        let config = config.unwrap();
        let (traces, logs) = (config.traces.unwrap(), config.logs.unwrap());
        assert_eq!(faults, Vec::<String>::new());
        assert_eq!(traces.endpoint.uri.to_string(), "https://c:4318/base/v1/traces");
        assert_eq!(logs.endpoint.uri.to_string(), "http://[::1]:4317/");
        assert_eq!((traces.endpoint.protocol, logs.endpoint.protocol), (Protocol::Http, Protocol::Grpc));
        let headers = |signal: &SignalConfig| {
            let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
            signal.endpoint.headers.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect::<Vec<_>>()
        };
        assert_eq!((headers(&traces), headers(&logs)), (vec!["a: 1,2".into(), "b: x=y".into()], vec!["c: 3".into()]));
        let timeouts = (traces.endpoint.timeout, logs.endpoint.timeout);
        assert_eq!(timeouts, (Duration::from_millis(100), Duration::from_millis(200)));
        assert!(matches!((&traces.endpoint.roots, &logs.endpoint.roots), (Roots::System, Roots::File(_))));
        assert_eq!((traces.limits.entries, traces.limits.batch, logs.limits.batch), (10, 10, 512));
        assert_eq!(format!("{:?}", config.sampler), "ParentBased(TraceIdRatioBased(0.25))");
        let shown = format!("{:?}", logs.endpoint);
        assert_eq!(shown, "Endpoint(http://[::1]:4317/, Grpc, 1 headers)");
    }

    #[test]
    fn a_resource_says_what_is_known_and_what_is_set() {
        let of = |given: &[(&str, &str)]| {
            let all = [&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1"), ("POD_NAME", "culvert-x")], given].concat();
            let mut resource = read(&all).0.unwrap().resource;
            resource.retain(|(key, _)| key != "service.version");
            resource.into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of(&[]), "k8s.cluster.name=c1 k8s.pod.name=culvert-x service.name=culvert");
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "k8s.cluster.name=other,service.name=mesh,team=a%20b");
        assert_eq!(of(&[attributes]), "k8s.pod.name=culvert-x k8s.cluster.name=other service.name=mesh team=a b");
        let both = [attributes, ("OTEL_SERVICE_NAME", "named")];
        assert_eq!(of(&both), "k8s.pod.name=culvert-x service.name=named k8s.cluster.name=other team=a b");
    }

    #[test]
    fn faults_repeat_nothing_that_may_be_secret() {
        for (name, text) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hunter2@collector:4318"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317?token=hunter2"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a b=hunter2"),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "a=hunter2%0a"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Content-Type=hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,te=hunter2"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=hunter2%"),
            ("OTEL_RESOURCE_ATTRIBUTES", "hunter2"),
        ] {
            let (_, faults) = read(&[(name, text)]);
            assert!(
                !faults.is_empty() && faults.iter().all(|fault| fault.starts_with(name)),
                "{name}={text}: {faults:?}"
            );
            assert!(!faults.iter().any(|fault| fault.contains("hunter2")), "{faults:?}");
            let says_why =
                |fault: &String| fault.contains(" is not valid: expected ") || fault.contains(" is not allowed: ");
            assert!(faults.iter().all(says_why), "{faults:?}");
            assert_eq!(faults.len(), 1, "a setting that both signals share has its fault once: {faults:?}");
        }
    }
}
