//! Why an accepted socket leads to nothing, and the deadlines for those who connect.

use crate::hbone::TunnelError;
use crate::identity::verify::tls_reason;
use std::io;
use std::time::Duration;

/// How long a peer may take to say anything.
pub const SILENCE_DEADLINE: Duration = Duration::from_secs(2);

/// How long a peer may take for TLS and HTTP/2 set-up together, our waits for facts and a certificate included.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Why an accepted socket leads to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The kernel does not know what the connection was opened to.
    #[error("original destination unknown: {0}")]
    OriginalDestination(io::Error),
    /// The socket failed before anything was read from it.
    #[error("the accepted connection failed: {0}")]
    Socket(io::Error),
    /// TLS failed.
    #[error("tls handshake error: {}", tls_reason(.0))]
    Tls(io::Error),
    /// The certificate that TLS took names no workload; cannot happen unless the verifier is wrong.
    #[error("tls handshake error: the peer presented no certificate")]
    NoCertificate,
    /// HTTP/2 failed.
    #[error("http2 handshake failed: {0}")]
    Http2(#[from] TunnelError),
    /// The peer opened a connection and said nothing.
    #[error("the peer said nothing for {} s after it had connected", SILENCE_DEADLINE.as_secs())]
    Silent,
    /// The peer was too slow.
    #[error("the handshake took longer than {} s", HANDSHAKE_DEADLINE.as_secs())]
    Deadline,
}
