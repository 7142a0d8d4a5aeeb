//! Why a tunnel failed as a whole.

use super::buffers::Account;
use super::cut::CutReason;

/// Why a tunnel failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// HTTP/2 or the byte stream below it failed.
    #[error("HTTP/2: {0}")]
    Http2(h2::Error),
    /// This node cut it.
    #[error(transparent)]
    Cut(#[from] CutReason),
    /// This node ended it because the peer broke a rule of HTTP/2.
    #[error("cut: the peer broke a rule of HTTP/2 ({word}): {error}")]
    Rule {
        /// The rule, as a word for metrics.
        word: &'static str,
        /// The error of the h2 crate.
        error: h2::Error,
    },
    /// The peer closed the tunnel before it was ready.
    #[error("the peer closed the tunnel before it was ready")]
    Closed,
}

impl TunnelError {
    /// Classifies an error of the h2 crate. If this node cut the tunnel, h2 only sees that the byte stream failed; the
    /// account knows why.
    pub(super) fn of(error: h2::Error, account: &Account) -> Self {
        match (account.cut_reason(), broken_rule(&error, account)) {
            (Some(why), _) => Self::Cut(why),
            (None, Some(word)) => Self::Rule { word, error },
            (None, None) => Self::Http2(error),
        }
    }

    /// The error of the byte stream below HTTP/2, if that was the cause.
    pub fn io(&self) -> Option<&std::io::Error> {
        match self {
            Self::Http2(error) => error.get_io(),
            Self::Cut(_) | Self::Rule { .. } | Self::Closed => None,
        }
    }

    /// Why this node ended the tunnel, as a word for metrics; `None` if the peer or the network ended it.
    pub fn cut(&self) -> Option<&'static str> {
        match self {
            Self::Cut(why) => Some(why.word()),
            Self::Closed => None,
            Self::Rule { word, .. } => Some(word),
            Self::Http2(_) => None,
        }
    }
}

/// The rule of HTTP/2 that a peer has broken, as a word, if the h2 crate ended the tunnel because of it.
fn broken_rule(error: &h2::Error, account: &Account) -> Option<&'static str> {
    if !(error.is_library() && error.is_go_away()) {
        return None;
    }
    Some(match error.reason() {
        Some(h2::Reason::NO_ERROR) => return None,
        Some(h2::Reason::FLOW_CONTROL_ERROR) => "window_overflow",
        // The library does not say which kind of frame there was too much of. It is the kind that came last.
        Some(h2::Reason::ENHANCE_YOUR_CALM) => account.flood(),
        _ => "bad_frame",
    })
}
