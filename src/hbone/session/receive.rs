//! What arrives: frames become events, or errors (RFC 9113 sections 5 and 6).

use super::stream::Foreign;
use super::{DEFAULT_WINDOW, Event, GOAWAY_PING, Leaving, Role, Session};
use crate::hbone::codec::fields::{RequestHead, ResponseHead, Trailers};
use crate::hbone::codec::frame::{self, ErrorCode, FrameError, Part};
use crate::hbone::request::{ConnectRequest, RequestError, encode_response};
use std::ops::Range;

/// A DATA frame for a stream that this node has ended counts as a control frame if it is smaller than this. Data that
/// was on its way is not the peer's fault, and is not sent in tiny frames.
const LATE_BYTES: usize = 512;

/// Most bytes of control frames that may wait because the peer does not read.
const CONTROL_BYTES_MAX: usize = 256 * 1024;

/// Why the whole connection has to end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer sends too many frames that carry nothing.
    #[error("too many control frames")]
    ControlFrames,
    /// The peer broke a rule.
    #[error("{what}")]
    Rule {
        /// The error code for GOAWAY.
        code: ErrorCode,
        /// The rule, as a word for metrics.
        word: &'static str,
        /// What the peer did.
        what: String,
    },
}

impl SessionError {
    pub(super) fn rule(code: ErrorCode, what: impl Into<String>) -> Self {
        let word = match code {
            ErrorCode::FLOW_CONTROL_ERROR => "window_overflow",
            _ => "bad_frame",
        };
        Self::Rule { code, word, what: what.into() }
    }

    pub(super) fn flood(word: &'static str, what: &str) -> Self {
        Self::Rule { code: ErrorCode::ENHANCE_YOUR_CALM, word, what: what.into() }
    }
}

/// The fields of a request, of an answer or of trailers, still encoded.
struct HeaderBlock {
    id: u32,
    end_stream: bool,
    block: Vec<u8>,
    depends_on_itself: bool,
}

impl<A> Session<A> {
    /// Takes the bytes that arrived: `input` begins at `base` in the buffer of the owner. What they mean is appended to
    /// `events`. After an error nothing more may be given to the session.
    ///
    /// `app` makes what the owner keeps for a stream that the peer opens.
    pub fn receive(
        &mut self,
        mut input: &[u8],
        mut base: usize,
        events: &mut Vec<Event>,
        mut app: impl FnMut() -> A,
    ) -> Result<(), SessionError> {
        loop {
            let begun = self.reader.frames();
            let read = self.reader.next(input);
            if self.reader.frames() > begun && self.reader.head().kind != frame::DATA {
                self.count_frame()?;
            }
            let (used, part) = match read {
                Ok(read) => read,
                Err(FrameError { code, word, what, stream: None, .. }) => {
                    return Err(SessionError::Rule { code, word, what: what.into() });
                }
                Err(FrameError { code, stream: Some(id), used, .. }) => {
                    self.stream_error(id, code, events)?;
                    (used, None)
                }
            };
            // A frame without payload is reported after its last byte has been taken.
            let is_end = part.is_none() && used == input.len();
            if let Some(part) = part {
                self.part(part, base, events, &mut app)?;
            }
            if is_end {
                break;
            }
            base += used;
            input = input.get(used..).unwrap_or_default();
        }
        if self.control.len() > CONTROL_BYTES_MAX {
            return Err(SessionError::ControlFrames);
        }
        Ok(())
    }

    /// Counts a frame that carries no bytes.
    pub(super) fn count_frame(&mut self) -> Result<(), SessionError> {
        if self.frames.take() { Ok(()) } else { Err(SessionError::ControlFrames) }
    }

    /// Counts a DATA frame that has no payload, or nothing but padding, and does not end its stream.
    fn count_empty(&mut self) -> Result<(), SessionError> {
        self.count_frame()?;
        let without_end = "the peer sends empty DATA frames without end";
        if self.empty.take() { Ok(()) } else { Err(SessionError::flood("empty_frames", without_end)) }
    }

    /// Counts a stream that the peer opened for nothing.
    pub(super) fn count_reset(&mut self) -> Result<(), SessionError> {
        let too_many = "the peer opens streams only to reset them, or to break a rule on them";
        if self.resets.take() { Ok(()) } else { Err(SessionError::flood("rapid_reset", too_many)) }
    }

