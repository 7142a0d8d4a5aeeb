//! Why forwarding ended before both sides had closed.

use crate::connection::authorize::Refusal;
use crate::hbone::CarryError;
use std::io;
use std::time::Duration;

/// Why forwarding ended before both sides had closed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The application's connection broke: it was reset, or it stopped answering.
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The far side's plain TCP connection broke.
    #[error("the far connection broke: {0}")]
    Far(io::Error),
    /// The far end reset the stream.
    #[error("the far end reset the stream: {0}")]
    Reset(CarryError),
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    Tunnel(CarryError),
    /// This node ended the tunnel because of what its peer did.
    #[error("this node ended the tunnel: {0}")]
    Cut(CarryError),
    /// One side had closed, and the other one sent nothing for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// The connection had to stop.
    #[error("{0}")]
    Stopped(Stop),
}

/// Why a connection has to stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// It is no longer allowed.
    #[error("connection closed due to policy change: {0}")]
    Revoked(Refusal),
    /// The peer's certificate has been revoked.
    #[error("connection closed: peer certificate revoked by CRL")]
    CertificateRevoked,
    /// The peer's certificate has expired, and the peer has not opened a tunnel with a new one.
    #[error(
        "connection closed: the peer's certificate has expired, and the peer still uses the tunnel that it opened with it"
    )]
    CertificateExpired,
    /// The daemon is ending, or the pod is being released, and the deadline for open connections has passed.
    #[error("connection closed due to connection drain")]
    Drained,
}
