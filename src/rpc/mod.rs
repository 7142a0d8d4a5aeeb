//! gRPC to the control plane: one HTTP/2 connection over TLS, with the configured token and headers on every request.
//!
//! Roots and token are files that may appear late and change. Both are read for each connection, the token also for
//! each request. The token and the extra headers never appear in logs or on the admin port.

pub mod tls;

use crate::crypto::{ALPN_H2, with_clock_reason};
use crate::task::Group;
use http::header::{AUTHORIZATION, HeaderName};
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;

/// How long each step of connecting may take: name resolution, TCP, TLS, HTTP/2.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Silence after which the control plane is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long the answer to a ping may take.
const PING_DEADLINE: Duration = Duration::from_secs(10);
/// Size of the HTTP/2 stream window. It is large because a whole mesh arrives in one message.
const WINDOW_BYTES: u32 = 4 << 20;
/// Largest message that is accepted (the same as in ztunnel).
pub const MESSAGE_BYTES_MAX: usize = 200 << 20;

/// A control plane's address and the credentials for it.
#[derive(Clone)]
pub struct Config {
    /// `https`, host and port.
    pub address: Uri,
    /// Roots that verify its certificate.
    pub roots: tls::Roots,
    /// Another name that its certificate may have instead of the host.
    pub alt_host: Option<String>,
    /// The bearer token that authenticates this node.
    pub token: Token,
    /// Sent in the `clusterid` header.
    pub cluster_id: String,
    /// Sent with every request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Config({}, {} headers)", self.address, self.headers.len())
    }
}

/// A bearer token.
#[derive(Clone)]
pub enum Token {
    /// In a file, which may be rotated.
    File(PathBuf),
    /// Given in the settings.
    Literal(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "Token({})", path.display()),
            Self::Literal(_) => f.write_str("Token(given)"),
        }
    }
}

/// Why there is no connection to the control plane.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The token file does not exist yet, or cannot be read.
    #[error("the token {path} cannot be read: {source}; waiting for it")]
    Token {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The content of the token file is not a token.
    #[error("the file {0} is empty or does not contain a token; waiting for it to change")]
    BadToken(PathBuf),
    /// The roots do not exist yet, or are not usable.
    #[error(transparent)]
    Roots(#[from] tls::RootsError),
    /// The name cannot be resolved.
    #[error("{host} cannot be resolved: {source}")]
    Resolve {
        /// The host name.
        host: String,
        /// The resolver's error.
        source: io::Error,
    },
    /// The TCP connection failed.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// The TLS handshake failed.
    #[error("TLS handshake with {host} failed: {}", with_clock_reason(.source))]
    Tls {
        /// The host name.
        host: String,
        /// The library's error.
        source: io::Error,
    },
    /// The HTTP/2 handshake failed.
    #[error("{host} does not speak HTTP/2: {source}")]
    Http2 {
        /// The host name.
        host: String,
        /// The library's error.
        source: hyper::Error,
    },
    /// A step took too long.
    #[error("{step} took longer than {} s", CONNECT_DEADLINE.as_secs())]
    Deadline {
        /// The step.
        step: String,
    },
}

impl Token {
    /// The current value of the `authorization` header.
    fn header(&self) -> Result<HeaderValue, ConnectError> {
        let (text, path) = match self {
            Self::Literal(text) => (text.clone(), PathBuf::from("(given literally)")),
            Self::File(path) => {
                let read = std::fs::read_to_string(path);
                (read.map_err(|source| ConnectError::Token { path: path.clone(), source })?, path.clone())
            }
        };
        let token = text.trim();
        let header = HeaderValue::try_from(format!("Bearer {token}")).ok().filter(|_| !token.is_empty());
        let mut header = header.ok_or(ConnectError::BadToken(path))?;
        header.set_sensitive(true);
        Ok(header)
    }
}

/// A handle of an open connection, used by the generated clients. The connection is closed with its last handle.
pub struct Connection {
    send: http2::SendRequest<Body>,
    token: Token,
    cluster_id: HeaderValue,
    headers: Vec<(HeaderName, HeaderValue)>,
    tasks: Arc<Tasks>,
}

/// The tasks of a connection. They end with its last handle.
struct Tasks(Group);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.cut();
    }
}

