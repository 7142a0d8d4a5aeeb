//! A session against hostile peers, against another session and a model, and against the h2 crate.

mod against_h2;
mod misuse;
mod model;

use super::*;
use crate::hbone::request::Authority;
use std::time::Duration;

/// Small windows.
const CONFIG: Config = Config {
    stream_window: 65_535,
    connection_window: 65_535,
    frame_size: 16_384,
    max_streams: 100,
    half_closed_silence: Duration::from_secs(1),
};

fn connect() -> ConnectRequest {
    let authority = Authority::Address(([10, 0, 0, 1], 80).into());
    ConnectRequest { authority, baggage: None, forwarded: None, traceparent: None, network: None }
}

/// The header block of a request.
fn request_block() -> Vec<u8> {
    let mut block = Vec::new();
    connect().encode(&mut block);
    block
}

/// The header block of an answer.
fn answer_block(status: u16) -> Vec<u8> {
    let mut block = Vec::new();
    encode_response(status, None, &mut block);
    block
}

/// Any frame.
fn raw(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&frame::head(payload.len(), kind, flags, stream)[..], payload].concat()
}

fn headers(stream: u32, block: &[u8], end: bool) -> Vec<u8> {
    let mut out = Vec::new();
    frame::headers(stream, block, end, 16_384, &mut out);
    out
}

fn request(stream: u32) -> Vec<u8> {
    headers(stream, &request_block(), false)
}

fn data(stream: u32, bytes: usize, end: bool) -> Vec<u8> {
    raw(frame::DATA, if end { frame::END_STREAM } else { 0 }, stream, &vec![7; bytes])
}

fn reset(stream: u32) -> Vec<u8> {
    let mut out = Vec::new();
    frame::rst_stream(stream, ErrorCode::CANCEL, &mut out);
    out
}

fn window(stream: u32, increment: u32) -> Vec<u8> {
    raw(frame::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::settings(values, &mut out);
    out
}

/// A session whose peer has sent its first SETTINGS. A client has also opened stream 1 and got its answer.
fn session(role: Role) -> Session<()> {
    let mut session = Session::new(role, &CONFIG);
    let mut bytes = if role == Role::Server { frame::PREFACE.to_vec() } else { Vec::new() };
    bytes.extend(settings(&[]));
    if role == Role::Client {
        assert_eq!(session.open(&connect(), ()), Some(0));
        bytes.extend(headers(1, &answer_block(200), false));
    }
    receive(&mut session, &bytes).unwrap();
    session.control().clear();
    session
}

fn receive(session: &mut Session<()>, bytes: &[u8]) -> Result<Vec<Event>, SessionError> {
    let mut events = Vec::new();
    session.receive(bytes, 0, &mut events, || ())?;
    Ok(events)
}

/// The frames that a session has written.
fn written(session: &mut Session<()>) -> Vec<frame::Part> {
    let bytes = std::mem::take(session.control());
    let mut reader = Reader::new(false, 16_384, 1 << 20);
    let (_, part) = reader.next(&settings(&[])).unwrap();
    assert!(part.is_some());
    let (mut at, mut parts) = (0, Vec::new());
    while let (used, Some(part)) = reader.next(&bytes[at..]).unwrap() {
        at += used;
        parts.push(part);
    }
    parts
}
