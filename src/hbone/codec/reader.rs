//! Reads HTTP/2 frames from a byte stream that arrives in pieces (RFC 9113 sections 3.4, 4 and 6). Pure.
//!
//! The reader checks what can be known from one frame and from the order of frames: sizes, stream ids, padding, values
//! of settings. Whether a stream is open and what flow control allows is known to its owner.
//!
//! The payload of DATA is not copied: it is reported as ranges of the input. Everything else is collected in a buffer,
//! whose size is limited.

use super::frame::{
    ACK, CONTINUATION, DATA, ENABLE_PUSH, END_HEADERS, END_STREAM, ErrorCode, FRAME_SIZE_MAX, FRAME_SIZE_MIN,
    FrameError, GOAWAY, HAS_PRIORITY, HEAD_LEN, HEADERS, Head, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, PADDED, PING,
    PREFACE, PRIORITY, PUSH_PROMISE, Part, RST_STREAM, SETTINGS, STREAM_MASK, WINDOW_MAX, WINDOW_UPDATE,
};

/// Most CONTINUATION frames of a header block.
const CONTINUATIONS_MAX: usize = 32;

/// Most settings in a SETTINGS frame. The RFC defines six.
const SETTINGS_MAX: usize = 64;

/// How much debug data of GOAWAY is kept, in bytes.
const DEBUG_MAX: usize = 256;

/// A buffer with more capacity than this is freed when it is empty.
const KEPT_CAPACITY: usize = 1024;

/// The priority fields of HEADERS (RFC 9113 section 6.2).
const PRIORITY_LEN: usize = 5;

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug)]
enum State {
    /// The client preface, of which `seen` bytes have come.
    Preface { seen: usize },
    /// The head of a frame, of which `seen` bytes have come.
    Head { seen: usize },
    /// A DATA frame with this much left: the byte with the length of the padding, payload, and padding.
    Data { pad_length: bool, payload: usize, padding: usize },
    /// Any other frame: `keep` bytes are collected, then `skip` bytes are thrown away.
    Payload { keep: usize, skip: usize },
}

/// A header block whose end has not come.
#[derive(Clone, Copy, Debug)]
struct Block {
    stream: u32,
    end_stream: bool,
    depends_on_itself: bool,
    continuations: usize,
    /// The payload of its frames, with padding.
    length: usize,
}

/// What one step did with the input.
enum Step {
    /// Read a part, which ends behind this many bytes.
    Part(usize, Part),
    /// Took this many bytes and knows what comes next.
    Next(usize),
    /// Took everything and needs more.
    Starved,
}

/// Reads frames. See the head of this file.
#[derive(Debug)]
pub struct Reader {
    server: bool,
    frame_max: usize,
    block_max: usize,
    state: State,
    head_bytes: [u8; HEAD_LEN],
    head: Head,
    /// The payload of the frame that is being read, or of the header block.
    buffer: Vec<u8>,
    block: Option<Block>,
    settings_seen: bool,
    frames: u64,
    failed: Option<FrameError>,
}

impl Reader {
    /// A reader for a connection on which this side is the server, or the client. `frame_max` is the frame size that
    /// this side has announced, and `block_max` the longest header block that it takes, with padding.
    pub fn new(server: bool, frame_max: usize, block_max: usize) -> Self {
        Self {
            server,
            frame_max,
            block_max,
            state: if server { State::Preface { seen: 0 } } else { State::Head { seen: 0 } },
            head_bytes: [0; HEAD_LEN],
            head: Head::default(),
            buffer: Vec::new(),
            block: None,
            settings_seen: false,
            frames: 0,
            failed: None,
        }
    }

