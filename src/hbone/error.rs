//! Why a tunnel failed as a whole, and why a stream failed before it was carried.

use super::codec::frame::ErrorCode;
use super::cut::CutReason;
use super::session::SessionError;
use super::tls::TlsError;
use std::io;
use std::sync::{Arc, OnceLock};

/// How a stream ended that carries a tunnel, once it has ended other than in order.
pub type EndReason = Arc<OnceLock<Arc<str>>>;

/// Why a tunnel failed as a whole.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TunnelError {
    /// The TCP connection failed.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// TLS failed: the peer sent an alert, or something that is not TLS.
    #[error("TLS: {0}")]
    Tls(Arc<TlsError>),
    /// This node cut it.
    #[error(transparent)]
    Cut(#[from] CutReason),
    /// This node ended it because the peer broke a rule of HTTP/2.
    #[error("cut: the peer broke a rule of HTTP/2 ({word}): {what}")]
    Rule {
        /// The error code that the peer was told.
        code: ErrorCode,
        /// The rule, as a word for metrics.
        word: &'static str,
        /// What the peer did.
        what: String,
    },
    /// The peer ended it because of an error.
    #[error("the peer ended the tunnel: {code}{}", said(.debug))]
    GoAway {
        /// The peer's error code.
        code: ErrorCode,
        /// What it said about it.
        debug: String,
    },
    /// It was inside a stream of another tunnel, and that stream ended.
    #[error("the stream that carried it ended: {0}")]
    Carrier(Arc<str>),
    /// It was closed in order.
    #[error("the tunnel was closed")]
    Closed,
}

/// What a peer said about its error, as an addition to a message.
fn said(debug: &str) -> String {
    if debug.is_empty() { String::new() } else { format!(" ({debug})") }
}

impl TunnelError {
    /// An error of the TCP connection.
    pub(super) fn io(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }

    /// What to say about clocks, if two that differ may be the reason.
    pub fn clock_reason(&self) -> Option<&'static str> {
        crate::crypto::clock_reason(&self.clone().into_io())
    }

    /// The error as one of the TCP connection. An alert becomes the error that rustls has for it.
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error),
            Self::Tls(error) => (*error).into(),
            other => io::Error::other(other),
        }
    }

    /// Why this node ended the tunnel, as a word for metrics; `None` if the peer or the network ended it.
    pub fn cut(&self) -> Option<&'static str> {
        match self {
            Self::Cut(why) => Some(why.word()),
            Self::Rule { word, .. } => Some(word),
            Self::Io(_) | Self::Tls(_) | Self::GoAway { .. } | Self::Carrier(_) | Self::Closed => None,
        }
    }
}

impl From<TlsError> for TunnelError {
    fn from(error: TlsError) -> Self {
        Self::Tls(Arc::new(error))
    }
}

impl From<SessionError> for TunnelError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::ControlFrames => Self::Cut(CutReason::ControlFrames),
            SessionError::Rule { code, word, what } => Self::Rule { code, word, what },
        }
    }
}

/// Why a stream failed before it was carried.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamFailure {
    /// The peer reset it.
    #[error("the peer reset the stream ({0})")]
    Reset(ErrorCode),
    /// The peer is going away, and has not acted on the request.
    #[error("the peer is going away")]
    Unprocessed,
    /// The tunnel has ended.
    #[error("{0}")]
    Tunnel(Arc<TunnelError>),
}
