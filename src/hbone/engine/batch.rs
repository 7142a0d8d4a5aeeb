//! The records of one turn of one tunnel: frames are written into them, they are sealed in place, and sent at once.

use crate::hbone::tls::{HEAD, PLAIN_MAX, SLOT, Tls, TlsError};
use std::io::IoSliceMut;

/// Length of a frame header (RFC 9113 section 4.1).
const FRAME_HEAD: usize = 9;

/// Records that one turn fills at most.
pub const RECORDS: usize = 16;

/// Size of a batch's buffer. One slot is left for control records and records that are not full.
pub const BATCH_BYTES: usize = (RECORDS + 2) * SLOT;

/// A frame that would begin this close to the end of a record begins in the next one.
const ROOM_MIN: usize = 512;

/// A batch of records in a buffer of [`BATCH_BYTES`].
#[derive(Debug)]
pub struct Batch<'a> {
    buffer: &'a mut [u8],
    tls: &'a mut Tls,
    /// Where the current record begins.
    start: usize,
    /// Plaintext in the current record.
    used: usize,
}

impl<'a> Batch<'a> {
    /// An empty batch. What TLS itself has to send goes first.
    pub fn new(buffer: &'a mut [u8], tls: &'a mut Tls) -> Result<Self, TlsError> {
        let start = if tls.pending() { tls.write_control(buffer)? } else { 0 };
        Ok(Self { buffer, tls, start, used: 0 })
    }

    /// Whether another record may be begun.
    fn is_full(&self) -> bool {
        self.start + 2 * SLOT > self.buffer.len()
    }

    /// Adds as much of `bytes` as fits, across records; returns how much that was.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<usize, TlsError> {
        let mut written = 0;
        while written < bytes.len() && !self.is_full() {
            let rest = bytes.get(written..).unwrap_or_default();
            let now = rest.len().min(PLAIN_MAX - self.used);
            let at = self.start + HEAD + self.used;
            let (Some(to), Some(from)) = (self.buffer.get_mut(at..at + now), rest.get(..now)) else { break };
            to.copy_from_slice(from);
            self.used += now;
            written += now;
            if self.used == PLAIN_MAX {
                self.seal()?;
            }
        }
        Ok(written)
    }

    /// Adds whole frames; `false`: there is no room for them, and nothing was added.
    pub fn frame(&mut self, frame: &[u8]) -> Result<bool, TlsError> {
        if frame.len() > PLAIN_MAX - self.used {
            self.seal()?;
        }
        if self.is_full() {
            return Ok(false);
        }
        Ok(self.bytes(frame)? == frame.len())
    }

    /// Reads DATA of one stream, of at most `most` bytes, straight into the records. `read` fills the slices and
    /// returns how much it read; `head` makes the header of a frame of so many bytes. `None`: the batch is full.
    pub fn data(
        &mut self,
        most: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>], usize) -> usize,
        mut head: impl FnMut(usize) -> [u8; FRAME_HEAD],
    ) -> Result<Option<usize>, TlsError> {
        if PLAIN_MAX - self.used < FRAME_HEAD + ROOM_MIN {
            self.seal()?;
        }
        if self.is_full() {
            return Ok(None);
        }
        let first = PLAIN_MAX - self.used - FRAME_HEAD;
        let mut room = 0;
        let length = {
            // The first frame continues the current record; each further one fills a record of its own.
            let mut slots = self.buffer.get_mut(self.start..).unwrap_or_default().chunks_exact_mut(SLOT);
            let whole = slots.len().saturating_sub(1);
            let mut from = HEAD + self.used + FRAME_HEAD;
            let mut count = 0;
            let mut slices: [IoSliceMut<'_>; RECORDS + 1] = std::array::from_fn(|index| {
                let left = most - room;
                if left == 0 || index >= whole {
                    return IoSliceMut::new(&mut []);
                }
                let length = left.min(HEAD + PLAIN_MAX - from);
                let slice = slots.next().and_then(|slot| slot.get_mut(from..from + length)).unwrap_or_default();
                (room, count, from) = (room + slice.len(), count + 1, HEAD + FRAME_HEAD);
                IoSliceMut::new(slice)
            });
            read(slices.get_mut(..count).unwrap_or_default(), room)
        };
        let mut left = length.min(room);
        let mut part = first;
        while left > 0 {
            let now = left.min(part);
            let at = self.start + HEAD + self.used;
            if let Some(to) = self.buffer.get_mut(at..at + FRAME_HEAD) {
                to.copy_from_slice(&head(now));
            }
            self.used += FRAME_HEAD + now;
            left -= now;
            part = PLAIN_MAX - FRAME_HEAD;
            if left > 0 || self.used == PLAIN_MAX {
                self.seal()?;
            }
        }
        Ok(Some(length))
    }

    fn seal(&mut self) -> Result<(), TlsError> {
        if self.used > 0 {
            let record = self.buffer.get_mut(self.start..).unwrap_or_default();
            self.start += self.tls.seal(record, self.used)?;
            self.used = 0;
        }
        Ok(())
    }

    /// Seals the last record. Returns the length of all.
    pub fn finish(mut self) -> Result<usize, TlsError> {
        self.seal()?;
        Ok(self.start)
    }
}
