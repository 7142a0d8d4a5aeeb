//! What the kernel knows about how a TCP connection does: its part of `struct tcp_info` (source: linux/tcp.h) that tells
//! where time is lost.

/// How a TCP connection does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round-trip time, in microseconds.
    pub rtt_us: u32,
    /// Its variation, in microseconds.
    pub rtt_var_us: u32,
    /// Segments that were sent again since the beginning.
    pub retransmits: u32,
    /// Congestion window, in segments.
    pub cwnd: u32,
    /// Bytes that are written and were not sent yet.
    pub notsent_bytes: u32,
    /// Time during which there was something to send or acknowledge, in microseconds.
    pub busy_us: u64,
    /// Time of it during which the peer's receive window was full: the peer did not read.
    pub rwnd_limited_us: u64,
    /// Time of it during which our send buffer was too small.
    pub sndbuf_limited_us: u64,
}

impl TcpInfo {
    /// Reads it. An older kernel sends less; what it does not send is 0.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let short = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_ne_bytes)
        };
        let long = |at: usize| {
            let bytes = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_ne_bytes)
        };
        Self {
            rtt_us: short(68),
            rtt_var_us: short(72),
            retransmits: short(100),
            cwnd: short(80),
            notsent_bytes: short(144),
            busy_us: long(168),
            rwnd_limited_us: long(176),
            sndbuf_limited_us: long(184),
        }
    }
}
