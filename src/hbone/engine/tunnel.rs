//! One tunnel of an engine: what it reads and sends in a turn.

use super::app::{App, State};
use super::batch::Batch;
use super::rate::Rate;
use super::work::Work;
use crate::hbone::buffers::Account;
use crate::hbone::error::{EndReason, StreamFailure, TunnelError};
use crate::hbone::request::{ConnectRequest, RequestError};
use crate::hbone::session::{Event, Session};
use crate::hbone::tls::{Next, Tls};
use crate::sys::poller::Readiness;
use crate::sys::socket::reset_on_close;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;

/// Reads of what a peer has sent before it learns that the tunnel ends.
const READS_AT_END: usize = 4;

/// A request that waits to be taken: the key and the number of its stream, and what it says.
pub type Request = (usize, u32, Result<ConnectRequest, RequestError>);

/// A tunnel.
#[derive(Debug)]
pub struct Tunnel {
    /// Number in the engine.
    pub index: usize,
    /// The socket.
    pub socket: TcpStream,
    /// TLS.
    pub tls: Tls,
    /// HTTP/2.
    pub session: Session<App>,
    /// What the peer makes the node hold.
    pub account: Arc<Account>,
    /// Requests that wait to be taken.
    pub requests: VecDeque<Request>,
    /// The task that waits for requests, a PING's answer or the end.
    pub waker: Option<Waker>,
    /// Answers to PINGs.
    pub pongs: u64,
    /// How it ended.
    pub end: Option<Arc<TunnelError>>,
    /// It is closed as soon as everything is sent.
    pub closing: bool,
    /// No handle to it is left. Client only.
    pub unused: bool,
    /// How the stream of another tunnel ended that carries it, if one does.
    pub carrier: Option<EndReason>,
    /// The beginning of a record whose rest has not arrived.
    partial: Vec<u8>,
    /// What the socket did not take.
    pub(super) unsent: Unsent,
    /// Streams that have something to send: those that had nothing before, and those in the middle of much.
    pub(super) fresh: VecDeque<usize>,
    pub(super) bulk: VecDeque<usize>,
    /// Streams whose both sides have ended, and whose last bytes may not be sent.
    pub ending: Vec<usize>,
    /// Bytes of large transfers.
    pub bulk_rate: Rate,
    readable: bool,
    pub(super) writable: bool,
    hung_up: bool,
    /// Whether it waits in the engine's list of tunnels to be flushed, and to be read.
    pub marked: bool,
    /// See `marked`.
    pub again: bool,
    /// Bytes that were sealed, and those that the socket took.
    pub(super) sealed: u64,
    pub(super) sent: u64,
    /// Bytes booked on the account.
    held: usize,
}

/// Sealed bytes that the socket did not take.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    pub buffer: Vec<u8>,
    pub range: Range<usize>,
}

impl Tunnel {
    /// A tunnel whose handshake is done. `early` came behind the handshake.
    pub fn new(
        index: usize,
        socket: TcpStream,
        tls: Tls,
        session: Session<App>,
        account: Arc<Account>,
        early: Vec<u8>,
    ) -> Self {
        Self {
            index,
            socket,
            tls,
            session,
            account,
            requests: VecDeque::new(),
            waker: None,
            pongs: 0,
            end: None,
            closing: false,
            unused: false,
            carrier: None,
            partial: early,
            unsent: Unsent::default(),
            fresh: VecDeque::new(),
            bulk: VecDeque::new(),
            ending: Vec::new(),
            bulk_rate: Rate::new(),
            readable: true,
            writable: true,
            hung_up: false,
            marked: false,
            again: false,
            sealed: 0,
            sent: 0,
            held: 0,
        }
    }

    /// Takes note of what the poller reports about the socket.
    pub fn note(&mut self, ready: Readiness, work: &mut Work) {
        self.hung_up |= ready.hung_up;
        if ready.writable && !self.writable {
            self.writable = true;
            self.mark(work);
        }
        if ready.readable {
            self.readable = true;
            self.read_again(work);
        }
    }

    /// Wakes the task that waits for the tunnel.
    pub fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Whether everything that was sealed has been sent, and nothing waits.
    pub fn is_flushed(&mut self) -> bool {
        self.unsent.range.is_empty() && self.session.control().is_empty() && !self.tls.pending()
    }

