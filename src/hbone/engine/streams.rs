//! What happens to the streams of a tunnel: bytes arrive for an application, its socket becomes ready, one of both sides
//! ends.

use super::app::{Carried, State};
use super::ended::{CarryError, Ended, Rest};
use super::tunnel::Tunnel;
use super::work::Work;
use crate::hbone::codec::frame::ErrorCode;
use crate::hbone::error::{StreamFailure, TunnelError};
use crate::sys::leg::LAST_BYTES;
use crate::sys::poller::Readiness;
use std::io::IoSlice;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// A stream that brings this much at once is in the middle of a large transfer.
const BULK_BYTES: usize = 16 * 1024;

/// Pieces that one write takes at most.
const PIECES: usize = 32;

impl Tunnel {
    fn carried(&mut self, key: usize) -> Option<&mut Carried> {
        self.session.get_mut(key)?.app.carried.as_deref_mut()
    }

    /// The sockets of all carried connections.
    pub fn carried_sockets(&self) -> impl Iterator<Item = &TcpStream> {
        self.session.iter().filter_map(|stream| stream.app.carried.as_deref()).map(|carried| &carried.socket)
    }

    /// Sets the state of a stream that is not carried yet, and wakes who waits for it.
    pub fn settle(&mut self, key: usize, state: State) {
        let Some(stream) = self.session.get_mut(key) else { return };
        if matches!(stream.app.state, State::Asked) {
            stream.app.state = state;
        }
        if let Some(waker) = stream.app.waker.take() {
            waker.wake();
        }
    }

    /// Ends a stream that is not carried yet.
    pub fn fail(&mut self, key: usize, failure: StreamFailure) {
        self.settle(key, State::Failed(failure));
    }

    /// Passes bytes of a stream on to its application, or keeps what it does not take.
    pub fn deliver_to(&mut self, key: usize, pieces: &[(usize, Range<usize>)], buffer: &[u8], work: &mut Work) {
        let piece = |range: &Range<usize>| buffer.get(range.clone()).unwrap_or_default();
        let Some(stream) = self.session.get_mut(key) else { return };
        let app = &mut stream.app;
        let all: usize = pieces.iter().map(|(_, range)| range.len()).sum();
        let mut written = 0;
        let mut discard = false;
        if let Some(carried) = app.carried.as_deref_mut() {
            if app.backlog.is_empty() {
                for some in pieces.chunks(PIECES) {
                    let mut slices = [IoSlice::new(&[]); PIECES];
                    let mut length = 0;
                    for (slice, (_, range)) in slices.iter_mut().zip(some) {
                        *slice = IoSlice::new(piece(range));
                        length += range.len();
                    }
                    let now = carried.write(slices.get(..some.len()).unwrap_or_default());
                    written += now;
                    if now < length {
                        break;
                    }
                }
            }
            carried.owner.down(written);
            discard = carried.broken.is_some();
            if all >= BULK_BYTES {
                self.bulk_rate.count(all, work.now);
            }
            if all < 4096 {
                work.note_small();
            }
        }
        let passed = if discard { all } else { written };
        let mut skip = passed;
        let before = app.backlog.memory();
        for (_, range) in pieces {
            let bytes = piece(range);
            let rest = bytes.get(skip.min(bytes.len())..).unwrap_or_default();
            skip = skip.saturating_sub(bytes.len());
            app.backlog.push(rest);
        }
        let more = app.backlog.memory() - before;
        self.account.hold(more);
        let limit = work.window(self.account.scarce());
        self.session.consumed(key, passed, limit);
        if discard {
            self.app_broke(key, work);
        }
    }

    /// The peer sends no more on this stream.
    pub fn peer_ended(&mut self, key: usize, work: &mut Work) {
        let Some(stream) = self.session.get_mut(key) else { return };
        stream.app.peer_ended = true;
        self.pass_on_end(key, work);
    }

    /// Sends FIN to the application once it has everything that the peer sent.
    fn pass_on_end(&mut self, key: usize, work: &mut Work) {
        let Some(stream) = self.session.get_mut(key) else { return };
        let app = &mut stream.app;
        let Some(carried) = app.carried.as_deref_mut() else { return };
        if !app.peer_ended || !app.backlog.is_empty() || carried.shut || carried.broken.is_some() {
            return;
        }
        carried.shut();
        self.half_closed(key, work);
        self.check_done(key, work);
    }

