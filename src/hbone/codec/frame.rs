//! HTTP/2 frames (RFC 9113 sections 4, 6 and 7): their names and numbers, what is read of them, and writing them. Pure.
//! `reader` reads them.

use std::fmt;
use std::ops::Range;

/// What a client sends before its first frame (RFC 9113 section 3.4).
pub const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The length of a frame head (RFC 9113 section 4.1).
pub const HEAD_LEN: usize = 9;

/// The frame size that every peer accepts (RFC 9113 section 4.2).
pub const FRAME_SIZE_MIN: usize = 1 << 14;

/// The largest frame size that a peer may announce (RFC 9113 section 4.2).
pub const FRAME_SIZE_MAX: usize = (1 << 24) - 1;

/// The largest flow control window, and the largest increment of one (RFC 9113 section 6.9.1).
pub const WINDOW_MAX: u32 = (1 << 31) - 1;

/// Stream ids have 31 bits. The bit above is reserved and ignored when read (RFC 9113 section 4.1).
pub(super) const STREAM_MASK: u32 = (1 << 31) - 1;

// Frame types (RFC 9113 section 6).

/// DATA: the bytes of a stream.
pub const DATA: u8 = 0;
/// HEADERS: opens a stream, answers it, or ends it with trailers.
pub const HEADERS: u8 = 1;
/// PRIORITY: deprecated, ignored.
pub const PRIORITY: u8 = 2;
/// RST_STREAM: ends a stream at once.
pub const RST_STREAM: u8 = 3;
/// SETTINGS: parameters of the sender.
pub const SETTINGS: u8 = 4;
/// PUSH_PROMISE: never valid here.
pub const PUSH_PROMISE: u8 = 5;
/// PING: asks the peer for an answer.
pub const PING: u8 = 6;
/// GOAWAY: no new streams are accepted.
pub const GOAWAY: u8 = 7;
/// WINDOW_UPDATE: the peer may send more.
pub const WINDOW_UPDATE: u8 = 8;
/// CONTINUATION: the rest of a header block.
pub const CONTINUATION: u8 = 9;

// Frame flags (RFC 9113 section 6).

/// On SETTINGS and PING: this is the answer.
pub const ACK: u8 = 0x1;
/// On DATA and HEADERS: the sender sends nothing more on the stream.
pub const END_STREAM: u8 = 0x1;
/// On HEADERS and CONTINUATION: the header block ends with this frame.
pub const END_HEADERS: u8 = 0x4;
/// On DATA and HEADERS: the payload is padded.
pub const PADDED: u8 = 0x8;
/// On HEADERS: the payload starts with priority fields.
pub const HAS_PRIORITY: u8 = 0x20;

// Ids of settings (RFC 9113 section 6.5.2).

/// Whether the sender accepts PUSH_PROMISE. 1 until set.
pub const ENABLE_PUSH: u16 = 2;
/// How many streams the peer of the sender may have open. No limit until set.
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
/// The initial flow control window of streams. 65,535 until set.
pub const INITIAL_WINDOW_SIZE: u16 = 4;
/// The largest frame payload that the sender accepts. 16,384 until set.
pub const MAX_FRAME_SIZE: u16 = 5;
/// The largest header list that the sender accepts. No limit until set.
pub const MAX_HEADER_LIST_SIZE: u16 = 6;

/// An error code (RFC 9113 section 7). Codes that the RFC does not define are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ErrorCode(u32);

impl ErrorCode {
    /// No error: a graceful end.
    pub const NO_ERROR: Self = Self(0);
    /// The peer broke a rule that has no code of its own.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// The peer sent more than flow control allows.
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    /// A frame for a stream that the peer has already ended.
    pub const STREAM_CLOSED: Self = Self(5);
    /// A frame has a size that is not allowed.
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    /// The stream was not processed at all. It is safe to try it again.
    pub const REFUSED_STREAM: Self = Self(7);
    /// The stream is no longer needed.
    pub const CANCEL: Self = Self(8);
    /// The state of header compression is lost.
    pub const COMPRESSION_ERROR: Self = Self(9);
    /// The TCP connection behind a CONNECT stream failed.
    pub const CONNECT_ERROR: Self = Self(10);
    /// The peer causes too much work.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);

    /// The error code with this number.
    pub const fn from_code(code: u32) -> Self {
        Self(code)
    }

    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self.0
    }

    /// The name in RFC 9113, if it has one.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "NO_ERROR",
            1 => "PROTOCOL_ERROR",
            2 => "INTERNAL_ERROR",
            3 => "FLOW_CONTROL_ERROR",
            4 => "SETTINGS_TIMEOUT",
            5 => "STREAM_CLOSED",
            6 => "FRAME_SIZE_ERROR",
            7 => "REFUSED_STREAM",
            8 => "CANCEL",
            9 => "COMPRESSION_ERROR",
            10 => "CONNECT_ERROR",
            11 => "ENHANCE_YOUR_CALM",
            12 => "INADEQUATE_SECURITY",
            13 => "HTTP_1_1_REQUIRED",
            _ => return None,
        })
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "unknown error code {:#x}", self.0),
        }
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The head of a frame (RFC 9113 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The length of the payload.
    pub length: usize,
    /// The frame type.
    pub kind: u8,
    /// The flags. Their meaning depends on the type.
    pub flags: u8,
    /// The stream, 0 for the connection.
    pub stream: u32,
}

