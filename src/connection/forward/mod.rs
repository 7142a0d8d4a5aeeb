//! Step 5: bytes both ways until both sides have closed, or one breaks, or the connection is to stop. What ends badly
//! on one side ends badly on the other: RST is carried as RST, never as an orderly close.

pub mod copy;

use super::authorize::Refusal;
use crate::hbone::{CarryError, Meter, Stream};
use crate::sys::socket::reset_on_close;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

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

/// Carries `app` over a stream.
pub async fn over_stream(
    app: &TcpStream,
    stream: Stream,
    meter: &impl Meter,
    silence: Duration,
    stop: impl Future<Output = Stop>,
) -> Result<(), ForwardError> {
    let mut stopped = None;
    let stop = async { stopped = Some(stop.await) };
    let result = stream.carry(app, meter, silence, stop).await.map_err(|error| match error {
        CarryError::App(error) => ForwardError::App(error),
        CarryError::Reset(_) => ForwardError::Reset(error),
        CarryError::Tunnel(_) => ForwardError::Tunnel(error),
        CarryError::Cut(_) => ForwardError::Cut(error),
        CarryError::HalfClosedSilence(silence) => ForwardError::HalfClosedSilence(silence),
        CarryError::Stopped => ForwardError::Stopped(Stop::Drained),
    });
    let result = match (result, stopped) {
        (Err(ForwardError::Stopped(_)), Some(why)) => Err(ForwardError::Stopped(why)),
        (result, _) => result,
    };
    if result.is_err() {
        reset_on_close(app);
    }
    result
}

/// Copies between `app` and a plain TCP connection.
pub async fn over_tcp(
    app: &TcpStream,
    far: &TcpStream,
    meter: &impl Meter,
    silence: Duration,
    stop: impl Future<Output = Stop>,
) -> Result<(), ForwardError> {
    let result = tokio::select! {
        biased;
        why = stop => Err(ForwardError::Stopped(why)),
        result = copy::both_ways(app, far, meter, silence) => result,
    };
    if result.is_err() {
        reset_on_close(app);
        reset_on_close(far);
    }
    result
}
