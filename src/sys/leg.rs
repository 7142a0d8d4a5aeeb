//! One end of a connection that is carried: its socket, and how it broke. A reset does not undo what came before it: what an end
//! had sent is delivered, and what was written to the other end has arrived, before the reset is passed on.

use super::socket::unacknowledged;
use std::io;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::SetOnce;
use tokio::time::{Instant, sleep, sleep_until};

/// How long the last bytes of an end that broke may take on their way to the other one.
pub const LAST_BYTES: Duration = Duration::from_secs(10);

/// Longest pause between two looks at whether written bytes have arrived.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// An end of a connection.
#[derive(Debug)]
pub struct Leg<'a> {
    /// Its socket.
    pub socket: &'a TcpStream,
    /// The kernel tells of an error once, to whoever reads, writes or asks first; so it is kept here.
    broken: SetOnce<(io::Error, Instant)>,
}

impl<'a> Leg<'a> {
    /// An end that is whole.
    pub fn new(socket: &'a TcpStream) -> Self {
        Self { socket, broken: SetOnce::new() }
    }

    /// Notes that it broke; the first error counts.
    pub fn breaks(&self, error: io::Error) {
        // Fails only where it was noted before.
        let _ = self.broken.set((error, Instant::now()));
    }

    /// Whether it is known to have broken. A read that ends then is no orderly end.
    pub fn is_broken(&self) -> bool {
        self.broken.initialized()
    }

    /// Completes when it has broken, whoever finds out.
    pub async fn broken(&self) {
        tokio::select! {
            biased;
            _ = self.broken.wait() => {}
            error = error_of(self.socket) => self.breaks(error),
        }
    }

    /// Completes when what it had sent has been on its way for long enough.
    pub async fn is_late(&self) {
        self.broken().await;
        if let Some((_, since)) = self.broken.get() {
            sleep_until(*since + LAST_BYTES).await;
        }
    }

    /// How it broke.
    pub fn error(&self) -> io::Error {
        let again =
            |error: &io::Error| error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
        self.broken.get().map_or_else(|| io::ErrorKind::ConnectionReset.into(), |(error, _)| again(error))
    }

    /// Completes when all that was written to it has arrived in its peer's kernel, or never will: a reset would overtake the
    /// rest.
    pub async fn drained(&self) {
        let mut pause = Duration::from_millis(1);
        while !self.is_broken() && unacknowledged(self.socket).is_ok_and(|bytes| bytes > 0) {
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(LOOK_EVERY),
                () = self.broken() => return,
            }
        }
    }
}

/// Resolves when a connection has been reset, or has failed in another way, and tells how.
async fn error_of(socket: &TcpStream) -> io::Error {
    match socket.ready(Interest::ERROR).await {
        Err(error) => error,
        Ok(_) => match socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            // Whoever reads or writes has been told.
            Ok(None) => std::future::pending().await,
        },
    }
}

/// Completes when a client has been reset that has sent nothing which is still to be delivered.
pub async fn left_nothing(client: &TcpStream) {
    let mut byte = [std::mem::MaybeUninit::uninit()];
    let waits = client.ready(Interest::ERROR).await.is_ok()
        && socket2::SockRef::from(client).peek(&mut byte).is_ok_and(|length| length > 0);
    if waits {
        std::future::pending::<()>().await;
    }
}