impl Head {
    pub(super) fn parse(bytes: [u8; HEAD_LEN]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        let length = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        Self { length, kind, flags, stream: u32::from_be_bytes([s0, s1, s2, s3]) & STREAM_MASK }
    }

    /// Whether all bits of `flag` are set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag == flag
    }
}

/// Something that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// A DATA frame begins. Reported once for each, before its payload.
    DataHead {
        /// The stream.
        stream: u32,
        /// What counts for flow control: the payload with padding (RFC 9113 section 6.9.1).
        length: usize,
        /// Whether the stream ends with this frame.
        end_stream: bool,
    },
    /// The next piece of a DATA frame. The last one of a frame may be empty.
    Data {
        /// The stream.
        stream: u32,
        /// Where the bytes are in the input.
        range: Range<usize>,
        /// How many bytes of padding came with them, including the byte with its length.
        overhead: usize,
        /// Whether the frame ends here.
        end_of_frame: bool,
        /// Whether the stream ends here. Only true at the end of a frame.
        end_stream: bool,
    },
    /// A whole header block: HEADERS with its CONTINUATION frames, without padding and priority.
    Headers {
        /// The stream.
        stream: u32,
        /// Whether the stream ends with these headers.
        end_stream: bool,
        /// The block, still encoded.
        block: Vec<u8>,
        /// Whether the priority fields make the stream depend on itself (RFC 7540 section 5.3.1).
        depends_on_itself: bool,
    },
    /// Settings of the peer, in their order, with ids that nobody knows.
    Settings(Vec<(u16, u32)>),
    /// The peer has applied our settings.
    SettingsAck,
    /// The peer asks for an answer with the same data.
    Ping([u8; 8]),
    /// The answer to a ping.
    Pong([u8; 8]),
    /// More may be sent.
    WindowUpdate {
        /// The stream, 0 for the connection.
        stream: u32,
        /// How much more. Never 0.
        increment: u32,
    },
    /// RST_STREAM.
    Reset {
        /// The stream.
        stream: u32,
        /// Why.
        code: ErrorCode,
    },
    /// GOAWAY.
    GoAway {
        /// The highest stream that the peer has processed or may still process.
        last: u32,
        /// Why.
        code: ErrorCode,
        /// The beginning of the debug data, as the peer wrote it.
        debug: Vec<u8>,
    },
    /// PRIORITY, which means nothing any more.
    Priority {
        /// The stream.
        stream: u32,
        /// Whether the stream depends on itself (RFC 7540 section 5.3.1).
        depends_on_itself: bool,
    },
    /// A frame of an unknown type. It was skipped (RFC 9113 section 5.5).
    Unknown {
        /// The frame type.
        kind: u8,
    },
}

/// The peer broke a rule of RFC 9113.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct FrameError {
    /// The error code for the peer.
    pub code: ErrorCode,
    /// The stream that has to end. `None`: the connection has to end, and nothing more can be read.
    pub stream: Option<u32>,
    /// How much of the input was taken. Reading may go on behind it if only a stream has to end.
    pub used: usize,
    /// The rule, as a word for metrics.
    pub word: &'static str,
    /// What the peer did.
    pub what: &'static str,
}

impl FrameError {
    pub(super) const fn new(code: ErrorCode, word: &'static str, what: &'static str) -> Self {
        Self { code, stream: None, used: 0, word, what }
    }

    pub(super) const fn protocol(what: &'static str) -> Self {
        Self::new(ErrorCode::PROTOCOL_ERROR, "bad_frame", what)
    }

    pub(super) const fn size(what: &'static str) -> Self {
        Self::new(ErrorCode::FRAME_SIZE_ERROR, "bad_frame", what)
    }

    pub(super) const fn calm(word: &'static str, what: &'static str) -> Self {
        Self::new(ErrorCode::ENHANCE_YOUR_CALM, word, what)
    }

    pub(super) const fn on(self, stream: u32) -> Self {
        Self { stream: Some(stream), ..self }
    }
}

/// The bytes of the head of a frame. The payload length must be at most [`FRAME_SIZE_MAX`].
pub fn head(length: usize, kind: u8, flags: u8, stream: u32) -> [u8; HEAD_LEN] {
    debug_assert!(length <= FRAME_SIZE_MAX, "a frame length has 24 bits");
    let [.., l0, l1, l2] = length.to_be_bytes();
    let [s0, s1, s2, s3] = (stream & STREAM_MASK).to_be_bytes();
    [l0, l1, l2, kind, flags, s0, s1, s2, s3]
}

