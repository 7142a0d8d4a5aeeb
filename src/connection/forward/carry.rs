//! Forwarding over a stream of a tunnel or over plain TCP, until it ends or has to stop.

use super::copy;
use super::error::{ForwardError, Stop};
use crate::hbone::{CarryError, Meter, Stream};
use crate::sys::socket::reset_on_close;
use std::time::Duration;
use tokio::net::TcpStream;

/// Carries the application's connection over a stream of a tunnel. On an error, `app` is reset when it is closed.
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

/// Carries the application's connection over a plain TCP connection. On an error, both are reset when they are closed.
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
