//! Why an accepted socket does not become a connection or a tunnel, and the deadlines that apply to a connecting peer.

use crate::hbone::TunnelError;
use crate::identity::verify::tls_reason;
use std::io;
use std::time::Duration;

/// How long a peer may take to send its first byte.
pub const SILENCE_DEADLINE: Duration = Duration::from_secs(2);

/// How long the TLS and HTTP/2 handshakes may take together. Our own waits for facts and a certificate count as well.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a SOCKS5 client may take for its request.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// Why a SOCKS5 client has no request.
#[derive(Debug, thiserror::Error)]
pub enum SocksError {
    /// The socket failed, or the client left.
    #[error("SOCKS5: {0}")]
    Io(#[from] io::Error),
    /// It is not SOCKS5.
    #[error("SOCKS5: the client speaks version {0}")]
    Version(u8),
    /// The client insists on authentication.
    #[error("SOCKS5: the client does not offer to connect without authentication")]
    Method,
    /// The client asks for something else than a connection.
    #[error("SOCKS5: command {0} is not supported, only CONNECT is")]
    Command(u8),
    /// The type of the address is unknown.
    #[error("SOCKS5: the address type {0} is unknown")]
    AddressType(u8),
    /// The host name cannot be one.
    #[error("SOCKS5: the host name is not valid")]
    Host,
    /// The request was late.
    #[error("SOCKS5: no request within {} s", REQUEST_DEADLINE.as_secs())]
    Deadline,
}

/// Why an accepted socket does not become a connection or a tunnel.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The kernel does not know the original destination.
    #[error("original destination unknown: {0}")]
    OriginalDestination(io::Error),
    /// The socket failed before anything was read from it.
    #[error("the accepted connection failed: {0}")]
    Socket(io::Error),
    /// The TLS handshake failed.
    #[error("tls handshake error: {}", tls_reason(.0))]
    Tls(io::Error),
    /// TLS accepted a peer without a certificate. This cannot happen unless the verifier is wrong.
    #[error("tls handshake error: the peer presented no certificate")]
    NoCertificate,
    /// The HTTP/2 handshake failed.
    #[error("http2 handshake failed: {0}")]
    Http2(#[from] TunnelError),
    /// The SOCKS5 client sent no good request.
    #[error(transparent)]
    Socks(#[from] SocksError),
    /// The peer connected and sent nothing.
    #[error("the peer sent nothing within {} s after it connected", SILENCE_DEADLINE.as_secs())]
    Silent,
    /// The handshakes took too long.
    #[error("the handshake took longer than {} s", HANDSHAKE_DEADLINE.as_secs())]
    Deadline,
}
