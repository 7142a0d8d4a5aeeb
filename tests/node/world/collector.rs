//! An OpenTelemetry collector: OTLP by gRPC or by protobuf over HTTP, in TLS or not, which misbehaves on demand.

use super::inside;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Wire;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::future::poll_fn;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// Where a collector listens for gRPC, and where for HTTP.
pub const GRPC: u16 = 4317;
pub const HTTP: u16 = 4318;

/// What it does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Accept,
    /// Never answers a request.
    Silent,
    /// Accepts connections and never reads from them.
    Stalled,
    /// Refuses requests with this HTTP status.
    Refuse(u16),
}

/// What it has received.
#[derive(Default)]
pub struct Received {
    /// Spans and log records, each with the attributes of its resource.
    pub spans: Vec<(Span, Value)>,
    pub logs: Vec<(LogRecord, Value)>,
    /// Paths and headers of requests.
    pub requests: Vec<(String, HeaderMap)>,
    pub connections: usize,
}

#[derive(Clone)]
struct Shared {
    received: Arc<Mutex<Received>>,
    mood: Arc<Mutex<Mood>>,
}

pub struct Collector {
    shared: Shared,
    running: Option<Runtime>,
    ns: String,
    tls: Option<TlsAcceptor>,
}

impl Collector {
    /// Listens in a namespace.
    pub fn start(ns: &str, tls: Option<TlsAcceptor>) -> Self {
        let shared = Shared { received: Arc::default(), mood: Arc::new(Mutex::new(Mood::Accept)) };
        let mut collector = Self { shared, running: None, ns: ns.to_owned(), tls };
        collector.up();
        collector
    }

    pub fn up(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        for port in [GRPC, HTTP] {
            let listener = inside(&self.ns, || {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                let any: SocketAddr = ([0, 0, 0, 0], port).into();
                socket.bind(&any.into()).unwrap();
                socket.listen(128).unwrap();
                TcpListener::from(socket)
            });
            listener.set_nonblocking(true).unwrap();
            let (shared, tls) = (self.shared.clone(), self.tls.clone());
            runtime.spawn(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                loop {
                    let Ok((stream, _)) = listener.accept().await else { continue };
                    tokio::spawn(accepted(shared.clone(), tls.clone(), stream, port == GRPC));
                }
            });
        }
        self.running = Some(runtime);
    }

    /// Acts as if the process had been killed.
    pub fn down(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_timeout(std::time::Duration::from_secs(60));
        }
    }

    pub fn received(&self) -> MutexGuard<'_, Received> {
        self.shared.received()
    }

    pub fn mood(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    /// Spans of a direction with their attributes, as they are now.
    pub fn spans(&self, name: &str) -> Vec<(Span, Value)> {
        let received = self.received();
        let found = received.spans.iter().filter(|(span, _)| span.name == name);
        found.map(|(span, _)| (span.clone(), attributes(&span.attributes))).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }
}

async fn accepted(shared: Shared, tls: Option<TlsAcceptor>, stream: tokio::net::TcpStream, grpc: bool) {
    shared.received().connections += 1;
    if shared.mood() == Mood::Stalled {
        std::future::pending::<()>().await;
    }
    match tls {
        None => serve(shared, stream, grpc).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                serve(shared, stream, grpc).await;
            }
        }
    }
}

#[derive(Clone)]
struct Executor;

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, work: F) {
        tokio::spawn(work);
    }
}

async fn serve(shared: Shared, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, grpc: bool) {
    let service = hyper::service::service_fn(move |request| answer(shared.clone(), request, grpc));
    // A client may leave.
    if grpc {
        let mut builder = hyper::server::conn::http2::Builder::new(Executor);
        let _ = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }
}

/// A message and the trailers behind it.
struct Answer(Vec<Frame<Bytes>>);

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop().map(Ok))
    }
}

async fn answer(shared: Shared, request: Request<Incoming>, grpc: bool) -> Result<Response<Answer>, Infallible> {
    let (parts, mut body) = request.into_parts();
    let mut bytes = Vec::new();
    while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        bytes.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
    }
    let (path, mood) = (parts.uri.path().to_owned(), shared.mood());
    shared.received().requests.push((path.clone(), parts.headers));
    match mood {
        Mood::Accept => {}
        Mood::Refuse(status) => {
            let status = StatusCode::from_u16(status).unwrap();
            return Ok(Response::builder().status(status).body(Answer(Vec::new())).unwrap());
        }
        Mood::Silent | Mood::Stalled => std::future::pending().await,
    }
    let message = if grpc { &bytes[5..] } else { &bytes[..] };
    if path.contains("race") {
        let request = ExportTraceServiceRequest::decode(message).unwrap();
        for all in request.resource_spans {
            let resource = attributes(&all.resource.unwrap_or_default().attributes);
            let spans = all.scope_spans.into_iter().flat_map(|scope| scope.spans);
            shared.received().spans.extend(spans.map(|span| (span, resource.clone())));
        }
    } else {
        let request = ExportLogsServiceRequest::decode(message).unwrap();
        for all in request.resource_logs {
            let resource = attributes(&all.resource.unwrap_or_default().attributes);
            let logs = all.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            shared.received().logs.extend(logs.map(|log| (log, resource.clone())));
        }
    }
    if !grpc {
        return Ok(Response::new(Answer(Vec::new())));
    }
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let frames = vec![Frame::trailers(trailers), Frame::data(Bytes::from_static(&[0; 5]))];
    Ok(Response::builder().header("content-type", "application/grpc").body(Answer(frames)).unwrap())
}

/// Attributes as JSON.
pub fn attributes(all: &[KeyValue]) -> Value {
    let value = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Wire::StringValue(text)) => json!(text),
        Some(Wire::IntValue(number)) => json!(number),
        Some(Wire::DoubleValue(number)) => json!(number),
        Some(Wire::BoolValue(is_so)) => json!(is_so),
        other => panic!("an attribute of another type: {other:?}"),
    };
    all.iter().map(|attribute| (attribute.key.clone(), value(attribute))).collect::<serde_json::Map<_, _>>().into()
}
