//! Connections as spans and log records of OTLP. Names of attributes are OpenTelemetry's semantic conventions where
//! those have one, and begin with `culvert.` where they do not.

use crate::connection::report::export::{Export, Signal};
use crate::connection::report::{Direction, Failure};
use crate::mesh::{SpiffeName, Workload};
use bytes::Bytes;
use opentelemetry::trace::SpanId;
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::{Event, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};
use prost::Message;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A batch that is ready to be sent.
#[derive(Debug)]
pub enum Payload {
    /// Spans.
    Traces(ExportTraceServiceRequest),
    /// Log records.
    Logs(ExportLogsServiceRequest),
}

/// What a collector said about a batch that it accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Spans or records that it refused.
    pub rejected: u64,
    /// Its words about that.
    pub message: String,
}

impl Payload {
    /// Encodes a batch.
    pub fn of(signal: Signal, batch: &[Arc<Export>], resource: &[(String, String)]) -> Self {
        let resource = Some(Resource {
            attributes: resource.iter().map(|(key, value)| attribute(key, text(value))).collect(),
            ..Resource::default()
        });
        let scope = Some(InstrumentationScope {
            name: "culvert".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        });
        match signal {
            Signal::Traces => {
                let spans = batch.iter().map(|export| span(export)).collect();
                let scope_spans = vec![ScopeSpans { scope, spans, ..ScopeSpans::default() }];
                let all = ResourceSpans { resource, scope_spans, ..ResourceSpans::default() };
                Self::Traces(ExportTraceServiceRequest { resource_spans: vec![all] })
            }
            Signal::Logs => {
                let log_records = batch.iter().map(|export| record(export)).collect();
                let scope_logs = vec![ScopeLogs { scope, log_records, ..ScopeLogs::default() }];
                let all = ResourceLogs { resource, scope_logs, ..ResourceLogs::default() };
                Self::Logs(ExportLogsServiceRequest { resource_logs: vec![all] })
            }
        }
    }

    /// The body of an HTTP request.
    pub(super) fn encoded(&self) -> Bytes {
        match self {
            Self::Traces(request) => request.encode_to_vec().into(),
            Self::Logs(request) => request.encode_to_vec().into(),
        }
    }

    /// Reads the body of an HTTP answer.
    pub(super) fn answer(&self, body: &[u8]) -> Option<Accepted> {
        match self {
            Self::Traces(_) => ExportTraceServiceResponse::decode(body).ok().map(Into::into),
            Self::Logs(_) => ExportLogsServiceResponse::decode(body).ok().map(Into::into),
        }
    }
}

impl From<ExportTraceServiceResponse> for Accepted {
    fn from(answer: ExportTraceServiceResponse) -> Self {
        let partial = answer.partial_success.unwrap_or_default();
        Self { rejected: u64::try_from(partial.rejected_spans).unwrap_or(0), message: partial.error_message }
    }
}

impl From<ExportLogsServiceResponse> for Accepted {
    fn from(answer: ExportLogsServiceResponse) -> Self {
        let partial = answer.partial_success.unwrap_or_default();
        Self { rejected: u64::try_from(partial.rejected_log_records).unwrap_or(0), message: partial.error_message }
    }
}

/// The span of a connection: from its accept to its end.
fn span(export: &Export) -> Span {
    let ended = &export.ended;
    let begin = ended.at.checked_sub(ended.duration).unwrap_or(ended.at);
    let opened = ended.stages.is_open().then(|| Event {
        time_unix_nano: nanos(begin + ended.stages.until()),
        name: "culvert.open".into(),
        ..Event::default()
    });
    let status =
        ended.failure.as_ref().map(|failure| Status { message: failure.to_string(), code: StatusCode::Error as i32 });
    let (kind, name) = match ended.direction {
        Direction::Outbound => (SpanKind::Client, "connection outbound"),
        Direction::Inbound => (SpanKind::Server, "connection inbound"),
    };
    let context = &export.trace.context;
    let parent = Some(export.trace.parent).filter(|parent| *parent != SpanId::INVALID);
    Span {
        trace_id: context.trace_id().to_bytes().to_vec(),
        span_id: context.span_id().to_bytes().to_vec(),
        parent_span_id: parent.map_or_else(Vec::new, |parent| parent.to_bytes().to_vec()),
        flags: context.trace_flags().to_u8().into(),
        name: name.into(),
        kind: kind as i32,
        start_time_unix_nano: nanos(begin),
        end_time_unix_nano: nanos(ended.at),
        attributes: attributes(export),
        events: opened.into_iter().collect(),
        status,
        ..Span::default()
    }
}

/// The log record of a connection: what the line in the access log says.
fn record(export: &Export) -> LogRecord {
    let ended = &export.ended;
    let (severity, word) = match ended.failure {
        None => (SeverityNumber::Info, "INFO"),
        Some(_) => (SeverityNumber::Error, "ERROR"),
    };
    let context = &export.trace.context;
    let mut attributes = attributes(export);
    attributes.push(attribute("culvert.duration", seconds(ended.duration)));
    if let Some(failure) = &ended.failure {
        attributes.push(attribute("error.message", text(&failure.to_string())));
    }
    LogRecord {
        time_unix_nano: nanos(ended.at),
        observed_time_unix_nano: nanos(ended.at),
        severity_number: severity as i32,
        severity_text: word.into(),
        body: Some(AnyValue { value: Some(text("connection complete")) }),
        attributes,
        flags: context.trace_flags().to_u8().into(),
        trace_id: context.trace_id().to_bytes().to_vec(),
        span_id: context.span_id().to_bytes().to_vec(),
        event_name: "culvert.connection".into(),
        ..LogRecord::default()
    }
}

