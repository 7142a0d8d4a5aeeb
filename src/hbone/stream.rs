//! One stream, and carrying an application's socket over it.
//!
//! Bytes are carried both ways. Half-close is END_STREAM, a reset is RST_STREAM with CONNECT_ERROR (RFC 9113 section
//! 8.5), and both arrive behind what was sent before them. Back-pressure comes from reading only when the other side
//! has room.

use super::buffers::Account;
use super::carry::{Meter, Silent, deliver_last_bytes, end_writing, unless_silent};
use super::error::TunnelError;
use super::flow::{ReceiveHalf, SendHalf};
use crate::sys::leg::Leg;
use crate::sys::scratch::{SCRATCH_BYTES, read_now, write_all};
use bytes::Bytes;
use h2::{Reason, SendStream};
use std::fmt;
use std::future::{Future, poll_fn, ready};
use std::io;
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::net::TcpStream;

/// A stream that the far end or this node has accepted.
pub struct Stream {
    send: SendHalf,
    receive: ReceiveHalf,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

/// Why carrying ended before both sides had closed in order. The caller resets the application's socket.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The application's connection broke: it was reset, or it timed out.
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The peer reset the stream.
    #[error("the peer reset the stream ({0})")]
    Reset(Reason),
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    Tunnel(h2::Error),
    /// This node ended the tunnel because of what its peer did.
    #[error("{0}")]
    Cut(TunnelError),
    /// One side had closed, and the other one was silent for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// The caller's stop signal fired.
    #[error("stopped")]
    Stopped,
}

impl CarryError {
    /// Turns a broken tunnel into [`CarryError::Cut`] if this node ended it.
    fn ours_or_theirs(self, account: &Account) -> Self {
        let Self::Tunnel(error) = self else { return self };
        match TunnelError::of(error, account) {
            TunnelError::Http2(error) => Self::Tunnel(error),
            ours => Self::Cut(ours),
        }
    }
}

impl From<h2::Error> for CarryError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => Self::Reset(reason),
            _ => Self::Tunnel(error),
        }
    }
}

impl Stream {
    pub(super) fn new(send: SendStream<Bytes>, receive: ReceiveHalf) -> Self {
        Self { send: receive.sending(send), receive }
    }

    /// Carries `app` over this stream until both have closed. On the first error, or when `stop` resolves, the stream
    /// is reset. Once one direction has ended, the other may be silent for at most `silence`. If one side is reset,
    /// this returns when what it had sent before has been passed on, or after [`LAST_BYTES`].
    ///
    /// [`LAST_BYTES`]: crate::sys::leg::LAST_BYTES
    pub async fn carry(
        self,
        app: &TcpStream,
        meter: &impl Meter,
        silence: Duration,
        stop: impl Future<Output = ()>,
    ) -> Result<(), CarryError> {
        let (Self { send, receive }, app) = (self, Leg::new(app));
        let account = send.account().clone();
        let result = tokio::select! {
            biased;
            () = stop => Err(CarryError::Stopped),
            // Ends at once and discards the rest: a tunnel is often cut because there is no memory for it.
            reason = account.cut_signal() => Err(CarryError::Cut(reason.into())),
            result = both_ways(&app, StreamSender::new(send), receive, meter, silence) => result,
        };
        result.map_err(|error| error.ours_or_theirs(&account))
    }
}

/// The sending side of a stream. The stream is reset if this is dropped before it has ended.
struct StreamSender {
    stream: Option<SendHalf>,
}

impl StreamSender {
    fn new(stream: SendHalf) -> Self {
        Self { stream: Some(stream) }
    }

    /// The stream, or an error if it has ended.
    fn stream(&mut self) -> Result<&mut SendHalf, CarryError> {
        self.stream.as_mut().ok_or(CarryError::Reset(Reason::CANCEL))
    }

    /// Resolves when the peer accepts no more data.
    async fn unwanted(&mut self) -> Result<Reason, CarryError> {
        let stream = self.stream()?;
        Ok(poll_fn(|context| stream.poll_reset(context)).await?)
    }

    /// Ends the stream in order: completes when everything that is still queued has been sent.
    async fn ended(mut self) -> Result<(), CarryError> {
        if let Some(mut stream) = self.stream.take() {
            stream.flushed().await;
        }
        Ok(())
    }

    /// Resets the stream because the application's connection has broken, after sending what that had sent before.
    async fn app_broke(mut self, app: &Leg<'_>) -> CarryError {
        if let Some(mut stream) = self.stream.take() {
            // A reset discards what is still queued.
            tokio::select! {
                () = stream.flushed() => {}
                () = app.last_bytes_deadline() => {}
            }
            stream.send_reset(Reason::CONNECT_ERROR);
        }
        CarryError::App(app.error())
    }
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.send_reset(Reason::CANCEL);
        }
    }
}

async fn both_ways(
    app: &Leg<'_>,
    sender: StreamSender,
    receive: ReceiveHalf,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), CarryError> {
    let mut up = pin!(app_to_tunnel(app, sender, meter));
    let mut down = pin!(tunnel_to_app(app, receive, meter));
    let ended = tokio::select! {
        up = &mut up => FirstEnded::Up(up),
        down = &mut down => FirstEnded::Down(down),
    };
    match ended {
        FirstEnded::Up(Ok(sender)) => rest_of_down(app, sender, down, meter, silence).await,
        // The application is gone, so nothing more can be delivered to it.
        FirstEnded::Up(Err(error)) if app.is_broken() => Err(error),
        FirstEnded::Up(Err(error)) => Err(after_last_bytes(app, down, error).await),
        FirstEnded::Down(Ok(())) => match unless_silent(meter, silence, up).await {
            Ok(Ok(sender)) => sender.ended().await,
            Ok(Err(error)) => Err(after_last_bytes(app, ready(()), error).await),
            Err(Silent) => Err(CarryError::HalfClosedSilence(silence)),
        },
        // What the application had sent before it broke still has to be sent.
        FirstEnded::Down(Err(error)) if app.is_broken() => Err(up.await.err().unwrap_or(error)),
        FirstEnded::Down(Err(error)) => Err(after_last_bytes(app, ready(()), error).await),
    }
}

