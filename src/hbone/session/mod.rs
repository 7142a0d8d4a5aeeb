//! The state of one HTTP/2 connection that carries CONNECT streams and nothing else (RFC 9113), for both roles. Sans-I/O:
//! it is given the decrypted bytes that arrive, reports what they mean as [`Event`]s, and collects the frames that are
//! to be sent, except DATA. DATA is written by the owner, who asks for the room first.
//!
//! The window of the whole connection is given back as soon as bytes arrive, so that no set of stalled streams can use
//! it up. What streams hold is limited by their own windows, and by the node's buffers.

mod control;
mod foreign;
mod limits;
mod receive;
mod stream;

pub use receive::SessionError;
pub use stream::{Stream, WINDOW_MAX};

use super::codec::frame::{self, ErrorCode};
use super::codec::hpack::Decoder;
use super::codec::reader::Reader;
use super::request::{ConnectRequest, RequestError, encode_response};
use crate::hbone::Config;
use limits::Allowance;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use stream::ReceiveWindow;

/// Window and frame size before SETTINGS say otherwise (RFC 9113 section 6.5.2).
const DEFAULT_WINDOW: u32 = 65_535;
const DEFAULT_FRAME: usize = 16_384;

/// Streams that a client opens at once before the peer's SETTINGS are known.
const DEFAULT_STREAMS: u32 = 100;

/// The size with which the window of a stream begins. It grows with the traffic.
const FIRST_WINDOW: u32 = 256 * 1024;

/// Largest header list that is accepted in an answer, in bytes.
const ANSWER_BYTES: usize = 16 * 1024;

/// Largest header list that is accepted in a request, in bytes. CONNECT requests are much smaller.
const REQUEST_BYTES: usize = 64 * 1024;

/// Streams that this node has reset and that are remembered: frames that were on their way do not break a rule.
const REMEMBERED_MAX: usize = 256;

/// A dynamic table size update to 0 (RFC 7541 section 6.3).
const TABLE_SIZE_0: u8 = 0x20;

/// Payload of the PING that follows the first GOAWAY. When it is answered, the peer has seen the GOAWAY.
const GOAWAY_PING: [u8; 8] = *b"goaway..";

/// Which end of the connection this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It opens the streams.
    Client,
    /// It accepts them.
    Server,
}

/// What arrived. `key` is the number by which the session knows the stream.
#[derive(Debug)]
pub enum Event {
    /// The peer asks for a stream. Server only.
    Request {
        /// The stream.
        key: usize,
        /// The request, or why it is not a valid one.
        request: Result<ConnectRequest, RequestError>,
    },
    /// The peer has answered a request. Client only.
    Answer {
        /// The stream.
        key: usize,
        /// The status.
        status: u16,
    },
    /// Bytes of a stream.
    Data {
        /// The stream.
        key: usize,
        /// Where they are, in the buffer that was read.
        range: Range<usize>,
    },
    /// The peer sends no more bytes on this stream.
    End {
        /// The stream.
        key: usize,
    },
    /// The peer has reset the stream, or this node has because the peer broke a rule of HTTP/2 on it.
    Reset {
        /// The stream.
        key: usize,
        /// The error code.
        code: ErrorCode,
    },
    /// The peer will never act on this stream: it is going away (RFC 9113 section 6.8). Client only.
    Unprocessed {
        /// The stream.
        key: usize,
    },
    /// More may be sent on this stream.
    Room {
        /// The stream.
        key: usize,
    },
    /// More may be sent on all streams.
    RoomForAll,
    /// The peer's first SETTINGS are there.
    Settled,
    /// The peer has answered a PING.
    Pong,
    /// The peer opens no more streams, or accepts no more.
    GoAway,
}

/// One HTTP/2 connection. `A` is what the owner keeps for each stream.
#[derive(Debug)]
pub struct Session<A> {
    role: Role,
    reader: Reader,
    hpack: Decoder,
    streams: Slab<Stream<A>>,
    by_id: HashMap<u32, usize>,
    /// The newest stream that either side has opened.
    newest: u32,
    /// Streams that this node has reset.
    remembered: VecDeque<u32>,
    /// What our first header block begins with: we never use a dynamic table, and have to say so if the peer makes its
    /// own smaller (RFC 7541 section 4.2).
    first_block: Vec<u8>,
    /// Frames to be sent, without DATA.
    control: Vec<u8>,
    /// Bytes that we may still send on all streams together.
    send_window: i64,
    /// The window with which the peer's streams begin.
    peer_window: u32,
    peer_frame: usize,
    peer_streams: u32,
    receive: ReceiveWindow,
    window: u32,
    /// Most streams that the peer may have open.
    max_streams: usize,
    settings_received: bool,
    /// The peer accepts no stream after this one. Client only.
    peer_last: Option<u32>,
    /// Why the peer goes away, if it is because of an error.
    peer_error: Option<(ErrorCode, String)>,
    /// How far our own GOAWAY is.
    leaving: Leaving,
    /// Whether the DATA frame that is being read has brought payload.
    has_payload: bool,
    frames: Allowance,
    resets: Allowance,
    empty: Allowance,
}