    fn part(
        &mut self,
        part: Part,
        base: usize,
        events: &mut Vec<Event>,
        app: &mut impl FnMut() -> A,
    ) -> Result<(), SessionError> {
        match part {
            Part::DataHead { stream, length, .. } => self.data_begins(stream, length, events),
            Part::Data { stream, range, overhead, end_of_frame, end_stream } => {
                if end_of_frame && !end_stream && range.is_empty() && !self.has_payload {
                    self.count_empty()?;
                }
                self.has_payload |= !range.is_empty();
                self.data(stream, base + range.start..base + range.end, overhead, end_stream, events)
            }
            Part::Headers { stream: id, end_stream, block, depends_on_itself } => {
                self.headers(&HeaderBlock { id, end_stream, block, depends_on_itself }, events, app)
            }
            Part::Settings(settings) => self.settings(&settings, events),
            Part::Ping(payload) => {
                frame::ping(payload, true, &mut self.control);
                Ok(())
            }
            Part::Pong(payload) => {
                if payload == GOAWAY_PING && self.leaving == Leaving::Announced {
                    self.leaving = Leaving::Final;
                    frame::goaway(self.newest, ErrorCode::NO_ERROR, &[], &mut self.control);
                } else {
                    events.push(Event::Pong);
                }
                Ok(())
            }
            Part::WindowUpdate { stream, increment } => self.window_update(stream, increment, events),
            Part::Reset { stream, code } => self.peer_reset(stream, code, events),
            Part::GoAway { last, code, debug } => {
                if code != ErrorCode::NO_ERROR {
                    self.peer_error = Some((code, String::from_utf8_lossy(&debug).into_owned()));
                }
                self.peer_goes_away(last, events);
                Ok(())
            }
            Part::Priority { stream, depends_on_itself: true } => {
                self.stream_error(stream, ErrorCode::PROTOCOL_ERROR, events)
            }
            _ => Ok(()),
        }
    }

    /// Whether a stream has never been opened (RFC 9113 section 5.1).
    pub(super) fn is_idle(&self, id: u32) -> bool {
        id > self.newest || id.is_multiple_of(2)
    }

    /// Whether a frame of a stream that has ended may have been on its way when this node reset the stream. A client
    /// opened all streams itself, and may have given up more of them at once than it remembers.
    fn may_be_late(&self, id: u32) -> bool {
        self.role == Role::Client || self.remembered.contains(&id)
    }

    /// Whether the peer may open one more stream. Streams that are over do not count, although their owner may still
    /// have to take them away.
    fn may_open(&self) -> bool {
        let most = self.max_streams;
        let open = || self.streams.iter().filter(|(_, stream)| !stream.is_over()).count();
        self.streams.len() < most || (!self.is_crowded() && open() < most)
    }

    /// Whether the owner has so many streams to take away that the peer must be the reason.
    fn is_crowded(&self) -> bool {
        self.streams.len() >= 2 * self.max_streams
    }

    /// Ends a stream because the peer broke a rule on it.
    pub(super) fn stream_error(
        &mut self,
        id: u32,
        code: ErrorCode,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        self.count_reset()?;
        match self.by_id.get(&id).copied() {
            Some(key) if self.streams.get(key).is_some_and(|stream| !stream.is_over()) => {
                self.reset(key, code);
                self.tell_reset(key, code, events);
            }
            // An idle stream must not be reset (RFC 9113 section 6.4).
            None if self.is_idle(id) => {
                return Err(SessionError::rule(code, "a frame that is wrong, on a stream that was never opened"));
            }
            _ => frame::rst_stream(id, code, &mut self.control),
        }
        Ok(())
    }

