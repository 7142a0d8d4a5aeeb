//! How batches reach a collector: over gRPC, or as protobuf over HTTP/1.1, in TLS or not. One connection is kept open.
//! Everything about one attempt, from the name's resolution to the end of the answer, has the endpoint's timeout.

use super::encode::{Accepted, Payload};
use crate::crypto::ALPN_H2;
use crate::rpc::tls::{self, Roots, RootsError};
use crate::task::Group;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, RETRY_AFTER};
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceResponse;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::{Code, Status};

/// Most bytes of an answer that are read.
const ANSWER_BYTES: usize = 64 * 1024;

/// The longest wait before the next attempt that a collector may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// How OTLP is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// Protobuf in HTTP.
    Http,
}

/// A collector.
#[derive(Clone)]
pub struct Endpoint {
    /// `http` or `https`, host, port, and for HTTP the path.
    pub uri: Uri,
    /// How OTLP is spoken.
    pub protocol: Protocol,
    /// Sent with every request. The values appear nowhere else.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// Roots that verify its certificate.
    pub roots: Roots,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({}, {:?}, {} headers)", self.uri, self.protocol, self.headers.len())
    }
}

/// Why a batch was not accepted.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct SendError {
    what: String,
    /// Whether the same batch may be accepted later.
    pub may_retry: bool,
    /// How long the collector wants not to be asked.
    pub after: Option<Duration>,
}

impl SendError {
    fn passing(what: impl ToString) -> Self {
        Self { what: what.to_string(), may_retry: true, after: None }
    }
}

impl From<RootsError> for SendError {
    fn from(error: RootsError) -> Self {
        Self::passing(error)
    }
}

/// A client of one collector.
pub struct Client {
    endpoint: Endpoint,
    open: Option<Open>,
}

/// An open connection.
enum Open {
    Grpc { send: http2::SendRequest<Body>, _tasks: Tasks },
    Http { send: http1::SendRequest<Whole>, _tasks: Tasks },
}

/// The tasks of a connection. They end with it.
struct Tasks(Group);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.cut();
    }
}

/// A body in one piece.
struct Whole(Option<Bytes>);

impl hyper::body::Body for Whole {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        hyper::body::SizeHint::with_exact(self.0.as_ref().map_or(0, Bytes::len) as u64)
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Client {
    /// A client that is not connected yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, open: None }
    }

    /// The collector's address.
    pub fn endpoint(&self) -> &Uri {
        &self.endpoint.uri
    }

    /// Sends a batch, and connects before if need be. A connection that did not answer in time is closed.
    pub async fn send(&mut self, payload: &Payload) -> Result<Accepted, SendError> {
        let timeout = self.endpoint.timeout;
        let sent = match tokio::time::timeout(timeout, self.attempt(payload)).await {
            Ok(sent) => sent,
            Err(_) => Err(SendError::passing(format!("no answer within {} ms", timeout.as_millis()))),
        };
        if sent.is_err() {
            self.open = None;
        }
        sent
    }

    async fn attempt(&mut self, payload: &Payload) -> Result<Accepted, SendError> {
        let is_usable = match &self.open {
            Some(Open::Grpc { send, .. }) => !send.is_closed(),
            Some(Open::Http { send, .. }) => !send.is_closed(),
            None => false,
        };
        if !is_usable {
            self.open = Some(connect(&self.endpoint).await?);
        }
        match &mut self.open {
            Some(Open::Grpc { send, .. }) => grpc(&self.endpoint, send.clone(), payload).await,
            Some(Open::Http { send, .. }) => http(&self.endpoint, send, payload).await,
            // It was opened just now.
            None => Err(SendError::passing("not connected")),
        }
    }
}

