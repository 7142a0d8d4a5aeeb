//! Why forwarding ended otherwise than by both sides closing.

use crate::connection::authorize::Refusal;
use crate::hbone::CarryError;
use std::io;
use std::time::Duration;

/// Why forwarding ended otherwise than by both sides closing.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The application's connection broke: it reset, or it stopped answering.
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The far connection broke (plain TCP).
    #[error("the far connection broke: {0}")]
    Far(io::Error),
    /// The far end reset the stream.
    #[error("the far end reset the stream: {0}")]
    Reset(CarryError),
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    Tunnel(CarryError),
    /// We have ended the tunnel.
    #[error("this node has ended the tunnel: {0}")]
    Cut(CarryError),
    /// One side closed and the other said nothing for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// It was told to stop.
    #[error("{0}")]
    Stopped(Stop),
}

/// Why a connection was told to stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// It is no longer allowed.
    #[error("connection closed due to policy change: {0}")]
    Revoked(Refusal),
    /// The peer's certificate has been revoked.
    #[error("connection closed: peer certificate revoked by CRL")]
    CertificateRevoked,
    /// The peer's certificate has ended, and it has not come back with a new one.
    #[error("connection closed: the peer's certificate has expired, and it keeps to the tunnel that it opened with it")]
    CertificateExpired,
    /// The daemon is ending, or the pod has been released, and the time to finish is over.
    #[error("connection closed due to connection drain")]
    Drained,
}
