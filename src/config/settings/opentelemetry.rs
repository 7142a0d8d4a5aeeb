//! Settings of the export to an OpenTelemetry collector, under OpenTelemetry's own names, defaults and meanings.

use crate::config::Config;
use crate::config::kind::{Custom, File, Number, Switch, Text, Words};
use crate::config::setting::{Described, Setting};
use crate::otlp::SignalConfig;
use crate::otlp::transport::Protocol;
use serde_json::{Value, json};

/// How OTLP is spoken.
const PROTOCOLS: Words<Protocol> = Words(&[("grpc", Protocol::Grpc), ("http/protobuf", Protocol::Http)]);
/// Whether a signal is exported.
const EXPORTERS: Words<bool> = Words(&[("otlp", true), ("none", false)]);
/// How traces without a decision of a peer are sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// All of them.
    All,
    /// None of them.
    None,
    /// A share of them.
    Share,
}

/// Samplers: whether they follow the decision of a peer, and what they decide where there is none.
const SAMPLERS: Words<(bool, Root)> = Words(&[
    ("always_on", (false, Root::All)),
    ("always_off", (false, Root::None)),
    ("traceidratio", (false, Root::Share)),
    ("parentbased_always_on", (true, Root::All)),
    ("parentbased_always_off", (true, Root::None)),
    ("parentbased_traceidratio", (true, Root::Share)),
]);

/// A time in milliseconds.
const MILLISECONDS: Number<u64> = Number(1, 3_600_000);
/// Entries of a queue or batch.
const ENTRIES: Number<usize> = Number(1, 1_000_000);

/// A share of traces.
const RATIO: Custom<f64> = Custom {
    expected: "a number from 0 to 1",
    read: |text| text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).ok_or_else(|| RATIO.expected.into()),
};

/// The collector of a signal, as it is shown.
fn shown(signal: Option<&SignalConfig>) -> Value {
    json!(signal.map(|signal| signal.endpoint.uri.to_string()))
}

fn traces(c: &Config) -> Option<&SignalConfig> {
    c.otlp.as_ref()?.traces.as_ref()
}

fn logs(c: &Config) -> Option<&SignalConfig> {
    c.otlp.as_ref()?.logs.as_ref()
}