/// What is known of a connection.
fn attributes(export: &Export) -> Vec<KeyValue> {
    let ended = &export.ended;
    let mut all = Attributes(Vec::with_capacity(40));
    let actual = ended.ends.as_ref().map(|ends| ends.actual);
    let asked = match ended.direction {
        Direction::Outbound => ended.destination.or(actual),
        // The destination of a tunnel says less: it is the pod's HBONE port.
        Direction::Inbound => actual.or(ended.destination),
    };
    all.put("network.transport", text("tcp"));
    all.put("network.type", text(if ended.source.is_ipv4() { "ipv4" } else { "ipv6" }));
    all.address("source", Some(ended.source));
    all.address("destination", asked);
    let host = export.service.as_ref().map(|service| service.key.hostname.to_string());
    if let Some(host) = host.or_else(|| asked.map(|asked| asked.ip().to_string())) {
        all.put("server.address", Value::StringValue(host));
    }
    if let Some(asked) = asked {
        all.put("server.port", Value::IntValue(asked.port().into()));
    }
    // The other end of the leg between nodes: of the tunnel or connection that leaves this node, or arrives at it.
    all.address(
        "network.peer",
        match ended.direction {
            Direction::Outbound => actual,
            Direction::Inbound => Some(ended.source),
        },
    );
    if let Some(tls) = &export.tls {
        all.put("tls.protocol.name", text("tls"));
        all.put("tls.protocol.version", text(tls.version.trim_start_matches("TLSv").replace('_', ".").as_str()));
        all.put("tls.cipher", text(&tls.cipher.replace("TLS13_", "TLS_")));
        all.put("tls.curve", text(tls.key_exchange));
    }
    all.put("k8s.pod.uid", text(&ended.pod));
    all.put("culvert.direction", text(ended.direction.word()));
    all.put("culvert.bytes.sent", count(ended.bytes.0));
    all.put("culvert.bytes.received", count(ended.bytes.1));
    let identity = |name: Option<&SpiffeName>| name.map(ToString::to_string);
    let ends = ended.ends.as_ref();
    all.workload("culvert.source", export.source.as_deref(), identity(ends.and_then(|e| e.source_identity.as_ref())));
    let proven = identity(ends.and_then(|e| e.destination_identity.as_ref()));
    all.workload("culvert.destination", export.destination.as_deref(), proven);
    if let Some(ends) = ends {
        all.put("culvert.encrypted", Value::BoolValue(ends.is_encrypted));
        all.some("culvert.rule", ends.rule.as_deref());
    }
    let authority = export.authority.as_ref().map(ToString::to_string);
    all.some("culvert.authority", authority.as_deref());
    all.some("culvert.tried", ended.tried.as_deref());
    for (stage, took) in ended.stages.all() {
        all.put(&format!("culvert.stage.{}", stage.word()), seconds(took));
    }
    if let Some(failure) = &ended.failure {
        all.failure(failure);
    }
    all.0
}

/// Attributes so far.
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn put(&mut self, key: &str, value: Value) {
        self.0.push(attribute(key, value));
    }

    fn some(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            self.put(key, text(value));
        }
    }

    fn address(&mut self, prefix: &str, address: Option<SocketAddr>) {
        if let Some(address) = address {
            self.put(&format!("{prefix}.address"), text(&address.ip().to_string()));
            self.put(&format!("{prefix}.port"), Value::IntValue(address.port().into()));
        }
    }

    /// The workload of an end, and its identity.
    fn workload(&mut self, prefix: &str, workload: Option<&Workload>, identity: Option<String>) {
        self.some(&format!("{prefix}.identity"), identity.as_deref());
        let Some(workload) = workload else { return };
        let kind = format!("k8s.{}.name", workload.workload_type.as_str());
        for (key, value) in [
            ("k8s.cluster.name", &workload.cluster_id),
            ("k8s.namespace.name", &workload.namespace),
            ("k8s.node.name", &workload.node),
            ("k8s.pod.name", &workload.name),
            (kind.as_str(), &workload.workload_name),
            ("service.name", &workload.canonical_name),
            ("service.version", &workload.canonical_revision),
        ] {
            // A pod without owner is its own workload.
            if key != "k8s.pod.name" || workload.workload_type.as_str() != "pod" || workload.workload_name.is_empty() {
                self.some(&format!("{prefix}.{key}"), Some(value));
            }
        }
    }

    fn failure(&mut self, failure: &Failure) {
        self.put("error.type", text(failure.word()));
        self.put("culvert.reason", text(failure.word()));
        self.put("culvert.fault", text(failure.fault().word()));
        self.put("culvert.response_flag", text(failure.flag()));
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(text: &str) -> Value {
    Value::StringValue(text.into())
}

fn count(count: u64) -> Value {
    Value::IntValue(i64::try_from(count).unwrap_or(i64::MAX))
}

fn seconds(time: Duration) -> Value {
    Value::DoubleValue(time.as_secs_f64())
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