/// Appends a SETTINGS frame with these ids and values.
pub fn settings(values: &[(u16, u32)], out: &mut Vec<u8>) {
    out.extend_from_slice(&head(values.len() * 6, SETTINGS, 0, 0));
    for (id, value) in values {
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

/// Appends a SETTINGS frame that acknowledges the settings of the peer.
pub fn settings_ack(out: &mut Vec<u8>) {
    out.extend_from_slice(&head(0, SETTINGS, ACK, 0));
}

/// Appends a PING frame: a question, or with `ack` the answer to one.
pub fn ping(data: [u8; 8], ack: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(&head(8, PING, if ack { ACK } else { 0 }, 0));
    out.extend_from_slice(&data);
}

/// Appends a WINDOW_UPDATE frame. Stream 0 is the connection. The increment must be 1 to [`WINDOW_MAX`].
pub fn window_update(stream: u32, increment: u32, out: &mut Vec<u8>) {
    debug_assert!((1..=WINDOW_MAX).contains(&increment), "an increment is 1 to 2^31-1");
    out.extend_from_slice(&head(4, WINDOW_UPDATE, 0, stream));
    out.extend_from_slice(&increment.to_be_bytes());
}

/// Appends a RST_STREAM frame.
pub fn rst_stream(stream: u32, code: ErrorCode, out: &mut Vec<u8>) {
    out.extend_from_slice(&head(4, RST_STREAM, 0, stream));
    out.extend_from_slice(&code.code().to_be_bytes());
}

/// Appends a GOAWAY frame. `last` is the highest stream of the peer that was or may be processed. The debug data must
/// fit into a frame that every peer accepts.
pub fn goaway(last: u32, code: ErrorCode, debug: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&head(8 + debug.len(), GOAWAY, 0, 0));
    out.extend_from_slice(&(last & STREAM_MASK).to_be_bytes());
    out.extend_from_slice(&code.code().to_be_bytes());
    out.extend_from_slice(debug);
}

/// Appends a header block as a HEADERS frame. A block that is longer than `frame_max` continues in CONTINUATION frames;
/// nothing may be written between them (RFC 9113 section 6.10).
pub fn headers(stream: u32, block: &[u8], end_stream: bool, frame_max: usize, out: &mut Vec<u8>) {
    let (mut kind, mut flags) = (HEADERS, if end_stream { END_STREAM } else { 0 });
    let mut rest = block;
    loop {
        let (fragment, after) = rest.split_at(rest.len().min(frame_max.max(1)));
        if after.is_empty() {
            flags |= END_HEADERS;
        }
        out.extend_from_slice(&head(fragment.len(), kind, flags, stream));
        out.extend_from_slice(fragment);
        if after.is_empty() {
            return;
        }
        (kind, flags, rest) = (CONTINUATION, 0, after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_bytes_of_the_rfc() {
        let mut out = Vec::new();
        settings(&[(ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, 0x0102_0304)], &mut out);
        assert_eq!(out, [0, 0, 12, 4, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4]);
        out.clear();
        settings_ack(&mut out);
        assert_eq!(out, [0, 0, 0, 4, 1, 0, 0, 0, 0]);
        out.clear();
        ping(*b"abcdefgh", true, &mut out);
        assert_eq!(out, *b"\0\0\x08\x06\x01\0\0\0\0abcdefgh");
        out.clear();
        window_update(3, 0x10, &mut out);
        assert_eq!(out, [0, 0, 4, 8, 0, 0, 0, 0, 3, 0, 0, 0, 0x10]);
        out.clear();
        rst_stream(5, ErrorCode::REFUSED_STREAM, &mut out);
        assert_eq!(out, [0, 0, 4, 3, 0, 0, 0, 0, 5, 0, 0, 0, 7]);
        out.clear();
        goaway(7, ErrorCode::ENHANCE_YOUR_CALM, b"no", &mut out);
        assert_eq!(out, [0, 0, 10, 7, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 11, b'n', b'o']);
    }

    #[test]
    fn the_head_has_a_length_of_24_bits_and_a_stream_of_31() {
        assert_eq!(head(0x01_02_03, DATA, 9, 0xff02_0304), [1, 2, 3, 0, 9, 0x7f, 2, 3, 4]);
    }

    #[test]
    fn a_long_header_block_is_continued() {
        let mut out = Vec::new();
        headers(1, b"abcde", true, 2, &mut out);
        let expected =
            [&b"\0\0\x02\x01\x01\0\0\0\x01ab"[..], b"\0\0\x02\x09\0\0\0\0\x01cd", b"\0\0\x01\x09\x04\0\0\0\x01e"];
        assert_eq!(out, expected.concat());
        out.clear();
        headers(1, b"ab", false, 2, &mut out);
        assert_eq!(out, *b"\0\0\x02\x01\x04\0\0\0\x01ab", "a block that just fits needs no CONTINUATION");
    }

    #[test]
    fn error_codes_have_the_names_of_the_rfc() {
        for (code, name) in [(0, "NO_ERROR"), (7, "REFUSED_STREAM"), (13, "HTTP_1_1_REQUIRED")] {
            assert_eq!(ErrorCode::from_code(code).to_string(), name);
            assert_eq!(ErrorCode::from_code(code).code(), code);
        }
        assert_eq!(ErrorCode::from_code(0xabcd).to_string(), "unknown error code 0xabcd");
        assert_eq!(ErrorCode::from_code(0xabcd).code(), 0xabcd);
    }
}
