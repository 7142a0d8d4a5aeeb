//! A leg of a carried connection: its socket, and the error with which it broke.
//!
//! A reset does not overtake the bytes before it: everything that the leg's peer had sent is delivered to the other
//! leg, and has arrived there, before the reset is passed on.

use super::socket::{unacknowledged, watch_for};
use std::io;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::SetOnce;
use tokio::time::sleep;

/// How long the last bytes of a broken leg may take to reach the other leg's peer.
pub const LAST_BYTES: Duration = Duration::from_secs(10);

/// Longest pause between two checks whether written bytes have arrived.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// A leg of a carried connection.
#[derive(Debug)]
pub struct Leg<'a> {
    /// The socket.
    pub socket: &'a TcpStream,
    /// The error. The kernel reports an error only once, to the first caller that reads, writes
    /// or asks, so it is kept here.
    broken: SetOnce<io::Error>,
}

impl<'a> Leg<'a> {
    /// A leg without an error.
    pub fn new(socket: &'a TcpStream) -> Self {
        Self { socket, broken: SetOnce::new() }
    }

    /// Records an error. Only the first one counts.
    pub fn record_error(&self, error: io::Error) {
        // Fails only if an error has been recorded before.
        let _ = self.broken.set(error);
    }

    /// Whether an error has been recorded. End of stream on a broken leg is not an orderly end.
    pub fn is_broken(&self) -> bool {
        self.broken.initialized()
    }

    /// Completes when the leg has broken, whether the caller or the kernel reports it first.
    pub async fn broken(&self) {
        tokio::select! {
            biased;
            _ = self.broken.wait() => {}
            error = error_of(self.socket) => self.record_error(error),
        }
    }

    /// The error with which it broke; a plain reset if none is recorded.
    pub fn error(&self) -> io::Error {
        let again =
            |error: &io::Error| error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
        self.broken.get().map_or_else(|| io::ErrorKind::ConnectionReset.into(), again)
    }

    /// Completes when everything written to the leg has arrived in its peer's kernel, or never will. Wait for this
    /// before a reset, which would discard the rest.
    pub async fn drained(&self) {
        let mut pause = Duration::from_millis(1);
        while !self.is_broken() && unacknowledged(self.socket).is_ok_and(|bytes| bytes > 0) {
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(CHECK_EVERY),
                () = self.broken() => return,
            }
        }
    }
}

/// Completes with the error when a connection has been reset or has failed in another way.
async fn error_of(socket: &TcpStream) -> io::Error {
    match socket.ready(Interest::ERROR).await {
        Err(error) => error,
        Ok(_) => match socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            // A read or write has received the error already, and its caller records it.
            Ok(None) => std::future::pending().await,
        },
    }
}

/// Completes when a socket that was told to connect is connected, or with the error with which that failed.
pub async fn connected(socket: &std::net::TcpStream) -> io::Result<()> {
    // The kernel knows the peer once the connection is open, which is at once where it stays on this node.
    if socket.peer_addr().is_ok() {
        return Ok(());
    }
    let watched = watch_for(socket, Interest::WRITABLE)?;
    let _ready = watched.writable().await?;
    socket.take_error()?.map_or(Ok(()), Err)
}

/// Completes when a client has reset its connection and none of its bytes are left to deliver.
pub async fn reset_without_data(client: &std::net::TcpStream) {
    let mut byte = [std::mem::MaybeUninit::uninit()];
    let Ok(watched) = watch_for(client, Interest::ERROR) else { return std::future::pending().await };
    let waits = watched.ready(Interest::ERROR).await.is_ok()
        && socket2::SockRef::from(client).peek(&mut byte).is_ok_and(|length| length > 0);
    if waits {
        std::future::pending::<()>().await;
    }
}
