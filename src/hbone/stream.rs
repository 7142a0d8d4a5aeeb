//! One stream, and carrying an application's socket over it: bytes both ways, half-close as END_STREAM, RST as
//! RST_STREAM (CONNECT_ERROR, RFC 9113 section 8.5) behind what was sent before it, back-pressure by not reading.

use super::buffers::Account;
use super::carry::{Meter, Silent, deliver_last_bytes, end_writing, unless_silent};
use super::error::TunnelError;
use super::flow::{ReceiveHalf, SendHalf};
use crate::sys::end::End;
use crate::sys::scratch::{SCRATCH_BYTES, read_now, write_all};
use bytes::Bytes;
use h2::{Reason, SendStream};
use std::fmt;
use std::future::{Future, poll_fn, ready};
use std::io;
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::net::TcpStream;

/// An accepted stream.
pub struct Stream {
    send: SendHalf,
    receive: ReceiveHalf,
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
    /// We have ended the tunnel because of what its peer did.
    #[error("{0}")]
    Cut(TunnelError),
    /// One side had closed and the other was silent for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// The caller's stop signal came.
    #[error("stopped")]
    Stopped,
}

impl CarryError {
    /// Names an end of the tunnel that was ours as ours.
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

    /// Carries `app` over this stream until both have closed, or until the first error or `stop`; then the stream is
    /// reset. `silence` bounds how long one direction may be silent after the other has ended. Where one side is reset, what it
    /// had sent before has been passed on when this returns, or 10 s have passed.
    pub async fn carry(
        self,
        app: &TcpStream,
        meter: &impl Meter,
        silence: Duration,
        stop: impl Future<Output = ()>,
    ) -> Result<(), CarryError> {
        let (Self { send, receive }, app) = (self, End::new(app));
        let account = send.account().clone();
        let result = tokio::select! {
            biased;
            () = stop => Err(CarryError::Stopped),
            // At once, whatever is still to be delivered: that is what there is no room for.
            reason = account.cut_signal() => Err(CarryError::Cut(reason.into())),
            result = both_ways(&app, StreamSender::new(send), receive, meter, silence) => result,
        };
        result.map_err(|error| error.ours_or_theirs(&account))
    }
}

/// The sending side of a stream, which is reset when it is dropped before it has ended.
struct StreamSender {
    stream: Option<SendHalf>,
}

impl StreamSender {
    fn new(stream: SendHalf) -> Self {
        Self { stream: Some(stream) }
    }

    fn stream(&mut self) -> Result<&mut SendHalf, CarryError> {
        self.stream.as_mut().ok_or(CarryError::Reset(Reason::CANCEL))
    }

    /// Resolves when the peer wants no more of our bytes.
    async fn unwanted(&mut self) -> Result<Reason, CarryError> {
        let stream = self.stream()?;
        Ok(poll_fn(|context| stream.poll_reset(context)).await?)
    }

    /// The stream has ended in order, or the peer has ended it: it is over when what is still queued has gone.
    async fn ended(mut self) -> Result<(), CarryError> {
        if let Some(mut stream) = self.stream.take() {
            stream.flushed().await;
        }
        Ok(())
    }

