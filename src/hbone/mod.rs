//! HBONE: TCP streams as HTTP/2 CONNECT over any byte stream. A narrow interface, because what stands behind it (the
//! h2 crate now) is to be replaced by a faster path: open or accept a tunnel, open or accept a stream, carry a socket.
//!
//! It knows neither TLS nor identities nor policies. Every byte stream given to it must already be authenticated.

pub mod buffers;
pub mod client;
mod flow;
mod guard;
pub mod ping;
pub mod request;
pub mod server;
pub mod stream;
mod windows;

pub use buffers::{Account, Buffers, Cut};
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

/// HTTP/2's own bound on small frames that wait is for ever, and one slow reader reaches it; [`Buffers`] bounds them instead.
const FRAME_BUDGET: usize = 1 << 40;

/// Why a tunnel failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// HTTP/2 went wrong, or the byte stream below did.
    #[error("HTTP/2: {0}")]
    Http2(h2::Error),
    /// We have ended it.
    #[error(transparent)]
    Cut(#[from] Cut),
    /// We have ended it because the peer broke a rule of HTTP/2.
    #[error("cut: the peer broke a rule of HTTP/2 ({word}): {error}")]
    Rule {
        /// Which, as a word for metrics.
        word: &'static str,
        /// What the library says.
        error: h2::Error,
    },
    /// The peer closed the tunnel before it was ready.
    #[error("the peer closed the tunnel before it was ready")]
    Closed,
}

impl TunnelError {
    /// HTTP/2 reports an error of the byte stream below by its text alone; the account knows better.
    fn of(error: h2::Error, account: &Account) -> Self {
        match (account.why(), broken_rule(&error, account)) {
            (Some(why), _) => Self::Cut(why),
            (None, Some(word)) => Self::Rule { word, error },
            (None, None) => Self::Http2(error),
        }
    }

    /// The error of the byte stream below, where it was that.
    pub fn io(&self) -> Option<&std::io::Error> {
        match self {
            Self::Http2(error) => error.get_io(),
            Self::Cut(_) | Self::Rule { .. } | Self::Closed => None,
        }
    }

    /// Why *we* have ended the tunnel, as a word for metrics; `None` where the peer or the network did.
    pub fn cut(&self) -> Option<&'static str> {
        match self {
            Self::Cut(why) => Some(why.word()),
            Self::Closed => None,
            Self::Rule { word, .. } => Some(word),
            Self::Http2(_) => None,
        }
    }
}

/// The rule of HTTP/2 that a peer has broken, where we ended its tunnel for that.
fn broken_rule(error: &h2::Error, account: &Account) -> Option<&'static str> {
    if !(error.is_library() && error.is_go_away()) {
        return None;
    }
    Some(match error.reason() {
        Some(h2::Reason::NO_ERROR) => return None,
        Some(h2::Reason::FLOW_CONTROL_ERROR) => "window_overflow",
        // Of what there was too much, the library does not tell; it came last.
        Some(h2::Reason::ENHANCE_YOUR_CALM) => account.flood(),
        _ => "bad_frame",
    })
}
