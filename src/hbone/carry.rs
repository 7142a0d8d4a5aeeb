//! What carrying a connection has in common, whether its far side is a stream of a tunnel or a plain TCP connection: how
//! bytes are counted, how long a half-closed connection may be silent, how one direction ends, and that what one side had
//! sent before it broke still arrives at the other.

use crate::sys::end::{End, LAST_BYTES};
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Counts bytes as they are passed on.
pub trait Meter: Sync {
    /// Bytes from the application to the tunnel.
    fn up(&self, bytes: usize);
    /// Bytes from the tunnel to the application.
    fn down(&self, bytes: usize);
    /// All bytes so far, in either direction.
    fn total(&self) -> u64;
}

/// A half-closed connection carried nothing for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silent;

/// Awaits `step` of a half-closed connection; gives it up when nothing has been carried for `silence`.
pub async fn unless_silent<T>(
    meter: &impl Meter,
    silence: Duration,
    step: impl Future<Output = T>,
) -> Result<T, Silent> {
    let mut step = pin!(step);
    loop {
        let before = meter.total();
        match timeout(silence, &mut step).await {
            Ok(done) => return Ok(done),
            Err(_) if meter.total() == before => return Err(Silent),
            Err(_) => {}
        }
    }
}

/// After one side has broken: awaits `rest`, which passes on what that side had sent before, until it has arrived at `to`,
/// for [`LAST_BYTES`] at most. How `rest` ends does not matter: how the connection ends is known by then.
pub async fn deliver_last_bytes<T>(to: &End<'_>, rest: impl Future<Output = T>) {
    let last = async {
        rest.await;
        to.drained().await;
    };
    // A side that does not read in this time loses the rest.
    let _ = timeout(LAST_BYTES, last).await;
}

/// Sends FIN: nothing more will be written, while the other direction goes on. A socket whose peer has gone already cannot
/// be shut down, and need not be.
pub fn end_writing(socket: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(socket).shutdown(Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}
