//! Why a tunnel is cut: this node ends it because of what its peer does.

use super::config::PING_TIMEOUT;

/// Why this node ends a tunnel although its peer has not broken a rule of HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutReason {
    /// The peer sends too many control frames.
    #[error("cut: the peer sends more control frames than any use of a tunnel needs")]
    ControlFrames,
    /// The peer does not answer a PING in time.
    #[error("cut: the peer did not answer a PING within {} s", PING_TIMEOUT.as_secs())]
    PingTimeout,
    /// The node's buffers are full, and the peer uses the most of them.
    #[error("cut: this node's buffers are full, and this peer uses the most of them")]
    Memory,
}

impl CutReason {
    /// The word in metrics and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::ControlFrames => "control_frames",
            Self::PingTimeout => "ping_timeout",
            Self::Memory => "memory",
        }
    }
}
