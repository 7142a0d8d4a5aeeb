//! Why the far side could not be opened, and how long opening it may take.

use crate::hbone::TunnelError;
use crate::hbone::client::OpenError;
use crate::identity::store::StoreError;
use crate::identity::verify::tls_reason;
use crate::ports::HBONE;
use crate::sys::netns::NetnsError;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long TCP may take to connect.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long the TLS and HTTP/2 handshakes of a tunnel may take together, after TCP has connected.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the far end of a tunnel may take to answer a CONNECT request. It may wait for facts (5 s), for a policy (5
/// s) and for its application (10 s) itself; the rest is margin.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(25);

/// Why the far side could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The pod's network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// TCP could not connect.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// The destination.
        to: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// TCP did not connect in time.
    #[error("connection failed: {0}: no answer within {deadline} s", deadline = CONNECT_DEADLINE.as_secs())]
    ConnectDeadline(SocketAddr),
    /// There is no certificate for the pod.
    #[error("identity error: {0}")]
    Identity(#[from] StoreError),
    /// The tunnel could not be opened. All connections that waited for it share the error.
    #[error(transparent)]
    Tunnel(#[from] Arc<TunnelDialError>),
    /// The tunnel is open, but the stream was refused or broke.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The far end did not answer the CONNECT request in time.
    #[error("no answer to CONNECT within {} s", ANSWER_DEADLINE.as_secs())]
    AnswerDeadline,
    /// The client gave up meanwhile.
    #[error("the client gave up before the connection was open")]
    Abandoned,
}

/// The error's text; if two clocks differ, with a hint about that.
fn http2_reason(error: &TunnelError) -> String {
    error.clock_reason().map_or_else(|| error.to_string(), |clock| format!("{error}; {clock}"))
}

/// Why a tunnel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelDialError {
    /// TCP to the far end did not connect in time.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port {HBONE}: {0}")]
    Blocked(SocketAddr),
    /// TCP could not connect.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// Address and port of the far end.
        to: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// The pod's network namespace cannot be entered.
    #[error(transparent)]
    Netns(NetnsError),
    /// TLS failed: the far end has not proven an expected identity, or it does not accept ours.
    #[error("tls error: {}", tls_reason(.0))]
    Tls(io::Error),
    /// The HTTP/2 handshake failed.
    #[error("http2 handshake failed: {}", http2_reason(.0))]
    Http2(TunnelError),
    /// The TLS and HTTP/2 handshakes did not finish in time.
    #[error("the handshake with {0} took longer than {deadline} s", deadline = HANDSHAKE_DEADLINE.as_secs())]
    HandshakeDeadline(SocketAddr),
    /// The daemon is ending, or the pod is being released.
    #[error("pool draining")]
    Draining,
}