    /// Reads the next part. Returns how much of the input was taken.
    ///
    /// Must be called with the rest of the input until it returns no part, even if the rest is empty: an empty DATA
    /// frame has two parts, and only the first one takes bytes. No part means that all input was taken.
    ///
    /// An error with a stream concerns that stream only: the frame was taken, and reading may go on. After any other
    /// error, each call returns that error.
    pub fn next(&mut self, input: &[u8]) -> Result<(usize, Option<Part>), FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let mut used = 0;
        loop {
            match self.step(input.get(used..).unwrap_or_default()) {
                Ok(Step::Part(taken, part)) => return Ok((used + taken, Some(part))),
                Ok(Step::Next(taken)) => used += taken,
                Ok(Step::Starved) => return Ok((input.len(), None)),
                Err(error) => {
                    let error = FrameError { used: used + error.used, ..error };
                    if error.stream.is_none() {
                        self.failed = Some(FrameError { used: 0, ..error });
                        self.buffer = Vec::new();
                    }
                    return Err(error);
                }
            }
        }
    }

    /// The head of the frame that was begun last.
    pub fn head(&self) -> Head {
        self.head
    }

    /// How many frames have begun, with CONTINUATION frames and frames of unknown types.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Does one step.
    fn step(&mut self, rest: &[u8]) -> Result<Step, FrameError> {
        match self.state {
            State::Data { pad_length, payload, padding } => self.data(rest, pad_length, payload, padding),
            State::Head { seen } => self.read_head(rest, seen),
            State::Payload { keep, skip } => self.payload(rest, keep, skip),
            State::Preface { seen } => self.preface(rest, seen),
        }
    }

    /// Compares each byte with the preface as it comes, so that a peer that speaks something else is noticed at once.
    fn preface(&mut self, rest: &[u8], seen: usize) -> Result<Step, FrameError> {
        let expected = PREFACE.get(seen..).unwrap_or_default();
        if expected.iter().zip(rest).any(|(expected, byte)| expected != byte) {
            return Err(FrameError::protocol("no HTTP/2 client preface"));
        }
        if rest.len() < expected.len() {
            self.state = State::Preface { seen: seen + rest.len() };
            return Ok(Step::Starved);
        }
        self.state = State::Head { seen: 0 };
        Ok(Step::Next(expected.len()))
    }

    fn read_head(&mut self, rest: &[u8], seen: usize) -> Result<Step, FrameError> {
        let (bytes, taken) = match rest.first_chunk::<HEAD_LEN>() {
            Some(bytes) if seen == 0 => (*bytes, HEAD_LEN),
            _ => {
                let missing = self.head_bytes.iter_mut().skip(seen);
                missing.zip(rest).for_each(|(to, from)| *to = *from);
                if seen + rest.len() < HEAD_LEN {
                    self.state = State::Head { seen: seen + rest.len() };
                    return Ok(Step::Starved);
                }
                (self.head_bytes, HEAD_LEN - seen)
            }
        };
        self.head = Head::parse(bytes);
        self.frames += 1;
        self.check_order()?;
        self.check_stream()?;
        self.check_size()?;
        self.settings_seen = true;
        Ok(self.begin(taken))
    }

    /// Whether a frame of this type may come now (RFC 9113 sections 3.4, 6.6 and 6.10).
    fn check_order(&self) -> Result<(), FrameError> {
        let head = self.head;
        if !self.settings_seen && (head.kind != SETTINGS || head.has(ACK)) {
            return Err(FrameError::protocol("the first frame is not SETTINGS"));
        }
        match self.block {
            Some(block) if head.kind != CONTINUATION || head.stream != block.stream => {
                Err(FrameError::protocol("another frame within a header block"))
            }
            None if head.kind == CONTINUATION => Err(FrameError::protocol("CONTINUATION without HEADERS")),
            // A client never pushes, and this client never allows it.
            _ if head.kind == PUSH_PROMISE => Err(FrameError::protocol("PUSH_PROMISE, which is not allowed here")),
            _ => Ok(()),
        }
    }

    /// Whether the frame is for a stream or for the connection, as its type demands (RFC 9113 section 6).
    fn check_stream(&self) -> Result<(), FrameError> {
        match (self.head.kind, self.head.stream) {
            (DATA | HEADERS | PRIORITY | RST_STREAM, 0) => Err(FrameError::protocol("a frame that needs a stream")),
            (SETTINGS | PING | GOAWAY, 1..) => Err(FrameError::protocol("a frame that must not have a stream")),
            _ => Ok(()),
        }
    }

    /// Whether the length is possible (RFC 9113 sections 4.2 and 6), and not more than is kept here. A frame that is
    /// too long ends the connection whatever its type: nobody sends one by mistake.
    fn check_size(&self) -> Result<(), FrameError> {
        let head = self.head;
        if head.length > self.frame_max {
            return Err(FrameError::size("a frame larger than the announced limit"));
        }
        let smallest = usize::from(head.has(PADDED)) + if head.has(HAS_PRIORITY) { PRIORITY_LEN } else { 0 };
        let possible = match head.kind {
            DATA => !head.has(PADDED) || head.length > 0,
            HEADERS => head.length >= smallest,
            RST_STREAM | WINDOW_UPDATE => head.length == 4,
            SETTINGS if head.has(ACK) => head.length == 0,
            SETTINGS => head.length.is_multiple_of(6),
            PING => head.length == 8,
            GOAWAY => head.length >= 8,
            _ => true,
        };
        if !possible {
            return Err(FrameError::size("a frame whose length is wrong for its type"));
        }
        if head.kind == SETTINGS && head.length > SETTINGS_MAX * 6 {
            return Err(FrameError::calm("flood", "too many settings in a frame"));
        }
        let (length, continuations) = self.block.map_or((0, 0), |block| (block.length, block.continuations));
        if matches!(head.kind, HEADERS | CONTINUATION) && length + head.length > self.block_max {
            return Err(FrameError::calm("continuation_flood", "a header block that is too long"));
        }
        if head.kind == CONTINUATION && continuations >= CONTINUATIONS_MAX {
            return Err(FrameError::calm("continuation_flood", "too many CONTINUATION frames"));
        }
        Ok(())
    }

    /// The head is good: what comes next.
    fn begin(&mut self, taken: usize) -> Step {
        let head = self.head;
        let length = head.length;
        if head.kind == DATA {
            self.state = State::Data { pad_length: head.has(PADDED), payload: length, padding: 0 };
            let end_stream = head.has(END_STREAM);
            return Step::Part(taken, Part::DataHead { stream: head.stream, length, end_stream });
        }
        if let Some(block) = &mut self.block {
            block.continuations += 1;
            block.length += length;
        }
        let keep = match head.kind {
            GOAWAY => length.min(8 + DEBUG_MAX),
            PRIORITY => length.min(PRIORITY_LEN),
            HEADERS | CONTINUATION | SETTINGS | PING | RST_STREAM | WINDOW_UPDATE => length,
            _ => 0,
        };
        self.state = State::Payload { keep, skip: length - keep };
        Step::Next(taken)
    }

    /// The next piece of a DATA frame. The step before ended with a part, so `rest` is the whole input.
    fn data(
        &mut self,
        rest: &[u8],
        pad_length: bool,
        mut payload: usize,
        mut padding: usize,
    ) -> Result<Step, FrameError> {
        let mut start = 0;
        if pad_length {
            let Some(pad) = rest.first() else { return Ok(Step::Starved) };
            // The payload still includes the byte that was just read.
            let Some(left) = payload.checked_sub(1 + usize::from(*pad)) else {
                return Err(FrameError::protocol("padding longer than its frame"));
            };
            (start, payload, padding) = (1, left, usize::from(*pad));
        }
        let bytes = payload.min(rest.len() - start);
        let pad = padding.min(rest.len() - start - bytes);
        let taken = start + bytes + pad;
        (payload, padding) = (payload - bytes, padding - pad);
        let end_of_frame = payload == 0 && padding == 0;
        if taken == 0 && !end_of_frame {
            return Ok(Step::Starved);
        }
        self.state =
            if end_of_frame { State::Head { seen: 0 } } else { State::Data { pad_length: false, payload, padding } };
        let part = Part::Data {
            stream: self.head.stream,
            range: start..start + bytes,
            overhead: start + pad,
            end_of_frame,
            end_stream: end_of_frame && self.head.has(END_STREAM),
        };
        Ok(Step::Part(taken, part))
    }

    fn payload(&mut self, rest: &[u8], keep: usize, skip: usize) -> Result<Step, FrameError> {
        let (kept, behind) = rest.split_at(keep.min(rest.len()));
        self.buffer.extend_from_slice(kept);
        let skipped = skip.min(behind.len());
        let taken = kept.len() + skipped;
        if kept.len() < keep || skipped < skip {
            self.state = State::Payload { keep: keep - kept.len(), skip: skip - skipped };
            return Ok(Step::Starved);
        }
        self.state = State::Head { seen: 0 };
        if matches!(self.head.kind, HEADERS | CONTINUATION) {
            let part = self.header_block().map_err(|error| FrameError { used: taken, ..error })?;
            return Ok(part.map_or(Step::Next(taken), |part| Step::Part(taken, part)));
        }
        let part = control(self.head, &self.buffer, self.server);
        self.buffer.clear();
        if self.buffer.capacity() > KEPT_CAPACITY {
            self.buffer = Vec::new();
        }
        let part = part.map_err(|error| FrameError { used: taken, ..error })?;
        Ok(Step::Part(taken, part))
    }

    /// The end of HEADERS or CONTINUATION. The buffer has the header block so far.
    fn header_block(&mut self) -> Result<Option<Part>, FrameError> {
        let head = self.head;
        let block = match self.block.take() {
            Some(block) => block,
            None => Block {
                stream: head.stream,
                end_stream: head.has(END_STREAM),
                depends_on_itself: strip(head, &mut self.buffer)?,
                continuations: 0,
                length: head.length,
            },
        };
        if !head.has(END_HEADERS) {
            self.block = Some(block);
            return Ok(None);
        }
        let Block { stream, end_stream, depends_on_itself, .. } = block;
        Ok(Some(Part::Headers { stream, end_stream, block: std::mem::take(&mut self.buffer), depends_on_itself }))
    }
}

