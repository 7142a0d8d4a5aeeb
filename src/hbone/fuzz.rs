//! One function for each layer that reads what a peer sends, for the fuzzer. None of them may panic, whatever its input.
//! The first bytes of the input choose the role of this node and how the rest is cut into pieces.

use super::codec::fields::{RequestHead, ResponseHead, Trailers};
use super::codec::frame::{self, FRAME_SIZE_MIN, Part};
use super::codec::hpack::Decoder;
use super::codec::reader::Reader;
use super::config::Config;
use super::request::{Authority, ConnectRequest};
use super::session::{Event, Role, Session};
use std::time::Duration;

/// Small windows, so that little input reaches limits.
pub(super) const CONFIG: Config = Config {
    stream_window: 65_535,
    connection_window: 65_535,
    frame_size: 16_384,
    max_streams: 20,
    half_closed_silence: Duration::from_secs(1),
};

/// Longest header block.
const BLOCK_MAX: usize = 1 << 16;

/// What the first two bytes choose: flags, and the size of pieces. The rest is for the layer itself.
pub(super) fn choices(data: &[u8]) -> Option<(u8, usize, &[u8])> {
    let ([flags, size], rest) = data.split_first_chunk::<2>()?;
    // From single bytes to whole records.
    Some((*flags, usize::from(*size).pow(2) / 4 + 1, rest))
}

/// The role of this node.
pub(super) fn role(flags: u8) -> Role {
    if flags & 1 == 0 { Role::Client } else { Role::Server }
}

/// What a peer that follows the rules sends first, if the flags say so.
pub(super) fn opening(flags: u8) -> Vec<u8> {
    let mut opening = Vec::new();
    if flags & 2 != 0 {
        if role(flags) == Role::Server {
            opening.extend(frame::PREFACE);
        }
        frame::settings(&[], &mut opening);
    }
    opening
}

/// A request.
pub(super) fn connect() -> ConnectRequest {
    let authority = Authority::Address(([10, 0, 0, 1], 80).into());
    ConnectRequest { authority, baggage: None, forwarded: None, traceparent: None, network: None }
}

/// Frames and header blocks.
pub fn frames(data: &[u8]) {
    let Some((flags, size, rest)) = choices(data) else { return };
    let bytes = [opening(flags), rest.to_vec()].concat();
    let mut reader = Reader::new(role(flags) == Role::Server, FRAME_SIZE_MIN, BLOCK_MAX);
    let mut decoder = Decoder::new();
    for piece in bytes.chunks(size) {
        let mut input = piece;
        loop {
            let (used, part) = match reader.next(input) {
                Ok(read) => read,
                Err(error) if error.stream.is_some() => (error.used, None),
                Err(_) => return,
            };
            assert!(used <= input.len(), "no more is taken than there is");
            let is_end = part.is_none() && used == input.len();
            match part {
                Some(Part::Data { range, overhead, .. }) => {
                    assert!(range.end <= used && range.len() + overhead <= used)
                }
                Some(Part::Headers { block, .. }) if !headers(&block, &mut decoder) => return,
                _ => {}
            }
            assert!(reader.held() <= 2 * BLOCK_MAX && decoder.size() <= 4096, "what is kept is limited");
            if is_end {
                break;
            }
            input = input.get(used..).unwrap_or_default();
        }
    }
}

/// Decodes a header block as all that it may be; `false`: the connection would end.
fn headers(block: &[u8], decoder: &mut Decoder) -> bool {
    let (mut request, mut answer, mut trailers) =
        (RequestHead::default(), ResponseHead::default(), Trailers::default());
    let decoded = decoder.decode(block, BLOCK_MAX, &mut |name, value| {
        request.field(name, value);
        answer.field(name, value);
        trailers.field(name, value);
    });
    if request.check().is_ok() {
        let _ = ConnectRequest::from_head(request);
    }
    if let Ok(status) = answer.check() {
        assert!((100..1000).contains(&status), "a status has three digits");
    }
    let _ = trailers.check();
    decoded.is_ok()
}

/// One HTTP/2 connection, in either role.
pub fn session(data: &[u8]) {
    let Some((flags, size, rest)) = choices(data) else { return };
    let mut session = Session::new(role(flags), &CONFIG);
    for _ in 0..3 {
        if role(flags) == Role::Client {
            let _ = session.open(&connect(), ());
        }
    }
    let bytes = [opening(flags), rest.to_vec()].concat();
    let mut events = Vec::new();
    for piece in bytes.chunks(size.min(FRAME_SIZE_MIN)) {
        let received = session.receive(piece, 0, &mut events, || ());
        for event in events.drain(..) {
            act(&mut session, event, piece.len(), flags);
        }
        if received.is_err() {
            return;
        }
        assert!(session.len() <= 2 * CONFIG.max_streams as usize, "streams are limited");
        // A whole buffer of PINGs may be answered beyond the limit.
        assert!(session.control().len() <= 256 * 1024 + 4 * FRAME_SIZE_MIN, "frames that wait are limited");
        for key in session.keys() {
            let bytes = session.room(key).min(1000);
            if flags & 4 != 0 && session.get(key).is_some_and(|stream| stream.answered && !stream.local_ended) {
                session.data_head(key, bytes, bytes == 0);
            }
            if session.get(key).is_some_and(|stream| stream.is_over()) {
                session.remove(key);
            }
        }
        if flags & 8 != 0 {
            session.control().clear();
        }
        if flags & 16 != 0 {
            session.go_away();
        }
    }
}

fn act(session: &mut Session<()>, event: Event, input: usize, flags: u8) {
    match event {
        Event::Request { key, request } => {
            assert!(session.get(key).is_some(), "a request belongs to a stream");
            let status = if request.is_ok() { 200 } else { 400 };
            session.answer(key, status, None, request.is_err());
        }
        Event::Data { key, range } => {
            assert!(range.end <= input && !range.is_empty() && session.get(key).is_some());
            if flags & 32 == 0 {
                session.consumed(key, range.len(), CONFIG.stream_window);
            }
        }
        Event::Answer { key, .. } | Event::End { key } | Event::Reset { key, .. } | Event::Unprocessed { key } => {
            assert!(session.get(key).is_some(), "an event belongs to a stream");
        }
        Event::Room { .. } | Event::RoomForAll | Event::Settled | Event::Pong | Event::GoAway => {}
    }
}