    /// The peer has reset the stream, or broken a rule on it.
    pub fn peer_reset(&mut self, key: usize, code: ErrorCode, work: &mut Work) {
        let Some(stream) = self.session.get_mut(key) else { return };
        let app = &mut stream.app;
        if app.waits {
            // Nobody needs to learn of it.
            return self.drop_stream(key, work);
        }
        if app.carried.is_none() {
            app.reset = Some(code);
            return self.fail(key, StreamFailure::Reset(code));
        }
        // Behind END_STREAM, NO_ERROR is an orderly end: the peer takes no more (RFC 9113 section 8.1).
        if code == ErrorCode::NO_ERROR && app.peer_ended {
            if let Some(carried) = app.carried.as_deref_mut() {
                carried.app_ended = true;
            }
            self.half_closed(key, work);
            self.check_done(key, work);
            return;
        }
        let broke = self.carried(key).is_some_and(|carried| carried.broken.is_some());
        if broke { self.finish_broken(key, work) } else { self.finish(key, Err(CarryError::Reset(code)), work) }
    }

    /// The application's socket is ready.
    pub fn app_ready(&mut self, key: usize, ready: Readiness, work: &mut Work) {
        let Some(carried) = self.carried(key) else { return };
        carried.note(ready);
        if carried.broken.is_some() {
            return self.app_broke(key, work);
        }
        if ready.writable {
            self.write_backlog(key, work);
        }
        if ready.readable {
            self.want_send(key, work);
        }
    }

    /// Gives an application what waits for it.
    pub fn write_backlog(&mut self, key: usize, work: &mut Work) {
        let Some(stream) = self.session.get_mut(key) else { return };
        let app = &mut stream.app;
        let Some(carried) = app.carried.as_deref_mut() else { return };
        let (before, mut total) = (app.backlog.memory(), 0);
        while !app.backlog.is_empty() {
            let written = carried.write(&app.backlog.slices());
            app.backlog.advance(written);
            total += written;
            if written == 0 {
                break;
            }
        }
        carried.owner.down(total);
        let broke = carried.broken.is_some();
        let less = before - app.backlog.memory();
        self.account.free(less);
        if total > 0 {
            let limit = work.window(self.account.scarce());
            self.session.consumed(key, total, limit);
            if !self.session.control().is_empty() {
                self.mark(work);
            }
        }
        if broke { self.app_broke(key, work) } else { self.pass_on_end(key, work) }
    }

    /// Queues a stream whose application may have something to send.
    pub fn want_send(&mut self, key: usize, work: &mut Work) {
        let has_room = self.session.room(key) > 0;
        let Some(carried) = self.carried(key) else { return };
        if carried.readable && has_room && !carried.queued && !carried.app_ended {
            carried.queued = true;
            self.enqueue(key, work);
        }
    }

    /// The application's connection has broken. What it had sent before is still sent, if the peer takes it in time.
    fn app_broke(&mut self, key: usize, work: &mut Work) {
        let ended = self.session.get(key).is_none_or(|stream| stream.local_ended);
        let Some(stream) = self.session.get_mut(key) else { return };
        let app = &mut stream.app;
        let waits = app.backlog.memory();
        app.backlog = Default::default();
        self.account.free(waits);
        let Some(carried) = self.carried(key) else { return };
        if ended || carried.app_ended {
            return self.finish_broken(key, work);
        }
        if std::mem::replace(&mut carried.giving_up, true) {
            return;
        }
        let at = Instant::now() + LAST_BYTES;
        self.set_deadline(key, at, work);
        self.want_send(key, work);
    }

    /// Reports that the application's connection has broken, now that all of it is sent.
    fn finish_broken(&mut self, key: usize, work: &mut Work) {
        let Some(carried) = self.carried(key) else { return };
        let error = carried.error();
        // The peer passes it on as a reset (RFC 9113 section 8.5).
        self.session.reset(key, ErrorCode::CONNECT_ERROR);
        self.mark(work);
        self.finish(key, Err(error), work);
    }

    /// The application has ended, in order or not. Everything up to `mark` belongs before that.
    pub fn app_ended(&mut self, key: usize, mark: u64, work: &mut Work) {
        let Some(carried) = self.carried(key) else { return };
        carried.end_at = mark;
        if carried.broken.is_some() {
            return self.finish_broken(key, work);
        }
        self.half_closed(key, work);
    }

    /// Ends a connection whose both sides have ended and whose last bytes are sent.
    pub fn check_done(&mut self, key: usize, work: &mut Work) {
        let Some(stream) = self.session.get(key) else { return };
        let Some(carried) = stream.app.carried.as_deref() else { return };
        if carried.app_ended && carried.shut && self.has_sent(carried.end_at) {
            self.finish(key, Ok(()), work);
        }
    }