settings! {
    ENDPOINT: Text = Setting::new("otel-exporter-otlp-endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT", Text)
        .or_else("nothing is exported")
        .help(
            "Address of an OpenTelemetry collector: `http://` or `https://`, host, port, and perhaps a path. It gets a span and a log record \
             for each connection. With `http/protobuf`, `/v1/traces` and `/v1/logs` are added to the path.",
        )
        .secret();
    TRACES_ENDPOINT: Text = Setting::new("otel-exporter-otlp-traces-endpoint", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", Text)
        .or_else("`OTEL_EXPORTER_OTLP_ENDPOINT`")
        .help("Address of the collector for spans, to whose path nothing is added.")
        .secret()
        .shown("otlpTracesEndpoint", |c| shown(traces(c)));
    LOGS_ENDPOINT: Text = Setting::new("otel-exporter-otlp-logs-endpoint", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", Text)
        .or_else("`OTEL_EXPORTER_OTLP_ENDPOINT`")
        .help("Address of the collector for log records, to whose path nothing is added.")
        .secret()
        .shown("otlpLogsEndpoint", |c| shown(logs(c)));
    PROTOCOL: Words<Protocol> = Setting::new("otel-exporter-otlp-protocol", "OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOLS)
        .or("http/protobuf")
        .help("How the collector is spoken to. Collectors listen for gRPC on port 4317 and for HTTP on port 4318.");
    TRACES_PROTOCOL: Words<Protocol> = Setting::new("otel-exporter-otlp-traces-protocol", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", PROTOCOLS)
        .or_else("`OTEL_EXPORTER_OTLP_PROTOCOL`")
        .help("The same for spans.");
    LOGS_PROTOCOL: Words<Protocol> = Setting::new("otel-exporter-otlp-logs-protocol", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", PROTOCOLS)
        .or_else("`OTEL_EXPORTER_OTLP_PROTOCOL`")
        .help("The same for log records.");
    HEADERS: Text = Setting::new("otel-exporter-otlp-headers", "OTEL_EXPORTER_OTLP_HEADERS", Text)
        .help("Headers of every request to the collector: `name=value` pairs, separated by commas, with percent-encoding. Their values are shown nowhere.")
        .secret();
    TRACES_HEADERS: Text = Setting::new("otel-exporter-otlp-traces-headers", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", Text)
        .help("Headers of requests with spans. They take the place of `OTEL_EXPORTER_OTLP_HEADERS`.")
        .secret();
    LOGS_HEADERS: Text = Setting::new("otel-exporter-otlp-logs-headers", "OTEL_EXPORTER_OTLP_LOGS_HEADERS", Text)
        .help("Headers of requests with log records. They take the place of `OTEL_EXPORTER_OTLP_HEADERS`.")
        .secret();
    TIMEOUT: Number<u64> = Setting::new("otel-exporter-otlp-timeout", "OTEL_EXPORTER_OTLP_TIMEOUT", MILLISECONDS)
        .or("10000")
        .help("How long one attempt to send may take, in milliseconds.");
    TRACES_TIMEOUT: Number<u64> = Setting::new("otel-exporter-otlp-traces-timeout", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", MILLISECONDS)
        .or_else("`OTEL_EXPORTER_OTLP_TIMEOUT`")
        .help("The same for spans.");
    LOGS_TIMEOUT: Number<u64> = Setting::new("otel-exporter-otlp-logs-timeout", "OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", MILLISECONDS)
        .or_else("`OTEL_EXPORTER_OTLP_TIMEOUT`")
        .help("The same for log records.");
    CERTIFICATE: File = Setting::new("otel-exporter-otlp-certificate", "OTEL_EXPORTER_OTLP_CERTIFICATE", File)
        .or_else("the roots of the operating system")
        .help("File of root certificates that an `https` collector is verified against.");
    TRACES_CERTIFICATE: File = Setting::new("otel-exporter-otlp-traces-certificate", "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", File)
        .or_else("`OTEL_EXPORTER_OTLP_CERTIFICATE`")
        .help("The same for spans.");
    LOGS_CERTIFICATE: File = Setting::new("otel-exporter-otlp-logs-certificate", "OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", File)
        .or_else("`OTEL_EXPORTER_OTLP_CERTIFICATE`")
        .help("The same for log records.");
    TRACES_EXPORTER: Words<bool> = Setting::new("otel-traces-exporter", "OTEL_TRACES_EXPORTER", EXPORTERS)
        .or("otlp")
        .help("Whether spans are exported.");
    LOGS_EXPORTER: Words<bool> = Setting::new("otel-logs-exporter", "OTEL_LOGS_EXPORTER", EXPORTERS)
        .or("otlp")
        .help("Whether log records are exported.");
    SDK_DISABLED: Switch = Setting::new("otel-sdk-disabled", "OTEL_SDK_DISABLED", Switch)
        .or("false")
        .help("Export nothing, whatever else is set.");
    SAMPLER: Words<(bool, Root)> = Setting::new("otel-traces-sampler", "OTEL_TRACES_SAMPLER", SAMPLERS)
        .or("parentbased_always_on")
        .help(
            "Which connections get a span. Those that begin with `parentbased_` follow the decision that the peer's `traceparent` header \
             states; peers that record no traces, such as ztunnel, state that theirs are not sampled.",
        )
        .shown("otelTracesSampler", |c| json!(c.otlp.as_ref().map(|otlp| format!("{:?}", otlp.sampler))));
    SAMPLER_ARG: Custom<f64> = Setting::new("otel-traces-sampler-arg", "OTEL_TRACES_SAMPLER_ARG", RATIO)
        .or("1")
        .help("Share of the traces that `traceidratio` and `parentbased_traceidratio` sample.");
    SERVICE_NAME: Text = Setting::new("otel-service-name", "OTEL_SERVICE_NAME", Text)
        .or("culvert")
        .help("The resource attribute `service.name`.");
    RESOURCE_ATTRIBUTES: Text = Setting::new("otel-resource-attributes", "OTEL_RESOURCE_ATTRIBUTES", Text)
        .help(
            "More resource attributes: `key=value` pairs, separated by commas, with percent-encoding. They take precedence over those that \
             the daemon knows: `service.version`, `k8s.cluster.name`, `k8s.node.name`, `k8s.namespace.name` and `k8s.pod.name`.",
        )
        .shown("otelResource", |c| json!(c.otlp.as_ref().map(|otlp| otlp.resource.iter().cloned().collect::<std::collections::BTreeMap<_, _>>())));
    BSP_SCHEDULE_DELAY: Number<u64> = Setting::new("otel-bsp-schedule-delay", "OTEL_BSP_SCHEDULE_DELAY", MILLISECONDS)
        .or("5000")
        .help("How long a span may wait for the others of its batch, in milliseconds.");
    BSP_MAX_QUEUE_SIZE: Number<usize> = Setting::new("otel-bsp-max-queue-size", "OTEL_BSP_MAX_QUEUE_SIZE", ENTRIES)
        .or("2048")
        .help("Spans that may wait. Those beyond are dropped and counted.");
    BSP_MAX_EXPORT_BATCH_SIZE: Number<usize> = Setting::new("otel-bsp-max-export-batch-size", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", ENTRIES)
        .or("512")
        .help("Spans of a batch. If this is more than may wait, it is as many.");
    BLRP_SCHEDULE_DELAY: Number<u64> = Setting::new("otel-blrp-schedule-delay", "OTEL_BLRP_SCHEDULE_DELAY", MILLISECONDS)
        .or("1000")
        .help("How long a log record may wait for the others of its batch, in milliseconds.");
    BLRP_MAX_QUEUE_SIZE: Number<usize> = Setting::new("otel-blrp-max-queue-size", "OTEL_BLRP_MAX_QUEUE_SIZE", ENTRIES)
        .or("2048")
        .help("Log records that may wait. Those beyond are dropped and counted.");
    BLRP_MAX_EXPORT_BATCH_SIZE: Number<usize> = Setting::new("otel-blrp-max-export-batch-size", "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", ENTRIES)
        .or("512")
        .help("Log records of a batch. If this is more than may wait, it is as many.");
}