/// Removes padding and priority from the payload of HEADERS (RFC 9113 section 6.2). Returns whether the stream depends
/// on itself.
fn strip(head: Head, payload: &mut Vec<u8>) -> Result<bool, FrameError> {
    let (mut front, mut depends_on_itself) = (0, false);
    if head.has(PADDED) {
        front = 1;
        let padding = payload.first().copied().map_or(0, usize::from);
        let end = payload.len().checked_sub(padding);
        payload.truncate(end.ok_or(FrameError::protocol("padding longer than its frame"))?);
    }
    if head.has(HAS_PRIORITY) {
        let parent = payload.get(front..).and_then(|rest| rest.first_chunk());
        depends_on_itself = parent.is_some_and(|parent| number(*parent) & STREAM_MASK == head.stream);
        front += PRIORITY_LEN;
    }
    if front > payload.len() {
        return Err(FrameError::protocol("padding longer than its frame"));
    }
    payload.drain(..front);
    Ok(depends_on_itself)
}

fn number(bytes: [u8; 4]) -> u32 {
    u32::from_be_bytes(bytes)
}

/// A whole frame that is neither DATA nor part of a header block. Its length has been checked, apart from PRIORITY.
fn control(head: Head, payload: &[u8], server: bool) -> Result<Part, FrameError> {
    let wrong = FrameError::size("a frame whose length is wrong for its type");
    let stream = head.stream;
    Ok(match head.kind {
        SETTINGS if head.has(ACK) => Part::SettingsAck,
        SETTINGS => Part::Settings(read_settings(payload, server)?),
        PING => {
            let data = payload.try_into().map_err(|_| wrong)?;
            if head.has(ACK) { Part::Pong(data) } else { Part::Ping(data) }
        }
        WINDOW_UPDATE => {
            let increment = payload.try_into().map(number).map_err(|_| wrong)? & STREAM_MASK;
            if increment == 0 {
                // RFC 9113 section 6.9.
                let error = FrameError::protocol("WINDOW_UPDATE with an increment of 0");
                return Err(if stream == 0 { error } else { error.on(stream) });
            }
            Part::WindowUpdate { stream, increment }
        }
        RST_STREAM => {
            let code = payload.try_into().map(number).map_err(|_| wrong)?;
            Part::Reset { stream, code: ErrorCode::from_code(code) }
        }
        GOAWAY => {
            let (last, rest) = payload.split_first_chunk().ok_or(wrong)?;
            let (code, debug) = rest.split_first_chunk().ok_or(wrong)?;
            let code = ErrorCode::from_code(number(*code));
            Part::GoAway { last: number(*last) & STREAM_MASK, code, debug: debug.to_vec() }
        }
        PRIORITY => {
            // The only wrong length that does not end the connection (RFC 9113 section 6.3).
            let parent = payload.first_chunk().filter(|_| head.length == PRIORITY_LEN).ok_or(wrong.on(stream))?;
            Part::Priority { stream, depends_on_itself: number(*parent) & STREAM_MASK == stream }
        }
        kind => Part::Unknown { kind },
    })
}