/// The direction that ended first, with its result.
enum FirstEnded {
    Up(Result<StreamSender, CarryError>),
    Down(Result<(), CarryError>),
}

/// The direction from the tunnel to the application, after the application has ended in order.
async fn rest_of_down(
    app: &Leg<'_>,
    mut sender: StreamSender,
    mut down: Pin<&mut impl Future<Output = Result<(), CarryError>>>,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), CarryError> {
    let mut wanted = true;
    loop {
        let ended = {
            let step = pin!(async {
                tokio::select! {
                    ended = &mut down => Ok(ended),
                    reason = sender.unwanted(), if wanted => match reason {
                        Ok(Reason::NO_ERROR) => Err(None),
                        Ok(reason) => Err(Some(CarryError::Reset(reason))),
                        Err(error) => Err(Some(error)),
                    },
                    () = app.broken() => Ok(Err(CarryError::App(app.error()))),
                }
            });
            unless_silent(meter, silence, step).await
        };
        match ended {
            Ok(Ok(Ok(()))) => return sender.ended().await,
            Ok(Ok(Err(_))) if app.is_broken() => return Err(sender.app_broke(app).await),
            Ok(Ok(Err(error))) => return Err(after_last_bytes(app, ready(()), error).await),
            Ok(Err(Some(error))) => return Err(after_last_bytes(app, down, error).await),
            Ok(Err(None)) => wanted = false,
            Err(Silent) => return Err(CarryError::HalfClosedSilence(silence)),
        }
    }
}

/// Waits until the application has received what the tunnel brought before it ended with `error`; returns `error`.
async fn after_last_bytes<T>(app: &Leg<'_>, rest: impl Future<Output = T>, error: CarryError) -> CarryError {
    deliver_last_bytes(app, rest).await;
    error
}

/// Passes on what the application sends until it ends, and then sends END_STREAM. Returns the sender.
async fn app_to_tunnel(
    app: &Leg<'_>,
    mut sender: StreamSender,
    meter: &impl Meter,
) -> Result<StreamSender, CarryError> {
    loop {
        // Reads that succeed at once never yield to the runtime by themselves; other tasks must get their turn.
        tokio::task::consume_budget().await;
        tokio::select! {
            ready = app.socket.readable() => if let Err(error) = ready {
                app.record_error(error);
                return Err(sender.app_broke(app).await);
            },
            reason = sender.unwanted() => return finished_early(reason?, sender),
        }
        let send = sender.stream()?;
        send.reserve_capacity(SCRATCH_BYTES);
        while send.capacity() == 0 {
            tokio::select! {
                biased;
                () = app.last_bytes_deadline() => return Err(sender.app_broke(app).await),
                granted = poll_fn(|context| send.poll_capacity(context)) => match granted {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                    None => {
                        let reason = poll_fn(|context| send.poll_reset(context)).await?;
                        return finished_early(reason, sender);
                    }
                },
            }
        }
        let room = send.capacity();
        match read_now(app.socket, room) {
            Ok(bytes) if bytes.is_empty() && app.is_broken() => return Err(sender.app_broke(app).await),
            Ok(bytes) if bytes.is_empty() => {
                send.reserve_capacity(0);
                send.send_data(Bytes::new(), true)?;
                return Ok(sender);
            }
            Ok(bytes) => {
                let length = bytes.len();
                sender.stream()?.send_data(bytes, false)?;
                meter.up(length);
                if length < room.min(SCRATCH_BYTES) {
                    // An idle stream must not reserve window that busy streams need.
                    sender.stream()?.reserve_capacity(0);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => send.reserve_capacity(0),
            Err(error) => {
                app.record_error(error);
                return Err(sender.app_broke(app).await);
            }
        }
    }
}

/// The peer accepts no more data: NO_ERROR is an orderly end (RFC 9113 section 8.1), anything else a reset.
fn finished_early(reason: Reason, sender: StreamSender) -> Result<StreamSender, CarryError> {
    if reason == Reason::NO_ERROR { Ok(sender) } else { Err(CarryError::Reset(reason)) }
}

/// Passes on what the tunnel brings until it ends, and then sends FIN. After a reset, h2 still returns what came before
/// it.
async fn tunnel_to_app(app: &Leg<'_>, mut receive: ReceiveHalf, meter: &impl Meter) -> Result<(), CarryError> {
    let failed = |error: io::Error| {
        app.record_error(error);
        CarryError::App(app.error())
    };
    while let Some(chunk) = receive.data().await {
        let chunk = chunk?;
        tokio::task::consume_budget().await;
        tokio::select! {
            biased;
            written = write_all(app.socket, &chunk) => written.map_err(failed)?,
            // Keep taking frames while the application does not read; small ones must not pile up in the queue of
            // HTTP/2.
            never = receive.gather() => match never {},
        }
        meter.down(chunk.len());
        receive.release(chunk.len())?;
    }
    // Only this direction ends; the other one may continue.
    end_writing(app.socket).map_err(failed)
}
