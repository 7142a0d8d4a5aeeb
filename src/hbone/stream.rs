//! One stream of a tunnel, until an application's connection is carried over it.

use super::codec::frame::ErrorCode;
use super::engine::{Engine, Owner, State, StreamId, TunnelId};
use super::error::{StreamFailure, TunnelError};
use http::StatusCode;
use std::fmt;
use std::net::TcpStream;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// A stream. If it is dropped before anything is carried over it, it is reset.
pub struct Stream {
    engine: Engine,
    id: StreamId,
    /// Whether the engine has taken it over.
    carried: bool,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.id.id)
    }
}

/// Tells the connection that is carried over a stream to stop.
#[derive(Clone, Debug)]
pub struct Stopper {
    engine: Engine,
    id: StreamId,
}

impl Stopper {
    /// Ends the connection with [`CarryError::Stopped`], unless it has ended already. Can be called on any thread.
    ///
    /// [`CarryError::Stopped`]: super::CarryError::Stopped
    pub fn stop(&self) {
        self.engine.stop(self.id);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.carried {
            self.engine.with(self.id.tunnel, |tunnel, work| {
                if tunnel.session.get(self.id.key).is_some_and(|stream| stream.id == self.id.id) {
                    tunnel.drop_stream(self.id.key, work);
                }
            });
        }
    }
}

impl Stream {
    pub(super) fn new(engine: &Engine, tunnel: TunnelId, key: usize, id: u32) -> Self {
        Self { engine: engine.clone(), id: StreamId { tunnel, key, id }, carried: false }
    }

    /// What the state of the stream means; the waker is woken when it changes.
    pub(super) fn poll_state<T>(&self, context: &mut Context<'_>, meaning: impl Fn(&State) -> Poll<T>) -> Poll<T> {
        let polled = self.engine.with(self.id.tunnel, |tunnel, _| {
            let stream = tunnel.session.get_mut(self.id.key)?;
            let polled = meaning(&stream.app.state);
            if polled.is_pending() {
                stream.app.waker = Some(context.waker().clone());
            }
            Some(polled)
        });
        let gone = || State::Failed(StreamFailure::Tunnel(Arc::new(TunnelError::Closed)));
        polled.flatten().unwrap_or_else(|| meaning(&gone()))
    }

    /// Answers the peer's request. Any status but 200 ends our side.
    pub(super) fn answer(&self, status: StatusCode, baggage: Option<&str>) {
        self.engine.with(self.id.tunnel, |tunnel, work| {
            tunnel.session.answer(self.id.key, status.as_u16(), baggage, status != StatusCode::OK);
            tunnel.mark(work);
        });
    }

    /// Resets the stream.
    pub(super) fn reset(&self, code: ErrorCode) {
        self.engine.with(self.id.tunnel, |tunnel, work| {
            tunnel.session.reset(self.id.key, code);
            tunnel.mark(work);
        });
    }

    /// Carries an application's connection over this stream until both sides have closed, one of them breaks, or the
    /// connection is told to stop. Then `owner` is told how it ended. Once one direction has ended, the other may be
    /// silent for at most `silence`.
    ///
    /// Half-close is END_STREAM, a reset is RST_STREAM with CONNECT_ERROR (RFC 9113 section 8.5), and both arrive behind
    /// what was sent before them.
    pub fn carry(mut self, app: TcpStream, owner: Box<dyn Owner>, silence: Duration) -> Stopper {
        self.carried = true;
        let stopper = Stopper { engine: self.engine.clone(), id: self.id };
        self.engine.carry(self.id, app, owner, silence);
        stopper
    }
}
