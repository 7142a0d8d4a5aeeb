//! Why a tunnel failed as a whole.

use super::buffers::Account;
use super::cut::CutReason;

/// Why a tunnel failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// HTTP/2 went wrong, or the byte stream below did.
    #[error("HTTP/2: {0}")]
    Http2(h2::Error),
    /// We have ended it.
    #[error(transparent)]
    Cut(#[from] CutReason),
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
    pub(super) fn of(error: h2::Error, account: &Account) -> Self {
        match (account.cut_reason(), broken_rule(&error, account)) {
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
