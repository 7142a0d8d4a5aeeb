//! The client end of a tunnel: opens streams until one side says that it is going away.

use super::buffers::Account;
use super::config::{Config, FRAME_BUDGET, SEND_BUFFER_BYTES};
use super::error::TunnelError;
use super::flow::{ReceiveHalf, StreamAccount};
use super::guard::Guard;
use super::ping;
use super::request::ConnectRequest;
use super::stream::Stream;
use super::windows::{AdjustWindows, Windows};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong};
use http::StatusCode;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Largest header list that is accepted in an answer, in bytes.
const HEADER_LIST_BYTES: u32 = 16 * 1024;

/// A handle to a tunnel to one peer. Clones share the tunnel, and it ends when all of them are gone.
#[derive(Clone)]
pub struct Tunnel {
    sender: SendRequest<Bytes>,
    account: Arc<Account>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tunnel")
    }
}

/// Moves the bytes of a tunnel. The caller must await [`Driver::run`] for as long as the tunnel is used.
pub struct Driver<IO> {
    connection: Connection<Guard<IO>, Bytes>,
    account: Arc<Account>,
    windows: Windows,
    pings: Option<PingPong>,
}

impl<IO> fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The tunnel was going away before the request was sent. It is safe to use another tunnel.
    #[error("the tunnel is going away: {0}")]
    TunnelGone(h2::Error),
    /// The peer accepts no more streams on this tunnel for now. It is safe to ask again.
    #[error("the peer refuses the stream (REFUSED_STREAM)")]
    Refused,
    /// The peer answered with a status other than 200.
    #[error("http status: {}: {}", .0, meaning(.0))]
    Status(StatusCode),
    /// The tunnel broke while waiting for the answer.
    #[error("the tunnel broke: {0}")]
    Broken(h2::Error),
    /// The request cannot be written as HTTP.
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
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

/// Starts HTTP/2 on `io`. What the peer makes this node buffer is booked on `account`.
pub async fn handshake<IO>(io: IO, config: &Config, account: &Arc<Account>) -> Result<(Tunnel, Driver<IO>), TunnelError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let (sender, mut connection) = h2::client::Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame_size)
        .max_header_list_size(HEADER_LIST_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_local_error_reset_streams(None)
        .data_frame_budget(FRAME_BUDGET)
        .enable_push(false)
        .handshake(Guard::client(io, account.clone()))
        .await
        .map_err(|error| TunnelError::of(error, account))?;
    let (pings, account) = (connection.ping_pong(), account.clone());
    let windows = Windows::new(config);
    Ok((Tunnel { sender, account: account.clone() }, Driver { connection, account, windows, pings }))
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    /// Completes once the far end has answered a PING: it has accepted our certificate, and its limits are known.
    pub async fn settled(&mut self) -> Result<(), TunnelError> {
        let Some(pings) = &mut self.pings else { return Ok(()) };
        tokio::select! {
            ended = &mut self.connection => match ended {
                Err(error) => Err(TunnelError::of(error, &self.account)),
                Ok(()) => Err(TunnelError::Closed),
            },
            answer = pings.ping(Ping::opaque()) => answer.map(drop).map_err(|error| TunnelError::of(error, &self.account)),
        }
    }

    /// Runs the tunnel until it ends: because it is not used any more, the peer closes it, it breaks, or it is cut.
    pub async fn run(self) -> Result<(), TunnelError> {
        let Self { mut connection, account, mut windows, pings } = self;
        let moved = poll_fn(|context| {
            windows.adjust(&account, &mut connection);
            Pin::new(&mut connection).poll(context)
        });
        tokio::select! {
            biased;
            reason = account.cut_signal() => Err(reason.into()),
            ended = moved => ended.map_err(|error| TunnelError::of(error, &account)),
            overdue = ping::watch(pings) => {
                account.cut(overdue);
                Err(overdue.into())
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AdjustWindows for Connection<IO, Bytes> {
    fn connection_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn stream_window(&mut self, bytes: u32) -> bool {
        self.set_initial_window_size(bytes).is_ok()
    }
}

impl Tunnel {
    /// Most streams that the peer allows at once.
    pub fn max_streams(&self) -> usize {
        self.sender.current_max_send_streams()
    }

    /// Opens a stream and waits for the peer to accept it. No data is sent on it before.
    pub async fn open(&self, request: &ConnectRequest) -> Result<Stream, OpenError> {
        let http = request.to_http()?;
        let mut sender = self.sender.clone().ready().await.map_err(OpenError::TunnelGone)?;
        let (response, send) = sender.send_request(http, false).map_err(OpenError::TunnelGone)?;
        // Data that arrives with the answer must already be accounted for.
        let on_account = StreamAccount::new(&self.account, response.stream_id());
        let response = response.await.map_err(|error| {
            // REFUSED_STREAM, and a GOAWAY that excludes this stream, guarantee that the peer has not acted on the
            // request (RFC 9113 sections 8.7 and 6.8).
            match (error.is_remote(), error.is_go_away()) {
                (true, true) => OpenError::TunnelGone(error),
                (true, false) if error.reason() == Some(h2::Reason::REFUSED_STREAM) => OpenError::Refused,
                _ => OpenError::Broken(error),
            }
        })?;
        if response.status() != StatusCode::OK {
            return Err(OpenError::Status(response.status()));
        }
        Ok(Stream::new(send, ReceiveHalf::new(response.into_body(), on_account)))
    }
}