    fn data_begins(&mut self, id: u32, length: usize, events: &mut Vec<Event>) -> Result<(), SessionError> {
        self.has_payload = false;
        if !self.receive.received(length) {
            return Err(SessionError::rule(ErrorCode::FLOW_CONTROL_ERROR, "more DATA than the connection's window"));
        }
        // Given back at once: see the head of this module.
        if let Some(credit) = self.receive.consumed(length, u32::MAX >> 1) {
            frame::window_update(0, credit, &mut self.control);
        }
        let Some(key) = self.by_id.get(&id).copied() else {
            if self.is_idle(id) {
                return Err(SessionError::rule(ErrorCode::PROTOCOL_ERROR, "DATA on a stream that was never opened"));
            }
            if length < LATE_BYTES {
                self.count_frame()?;
            }
            if self.may_be_late(id) {
                return Ok(());
            }
            return self.stream_error(id, ErrorCode::STREAM_CLOSED, events);
        };
        let role = self.role;
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        if stream.remote_ended {
            if self.remembered.contains(&id) {
                return Ok(());
            }
            return self.stream_error(id, ErrorCode::STREAM_CLOSED, events);
        }
        if role == Role::Client && !stream.answered {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        if !stream.receive.received(length) {
            return self.stream_error(id, ErrorCode::FLOW_CONTROL_ERROR, events);
        }
        Ok(())
    }

    fn data(
        &mut self,
        id: u32,
        range: Range<usize>,
        overhead: usize,
        end: bool,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        let Some(key) = self.by_id.get(&id).copied() else { return Ok(()) };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        if stream.remote_ended {
            return Ok(());
        }
        // Padding is nobody's data.
        let mut discarded = overhead;
        if let Some(foreign) = &mut stream.foreign {
            foreign.received = foreign.received.saturating_add(range.len() as u64);
            discarded += range.len();
        } else if !range.is_empty() {
            events.push(Event::Data { key, range });
        }
        if end {
            return self.ends(key, events);
        }
        if discarded > 0 {
            self.consumed(key, discarded, DEFAULT_WINDOW);
        }
        Ok(())
    }

    fn headers(
        &mut self,
        headers: &HeaderBlock,
        events: &mut Vec<Event>,
        app: &mut impl FnMut() -> A,
    ) -> Result<(), SessionError> {
        let HeaderBlock { id, end_stream, ref block, depends_on_itself } = *headers;
        let known = self.by_id.get(&id).copied();
        if known.is_none() && self.role == Role::Server && id > self.newest && !id.is_multiple_of(2) {
            return self.request(headers, events, app);
        }
        if known.is_none() && self.is_idle(id) {
            return Err(SessionError::rule(ErrorCode::PROTOCOL_ERROR, "HEADERS on a stream that cannot be opened"));
        }
        let stream = known.and_then(|key| self.streams.get(key));
        let (answered, ended) = stream.map_or((true, true), |stream| (stream.answered, stream.remote_ended));
        let is_answer = self.role == Role::Client && !answered && !ended;
        let (mut head, mut trailers) = (ResponseHead::default(), Trailers::default());
        // Decoded in any case, because the block may change the table of the decoder.
        let fields = if is_answer {
            self.hpack.decode(block, super::ANSWER_BYTES, &mut |name, value| head.field(name, value))
        } else {
            self.hpack.decode(block, super::ANSWER_BYTES, &mut |name, value| trailers.field(name, value))
        };
        let complete = fields.map_err(|error| SessionError::rule(ErrorCode::COMPRESSION_ERROR, error.to_string()))?;
        let Some(key) = known else {
            if self.may_be_late(id) {
                return Ok(());
            }
            return Err(SessionError::rule(ErrorCode::STREAM_CLOSED, "HEADERS on a stream that has ended"));
        };
        if ended {
            if self.remembered.contains(&id) {
                return Ok(());
            }
            return self.stream_error(id, ErrorCode::STREAM_CLOSED, events);
        }
        if depends_on_itself {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        if is_answer {
            return self.answered(key, headers, head, complete, events);
        }
        // Trailers: HTTP has a use for them, a tunnel has not, so they only end the stream.
        if !end_stream || trailers.check().is_err() {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        self.ends(key, events)
    }

    fn request(
        &mut self,
        headers: &HeaderBlock,
        events: &mut Vec<Event>,
        app: &mut impl FnMut() -> A,
    ) -> Result<(), SessionError> {
        let HeaderBlock { id, end_stream, ref block, depends_on_itself } = *headers;
        self.newest = id;
        let mut head = RequestHead::default();
        let complete = self
            .hpack
            .decode(block, super::REQUEST_BYTES, &mut |name, value| head.field(name, value))
            .map_err(|error| SessionError::rule(ErrorCode::COMPRESSION_ERROR, error.to_string()))?;
        if depends_on_itself || head.check().is_err() {
            self.remember(id);
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        if self.leaving == Leaving::Final || !self.may_open() {
            self.remember(id);
            frame::rst_stream(id, ErrorCode::REFUSED_STREAM, &mut self.control);
            return if self.is_crowded() { self.count_reset() } else { Ok(()) };
        }
        if !complete {
            // Header fields too large (RFC 6585 section 5). The owner never knows of the stream.
            let mut block = std::mem::take(&mut self.first_block);
            encode_response(431, None, &mut block);
            frame::headers(id, &block, true, self.peer_frame, &mut self.control);
            frame::rst_stream(id, ErrorCode::NO_ERROR, &mut self.control);
            self.remember(id);
            return self.count_reset();
        }
        let key = self.insert(id, app());
        let announced = head.content();
        match ConnectRequest::from_head(head) {
            Err(error @ RequestError::Method(_)) => {
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.foreign = Some(Box::new(Foreign { error, announced, received: 0 }));
                }
            }
            request => events.push(Event::Request { key, request }),
        }
        if end_stream { self.ends(key, events) } else { Ok(()) }
    }

    fn answered(
        &mut self,
        key: usize,
        headers: &HeaderBlock,
        head: ResponseHead,
        complete: bool,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        let HeaderBlock { id, end_stream, .. } = *headers;
        let Ok(status) = head.check() else {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        };
        if !complete {
            return self.stream_error(id, ErrorCode::ENHANCE_YOUR_CALM, events);
        }
        if (100..200).contains(&status) && !end_stream {
            // Informational: the final answer follows.
            return Ok(());
        }
        if let Some(stream) = self.streams.get_mut(key) {
            stream.answered = true;
            stream.remote_ended = end_stream;
        }
        events.push(Event::Answer { key, status });
        if end_stream {
            events.push(Event::End { key });
        }
        Ok(())
    }
}
