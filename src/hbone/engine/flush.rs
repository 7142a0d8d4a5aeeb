//! What a tunnel sends in a turn: frames of its session, and what applications have written.

use super::app::{App, Carried, Got};
use super::batch::Batch;
use super::tunnel::{Tunnel, Unsent};
use super::work::Work;
use crate::hbone::error::TunnelError;
use crate::hbone::session::Session;
use std::io::{self, Write};

/// A stream that had nothing to send before may send this much first.
const QUANTUM: usize = 16 * 1024;

/// A message smaller than this makes turns short for a while.
const SMALL_MESSAGE: usize = 4 * 1024;

/// A rest smaller than this is copied out of its buffer.
const SMALL_REST: usize = 64 * 1024;

/// Room for frames of the session that an idle tunnel keeps: WINDOW_UPDATEs between messages then allocate nothing.
const CONTROL_KEPT: usize = 128;

impl Tunnel {
    /// Sends what waits: frames of the session first, then what applications have written, in turn. One write at most.
    pub fn flush(&mut self, work: &mut Work) -> Result<(), TunnelError> {
        if self.end.is_some() || !self.send_unsent()? {
            return Ok(());
        }
        work.give_back(std::mem::take(&mut self.unsent.buffer));
        self.finish_ending(work);
        if self.is_flushed() && self.fresh.is_empty() && self.bulk.is_empty() {
            return Ok(());
        }
        let mut buffer = work.buffer();
        let filled = self.fill(&mut buffer, work)?;
        self.sealed += filled as u64;
        self.unsent = Unsent { buffer, range: 0..filled };
        let all_sent = self.send_unsent()?;
        self.finish_ending(work);
        if all_sent {
            work.give_back(std::mem::take(&mut self.unsent.buffer));
            if !(self.fresh.is_empty() && self.bulk.is_empty() && self.session.control().is_empty()) {
                self.mark(work);
            }
        } else if self.unsent.range.len() < SMALL_REST {
            // A whole buffer for a small rest would be a waste.
            let rest = self.unsent.buffer.get(self.unsent.range.clone()).unwrap_or_default().to_vec();
            let range = 0..rest.len();
            work.give_back(std::mem::replace(&mut self.unsent, Unsent { buffer: rest, range }).buffer);
        }
        self.book();
        Ok(())
    }

    /// Sends what the socket did not take before; `true` if nothing is left.
    fn send_unsent(&mut self) -> Result<bool, TunnelError> {
        while !self.unsent.range.is_empty() {
            if !self.writable {
                return Ok(false);
            }
            let bytes = self.unsent.buffer.get(self.unsent.range.clone()).unwrap_or_default();
            match (&self.socket).write(bytes) {
                Ok(length) => {
                    self.writable = length == bytes.len();
                    self.unsent.range.start += length;
                    self.sent += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TunnelError::io(error)),
            }
        }
        Ok(true)
    }

    /// Ends the connections whose both sides have ended, as far as everything of them is sent.
    fn finish_ending(&mut self, work: &mut Work) {
        for key in std::mem::take(&mut self.ending) {
            let waits = self
                .session
                .get(key)
                .and_then(|stream| stream.app.carried.as_ref())
                .is_some_and(|carried| carried.app_ended && carried.shut && !self.has_sent(carried.end_at));
            if waits { self.ending.push(key) } else { self.check_done(key, work) }
        }
    }

    /// Fills a buffer with records.
    fn fill(&mut self, buffer: &mut [u8], work: &mut Work) -> Result<usize, TunnelError> {
        let most = work.turn_bytes();
        let mut batch = Batch::new(buffer, &mut self.tls)?;
        let control = self.session.control();
        let taken = batch.bytes(control)?;
        control.drain(..taken);
        if !control.is_empty() {
            return Ok(batch.finish()?);
        }
        if control.capacity() > CONTROL_KEPT {
            *control = Vec::new();
        }
        let mut total = 0;
        let mut ended = std::mem::take(&mut work.ended);
        while total < most {
            let Some((key, is_fresh)) =
                self.fresh.pop_front().map(|key| (key, true)).or_else(|| self.bulk.pop_front().map(|key| (key, false)))
            else {
                break;
            };
            let active = self.fresh.len() + self.bulk.len() + 1;
            let quantum = if is_fresh { QUANTUM } else { QUANTUM.max(most / active) };
            let step = send_some(&mut self.session, key, quantum.min(most - total), &mut batch)?;
            match step {
                Step::Full => {
                    self.fresh.push_front(key);
                    if let Some(carried) = self.session.get_mut(key).and_then(|stream| stream.app.carried.as_mut()) {
                        carried.queued = true;
                    }
                    break;
                }
                Step::Sent { bytes, more } => {
                    total += bytes;
                    if bytes >= QUANTUM {
                        self.bulk_rate.count(bytes, work.now);
                    }
                    if is_fresh && bytes < SMALL_MESSAGE && !more {
                        work.note_small();
                    }
                    if more {
                        if let Some(carried) = self.session.get_mut(key).and_then(|stream| stream.app.carried.as_mut())
                        {
                            carried.queued = true;
                        }
                        self.bulk.push_back(key);
                    }
                }
                Step::Ended => ended.push(key),
                Step::Nothing => {}
            }
        }
        let filled = batch.finish()?;
        for key in ended.drain(..) {
            self.app_ended(key, self.sealed + filled as u64, work);
        }
        work.ended = ended;
        Ok(filled)
    }
}

/// What sending some of a stream came to.
enum Step {
    /// The batch has no room for it.
    Full,
    /// Bytes were added; there may be more.
    Sent { bytes: usize, more: bool },
    /// The application has ended, in order or not.
    Ended,
    /// There was nothing to send, or no window for it.
    Nothing,
}

/// Adds up to `quantum` bytes of an application to the batch, and END_STREAM at its end.
fn send_some(
    session: &mut Session<App>,
    key: usize,
    quantum: usize,
    batch: &mut Batch<'_>,
) -> Result<Step, TunnelError> {
    let room = session.room(key).min(quantum);
    let Some(stream) = session.get_mut(key) else { return Ok(Step::Nothing) };
    let Some(mut carried) = stream.app.carried.take() else { return Ok(Step::Nothing) };
    carried.queued = false;
    let step = send_from(session, key, room, &mut carried, batch);
    if let Some(stream) = session.get_mut(key) {
        stream.app.carried = Some(carried);
    }
    step
}

fn send_from(
    session: &mut Session<App>,
    key: usize,
    room: usize,
    carried: &mut Carried,
    batch: &mut Batch<'_>,
) -> Result<Step, TunnelError> {
    if !carried.readable || carried.app_ended || room == 0 {
        return Ok(Step::Nothing);
    }
    let mut got = Got::Nothing;
    let added = batch.data(
        room,
        |slices, room| {
            got = carried.read(slices, room);
            if let Got::Bytes(length) = got { length } else { 0 }
        },
        |length| session.data_head(key, length, false),
    )?;
    let Some(bytes) = added else { return Ok(Step::Full) };
    Ok(match got {
        Got::Nothing => Step::Nothing,
        Got::Bytes(_) => {
            carried.owner.up(bytes);
            Step::Sent { bytes, more: carried.readable && session.room(key) > 0 }
        }
        Got::Broken => Step::Ended,
        Got::End => {
            if !batch.frame(&session.data_head(key, 0, true))? {
                carried.readable = true;
                return Ok(Step::Full);
            }
            carried.app_ended = true;
            Step::Ended
        }
    })
}
