//! The server end of a tunnel: streams arrive, and each is accepted or refused.

use super::buffers::Account;
use super::config::{Config, FRAME_BUDGET, SEND_BUFFER_BYTES};
use super::cut::CutReason;
use super::error::TunnelError;
use super::flow::{ReceiveHalf, StreamAccount};
use super::guard::Guard;
use super::ping;
use super::request::{self, ConnectRequest, RequestError};
use super::stream::Stream;
use super::windows::{AdjustWindows, Windows};
use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::StatusCode;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Largest header list that is accepted in a request, in bytes. CONNECT requests are much smaller.
const HEADER_LIST_BYTES: u32 = 64 * 1024;

/// A tunnel from one peer.
pub struct Server<IO> {
    connection: Connection<Guard<IO>, Bytes>,
    account: Arc<Account>,
    windows: Windows,
    pings: Pin<Box<dyn Future<Output = CutReason> + Send>>,
}

impl<IO> fmt::Debug for Server<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Server")
    }
}

/// A stream that waits for an answer. If it is dropped without one, it is reset.
pub struct Incoming {
    /// The request, or why it is not a valid one.
    pub request: Result<ConnectRequest, RequestError>,
    receive: ReceiveHalf,
    respond: SendResponse<Bytes>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incoming({:?})", self.request)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Server<IO> {
    /// Starts HTTP/2 on `io`. What the peer makes this node buffer is booked on `account`.
    pub async fn handshake(io: IO, config: &Config, account: &Arc<Account>) -> Result<Self, TunnelError> {
        let mut connection = h2::server::Builder::new()
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            .max_frame_size(config.frame_size)
            .max_header_list_size(HEADER_LIST_BYTES)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .max_concurrent_streams(config.max_streams)
            .max_local_error_reset_streams(None)
            .data_frame_budget(FRAME_BUDGET)
            .handshake(Guard::server(io, account.clone()))
            .await
            .map_err(|error| TunnelError::of(error, account))?;
        let pings = Box::pin(ping::watch(connection.ping_pong()));
        Ok(Self { connection, account: account.clone(), windows: Windows::new(config), pings })
    }

    /// The next stream; `None` when the tunnel has ended. No stream of the tunnel makes progress unless this is
    /// awaited.
    pub async fn next(&mut self) -> Option<Result<Incoming, TunnelError>> {
        let Self { connection, account, windows, pings } = self;
        let accept = poll_fn(|context| {
            windows.adjust(account, connection);
            connection.poll_accept(context)
        });
        tokio::select! {
            biased;
            reason = account.cut_signal() => Some(Err(reason.into())),
            accepted = accept => Some(match accepted? {
                Ok((http, respond)) => {
                    let (parts, body) = http.into_parts();
                    let request = ConnectRequest::parse(&parts.method, &parts.uri, &parts.headers);
                    let on_account = StreamAccount::new(account, respond.stream_id());
                    Ok(Incoming { request, receive: ReceiveHalf::new(body, on_account), respond })
                }
                Err(error) => Err(TunnelError::of(error, account)),
            }),
            overdue = pings => {
                account.cut(overdue);
                Some(Err(overdue.into()))
            }
        }
    }

    /// Sends GOAWAY: the peer opens no new streams, and the open ones continue.
    pub fn go_away(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl Incoming {
    /// Answers 200, with the `baggage` of the workload that accepts.
    pub fn accept(mut self, baggage: Option<&str>) -> Result<Stream, TunnelError> {
        let send = self.respond.send_response(request::accepted(baggage), false).map_err(TunnelError::Http2)?;
        Ok(Stream::new(send, self.receive))
    }

    /// Answers with a status other than 200. What the peer has sent already is discarded.
    pub fn refuse(mut self, status: StatusCode) {
        // Fails only if the stream is gone already; then the peer does not wait for the answer.
        let _ = self.respond.send_response(request::refused(status), true);
    }

    /// Resolves when the peer gives up the stream before it is answered.
    pub async fn abandoned(&mut self) {
        tokio::select! {
            // Any result means that the peer no longer waits for an answer.
            _ = poll_fn(|context| self.respond.poll_reset(context)) => {}
            // Data that arrives before the answer must not pile up in the queue of HTTP/2.
            never = self.receive.gather() => match never {},
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