    /// Whether the bytes up to a mark have been sent.
    pub fn has_sent(&self, mark: u64) -> bool {
        self.sent >= mark
    }

    /// Reads once and acts on what arrived, also if an error came behind it.
    pub fn read(&mut self, work: &mut Work) -> Result<(), TunnelError> {
        if self.end.is_some() || (!self.readable && self.partial.is_empty()) {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut work.receive);
        let result = self.read_into(&mut buffer, work);
        self.deliver(&buffer, work);
        work.receive = buffer;
        self.act(work);
        result
    }

    fn read_into(&mut self, buffer: &mut [u8], work: &mut Work) -> Result<(), TunnelError> {
        let kept = self.partial.len();
        if let Some(to) = buffer.get_mut(..kept) {
            to.copy_from_slice(&self.partial);
        }
        // An idle tunnel owns no buffer.
        self.partial = Vec::new();
        let most = work.turn_bytes().min(buffer.len().saturating_sub(kept));
        let mut end = kept;
        if self.readable {
            let room = buffer.get_mut(kept..kept + most).unwrap_or_default();
            let arrived = loop {
                match (&self.socket).read(room) {
                    Ok(0) => return Err(self.closed(TunnelError::io(io::ErrorKind::UnexpectedEof.into()))),
                    Ok(length) => break length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break 0,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.closed(TunnelError::io(error))),
                }
            };
            // A short read means that nothing is left, unless the end is all that is left.
            if arrived == most || (arrived > 0 && self.hung_up) {
                self.read_again(work);
            } else {
                self.readable = false;
            }
            end = kept + arrived;
        }
        let mut at = 0;
        while at < end {
            let Some(wire) = buffer.get_mut(at..end) else { break };
            match self.tls.next(wire)? {
                Next::Incomplete { .. } => break,
                Next::Control { used } => at += used,
                Next::Closed { .. } => return Err(self.closed(TunnelError::Closed)),
                Next::Data { used, plain } => {
                    let base = at + plain.start;
                    let bytes = wire.get(plain).unwrap_or_default();
                    self.session.receive(bytes, base, &mut work.events, App::default)?;
                    at += used;
                }
            }
        }
        self.partial = buffer.get(at..end).map(<[u8]>::to_vec).unwrap_or_default();
        Ok(())
    }

    /// Why the connection has ended, if the peer has said so or the stream that carries it knows.
    fn closed(&self, otherwise: TunnelError) -> TunnelError {
        match (self.session.peer_error(), self.carrier.as_ref().and_then(|carrier| carrier.get())) {
            (Some((code, debug)), _) => TunnelError::GoAway { code: *code, debug: debug.clone() },
            (None, Some(reason)) => TunnelError::Carrier(reason.clone()),
            (None, None) => otherwise,
        }
    }

    /// Passes on the DATA that arrived, with one write for each application.
    fn deliver(&mut self, buffer: &[u8], work: &mut Work) {
        let mut data = std::mem::take(&mut work.data);
        work.events.retain_mut(|event| {
            let Event::Data { key, range } = event else { return true };
            data.push((*key, std::mem::take(range)));
            false
        });
        // Stable, so that the bytes of a stream stay in order.
        if data.windows(2).any(|pair| matches!(pair, [(one, _), (two, _)] if one != two)) {
            data.sort_by_key(|(key, _)| *key);
        }
        for of_one in data.chunk_by(|(one, _), (two, _)| one == two) {
            if let Some((key, _)) = of_one.first() {
                self.deliver_to(*key, of_one, buffer, work);
            }
        }
        data.clear();
        work.data = data;
    }

    /// Acts on the other events. The data before them has been passed on already.
    fn act(&mut self, work: &mut Work) {
        let mut events = std::mem::take(&mut work.events);
        for event in events.drain(..) {
            match event {
                Event::Data { .. } => {}
                Event::Request { key, request } => {
                    if let Some(stream) = self.session.get_mut(key) {
                        stream.app.waits = true;
                        self.requests.push_back((key, stream.id, request));
                        self.wake();
                    }
                }
                Event::Answer { key, status } => self.settle(key, State::Answered(status)),
                Event::End { key } => self.peer_ended(key, work),
                Event::Reset { key, code } => self.peer_reset(key, code, work),
                Event::Unprocessed { key } => self.fail(key, StreamFailure::Unprocessed),
                Event::Room { key } => self.want_send(key, work),
                Event::RoomForAll => {
                    for key in self.session.keys() {
                        self.want_send(key, work);
                    }
                }
                Event::Pong => {
                    self.pongs += 1;
                    self.wake();
                }
                Event::Settled | Event::GoAway => self.wake(),
            }
        }
        work.events = events;
        if !self.session.control().is_empty() || self.tls.pending() {
            self.mark(work);
        }
    }

    /// Notes that the tunnel has something to send.
    pub fn mark(&mut self, work: &mut Work) {
        if !std::mem::replace(&mut self.marked, true) {
            work.marked.push_back(self.index);
        }
    }

    /// Notes that the tunnel may have more to read.
    pub fn read_again(&mut self, work: &mut Work) {
        if !std::mem::replace(&mut self.again, true) {
            work.again.push_back(self.index);
        }
    }

    /// Ends the tunnel. The peer is told why, as far as that is possible without waiting.
    pub fn end_with(&mut self, error: TunnelError, work: &mut Work) {
        if self.end.is_some() {
            return;
        }
        let error = Arc::new(error);
        self.end = Some(error.clone());
        self.end_streams(&error, work);
        match &*error {
            TunnelError::Cut(_) => reset_on_close(&self.socket),
            TunnelError::Io(_) | TunnelError::Carrier(_) => {}
            TunnelError::Rule { code, what, .. } => {
                self.session.break_off(*code, what);
                self.say_last(None, work);
            }
            TunnelError::Tls(error) => self.say_last(error.alert(), work),
            TunnelError::Closed | TunnelError::GoAway { .. } => self.say_last(None, work),
        }
        work.forget(&self.socket);
        (self.partial, self.unsent) = (Vec::new(), Unsent::default());
        self.book();
        self.wake();
    }

    /// Ends the tunnel because it cannot be written. What the peer said before it closed may tell why.
    pub fn end_after_reading(&mut self, error: TunnelError, work: &mut Work) {
        let error = match self.read(work) {
            Err(said @ (TunnelError::Tls(_) | TunnelError::GoAway { .. } | TunnelError::Carrier(_))) => said,
            _ => error,
        };
        self.end_with(error, work);
    }

    /// Sends the last frames and the end of TLS: an alert, or `close_notify`.
    fn say_last(&mut self, alert: Option<u8>, work: &mut Work) {
        if !self.unsent.range.is_empty() || !self.writable {
            return;
        }
        let mut buffer = work.buffer();
        let control = std::mem::take(self.session.control());
        let filled = Batch::new(&mut buffer, &mut self.tls).and_then(|mut batch| {
            batch.bytes(&control)?;
            batch.finish()
        });
        let filled = filled.and_then(|filled| {
            let rest = buffer.get_mut(filled..).unwrap_or_default();
            let last = match alert {
                Some(description) => self.tls.alert(description, rest)?,
                None => self.tls.close_notify(rest)?,
            };
            Ok(filled + last)
        });
        if let Ok(filled) = filled {
            // The peer may be gone already; then it does not need to know.
            let _ = (&self.socket).write(buffer.get(..filled).unwrap_or_default());
        }
        let _ = self.socket.shutdown(Shutdown::Write);
        work.give_back(buffer);
        // Closed with something to read, the socket would reset the connection, and the peer not learn the reason.
        for _ in 0..READS_AT_END {
            if !matches!((&self.socket).read(&mut work.receive), Ok(1..)) {
                break;
            }
        }
    }

    /// Marks a stream as one that has something to send.
    pub fn enqueue(&mut self, key: usize, work: &mut Work) {
        self.fresh.push_back(key);
        self.mark(work);
    }

    /// Books what the tunnel makes the node hold.
    pub fn book(&mut self) {
        let now = self.unsent.buffer.capacity() + self.partial.capacity();
        self.account.rebook(&mut self.held, now);
    }
}