/// Opens a connection.
async fn connect(endpoint: &Endpoint) -> Result<Open, SendError> {
    let host = endpoint.uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_tls = endpoint.uri.scheme_str() == Some("https");
    let port = endpoint.uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    // Every address is tried, the first that answers is used.
    let tcp = TcpStream::connect((host, port)).await;
    let tcp = tcp.map_err(|error| SendError::passing(format!("cannot connect to {host}:{port}: {error}")))?;
    tcp.set_nodelay(true).map_err(SendError::passing)?;
    let stream: Box<dyn Stream> = if is_tls {
        let alpn: &[u8] = if endpoint.protocol == Protocol::Grpc { ALPN_H2 } else { b"http/1.1" };
        let tls = tls::client(&endpoint.roots, host, None, alpn)?;
        let failed = |error: io::Error| {
            let why = crate::crypto::with_clock_reason(&error);
            SendError::passing(format!("TLS handshake with {host} failed: {why}"))
        };
        Box::new(TlsConnector::from(tls.config).connect(tls.name, tcp).await.map_err(failed)?)
    } else {
        Box::new(tcp)
    };
    let (tasks, io) = (Group::default(), TokioIo::new(stream));
    Ok(match endpoint.protocol {
        Protocol::Grpc => {
            let mut builder = http2::Builder::new(tasks.clone());
            builder.timer(TokioTimer::new());
            let (send, connection) = builder.handshake(io).await.map_err(SendError::passing)?;
            tasks.spawn(async move { ended(connection.await) });
            Open::Grpc { send, _tasks: Tasks(tasks) }
        }
        Protocol::Http => {
            let (send, connection) = http1::handshake(io).await.map_err(SendError::passing)?;
            tasks.spawn(async move { ended(connection.await) });
            Open::Http { send, _tasks: Tasks(tasks) }
        }
    })
}

fn ended(result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "the connection to the OpenTelemetry collector ended with an error");
    }
}

/// A gRPC channel over one connection.
#[derive(Clone)]
struct Channel {
    send: http2::SendRequest<Body>,
    uri: Uri,
    headers: HeaderMap,
}

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.send.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let mut parts = self.uri.clone().into_parts();
        parts.path_and_query = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request.headers_mut().extend(self.headers.clone());
        Box::pin(self.send.send_request(request))
    }
}

/// Sends a batch over gRPC.
async fn call(channel: Channel, payload: &Payload) -> Result<Accepted, Status> {
    const TRACES: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    const LOGS: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
    Ok(match payload {
        Payload::Traces(spans) => unary::<_, ExportTraceServiceResponse>(channel, TRACES, spans.clone()).await?.into(),
        Payload::Logs(logs) => unary::<_, ExportLogsServiceResponse>(channel, LOGS, logs.clone()).await?.into(),
    })
}

/// Calls one method.
async fn unary<Q: Message + 'static, A: Message + Default + 'static>(
    channel: Channel,
    method: &'static str,
    request: Q,
) -> Result<A, Status> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(ANSWER_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = http::uri::PathAndQuery::from_static(method);
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    Ok(grpc.unary(tonic::Request::new(request), path, codec).await?.into_inner())
}

async fn grpc(endpoint: &Endpoint, send: http2::SendRequest<Body>, payload: &Payload) -> Result<Accepted, SendError> {
    let headers = endpoint.headers.iter().cloned().collect();
    let channel = Channel { send, uri: endpoint.uri.clone(), headers };
    call(channel, payload).await.map_err(|status| {
        // By the OTLP specification.
        let may_retry = matches!(
            status.code(),
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Aborted
                | Code::OutOfRange
                | Code::Unavailable
                | Code::DataLoss
                | Code::ResourceExhausted
                // The connection broke; tonic knows no better word.
                | Code::Unknown
        );
        SendError { what: format!("{:?}: {}", status.code(), status.message()), may_retry, after: None }
    })
}

async fn http(
    endpoint: &Endpoint,
    send: &mut http1::SendRequest<Whole>,
    payload: &Payload,
) -> Result<Accepted, SendError> {
    let path = endpoint.uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = endpoint.uri.authority().map_or("", |authority| authority.as_str());
    let mut request = Request::post(path).header(HOST, authority).header(CONTENT_TYPE, "application/x-protobuf");
    if let Some(headers) = request.headers_mut() {
        headers.extend(endpoint.headers.iter().cloned());
    }
    let request = request.body(Whole(Some(payload.encoded()))).map_err(SendError::passing)?;
    send.ready().await.map_err(SendError::passing)?;
    let mut answer = send.send_request(request).await.map_err(SendError::passing)?;
    let body = read(answer.body_mut()).await?;
    let status = answer.status();
    if status.is_success() {
        // An answer that is not understood says nothing of a refusal.
        return Ok(payload.answer(&body).unwrap_or_default());
    }
    let may_retry = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    );
    let after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let after = after.map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
    Err(SendError { what: format!("HTTP status {status}"), may_retry, after })
}

/// Reads an answer to its end, so that the connection can be used again.
async fn read(body: &mut Incoming) -> Result<Vec<u8>, SendError> {
    let mut read = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(SendError::passing)?;
        if let Some(data) = frame.data_ref() {
            if read.len() + data.len() > ANSWER_BYTES {
                return Err(SendError::passing("the answer is too long"));
            }
            read.extend_from_slice(data);
        }
    }
    Ok(read)
}
