//! One stream, and carrying an application's socket over it: bytes both ways, half-close as END_STREAM, RST as
//! RST_STREAM (CONNECT_ERROR, RFC 9113 section 8.5), back-pressure by not reading.

use super::flow::{Opened, Receiver, Sender, halves};
use crate::sys::scratch::{SCRATCH_BYTES, read_now, write_all};
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Counts bytes as they are passed on.
pub trait Meter: Sync {
    /// Bytes from the application to the tunnel.
    fn up(&self, bytes: usize);
    /// Bytes from the tunnel to the application.
    fn down(&self, bytes: usize);
    /// All bytes so far, in either direction.
    fn total(&self) -> u64;
}

/// An accepted stream.
pub struct Stream {
    send: Sender,
    receive: Receiver,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

/// Why carrying ended before both sides had closed in order. Whoever gets this resets the application's socket.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The application's connection broke (reset, or timed out).
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The peer reset the stream.
    #[error("the peer reset the stream ({0})")]
    Reset(Reason),
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    Tunnel(h2::Error),
    /// One side had closed and the other was silent for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// The caller's stop signal came.
    #[error("stopped")]
    Stopped,
}

impl From<h2::Error> for CarryError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Tunnel(error),
        }
    }
}

impl Stream {
    pub(super) fn new(send: SendStream<Bytes>, receive: RecvStream, opened: Opened) -> Self {
        let (send, receive) = halves(send, receive, opened);
        Self { send, receive }
    }

    /// Carries `app` over this stream until both have closed, or until the first error or `stop`; then the stream is
    /// reset. `silence` bounds how long one direction may be silent after the other has ended.
    pub async fn carry(
        self,
        app: &TcpStream,
        meter: &impl Meter,
        silence: Duration,
        stop: impl Future<Output = ()>,
    ) -> Result<(), CarryError> {
        let Self { mut send, mut receive } = self;
        let result = {
            let both = both_ways(app, &mut send, &mut receive, meter, silence);
            tokio::select! {
                biased;
                () = stop => Err(CarryError::Stopped),
                result = both => result,
            }
        };
        match &result {
            Ok(()) | Err(CarryError::Reset(_) | CarryError::Tunnel(_)) => {}
            Err(CarryError::App(_)) => send.send_reset(Reason::CONNECT_ERROR),
            Err(CarryError::HalfClosedSilence(_) | CarryError::Stopped) => send.send_reset(Reason::CANCEL),
        }
        result
    }
}

async fn both_ways(
    app: &TcpStream,
    send: &mut Sender,
    receive: &mut Receiver,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), CarryError> {
    let mut up = pin!(app_to_tunnel(app, send, meter));
    let mut down = pin!(tunnel_to_app(app, receive, meter));
    let up_ended = tokio::select! {
        result = &mut up => { result?; true }
        result = &mut down => { result?; false }
    };
    loop {
        let before = meter.total();
        let rest = async {
            if up_ended {
                tokio::select! {
                    result = &mut down => result,
                    broken = app_broken(app) => Err(CarryError::App(broken)),
                }
            } else {
                up.as_mut().await
            }
        };
        match tokio::time::timeout(silence, rest).await {
            Ok(result) => return result,
            Err(_) if meter.total() == before => return Err(CarryError::HalfClosedSilence(silence)),
            Err(_) => {}
        }
    }
}

async fn app_to_tunnel(app: &TcpStream, send: &mut Sender, meter: &impl Meter) -> Result<(), CarryError> {
    loop {
        // Readiness and reads that succeed at once take no turn of the runtime's; others must have theirs.
        tokio::task::consume_budget().await;
        tokio::select! {
            ready = app.readable() => ready.map_err(CarryError::App)?,
            reset = poll_fn(|context| send.poll_reset(context)) => return finished_early(reset?),
        }
        send.reserve_capacity(SCRATCH_BYTES);
        while send.capacity() == 0 {
            tokio::select! {
                granted = poll_fn(|context| send.poll_capacity(context)) => match granted {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                    None => return finished_early(poll_fn(|context| send.poll_reset(context)).await?),
                },
                broken = app_broken(app) => return Err(CarryError::App(broken)),
            }
        }
        let room = send.capacity();
        match read_now(app, room) {
            Ok(bytes) if bytes.is_empty() => {
                send.reserve_capacity(0);
                send.send_data(Bytes::new(), true)?;
                return Ok(());
            }
            Ok(bytes) => {
                let length = bytes.len();
                send.send_data(bytes, false)?;
                meter.up(length);
                if length < room.min(SCRATCH_BYTES) {
                    // What an idle stream has reserved, busy ones would miss.
                    send.reserve_capacity(0);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => send.reserve_capacity(0),
            Err(error) => return Err(CarryError::App(error)),
        }
    }
}

/// The peer wants no more of our bytes: NO_ERROR is an orderly end (RFC 9113 8.1), anything else a reset.
fn finished_early(reason: Reason) -> Result<(), CarryError> {
    if reason == Reason::NO_ERROR { Ok(()) } else { Err(CarryError::Reset(reason)) }
}

async fn tunnel_to_app(app: &TcpStream, receive: &mut Receiver, meter: &impl Meter) -> Result<(), CarryError> {
    while let Some(chunk) = receive.data().await {
        let chunk = chunk?;
        tokio::task::consume_budget().await;
        tokio::select! {
            biased;
            written = write_all(app, &chunk) => written.map_err(CarryError::App)?,
            // An application that does not read must not make small frames pile up in HTTP/2's queue.
            never = receive.gather() => match never {},
        }
        meter.down(chunk.len());
        receive.release(chunk.len())?;
    }
    // The other direction may still run: only our sending side ends.
    socket2::SockRef::from(app).shutdown(std::net::Shutdown::Write).or_else(unconnected).map_err(CarryError::App)
}

/// A socket whose peer has gone cannot be shut down, and need not be.
fn unconnected(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

/// Resolves when the application's connection is reset while nobody reads it.
pub async fn app_broken(app: &TcpStream) -> io::Error {
    match app.ready(Interest::ERROR).await {
        Err(error) => error,
        Ok(_) => match app.take_error() {
            Ok(Some(error)) | Err(error) => error,
            // Both directions shut without error: an orderly end, reported by whoever reads or writes.
            Ok(None) => std::future::pending().await,
        },
    }
}