/// The steps of going away in order (RFC 9113 section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The peer has been told, and may have opened streams before it knew.
    Announced,
    /// No stream after the newest one is accepted.
    Final,
}

impl<A> Session<A> {
    /// A session. What it sends first is in [`Session::control`].
    pub fn new(role: Role, config: &Config) -> Self {
        let window = config.stream_window.min(FIRST_WINDOW);
        let list = if role == Role::Client { ANSWER_BYTES } else { REQUEST_BYTES };
        let mut control = Vec::new();
        // Without HEADER_TABLE_SIZE: some clients do not signal that they make their table smaller, as RFC 9113
        // section 4.3.1 demands, and each would lose its tunnel.
        let mut settings = vec![
            (frame::INITIAL_WINDOW_SIZE, window),
            (frame::MAX_FRAME_SIZE, config.frame_size),
            (frame::MAX_HEADER_LIST_SIZE, u32::try_from(list).unwrap_or(u32::MAX)),
        ];
        match role {
            Role::Client => {
                control.extend_from_slice(&frame::PREFACE);
                settings.push((frame::ENABLE_PUSH, 0));
            }
            Role::Server => settings.push((frame::MAX_CONCURRENT_STREAMS, config.max_streams)),
        }
        frame::settings(&settings, &mut control);
        let more = config.connection_window.saturating_sub(DEFAULT_WINDOW);
        if more > 0 {
            frame::window_update(0, more, &mut control);
        }
        Self {
            role,
            reader: Reader::new(role == Role::Server, config.frame_size as usize, list),
            hpack: Decoder::new(),
            streams: Slab::new(),
            by_id: HashMap::new(),
            newest: 0,
            remembered: VecDeque::new(),
            first_block: vec![TABLE_SIZE_0],
            control,
            send_window: DEFAULT_WINDOW.into(),
            peer_window: DEFAULT_WINDOW,
            peer_frame: DEFAULT_FRAME,
            peer_streams: DEFAULT_STREAMS,
            receive: ReceiveWindow::new(config.connection_window),
            window,
            max_streams: config.max_streams as usize,
            settings_received: false,
            peer_last: None,
            peer_error: None,
            leaving: Leaving::No,
            has_payload: false,
            frames: Allowance::control(),
            resets: Allowance::resets(),
            empty: Allowance::empty(),
        }
    }

    /// A stream.
    pub fn get(&self, key: usize) -> Option<&Stream<A>> {
        self.streams.get(key)
    }

    /// A stream.
    pub fn get_mut(&mut self, key: usize) -> Option<&mut Stream<A>> {
        self.streams.get_mut(key)
    }

    /// All streams.
    pub fn iter(&self) -> impl Iterator<Item = &Stream<A>> {
        self.streams.iter().map(|(_, stream)| stream)
    }

    /// The keys of all streams.
    pub fn keys(&self) -> Vec<usize> {
        self.streams.iter().map(|(key, _)| key).collect()
    }