    /// Sets the deadline of a connection one of whose sides has ended.
    fn half_closed(&mut self, key: usize, work: &mut Work) {
        let Some(carried) = self.carried(key) else { return };
        if carried.app_ended != carried.shut && carried.deadline.is_none() {
            carried.carried_then = carried.owner.total();
            // A time beyond what the clock can say never comes.
            if let Some(at) = Instant::now().checked_add(carried.silence) {
                self.set_deadline(key, at, work);
            }
        } else if carried.app_ended && carried.shut {
            self.ending.push(key);
        }
    }

    fn set_deadline(&mut self, key: usize, at: Instant, work: &mut Work) {
        let index = self.index;
        let Some(carried) = self.carried(key) else { return };
        if let Some(before) = carried.deadline.replace(at) {
            work.deadlines.remove(&(before, index, key));
        }
        work.deadlines.insert((at, index, key));
    }

    /// A deadline has passed.
    pub fn overdue(&mut self, key: usize, work: &mut Work) {
        let Some(carried) = self.carried(key) else { return };
        carried.deadline = None;
        if carried.broken.is_some() {
            return self.finish_broken(key, work);
        }
        if carried.app_ended == carried.shut {
            return;
        }
        if carried.owner.total() == carried.carried_then {
            let silence = carried.silence;
            return self.finish(key, Err(CarryError::HalfClosedSilence(silence)), work);
        }
        self.half_closed(key, work);
    }

    /// Tells a connection to stop.
    pub fn stop(&mut self, key: usize, work: &mut Work) {
        if self.carried(key).is_some() {
            self.finish(key, Err(CarryError::Stopped), work);
        }
    }

    /// Ends every stream, because the tunnel has ended.
    pub fn end_streams(&mut self, error: &Arc<TunnelError>, work: &mut Work) {
        for key in self.session.keys() {
            if self.carried(key).is_some_and(|carried| carried.broken.is_some()) {
                self.finish_broken(key, work);
            } else if self.carried(key).is_some() {
                self.finish(key, Err(CarryError::tunnel(error)), work);
            } else {
                self.fail(key, StreamFailure::Tunnel(error.clone()));
            }
        }
    }

    /// Ends a carried connection and hands its socket to the owner.
    pub fn finish(&mut self, key: usize, result: Result<(), CarryError>, work: &mut Work) {
        if self.carried(key).is_none() {
            return;
        }
        let Some(app) = self.session.remove(key) else { return };
        if !self.session.control().is_empty() {
            self.mark(work);
        }
        let Some(carried) = app.carried else { return };
        // No list may name a stream that is gone: while the tunnel cannot be written, nothing else shortens them.
        if carried.queued {
            self.fresh.retain(|queued| *queued != key);
            self.bulk.retain(|queued| *queued != key);
        }
        self.ending.retain(|ending| *ending != key);
        if let Some(at) = carried.deadline {
            work.deadlines.remove(&(at, self.index, key));
        }
        if result.is_err() {
            // Its owner may keep it open for a while.
            work.forget(&carried.socket);
        }
        let Carried { socket, owner, .. } = *carried;
        let held = self.account.handed_over(app.backlog.memory());
        let rest = Rest { backlog: app.backlog, _held: Some(held) };
        work.finished.push((owner, Ended { result, app: socket, rest }));
        self.wake();
    }

    /// Begins to carry an application's connection.
    pub fn carry(&mut self, key: usize, carried: Box<Carried>, token: u64, work: &mut Work) {
        let watched = work.poller.add(&carried.socket, token);
        let (ended, stream) = (self.end.clone(), self.session.get_mut(key));
        let Some(stream) = stream else {
            let Carried { socket, owner, .. } = *carried;
            let result = Err(CarryError::Tunnel(ended.unwrap_or_else(|| Arc::new(TunnelError::Closed))));
            return work.finished.push((owner, Ended { result, app: socket, rest: Rest::default() }));
        };
        let reset = stream.app.reset;
        stream.app.carried = Some(carried);
        // It would keep the memory of the task that opened the connection for as long as that lasts.
        stream.app.waker = None;
        if let Err(error) = watched {
            return self.finish(key, Err(CarryError::App(error)), work);
        }
        if let Some(error) = ended {
            return self.finish(key, Err(CarryError::tunnel(&error)), work);
        }
        self.write_backlog(key, work);
        if let Some(code) = reset {
            return self.peer_reset(key, code, work);
        }
        self.want_send(key, work);
    }

    /// Removes a stream that is not carried. If it is not over, it is reset.
    pub fn drop_stream(&mut self, key: usize, work: &mut Work) {
        if let Some(app) = self.session.remove(key) {
            self.account.free(app.backlog.memory());
            self.mark(work);
            self.wake();
        }
    }

    /// Tells every connection to stop.
    pub fn stop_all(&mut self, work: &mut Work) {
        for key in self.session.keys() {
            self.stop(key, work);
        }
    }
}