impl Connection {
    /// Whether both are handles of one connection.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tasks, &other.tasks)
    }
}

impl Clone for Connection {
    fn clone(&self) -> Self {
        Self {
            send: self.send.clone(),
            token: self.token.clone(),
            cluster_id: self.cluster_id.clone(),
            headers: self.headers.clone(),
            tasks: self.tasks.clone(),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection(closed: {})", self.send.is_closed())
    }
}

/// Connects. Each step has a deadline of [`CONNECT_DEADLINE`].
pub async fn connect(config: &Config) -> Result<Connection, ConnectError> {
    config.token.header()?;
    let host = config.address.host().unwrap_or_default();
    let bare_host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let tls = tls::client(&config.roots, &bare_host, config.alt_host.as_deref(), ALPN_H2)?;
    let port = config.address.port_u16().unwrap_or(443);
    let resolved = within("resolving the control plane's name", tokio::net::lookup_host((bare_host.clone(), port)));
    let addresses: Vec<SocketAddr> =
        resolved.await?.map_err(|source| ConnectError::Resolve { host: bare_host.clone(), source })?.collect();
    let tcp = connect_to_any(&bare_host, &addresses).await?;
    let connector = TlsConnector::from(tls.config);
    let stream = within("the TLS handshake with the control plane", connector.connect(tls.name, tcp)).await?;
    let stream = stream.map_err(|source| ConnectError::Tls { host: bare_host.clone(), source })?;
    let tasks = Group::default();
    let mut builder = http2::Builder::new(tasks.clone());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_DEADLINE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES * 4);
    let handshake = within("HTTP/2 with the control plane", builder.handshake(TokioIo::new(stream)));
    let (send, connection) =
        handshake.await?.map_err(|source| ConnectError::Http2 { host: bare_host.clone(), source })?;
    tasks.spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to the control plane ended with an error");
        }
    });
    let cluster_id = HeaderValue::try_from(&config.cluster_id).unwrap_or_else(|_| HeaderValue::from_static(""));
    let (token, headers) = (config.token.clone(), config.headers.clone());
    Ok(Connection { send, token, cluster_id, headers, tasks: Arc::new(Tasks(tasks)) })
}

async fn within<T>(step: &str, work: impl Future<Output = T>) -> Result<T, ConnectError> {
    let late = |_| ConnectError::Deadline { step: step.to_owned() };
    tokio::time::timeout(CONNECT_DEADLINE, work).await.map_err(late)
}

async fn connect_to_any(host: &str, addresses: &[SocketAddr]) -> Result<TcpStream, ConnectError> {
    let mut last = ConnectError::Resolve { host: host.to_owned(), source: io::Error::other("it has no address") };
    for address in addresses {
        match within(&format!("connecting to {address}"), TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let keepalive = socket2::TcpKeepalive::new()
                    .with_time(Duration::from_secs(300))
                    .with_interval(Duration::from_secs(75))
                    .with_retries(9);
                let socket = socket2::SockRef::from(&stream);
                let set = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_keepalive(&keepalive));
                match set {
                    Ok(()) => return Ok(stream),
                    Err(source) => last = ConnectError::Connect { address: *address, source },
                }
            }
            Ok(Err(source)) => last = ConnectError::Connect { address: *address, source },
            Err(late) => last = late,
        }
    }
    Err(last)
}

impl Connection {
    /// Whether the connection accepts no more requests.
    pub fn is_closed(&self) -> bool {
        self.send.is_closed()
    }
}

impl tower_service::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.send.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let token = match self.token.header() {
            Ok(token) => token,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        };
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, token);
        headers.insert(HeaderName::from_static("clusterid"), self.cluster_id.clone());
        for (name, value) in &self.headers {
            headers.append(name, value.clone());
        }
        let answer = self.send.send_request(request);
        Box::pin(async move { answer.await.map_err(Into::into) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{CertificateError, Error};

    #[test]
    fn a_certificate_that_is_not_valid_now_is_explained() {
        let source = io::Error::other(Error::InvalidCertificate(CertificateError::Expired));
        let said = ConnectError::Tls { host: "istiod".into(), source }.to_string();
        assert!(
            said.starts_with("TLS handshake with istiod failed: ") && said.contains("one of the two clocks"),
            "{said}"
        );
    }
}