    /// Number of streams.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Frames to be sent before any more DATA.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.control
    }

    /// Most streams that the peer allows at once.
    pub fn max_streams(&self) -> usize {
        self.peer_streams as usize
    }

    /// Why the peer goes away, if it is because of an error: the code, and what it says about it.
    pub fn peer_error(&self) -> Option<&(ErrorCode, String)> {
        self.peer_error.as_ref()
    }

    /// Whether the peer's SETTINGS have arrived.
    pub fn is_settled(&self) -> bool {
        self.settings_received
    }

    /// Whether new streams can be opened. Client only.
    pub fn takes_streams(&self) -> bool {
        self.peer_last.is_none() && self.leaving == Leaving::No && self.newest < (1 << 31) - 2
    }

    /// Whether the peer goes away: it acts on no stream that this node has not opened yet.
    pub fn peer_is_leaving(&self) -> bool {
        self.peer_last.is_some()
    }

    /// Whether this node goes away and all streams are over.
    pub fn is_finished(&self) -> bool {
        self.leaving == Leaving::Final && self.streams.is_empty()
    }

    /// Opens a stream. Client only. `None` if the peer accepts no more.
    pub fn open(&mut self, request: &ConnectRequest, app: A) -> Option<usize> {
        if !self.takes_streams() {
            return None;
        }
        let id = if self.newest == 0 { 1 } else { self.newest + 2 };
        let mut block = std::mem::take(&mut self.first_block);
        request.encode(&mut block);
        frame::headers(id, &block, false, self.peer_frame, &mut self.control);
        self.earn(2);
        self.newest = id;
        Some(self.insert(id, app))
    }

    fn insert(&mut self, id: u32, app: A) -> usize {
        let key = self.streams.insert(Stream {
            app,
            id,
            send_window: self.peer_window.into(),
            receive: ReceiveWindow::new(self.window),
            answered: false,
            local_ended: false,
            remote_ended: false,
            foreign: None,
        });
        self.by_id.insert(id, key);
        key
    }

    /// Answers a request. Server only. `end`: the stream ends with the answer.
    pub fn answer(&mut self, key: usize, status: u16, baggage: Option<&str>, end: bool) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.answered || stream.local_ended {
            return;
        }
        let mut block = std::mem::take(&mut self.first_block);
        encode_response(status, baggage, &mut block);
        frame::headers(stream.id, &block, false, self.peer_frame, &mut self.control);
        if end {
            // In a frame of its own: an answer with DATA is what most clients and all tools expect.
            self.control.extend_from_slice(&frame::head(0, frame::DATA, frame::END_STREAM, stream.id));
        }
        stream.answered = true;
        stream.local_ended = end;
        self.earn(2);
    }

    /// Bytes that may be sent on this stream now.
    pub fn room(&self, key: usize) -> usize {
        let Some(stream) = self.streams.get(key) else { return 0 };
        if stream.local_ended {
            return 0;
        }
        usize::try_from(stream.send_window.min(self.send_window)).unwrap_or(0)
    }

    /// The header of a DATA frame that is sent now, of at most [`Session::room`] bytes. `end` adds END_STREAM.
    pub fn data_head(&mut self, key: usize, bytes: usize, end: bool) -> [u8; 9] {
        let Some(stream) = self.streams.get_mut(key) else { return frame::head(0, frame::DATA, 0, 0) };
        let sent = i64::try_from(bytes).unwrap_or(i64::MAX);
        stream.send_window = stream.send_window.saturating_sub(sent);
        self.send_window = self.send_window.saturating_sub(sent);
        stream.local_ended |= end;
        let flags = if end { frame::END_STREAM } else { 0 };
        let head = frame::head(bytes, frame::DATA, flags, stream.id);
        // A peer that returns window in small pieces may send one update per 2 KiB.
        self.earn(2 + (bytes / 2048) as u64);
        head
    }

    /// Records that bytes of a stream were passed on or discarded, and returns window to the peer. The window of a
    /// stream grows up to `limit`.
    pub fn consumed(&mut self, key: usize, bytes: usize, limit: u32) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if let Some(credit) = stream.receive.consumed(bytes, limit)
            && !stream.remote_ended
        {
            frame::window_update(stream.id, credit, &mut self.control);
        }
    }

    /// Resets a stream. Later frames of it are ignored.
    pub fn reset(&mut self, key: usize, code: ErrorCode) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.is_over() {
            return;
        }
        (stream.local_ended, stream.remote_ended) = (true, true);
        let id = stream.id;
        frame::rst_stream(id, code, &mut self.control);
        self.remember(id);
    }

    fn remember(&mut self, id: u32) {
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.pop_front();
        }
        self.remembered.push_back(id);
    }

    /// Removes a stream. If it is not over, it is reset.
    pub fn remove(&mut self, key: usize) -> Option<A> {
        self.reset(key, ErrorCode::CANCEL);
        let stream = self.streams.try_remove(key)?;
        self.by_id.remove(&stream.id);
        Some(stream.app)
    }

    /// Sends a PING.
    pub fn ping(&mut self) {
        frame::ping([0; 8], false, &mut self.control);
        self.earn(2);
    }

    /// Goes away in order: the peer opens no more streams, and the open ones continue.
    pub fn go_away(&mut self) {
        if self.leaving != Leaving::No {
            return;
        }
        match self.role {
            Role::Server => {
                self.leaving = Leaving::Announced;
                frame::goaway((1 << 31) - 1, ErrorCode::NO_ERROR, &[], &mut self.control);
                frame::ping(GOAWAY_PING, false, &mut self.control);
                self.earn(2);
            }
            Role::Client => {
                self.leaving = Leaving::Final;
                frame::goaway(0, ErrorCode::NO_ERROR, &[], &mut self.control);
            }
        }
    }

    /// Goes away because of an error: nothing of the peer is read any more.
    pub fn break_off(&mut self, code: ErrorCode, why: &str) {
        self.leaving = Leaving::Final;
        let last = if self.role == Role::Server { self.newest } else { 0 };
        frame::goaway(last, code, why.as_bytes(), &mut self.control);
    }

    fn earn(&mut self, frames: u64) {
        self.frames.earn(frames);
    }
}

#[cfg(test)]
mod tests;
