//! What the tunnels of an engine share in a turn: buffers, and lists of what is to be done.

use super::app::Owner;
use super::batch::BATCH_BYTES;
use super::ended::Ended;
use crate::hbone::session::Event;
use crate::hbone::tls::SLOT;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::time::Instant;

use crate::sys::poller::Poller;

/// Bytes that one tunnel reads, and sends, in one turn.
const LARGE_TURN: usize = 256 * 1024;

/// The same while small messages flow, so that they do not wait long.
const SMALL_TURN: usize = 64 * 1024;

/// Turns for which small messages count as flowing after one was seen.
const SMALL_TURNS: u64 = 32;

/// Send buffers that are kept for reuse.
const SPARE_MAX: usize = 4;

/// The window of a stream may grow to this while small messages flow.
const SHARED_WINDOW: u32 = 512 * 1024;

/// The same while the node's buffers are scarce.
const SCARCE_WINDOW: u32 = 64 * 1024;

/// A connection that has ended, with its owner.
pub type Finished = (Box<dyn Owner>, Ended);

/// What the tunnels of an engine share.
#[derive(Debug)]
pub struct Work {
    /// The sockets.
    pub poller: Arc<Poller>,
    /// The buffer that tunnels are read into.
    pub receive: Vec<u8>,
    /// Events of one read.
    pub events: Vec<Event>,
    /// DATA of one read.
    pub data: Vec<(usize, Range<usize>)>,
    /// Streams whose application has ended in one turn.
    pub ended: Vec<usize>,
    /// Tunnels that have something to send.
    pub marked: VecDeque<usize>,
    /// Tunnels that may have more to read.
    pub again: VecDeque<usize>,
    /// Connections that have ended. Their owners are told after the turn.
    pub finished: Vec<Finished>,
    /// When something is given up: the time, the tunnel and the stream.
    pub deadlines: BTreeSet<(Instant, usize, usize)>,
    /// Largest window of a stream.
    window: u32,
    spare: Vec<Vec<u8>>,
    turn: u64,
    small: u64,
    /// When the turn began.
    pub now: Instant,
}

impl std::fmt::Debug for dyn Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owner")
    }
}

impl Work {
    /// Nothing to do yet.
    pub fn new(poller: Arc<Poller>, window: u32) -> Self {
        Self {
            poller,
            receive: vec![0; LARGE_TURN + SLOT],
            events: Vec::new(),
            data: Vec::new(),
            ended: Vec::new(),
            marked: VecDeque::new(),
            again: VecDeque::new(),
            finished: Vec::new(),
            deadlines: BTreeSet::new(),
            window,
            spare: Vec::new(),
            turn: SMALL_TURNS,
            small: 0,
            now: Instant::now(),
        }
    }

    /// Begins a turn.
    pub fn begin(&mut self) {
        self.turn += 1;
        self.now = Instant::now();
    }

    /// Notes that a small message was carried.
    pub fn note_small(&mut self) {
        self.small = self.turn;
    }

    fn is_interactive(&self) -> bool {
        self.turn - self.small < SMALL_TURNS
    }

    /// Bytes that a tunnel may read, and send, in this turn.
    pub fn turn_bytes(&self) -> usize {
        if self.is_interactive() { SMALL_TURN } else { LARGE_TURN }
    }

    /// The size that the window of a stream may have now.
    pub fn window(&self, scarce: bool) -> u32 {
        let limit = match (scarce, self.is_interactive()) {
            (true, _) => SCARCE_WINDOW,
            (false, true) => SHARED_WINDOW,
            (false, false) => u32::MAX,
        };
        self.window.min(limit)
    }

    /// A buffer for a batch of records.
    pub fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| vec![0; BATCH_BYTES])
    }

    /// Takes a buffer back.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        if buffer.len() == BATCH_BYTES && self.spare.len() < SPARE_MAX {
            self.spare.push(buffer);
        }
    }

    /// The next deadline that has passed: its tunnel and stream.
    pub fn passed(&mut self, now: Instant) -> Option<(usize, usize)> {
        let first = self.deadlines.first().filter(|(at, _, _)| *at <= now).copied()?;
        self.deadlines.remove(&first);
        Some((first.1, first.2))
    }

    /// Whether there is something to do without an event.
    pub fn is_pending(&self) -> bool {
        !self.marked.is_empty() || !self.again.is_empty()
    }

    /// Removes a socket from the poller that is handed back.
    pub fn forget(&self, socket: &impl AsFd) {
        self.poller.remove(socket);
    }
}
