//! The server end of a tunnel: streams arrive, and each is accepted or refused.

use super::buffers::Account;
use super::codec::frame::ErrorCode;
use super::config::Config;
use super::engine::{self, Engine, State, TunnelId};
use super::error::TunnelError;
use super::ping;
use super::request::{ConnectRequest, RequestError};
use super::session::Role;
use super::stream::Stream;
use super::tls::Handshaken;
use crate::hbone::cut::CutReason;
use http::StatusCode;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A tunnel from one peer. The tunnel ends when this is dropped.
pub struct Server {
    engine: Engine,
    id: TunnelId,
    account: Arc<Account>,
    pings: Pin<Box<dyn Future<Output = CutReason> + Send>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Server")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.engine.remove(self.id, TunnelError::Closed);
    }
}

/// A stream that waits for an answer. If it is dropped without one, it is reset.
#[derive(Debug)]
pub struct Incoming {
    /// The request, or why it is not a valid one.
    pub request: Result<ConnectRequest, RequestError>,
    stream: Stream,
}

impl Server {
    /// Starts HTTP/2 on a connection whose TLS handshake is done. What the peer makes this node hold is booked on
    /// `account`.
    pub fn start(
        engine: &Engine,
        handshaken: Handshaken,
        config: &Config,
        account: &Arc<Account>,
    ) -> Result<Self, TunnelError> {
        let id = engine.add(Role::Server, handshaken, config, account).map_err(TunnelError::io)?;
        let pings = {
            let engine = engine.clone();
            Box::pin(async move { ping::watch(&engine, id).await })
        };
        Ok(Self { engine: engine.clone(), id, account: account.clone(), pings })
    }

    /// Completes once HTTP/2 has begun: the peer's SETTINGS are there.
    pub async fn settled(&mut self) -> Result<(), TunnelError> {
        poll_fn(|context| {
            let state = self.engine.with(self.id, |tunnel, _| match &tunnel.end {
                Some(error) => Poll::Ready(Err((**error).clone())),
                None if tunnel.session.is_settled() => Poll::Ready(Ok(())),
                None => {
                    tunnel.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            });
            state.unwrap_or(Poll::Ready(Err(TunnelError::Closed)))
        })
        .await
    }

    /// The next stream; `None` when the tunnel has been closed in order.
    pub async fn next(&mut self) -> Option<Result<Incoming, TunnelError>> {
        let Self { engine, id, account, pings } = self;
        let cut = tokio::select! {
            biased;
            reason = account.cut_signal() => reason,
            next = poll_fn(|context| poll_next(engine, *id, context)) => return next,
            overdue = pings => overdue,
        };
        engine.with(*id, |tunnel, work| tunnel.end_with(cut.into(), work));
        Some(Err(cut.into()))
    }

    /// Sends GOAWAY: the peer opens no new streams, and the open ones continue.
    pub fn go_away(&mut self) {
        self.engine.with(self.id, |tunnel, work| {
            tunnel.session.go_away();
            tunnel.mark(work);
        });
    }

    /// Tells every connection of the tunnel to stop.
    pub fn stop_all(&self) {
        self.engine.with(self.id, engine::Tunnel::stop_all);
    }
}

fn poll_next(engine: &Engine, id: TunnelId, context: &mut Context<'_>) -> Poll<Option<Result<Incoming, TunnelError>>> {
    let state = engine.with(id, |tunnel, work| {
        while let Some((key, number, request)) = tunnel.requests.pop_front() {
            // It may have been reset meanwhile, and the key may belong to another one.
            if let Some(stream) = tunnel.session.get_mut(key).filter(|stream| stream.id == number) {
                stream.app.waits = false;
                return Poll::Ready(Some(Ok((key, number, request))));
            }
        }
        if let Some(error) = &tunnel.end {
            return Poll::Ready(match &**error {
                TunnelError::Closed => None,
                error => Some(Err(error.clone())),
            });
        }
        if tunnel.session.is_finished() && !tunnel.closing {
            tunnel.closing = true;
            tunnel.mark(work);
        }
        tunnel.waker = Some(context.waker().clone());
        Poll::Pending
    });
    match state {
        None => Poll::Ready(None),
        Some(Poll::Pending) => Poll::Pending,
        Some(Poll::Ready(next)) => Poll::Ready(next.map(|next| {
            next.map(|(key, number, request)| Incoming { request, stream: Stream::new(engine, id, key, number) })
        })),
    }
}

impl Incoming {
    /// Answers 200, with the `baggage` of the workload that accepts.
    pub fn accept(self, baggage: Option<&str>) -> Stream {
        self.stream.answer(StatusCode::OK, baggage);
        self.stream
    }

    /// Answers with a status other than 200. What the peer has sent already is discarded.
    pub fn refuse(self, status: StatusCode) {
        self.stream.answer(status, None);
        // The answer is complete, and nothing more is wanted (RFC 9113 section 8.1).
        self.stream.reset(ErrorCode::NO_ERROR);
    }

    /// Resolves when the peer gives up the stream before it is answered.
    pub async fn abandoned(&mut self) {
        poll_fn(|context| {
            self.stream.poll_state(context, |state| match state {
                State::Failed(_) => Poll::Ready(()),
                State::Asked | State::Answered(_) => Poll::Pending,
            })
        })
        .await;
    }
}
