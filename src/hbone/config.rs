//! Settings of a tunnel, and fixed limits.

use std::time::Duration;

/// Settings of a tunnel, the same for both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Flow control window of one stream: bytes that a peer may send before they have been passed on.
    pub stream_window: u32,
    /// Flow control window of all streams of a tunnel together.
    pub connection_window: u32,
    /// Largest frame that is accepted, in bytes.
    pub frame_size: u32,
    /// Most streams that a peer may have open on one tunnel.
    pub max_streams: u32,
    /// How long one direction may be silent after the other has ended, before the connection is given up.
    pub half_closed_silence: Duration,
}

/// Time between the answer to a PING and the next PING.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to a PING may take.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