/// Checks the values of settings (RFC 9113 section 6.5.2).
fn read_settings(payload: &[u8], server: bool) -> Result<Vec<(u16, u32)>, FrameError> {
    let overflow = "SETTINGS with an initial window above 2^31-1";
    let (settings, _) = payload.as_chunks::<6>();
    let read = |&[i0, i1, v0, v1, v2, v3]: &[u8; 6]| {
        let (id, value) = (u16::from_be_bytes([i0, i1]), u32::from_be_bytes([v0, v1, v2, v3]));
        match id {
            // Only a client may accept pushes, so only a client may say so.
            ENABLE_PUSH if value > u32::from(server) => Err(FrameError::protocol("SETTINGS with a bad ENABLE_PUSH")),
            INITIAL_WINDOW_SIZE if value > WINDOW_MAX => {
                Err(FrameError::new(ErrorCode::FLOW_CONTROL_ERROR, "window_overflow", overflow))
            }
            MAX_FRAME_SIZE
                if !usize::try_from(value).is_ok_and(|value| (FRAME_SIZE_MIN..=FRAME_SIZE_MAX).contains(&value)) =>
            {
                Err(FrameError::protocol("SETTINGS with a bad MAX_FRAME_SIZE"))
            }
            _ => Ok((id, value)),
        }
    };
    settings.iter().map(read).collect()
}

#[cfg(any(test, fuzzing))]
impl Reader {
    /// How many bytes of memory the buffer takes.
    pub fn held(&self) -> usize {
        self.buffer.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame;
    use super::*;
    use proptest::prelude::*;

    const FRAME_MAX: usize = 1 << 14;
    const BLOCK_MAX: usize = 20_000;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        [&frame::head(payload.len(), kind, flags, stream)[..], payload].concat()
    }

