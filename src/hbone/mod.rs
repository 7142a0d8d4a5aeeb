//! HBONE: TCP streams as HTTP/2 CONNECT over any byte stream. A narrow interface, because what stands behind it (the
//! h2 crate now) is to be replaced by a faster path: open or accept a tunnel, open or accept a stream, carry a socket.
//!
//! It knows neither TLS nor identities nor policies. Every byte stream given to it must already be authenticated.

pub mod client;
mod ping;
pub mod request;
pub mod server;
pub mod stream;

pub use client::Tunnel;
pub use request::{Authority, ConnectRequest};
pub use server::{Incoming, Server};
pub use stream::{CarryError, Meter, Stream};

use std::time::Duration;

/// Settings of a tunnel, the same for both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes a peer may send on one stream before we have passed them on.
    pub stream_window: u32,
    /// Bytes a peer may send on all streams together.
    pub connection_window: u32,
    /// Largest frame we accept.
    pub frame_size: u32,
    /// Streams a peer may have open towards us on one tunnel.
    pub max_streams: u32,
    /// Silence of one direction after the other has ended, before the stream is given up.
    pub half_closed_silence: Duration,
}

/// Unsent bytes that one stream may hold in memory.
const SEND_BUFFER_BYTES: usize = 256 * 1024;

/// Why a tunnel failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// HTTP/2 went wrong, or the byte stream below did.
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    /// The peer closed the tunnel before it was ready.
    #[error("the peer closed the tunnel before it was ready")]
    Closed,
    /// The peer left a PING unanswered.
    #[error("the peer did not answer a PING within {} s", ping::TIMEOUT.as_secs())]
    PingTimeout,
}
