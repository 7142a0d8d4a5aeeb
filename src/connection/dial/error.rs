//! Why the far side could not be opened, and how long opening it may take.

use crate::hbone::TunnelError;
use crate::hbone::client::OpenError;
use crate::identity::store::StoreError;
use crate::identity::verify::{clock, tls_reason};
use crate::sys::netns::NetnsError;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a TCP connection may take.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long TLS and HTTP/2 together may take after TCP.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the far end of a tunnel may take to answer a CONNECT: its own waits for facts (5 s), for a policy (5 s) and
/// for the connection (10 s), and a little.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(25);

/// Why the far side could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// TCP failed.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// TCP took too long.
    #[error("connection failed: {0}: no answer within {deadline} s", deadline = CONNECT_DEADLINE.as_secs())]
    ConnectDeadline(SocketAddr),
    /// No certificate of our own.
    #[error("identity error: {0}")]
    Identity(#[from] StoreError),
    /// No tunnel: shared by all who waited for it.
    #[error(transparent)]
    Tunnel(#[from] Arc<TunnelDialError>),
    /// The tunnel was there, the stream was refused or broke.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The far end did not answer.
    #[error("no answer to CONNECT within {} s", ANSWER_DEADLINE.as_secs())]
    AnswerDeadline,
    /// Whoever waited for this connection has gone.
    #[error("the client gave up before the connection was there")]
    Abandoned,
}

fn http2_reason(error: &TunnelError) -> String {
    let clock = error.io().and_then(clock);
    clock.map_or_else(|| error.to_string(), |clock| format!("{error}; {clock}"))
}

/// Why a tunnel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelDialError {
    /// TCP to the far end timed out.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {0}")]
    Blocked(SocketAddr),
    /// TCP failed.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(NetnsError),
    /// TLS failed: the far end is not whom we expect, or does not take us.
    #[error("tls error: {}", tls_reason(.0))]
    Tls(io::Error),
    /// HTTP/2 failed.
    #[error("http2 handshake failed: {}", http2_reason(.0))]
    Http2(TunnelError),
    /// TLS and HTTP/2 together took too long.
    #[error("the handshake with {0} took longer than {deadline} s", deadline = HANDSHAKE_DEADLINE.as_secs())]
    HandshakeDeadline(SocketAddr),
    /// The daemon or the pod is ending.
    #[error("pool draining")]
    Draining,
}