    /// What a reader reports, without the pieces in which DATA arrives.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Seen {
        Part(Part),
        Data { stream: u32, bytes: Vec<u8>, overhead: usize, whole: bool, end_stream: bool },
        Error(FrameError),
    }

    /// Gives pieces to a reader until it fails.
    fn read<'a>(reader: &mut Reader, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Seen> {
        let mut all = Vec::new();
        for mut input in pieces {
            loop {
                assert!(reader.held() <= 2 * BLOCK_MAX);
                let used = match reader.next(input) {
                    Ok((used, Some(part))) => {
                        add(&mut all, part, input.get(..used).unwrap());
                        used
                    }
                    Ok((used, None)) => {
                        assert_eq!(used, input.len(), "no part means that everything was taken");
                        break;
                    }
                    Err(error) => {
                        all.push(Seen::Error(FrameError { used: 0, ..error }));
                        if error.stream.is_none() {
                            assert_eq!(reader.next(b"x"), Err(FrameError { used: 0, ..error }), "the error stays");
                            return all;
                        }
                        error.used
                    }
                };
                input = &input[used..];
            }
        }
        all
    }

    fn add(all: &mut Vec<Seen>, part: Part, taken: &[u8]) {
        let Part::Data { stream, range, overhead, end_of_frame, end_stream } = part else {
            return all.push(Seen::Part(part));
        };
        assert!(!end_stream || end_of_frame);
        assert!(range.len() + overhead <= taken.len());
        match all.last_mut() {
            Some(Seen::Data { bytes, overhead: sum, whole, end_stream: end, .. }) if !*whole => {
                bytes.extend_from_slice(&taken[range]);
                *sum += overhead;
                (*whole, *end) = (end_of_frame, end_stream);
            }
            _ => {
                let bytes = taken[range].to_vec();
                all.push(Seen::Data { stream, bytes, overhead, whole: end_of_frame, end_stream });
            }
        }
    }

    /// Reads frames that come behind the first SETTINGS frame of a client.
    fn read_frames(frames: &[u8]) -> Vec<Seen> {
        let (mut reader, start) = started();
        assert_eq!(start, [Seen::Part(Part::Settings(Vec::new()))]);
        read(&mut reader, [frames])
    }

    fn started() -> (Reader, Vec<Seen>) {
        let mut reader = Reader::new(true, FRAME_MAX, BLOCK_MAX);
        let start = read(&mut reader, [&PREFACE[..], &frame(SETTINGS, 0, 0, &[])]);
        (reader, start)
    }

    fn data(stream: u32, bytes: &[u8], overhead: usize, end_stream: bool) -> Vec<Seen> {
        let length = bytes.len() + overhead;
        let head = Seen::Part(Part::DataHead { stream, length, end_stream });
        vec![head, Seen::Data { stream, bytes: bytes.to_vec(), overhead, whole: true, end_stream }]
    }

    fn headers(stream: u32, block: &[u8], end_stream: bool, depends_on_itself: bool) -> Vec<Seen> {
        vec![Seen::Part(Part::Headers { stream, end_stream, block: block.to_vec(), depends_on_itself })]
    }

    #[test]
    fn data_is_reported_where_it_is() {
        let (mut reader, _) = started();
        let input = frame(DATA, END_STREAM | PADDED, 3, b"\x02abcd\0\0");
        let part = |range, overhead, end| Part::Data { stream: 3, range, overhead, end_of_frame: end, end_stream: end };
        let head = Part::DataHead { stream: 3, length: 7, end_stream: true };
        assert_eq!(reader.next(&input[..12]), Ok((9, Some(head))));
        assert_eq!(reader.head(), Head { length: 7, kind: DATA, flags: END_STREAM | PADDED, stream: 3 });
        assert_eq!(reader.next(&input[9..12]), Ok((3, Some(part(1..3, 1, false)))));
        assert_eq!(reader.next(&input[12..15]), Ok((3, Some(part(0..2, 1, false)))));
        assert_eq!(reader.next(&[]), Ok((0, None)));
        assert_eq!(reader.next(&input[15..]), Ok((1, Some(part(0..0, 1, true)))));
        assert_eq!(reader.held(), 0, "nothing was copied");
    }

    #[test]
    fn data_frames() {
        assert_eq!(read_frames(&frame(DATA, 0, 1, b"abc")), data(1, b"abc", 0, false));
        assert_eq!(read_frames(&frame(DATA, END_STREAM, 1, b"")), data(1, b"", 0, true));
        assert_eq!(read_frames(&frame(DATA, PADDED, 1, b"\0")), data(1, b"", 1, false));
        assert_eq!(read_frames(&frame(DATA, PADDED | END_STREAM, 1, b"\x03\0\0\0")), data(1, b"", 4, true));
        assert_eq!(read_frames(&frame(DATA, 0xf6, 0x8000_0001, b"a")), data(1, b"a", 0, false), "unknown flags");
    }

    #[test]
    fn header_blocks() {
        let whole = |flags, payload: &[u8]| read_frames(&frame(HEADERS, flags | END_HEADERS, 5, payload));
        assert_eq!(whole(0, b"abc"), headers(5, b"abc", false, false));
        assert_eq!(whole(END_STREAM, b""), headers(5, b"", true, false));
        assert_eq!(whole(PADDED, b"\x02abc\0\0"), headers(5, b"abc", false, false));
        assert_eq!(whole(PADDED, b"\x02\0\0"), headers(5, b"", false, false));
        assert_eq!(whole(HAS_PRIORITY, b"\x80\0\0\x03\x10abc"), headers(5, b"abc", false, false));
        assert_eq!(whole(HAS_PRIORITY, b"\x80\0\0\x05\x10abc"), headers(5, b"abc", false, true));
        assert_eq!(whole(HAS_PRIORITY | PADDED, b"\x01\0\0\0\x05\x10abc\0"), headers(5, b"abc", false, true));
        let parts = [
            frame(HEADERS, END_STREAM | PADDED, 5, b"\x01ab\0"),
            frame(CONTINUATION, PADDED, 5, b"\x01cd"),
            frame(CONTINUATION, END_HEADERS, 5, b""),
        ];
        assert_eq!(read_frames(&parts.concat()), headers(5, b"ab\x01cd", true, false), "CONTINUATION has no padding");
    }

    #[test]
    fn other_frames() {
        let one = |kind, flags, stream, payload: &[u8]| match &read_frames(&frame(kind, flags, stream, payload))[..] {
            [Seen::Part(part)] => part.clone(),
            seen => panic!("{seen:?}"),
        };
        let settings = b"\0\x03\0\0\0\x64\0\x99\x01\x02\x03\x04";
        assert_eq!(one(SETTINGS, 0, 0, settings), Part::Settings(vec![(3, 100), (0x99, 0x0102_0304)]));
        assert_eq!(one(SETTINGS, ACK, 0, b""), Part::SettingsAck);
        assert_eq!(one(PING, 0, 0, b"abcdefgh"), Part::Ping(*b"abcdefgh"));
        assert_eq!(one(PING, ACK, 0, b"abcdefgh"), Part::Pong(*b"abcdefgh"));
        let window = Part::WindowUpdate { stream: 3, increment: 1 };
        assert_eq!(one(WINDOW_UPDATE, 0, 3, b"\x80\0\0\x01"), window, "the reserved bit is ignored");
        let code = ErrorCode::REFUSED_STREAM;
        assert_eq!(one(RST_STREAM, 0, 3, b"\0\0\0\x07"), Part::Reset { stream: 3, code });
        let go_away = |debug| Part::GoAway { last: 9, code, debug };
        assert_eq!(one(GOAWAY, 0, 0, b"\x80\0\0\x09\0\0\0\x07"), go_away(Vec::new()));
        let long = [&b"\0\0\0\x09\0\0\0\x07"[..], &[b'x'; 1000]].concat();
        assert_eq!(one(GOAWAY, 0, 0, &long), go_away(vec![b'x'; DEBUG_MAX]));
        assert_eq!(one(PRIORITY, 0, 3, b"\0\0\0\x01a"), Part::Priority { stream: 3, depends_on_itself: false });
        assert_eq!(one(PRIORITY, 0, 3, b"\x80\0\0\x03a"), Part::Priority { stream: 3, depends_on_itself: true });
        assert_eq!(one(0x42, 0xff, 3, &[1; 5000]), Part::Unknown { kind: 0x42 });
    }

    #[test]
    fn a_bad_frame_ends_the_connection() {
        use ErrorCode as Code;
        let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        let many = setting(3, 1).repeat(65);
        for (kind, flags, stream, payload, code, word) in [
            (DATA, 0, 0, &b"a"[..], Code::PROTOCOL_ERROR, "bad_frame"),
            (DATA, PADDED, 1, b"", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (DATA, PADDED, 1, b"\x01", Code::PROTOCOL_ERROR, "bad_frame"),
            (DATA, PADDED, 1, b"\x03ab", Code::PROTOCOL_ERROR, "bad_frame"),
            (DATA, 0, 1, &[0; FRAME_MAX + 1], Code::FRAME_SIZE_ERROR, "bad_frame"),
            (HEADERS, END_HEADERS, 0, b"a", Code::PROTOCOL_ERROR, "bad_frame"),
            (HEADERS, END_HEADERS | PADDED, 1, b"", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"\0\0\0\0", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (HEADERS, END_HEADERS | PADDED, 1, b"\x03ab", Code::PROTOCOL_ERROR, "bad_frame"),
            (HEADERS, END_HEADERS | PADDED | HAS_PRIORITY, 1, b"\x01\0\0\0\0\0", Code::PROTOCOL_ERROR, "bad_frame"),
            (PRIORITY, 0, 0, b"\0\0\0\0\0", Code::PROTOCOL_ERROR, "bad_frame"),
            (RST_STREAM, 0, 0, b"\0\0\0\0", Code::PROTOCOL_ERROR, "bad_frame"),
            (RST_STREAM, 0, 1, b"\0\0\0", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (SETTINGS, 0, 1, b"", Code::PROTOCOL_ERROR, "bad_frame"),
            (SETTINGS, 0, 0, b"\0\x01\0", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (SETTINGS, ACK, 0, &setting(3, 1), Code::FRAME_SIZE_ERROR, "bad_frame"),
            (SETTINGS, 0, 0, &setting(ENABLE_PUSH, 2), Code::PROTOCOL_ERROR, "bad_frame"),
            (SETTINGS, 0, 0, &setting(INITIAL_WINDOW_SIZE, 1 << 31), Code::FLOW_CONTROL_ERROR, "window_overflow"),
            (SETTINGS, 0, 0, &setting(MAX_FRAME_SIZE, 16_383), Code::PROTOCOL_ERROR, "bad_frame"),
            (SETTINGS, 0, 0, &setting(MAX_FRAME_SIZE, 1 << 24), Code::PROTOCOL_ERROR, "bad_frame"),
            (SETTINGS, 0, 0, &many, Code::ENHANCE_YOUR_CALM, "flood"),
            (PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\x02", Code::PROTOCOL_ERROR, "bad_frame"),
            (PING, 0, 1, b"abcdefgh", Code::PROTOCOL_ERROR, "bad_frame"),
            (PING, 0, 0, b"abcdefg", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (GOAWAY, 0, 1, b"\0\0\0\0\0\0\0\0", Code::PROTOCOL_ERROR, "bad_frame"),
            (GOAWAY, 0, 0, b"\0\0\0\0\0\0\0", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (WINDOW_UPDATE, 0, 0, b"\x80\0\0\0", Code::PROTOCOL_ERROR, "bad_frame"),
            (WINDOW_UPDATE, 0, 1, b"\0\0\0\0\x01", Code::FRAME_SIZE_ERROR, "bad_frame"),
            (CONTINUATION, END_HEADERS, 1, b"a", Code::PROTOCOL_ERROR, "bad_frame"),
            (0x42, 0, 0, &[0; FRAME_MAX + 1], Code::FRAME_SIZE_ERROR, "bad_frame"),
        ] {
            let (mut reader, _) = started();
            let input = [frame(kind, flags, stream, payload), frame(PING, 0, 0, b"abcdefgh")].concat();
            match &read(&mut reader, [&input[..]])[..] {
                [Seen::Part(Part::DataHead { .. }), Seen::Error(error)] | [Seen::Error(error)] => {
                    let seen = (error.code, error.word, error.stream);
                    assert_eq!(seen, (code, word, None), "{kind} {flags} {stream} {payload:?}");
                }
                seen => panic!("{kind} {flags} {stream} {seen:?}"),
            }
        }
    }

    #[test]
    fn what_is_just_allowed() {
        let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        let values = [
            setting(ENABLE_PUSH, 0),
            setting(ENABLE_PUSH, 1),
            setting(INITIAL_WINDOW_SIZE, WINDOW_MAX),
            setting(MAX_FRAME_SIZE, 1 << 14),
            setting(MAX_FRAME_SIZE, (1 << 24) - 1),
        ];
        let all = [&values[..], &vec![setting(1, 2); 59]].concat().concat();
        let [Seen::Part(Part::Settings(settings))] = &read_frames(&frame(SETTINGS, 0, 0, &all))[..] else { panic!() };
        assert_eq!(settings.len(), 64);
        assert_eq!(read_frames(&frame(DATA, 0, 1, &[7; FRAME_MAX])), data(1, &[7; FRAME_MAX], 0, false));
        let window = [Seen::Part(Part::WindowUpdate { stream: 0, increment: WINDOW_MAX })];
        assert_eq!(read_frames(&frame(WINDOW_UPDATE, 0, 0, &[0xff; 4])), window);
    }

    #[test]
    fn some_errors_end_only_a_stream() {
        for (kind, payload, code) in [
            (WINDOW_UPDATE, &b"\0\0\0\0"[..], ErrorCode::PROTOCOL_ERROR),
            (PRIORITY, b"\0\0\0\0", ErrorCode::FRAME_SIZE_ERROR),
            (PRIORITY, b"\0\0\0\0\0\0\0\0\0\0", ErrorCode::FRAME_SIZE_ERROR),
            (PRIORITY, b"", ErrorCode::FRAME_SIZE_ERROR),
        ] {
            let input = [frame(kind, 0, 3, payload), frame(PING, 0, 0, b"abcdefgh")].concat();
            let seen = read_frames(&input);
            let [Seen::Error(error), Seen::Part(Part::Ping(_))] = &seen[..] else { panic!("{seen:?}") };
            assert_eq!((error.code, error.word, error.stream), (code, "bad_frame", Some(3)));
        }
    }

    #[test]
    fn nothing_may_come_within_a_header_block() {
        for inside in [
            frame(DATA, 0, 1, b"a"),
            frame(HEADERS, END_HEADERS, 1, b"a"),
            frame(HEADERS, END_HEADERS, 3, b"a"),
            frame(CONTINUATION, END_HEADERS, 3, b"a"),
            frame(PING, 0, 0, b"abcdefgh"),
            frame(SETTINGS, ACK, 0, b""),
            frame(0x42, 0, 1, b""),
        ] {
            let seen = read_frames(&[frame(HEADERS, 0, 1, b"a"), inside].concat());
            let [Seen::Error(error)] = &seen[..] else { panic!("{seen:?}") };
            assert_eq!((error.code, error.what), (ErrorCode::PROTOCOL_ERROR, "another frame within a header block"));
        }
    }

    #[test]
    fn a_header_block_has_a_limit() {
        let block = |continuations: usize, first: usize, each: usize| {
            let mut all = frame(HEADERS, 0, 1, &vec![0; first]);
            for place in 1..=continuations {
                let flags = if place == continuations { END_HEADERS } else { 0 };
                all.extend(frame(CONTINUATION, flags, 1, &vec![0; each]));
            }
            read_frames(&all)
        };
        let flood = |seen: Vec<Seen>| {
            matches!(
                &seen[..],
                [Seen::Error(FrameError {
                    code: ErrorCode::ENHANCE_YOUR_CALM,
                    word: "continuation_flood",
                    stream: None,
                    ..
                })]
            )
        };
        assert_eq!(block(32, 0, 0), headers(1, b"", false, false));
        assert!(flood(block(33, 0, 0)), "empty frames count");
        assert_eq!(block(2, 10_000, 5_000), headers(1, &[0; BLOCK_MAX], false, false));
        assert!(flood(block(2, 10_001, 5_000)));
        assert!(flood(block(33, 10, 1000)), "the length counts first");
    }

    #[test]
    fn a_connection_starts_with_preface_and_settings() {
        let start = |server: bool, input: &[u8]| {
            let mut reader = Reader::new(server, FRAME_MAX, BLOCK_MAX);
            match read(&mut reader, [input]).first().cloned() {
                Some(Seen::Error(error)) => Err((error.code, error.what)),
                Some(Seen::Part(Part::Settings(_))) => Ok(true),
                None => Ok(false),
                other => panic!("{other:?}"),
            }
        };
        let settings = frame(SETTINGS, 0, 0, &[]);
        let no_preface = Err((ErrorCode::PROTOCOL_ERROR, "no HTTP/2 client preface"));
        let not_settings = Err((ErrorCode::PROTOCOL_ERROR, "the first frame is not SETTINGS"));
        assert_eq!(start(true, &[&PREFACE[..], &settings].concat()), Ok(true));
        assert_eq!(start(true, &PREFACE), Ok(false));
        assert_eq!(start(true, b"G"), no_preface, "the first wrong byte is enough");
        assert_eq!(start(true, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX"), no_preface);
        assert_eq!(start(true, &settings), no_preface);
        assert_eq!(start(false, &settings), Ok(true));
        assert_eq!(start(false, &PREFACE), not_settings);
        assert_eq!(start(false, b"HTTP/1.1 400 Bad Request\r\n"), not_settings);
        assert_eq!(start(false, &frame(SETTINGS, ACK, 0, &[])), not_settings);
        assert_eq!(start(false, &frame(PING, 0, 0, b"abcdefgh")), not_settings);
        let push = |server: bool| {
            let mut input = if server { PREFACE.to_vec() } else { Vec::new() };
            frame::settings(&[(ENABLE_PUSH, 1)], &mut input);
            start(server, &input)
        };
        assert_eq!(push(true), Ok(true));
        assert_eq!(push(false), Err((ErrorCode::PROTOCOL_ERROR, "SETTINGS with a bad ENABLE_PUSH")));
    }

    #[test]
    fn all_frames_are_counted() {
        let (mut reader, _) = started();
        assert_eq!(reader.frames(), 1);
        let input = [
            frame(HEADERS, 0, 1, b"a"),
            frame(CONTINUATION, 0, 1, b""),
            frame(CONTINUATION, END_HEADERS, 1, b"b"),
            frame(0x42, 0, 1, b"b"),
        ];
        read(&mut reader, [&input.concat()[..]]);
        assert_eq!(reader.frames(), 5);
    }

    #[test]
    fn memory_is_given_back() {
        let (mut reader, _) = started();
        read(&mut reader, [&frame(HEADERS, 0, 1, &[0; 10_000])[..]]);
        assert!(reader.held() >= 10_000);
        read(&mut reader, [&frame(CONTINUATION, END_HEADERS, 1, &[])[..]]);
        assert_eq!(reader.held(), 0);
        read(&mut reader, [&frame(SETTINGS, 0, 0, &[1; 6 * 64])[..], &frame(GOAWAY, 0, 0, &[1; 10_000])]);
        assert!(reader.held() <= KEPT_CAPACITY);
        read(&mut reader, [&frame(HEADERS, 0, 1, &[0; 10_000])[..], &frame(PING, 0, 0, b"abcdefgh")]);
        assert_eq!(reader.held(), 0, "nothing is kept behind an error");
    }

    /// A frame that this side can write, and what should be read.
    fn written() -> impl Strategy<Value = (Vec<u8>, Vec<Seen>)> {
        let bytes = |max: usize| prop::collection::vec(any::<u8>(), 0..max);
        let stream = || 1..=WINDOW_MAX;
        let code = || any::<u32>().prop_map(ErrorCode::from_code);
        let known = |settings: Vec<(u16, u32)>| settings.into_iter().map(|(id, value)| (id | 0x100, value)).collect();
        let with = |write: &dyn Fn(&mut Vec<u8>), seen: Vec<Seen>| {
            let mut out = Vec::new();
            write(&mut out);
            (out, seen)
        };
        prop_oneof![
            (stream(), bytes(50), any::<bool>()).prop_map(move |(stream, bytes, end)| {
                let flags = if end { END_STREAM } else { 0 };
                (frame(DATA, flags, stream, &bytes), data(stream, &bytes, 0, end))
            }),
            (stream(), bytes(50), any::<u8>(), any::<bool>()).prop_map(move |(stream, bytes, pad, end)| {
                let flags = PADDED | if end { END_STREAM } else { 0 };
                let payload = [&[pad], &bytes[..], &vec![0; pad.into()]].concat();
                (frame(DATA, flags, stream, &payload), data(stream, &bytes, 1 + usize::from(pad), end))
            }),
            (stream(), bytes(50), any::<bool>(), 2..60_usize).prop_map(move |(stream, block, end, max)| {
                let write = |out: &mut Vec<u8>| frame::headers(stream, &block, end, max, out);
                with(&write, headers(stream, &block, end, false))
            }),
            prop::collection::vec(any::<(u16, u32)>(), 0..64).prop_map(known).prop_map(move |settings: Vec<_>| {
                with(&|out| frame::settings(&settings, out), vec![Seen::Part(Part::Settings(settings.clone()))])
            }),
            Just(with(&frame::settings_ack, vec![Seen::Part(Part::SettingsAck)])),
            any::<([u8; 8], bool)>().prop_map(move |(bytes, ack)| {
                let part = if ack { Part::Pong(bytes) } else { Part::Ping(bytes) };
                with(&|out| frame::ping(bytes, ack, out), vec![Seen::Part(part)])
            }),
            (0..=WINDOW_MAX, 1..=WINDOW_MAX).prop_map(move |(stream, increment)| {
                let write = |out: &mut Vec<u8>| frame::window_update(stream, increment, out);
                with(&write, vec![Seen::Part(Part::WindowUpdate { stream, increment })])
            }),
            (stream(), code()).prop_map(move |(stream, code)| {
                let write = |out: &mut Vec<u8>| frame::rst_stream(stream, code, out);
                with(&write, vec![Seen::Part(Part::Reset { stream, code })])
            }),
            (0..=WINDOW_MAX, code(), bytes(DEBUG_MAX)).prop_map(move |(last, code, debug)| {
                let write = |out: &mut Vec<u8>| frame::goaway(last, code, &debug, out);
                with(&write, vec![Seen::Part(Part::GoAway { last, code, debug: debug.clone() })])
            }),
        ]
    }

    /// Any frame, often a bad one.
    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![Just(0_usize), Just(4), Just(5), Just(8), Just(12), 0..40_usize];
        let stream = prop_oneof![Just(0_u32), Just(1), Just(3)];
        (0..=10_u8, any::<u8>(), stream, length).prop_flat_map(|(kind, flags, stream, length)| {
            let payload = prop::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], length);
            payload.prop_map(move |payload| frame(kind, flags, stream, &payload))
        })
    }

    /// The pieces of an input that is cut at some places.
    fn cut<'a>(input: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
        at.extend([0, input.len()]);
        at.sort_unstable();
        at.windows(2).map(|ends| &input[ends[0]..ends[1]]).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            frames in prop::collection::vec(written(), 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let input: Vec<u8> = frames.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            let expected: Vec<Seen> = frames.into_iter().flat_map(|(_, seen)| seen).collect();
            let (mut reader, _) = started();
            prop_assert_eq!(read(&mut reader, cut(&input, &cuts)), expected);
        }

        #[test]
        fn the_pieces_of_the_input_do_not_matter(
            frames in prop::collection::vec(any_frame(), 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
            server in any::<bool>(),
        ) {
            let start = if server { &PREFACE[..] } else { &[] };
            let input = [start, &frame(SETTINGS, 0, 0, &[]), &frames.concat()].concat();
            let whole = read(&mut Reader::new(server, FRAME_MAX, BLOCK_MAX), [&input[..]]);
            let pieces = read(&mut Reader::new(server, FRAME_MAX, BLOCK_MAX), cut(&input, &cuts));
            prop_assert_eq!(&pieces, &whole);
            let bytes = read(&mut Reader::new(server, FRAME_MAX, BLOCK_MAX), input.chunks(1));
            prop_assert_eq!(&bytes, &whole);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (mut reader, _) = started();
            read(&mut reader, [&bytes[..]]);
            read(&mut Reader::new(true, FRAME_MAX, BLOCK_MAX), [&bytes[..]]);
            read(&mut Reader::new(false, FRAME_MAX, BLOCK_MAX), [&bytes[..]]);
        }
    }
}