    /// Resets the stream because the application's connection has broken; what that had sent before goes first.
    async fn app_broke(mut self, app: &End<'_>) -> CarryError {
        if let Some(mut stream) = self.stream.take() {
            // A reset would throw away what is still queued.
            tokio::select! {
                () = stream.flushed() => {}
                () = app.is_late() => {}
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
    app: &End<'_>,
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
        // Nobody is left to take what comes.
        FirstEnded::Up(Err(error)) if app.is_broken() => Err(error),
        FirstEnded::Up(Err(error)) => Err(after_last_bytes(app, down, error).await),
        FirstEnded::Down(Ok(())) => match unless_silent(meter, silence, up).await {
            Ok(Ok(sender)) => sender.ended().await,
            Ok(Err(error)) => Err(after_last_bytes(app, ready(()), error).await),
            Err(Silent) => Err(CarryError::HalfClosedSilence(silence)),
        },
        // What the application had sent before it broke still goes out.
        FirstEnded::Down(Err(error)) if app.is_broken() => Err(up.await.err().unwrap_or(error)),
        FirstEnded::Down(Err(error)) => Err(after_last_bytes(app, ready(()), error).await),
    }
}

enum FirstEnded {
    Up(Result<StreamSender, CarryError>),
    Down(Result<(), CarryError>),
}

/// What comes from the tunnel after the application has ended in order.
async fn rest_of_down(
    app: &End<'_>,
    mut sender: StreamSender,
    mut down: Pin<&mut impl Future<Output = Result<(), CarryError>>>,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), CarryError> {
    let mut wanted = true;
    loop {
        let step = async {
            tokio::select! {
                ended = &mut down => Ok(ended),
                reason = sender.unwanted(), if wanted => match reason {
                    Ok(Reason::NO_ERROR) => Err(None),
                    Ok(reason) => Err(Some(CarryError::Reset(reason))),
                    Err(error) => Err(Some(error)),
                },
                () = app.broken() => Ok(Err(CarryError::App(app.error()))),
            }
        };
        match unless_silent(meter, silence, step).await {
            Ok(Ok(Ok(()))) => return sender.ended().await,
            Ok(Ok(Err(_))) if app.is_broken() => return Err(sender.app_broke(app).await),
            Ok(Ok(Err(error))) => return Err(after_last_bytes(app, ready(()), error).await),
            Ok(Err(Some(error))) => return Err(after_last_bytes(app, down, error).await),
            Ok(Err(None)) => wanted = false,
            Err(Silent) => return Err(CarryError::HalfClosedSilence(silence)),
        }
    }
}

/// Waits until the application has what the tunnel brought before it ended with `error`.
async fn after_last_bytes<T>(app: &End<'_>, rest: impl Future<Output = T>, error: CarryError) -> CarryError {
    deliver_last_bytes(app, rest).await;
    error
}

/// Passes on what the application sends until it ends, and then END_STREAM; gives the sender back.
async fn app_to_tunnel(
    app: &End<'_>,
    mut sender: StreamSender,
    meter: &impl Meter,
) -> Result<StreamSender, CarryError> {
    loop {
        // Readiness and reads that succeed at once take no turn of the runtime's; others must have theirs.
        tokio::task::consume_budget().await;
        tokio::select! {
            ready = app.socket.readable() => if let Err(error) = ready {
                app.breaks(error);
                return Err(sender.app_broke(app).await);
            },
            reason = sender.unwanted() => return finished_early(reason?, sender),
        }
        let send = sender.stream()?;
        send.reserve_capacity(SCRATCH_BYTES);
        while send.capacity() == 0 {
            tokio::select! {
                biased;
                () = app.is_late() => return Err(sender.app_broke(app).await),
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
                    // What an idle stream has reserved, busy ones would miss.
                    sender.stream()?.reserve_capacity(0);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => send.reserve_capacity(0),
            Err(error) => {
                app.breaks(error);
                return Err(sender.app_broke(app).await);
            }
        }
    }
}

/// The peer wants no more of our bytes: NO_ERROR is an orderly end (RFC 9113 8.1), anything else a reset.
fn finished_early(reason: Reason, sender: StreamSender) -> Result<StreamSender, CarryError> {
    if reason == Reason::NO_ERROR { Ok(sender) } else { Err(CarryError::Reset(reason)) }
}

/// Passes on what the tunnel brings until it ends, and then FIN. What came before a reset is still there to be read.
async fn tunnel_to_app(app: &End<'_>, mut receive: ReceiveHalf, meter: &impl Meter) -> Result<(), CarryError> {
    let failed = |error: io::Error| {
        app.breaks(error);
        CarryError::App(app.error())
    };
    while let Some(chunk) = receive.data().await {
        let chunk = chunk?;
        tokio::task::consume_budget().await;
        tokio::select! {
            biased;
            written = write_all(app.socket, &chunk) => written.map_err(failed)?,
            // An application that does not read must not make small frames pile up in HTTP/2's queue.
            never = receive.gather() => match never {},
        }
        meter.down(chunk.len());
        receive.release(chunk.len())?;
    }
    // The other direction may still run: only our sending side ends.
    end_writing(app.socket).map_err(failed)
}
