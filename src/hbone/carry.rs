//! What carrying a connection has in common, whether its far side is a stream of a tunnel or a plain TCP connection:
//! counting bytes, limiting the silence of a half-closed connection, ending one direction, and delivering what one side
//! sent before it broke.

use crate::sys::leg::{LAST_BYTES, Leg};
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Counts bytes as they are passed on.
pub trait Meter: Sync {
    /// Bytes from the application to the far side.
    fn up(&self, bytes: usize);
    /// Bytes from the far side to the application.
    fn down(&self, bytes: usize);
    /// All bytes so far, in both directions.
    fn total(&self) -> u64;
}

/// The error of a half-closed connection that carried nothing for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silent;

/// Awaits `step` of a half-closed connection. Gives up when `meter` has counted nothing for `silence`.
/// The caller pins `step`, so that an open connection does not hold it twice.
pub async fn unless_silent<T>(
    meter: &impl Meter,
    silence: Duration,
    mut step: impl Future<Output = T> + Unpin,
) -> Result<T, Silent> {
    loop {
        let before = meter.total();
        match timeout(silence, &mut step).await {
            Ok(done) => return Ok(done),
            Err(_) if meter.total() == before => return Err(Silent),
            Err(_) => {}
        }
    }
}

/// After one side has broken: awaits `rest`, which passes on what that side had sent before, and then its arrival at
/// `to`; both for at most [`LAST_BYTES`]. The result of `rest` is ignored, because the reason for the end is known
/// already.
pub async fn deliver_last_bytes<T>(to: &Leg<'_>, rest: impl Future<Output = T>) {
    let last = async {
        rest.await;
        to.drained().await;
    };
    // A side that does not read in time loses the rest.
    let _ = timeout(LAST_BYTES, last).await;
}

/// Sends FIN: nothing more will be written, while the other direction continues. A socket whose peer is gone cannot be
/// shut down and does not need to be.
pub fn end_writing(socket: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(socket).shutdown(Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}
