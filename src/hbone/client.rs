//! The client end of a tunnel: opens streams until one side says that it is going away.

use super::buffers::Account;
use super::carrier::Carrier;
use super::codec::frame::ErrorCode;
use super::config::Config;
use super::engine::{self, Engine, State, TunnelId};
use super::error::{StreamFailure, TunnelError};
use super::ping;
use super::request::ConnectRequest;
use super::session::Role;
use super::stream::Stream;
use super::tls::Handshaken;
use http::StatusCode;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// A handle to a tunnel to one peer. Clones share the tunnel, and it ends when all of them and all streams are gone.
#[derive(Clone)]
pub struct Tunnel {
    handle: Arc<Handle>,
}

struct Handle {
    engine: Engine,
    id: TunnelId,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.engine.with(self.id, |tunnel, _| {
            tunnel.unused = true;
            tunnel.wake();
        });
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tunnel")
    }
}

/// Ends a tunnel when it is not used any more, cut, or not answered. The tunnel ends when this is dropped.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    id: TunnelId,
    account: Arc<Account>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.engine.remove(self.id, TunnelError::Closed);
    }
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The tunnel was going away before the request was sent, or the peer says that it has not acted on it. It is safe
    /// to use another tunnel.
    #[error("the tunnel is going away: {0}")]
    TunnelGone(StreamFailure),
    /// The peer accepts no more streams on this tunnel for now. It is safe to ask again.
    #[error("the peer refuses the stream (REFUSED_STREAM)")]
    Refused,
    /// The peer answered with a status other than 200.
    #[error("http status: {}: {}", .0, meaning(.0))]
    Status(StatusCode),
    /// The stream or the tunnel broke while waiting for the answer.
    #[error("the tunnel broke: {0}")]
    Broken(StreamFailure),
}

/// What the far end means by a status (source: ztunnel's inbound HBONE handling, and Envoy's handling of
/// CONNECT).
fn meaning(status: &StatusCode) -> &'static str {
    match status.as_u16() {
        400 => {
            "the far end rejects the request: the address is not that pod's (outdated facts on one of the two sides), or it was not understood"
        }
        401 => "the far end's policies refuse it",
        403 => "the far end refuses it: by a waypoint's policies, or because our certificate is revoked",
        404 => "the far end, a waypoint or gateway, has no route for it: check its configuration",
        429 => "the far end limits the rate of requests",
        500 => "the far end failed: see its log",
        502 | 504 => "the far end, a waypoint or gateway, cannot reach the application",
        503 => {
            "the far end cannot reach the application (does it listen on the port?), does not know its pod's workload yet, or has reached a limit"
        }
        _ => "not a status that HBONE peers are known to answer",
    }
}

/// Starts HTTP/2 on a connection whose TLS handshake is done. What the peer makes this node hold is booked on
/// `account`.
pub fn start(
    engine: &Engine,
    handshaken: Handshaken,
    config: &Config,
    account: &Arc<Account>,
) -> Result<(Tunnel, Driver), TunnelError> {
    let id = engine.add(Role::Client, handshaken, config, account).map_err(TunnelError::io)?;
    let driver = Driver { engine: engine.clone(), id, account: account.clone() };
    Ok((Tunnel { handle: Arc::new(Handle { engine: engine.clone(), id }) }, driver))
}

impl Driver {
    /// The tunnel is inside a stream of another one. When that stream ends, the tunnel's error says why.
    pub fn carried_by(&self, carrier: &Carrier) {
        self.engine.with(self.id, |tunnel, _| tunnel.carrier = Some(carrier.reason.clone()));
    }

    /// Completes once the far end has answered a PING: it has accepted our certificate, and its limits are known.
    pub async fn settled(&mut self) -> Result<(), TunnelError> {
        self.engine.with(self.id, |tunnel, work| {
            tunnel.session.ping();
            tunnel.mark(work);
        });
        poll_fn(|context| {
            let state = self.engine.with(self.id, |tunnel, _| {
                if let Some(error) = &tunnel.end {
                    return Poll::Ready(Err((**error).clone()));
                }
                if tunnel.pongs > 0 && tunnel.session.is_settled() {
                    return Poll::Ready(Ok(()));
                }
                tunnel.waker = Some(context.waker().clone());
                Poll::Pending
            });
            state.unwrap_or(Poll::Ready(Err(TunnelError::Closed)))
        })
        .await
    }

