//! Settings of a tunnel, and bounds that are not settings.

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
pub(super) const SEND_BUFFER_BYTES: usize = 256 * 1024;

/// HTTP/2's own bound on small frames that wait is for ever, and one slow reader reaches it; [`super::Buffers`] bounds them instead.
pub(super) const FRAME_BUDGET: usize = 1 << 40;

/// Time between an answer and the next PING.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How long an answer may take.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(20);
