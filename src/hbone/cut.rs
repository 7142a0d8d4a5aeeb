//! Why we end a tunnel because of what its peer does.

use super::config::PING_TIMEOUT;

/// Why we end a tunnel whose peer breaks no rule of HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutReason {
    /// It sends control frames without end.
    #[error("cut: the peer sends more control frames than any use of a tunnel needs")]
    ControlFrames,
    /// It leaves a PING unanswered.
    #[error("cut: the peer did not answer a PING within {} s", PING_TIMEOUT.as_secs())]
    PingTimeout,
    /// It makes us hold more than anybody else while the node's buffers are full.
    #[error("cut: this node's buffers are full, and of all peers this one makes it hold most")]
    Memory,
}

impl CutReason {
    /// The word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::ControlFrames => "control_frames",
            Self::PingTimeout => "ping_timeout",
            Self::Memory => "memory",
        }
    }
}