    /// Completes when the tunnel has ended: because it is not used any more, the peer closes it, it breaks, or it is
    /// cut.
    pub async fn run(&self) -> Result<(), TunnelError> {
        let ended = tokio::select! {
            biased;
            ended = poll_fn(|context| self.poll_ended(context)) => ended,
            reason = self.account.cut_signal() => reason.into(),
            overdue = ping::watch(&self.engine, self.id) => overdue.into(),
        };
        if let TunnelError::Cut(_) = &ended {
            self.engine.with(self.id, |tunnel, work| tunnel.end_with(ended.clone(), work));
        }
        if matches!(ended, TunnelError::Closed) { Ok(()) } else { Err(ended) }
    }

    fn poll_ended(&self, context: &mut Context<'_>) -> Poll<TunnelError> {
        let state = self.engine.with(self.id, |tunnel, work| {
            if let Some(error) = &tunnel.end {
                return Poll::Ready((**error).clone());
            }
            let done = tunnel.unused || !tunnel.session.takes_streams();
            if done && tunnel.session.len() == 0 && !tunnel.closing {
                tunnel.session.go_away();
                tunnel.closing = true;
                tunnel.mark(work);
            }
            tunnel.waker = Some(context.waker().clone());
            Poll::Pending
        });
        state.unwrap_or(Poll::Ready(TunnelError::Closed))
    }

    /// Completes when the peer has said that it goes away (GOAWAY). Await it in the task that awaits [`Driver::run`]:
    /// only one task is woken.
    pub async fn going_away(&self) {
        poll_fn(|context| {
            let said = self.engine.with(self.id, |tunnel, _| {
                tunnel.waker = Some(context.waker().clone());
                tunnel.session.peer_is_leaving()
            });
            if said == Some(true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Whether the peer has said that it goes away.
    pub fn is_going_away(&self) -> bool {
        self.engine.with(self.id, |tunnel, _| tunnel.session.peer_is_leaving()).unwrap_or(false)
    }

    /// Tells every connection of the tunnel to stop.
    pub fn stop_all(&self) {
        self.engine.with(self.id, engine::Tunnel::stop_all);
    }
}

impl Tunnel {
    /// Most streams that the peer allows at once.
    pub fn max_streams(&self) -> usize {
        self.handle.engine.with(self.handle.id, |tunnel, _| tunnel.session.max_streams()).unwrap_or(0)
    }

    /// Whether large transfers keep the tunnel busy. A new stream is better off on another one.
    pub fn is_busy(&self) -> bool {
        let busy = self.handle.engine.with(self.handle.id, |tunnel, _| tunnel.bulk_rate.is_busy(Instant::now()));
        busy.unwrap_or(false)
    }

    /// Opens a stream and waits for the peer to accept it. No data is sent on it before.
    pub async fn open(&self, request: &ConnectRequest) -> Result<Stream, OpenError> {
        let Handle { engine, id } = &*self.handle;
        let opened = engine.with(*id, |tunnel, work| {
            if let Some(error) = &tunnel.end {
                return Err(OpenError::TunnelGone(StreamFailure::Tunnel(error.clone())));
            }
            if tunnel.session.takes_streams() && tunnel.session.len() >= tunnel.session.max_streams() {
                return Err(OpenError::Refused);
            }
            let key = tunnel.session.open(request, engine::App::default());
            let key = key.ok_or(OpenError::TunnelGone(StreamFailure::Unprocessed))?;
            tunnel.mark(work);
            Ok((key, tunnel.session.get(key).map_or(0, |stream| stream.id)))
        });
        let gone = || OpenError::TunnelGone(StreamFailure::Tunnel(Arc::new(TunnelError::Closed)));
        let (key, number) = opened.unwrap_or_else(|| Err(gone()))?;
        let stream = Stream::new(engine, *id, key, number);
        poll_fn(|context| stream.poll_state(context, answer)).await?;
        Ok(stream)
    }
}

/// What the state of a stream means to who has asked for it.
fn answer(state: &State) -> Poll<Result<(), OpenError>> {
    Poll::Ready(match state {
        State::Asked => return Poll::Pending,
        State::Answered(200) => Ok(()),
        State::Answered(status) => {
            Err(OpenError::Status(StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)))
        }
        // REFUSED_STREAM, and a GOAWAY that excludes this stream, guarantee that the peer has not acted on the request
        // (RFC 9113 sections 8.7 and 6.8).
        State::Failed(StreamFailure::Reset(ErrorCode::REFUSED_STREAM)) => Err(OpenError::Refused),
        State::Failed(StreamFailure::Unprocessed) => Err(OpenError::TunnelGone(StreamFailure::Unprocessed)),
        State::Failed(failure) => Err(OpenError::Broken(failure.clone())),
    })
}
