//! Sits between HTTP/2 and the byte stream below and watches the frames that pass (RFC 9113 section 4.1). It limits
//! what a tunnel may read before other tasks run, no peer can send control frames without limit, and what DATA frames
//! make the node buffer is booked on the tunnel's account.

use super::buffers::Account;
use super::cut::CutReason;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Bytes that one tunnel may read in one turn, before other tasks get theirs.
const TURN_BYTES: usize = 128 * 1024;

/// Control frames that a peer may send at once, beyond those that our own frames call for.
const BURST: u64 = 20_000;

/// The rate at which this allowance grows again.
const PER_SECOND: u64 = 2_000;

/// Control frames that each frame of ours may call for: window updates for stream and tunnel, or a stream's headers and
/// end.
const PER_FRAME_SENT: u64 = 2;

/// A DATA frame for a closed stream counts as a control frame if it is smaller than this.
const LATE_BYTES: usize = 512;

/// A peer that returns window in small pieces may send one window update per this many bytes.
const BYTES_PER_UPDATE: usize = 2048;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;

/// Length of a frame header.
const HEAD_BYTES: usize = 9;

/// Length of the client's connection preface (RFC 9113 section 3.4).
const PREFACE_BYTES: usize = 24;

/// Finds frame headers in a byte stream that arrives in pieces.
#[derive(Debug)]
struct FrameParser {
    head: [u8; HEAD_BYTES],
    filled: usize,
    /// Bytes until the next frame header.
    skip: usize,
    /// The stream, if the next `skip` bytes are the payload of a DATA frame.
    data_of: Option<u32>,
    /// Stream and length of a padded DATA frame whose first byte, the length of the padding, is still to come.
    padded: Option<(u32, usize)>,
}

/// What the parser found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameEvent {
    Head { kind: u8, id: u32, length: usize },
    Payload { id: u32, bytes: usize },
}

impl FrameParser {
    fn new(preface: usize) -> Self {
        Self { head: [0; HEAD_BYTES], filled: 0, skip: preface, data_of: None, padded: None }
    }

    /// Parses the next piece of the byte stream.
    fn feed(&mut self, mut bytes: &[u8], mut on_event: impl FnMut(FrameEvent) -> io::Result<()>) -> io::Result<()> {
        while !bytes.is_empty() {
            if let (Some((id, length)), [padding, rest @ ..]) = (self.padded, bytes) {
                self.padded = None;
                self.skip -= 1;
                bytes = rest;
                // The first byte of a padded frame is the length of the padding (RFC 9113 section 6.1).
                on_event(FrameEvent::Head {
                    kind: DATA,
                    id,
                    length: length.saturating_sub(1 + usize::from(*padding)),
                })?;
                continue;
            }
            if self.skip > 0 {
                let passed = self.skip.min(bytes.len());
                self.skip -= passed;
                bytes = bytes.get(passed..).unwrap_or_default();
                if let Some(id) = self.data_of {
                    on_event(FrameEvent::Payload { id, bytes: passed })?;
                }
                continue;
            }
            let (Some(free), [byte, rest @ ..]) = (self.head.get_mut(self.filled), bytes) else { break };
            *free = *byte;
            self.filled += 1;
            bytes = rest;
            if self.filled == HEAD_BYTES {
                let [l0, l1, l2, kind, flags, i0, i1, i2, i3] = self.head;
                let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
                let id = u32::from_be_bytes([i0 & 0x7f, i1, i2, i3]);
                (self.filled, self.skip) = (0, length);
                self.data_of = (kind == DATA).then_some(id);
                if kind == DATA && flags & PADDED != 0 && length > 0 {
                    self.padded = Some((id, length));
                } else {
                    on_event(FrameEvent::Head { kind, id, length })?;
                }
            }
        }
        Ok(())
    }
}

/// How many control frames a peer may still send.
#[derive(Debug)]
struct Allowance {
    left: u64,
    since: Instant,
}

impl Allowance {
    /// Adds to the allowance.
    fn earn(&mut self, frames: u64) {
        self.left = (self.left + frames).min(BURST);
    }

    /// Takes one frame off; `false` if the allowance is used up.
    fn take(&mut self) -> bool {
        if self.left == 0 {
            let passed = self.since.elapsed();
            self.since = Instant::now();
            self.earn(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).saturating_mul(PER_SECOND) / 1000);
        }
        let enough = self.left > 0;
        self.left = self.left.saturating_sub(1);
        enough
    }
}

/// The watched byte stream of a tunnel.
#[derive(Debug)]
pub struct Guard<IO> {
    io: IO,
    account: Arc<Account>,
    incoming: FrameParser,
    outgoing: FrameParser,
    allowance: Allowance,
    turn: usize,
}

impl<IO> Guard<IO> {
    /// Watches the server end of a tunnel, which the peer opened.
    pub(super) fn server(io: IO, account: Arc<Account>) -> Self {
        Self::new(io, account, FrameParser::new(PREFACE_BYTES), FrameParser::new(0))
    }

    /// Watches the client end of a tunnel.
    pub(super) fn client(io: IO, account: Arc<Account>) -> Self {
        Self::new(io, account, FrameParser::new(0), FrameParser::new(PREFACE_BYTES))
    }

    fn new(io: IO, account: Arc<Account>, incoming: FrameParser, outgoing: FrameParser) -> Self {
        let allowance = Allowance { left: BURST, since: Instant::now() };
        Self { io, account, incoming, outgoing, allowance, turn: 0 }
    }

    fn read(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self { account, allowance, incoming, .. } = self;
        incoming.feed(bytes, |event| {
            let FrameEvent::Head { kind, id, length } = event else { return Ok(()) };
            account.frame_received(kind);
            // An empty DATA frame only costs work, so it counts. So does a frame for a closed stream, unless it is
            // large: data that was on its way when this node closed the stream is not the peer's fault, and is not sent
            // in tiny frames.
            if kind == DATA && length > 0 && (account.data_received(id, length) || length >= LATE_BYTES) {
                return Ok(());
            }
            if allowance.take() {
                return Ok(());
            }
            account.cut(CutReason::ControlFrames);
            Err(io::Error::other(CutReason::ControlFrames))
        })
    }

    fn written(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self { account, allowance, outgoing, .. } = self;
        outgoing.feed(bytes, |event| {
            match event {
                FrameEvent::Payload { id, bytes } => account.bytes_sent(id, bytes),
                FrameEvent::Head { kind: DATA, length, .. } => {
                    allowance.earn(PER_FRAME_SENT + (length / BYTES_PER_UPDATE) as u64);
                }
                FrameEvent::Head { kind: HEADERS, .. } => allowance.earn(PER_FRAME_SENT),
                FrameEvent::Head { .. } => {}
            }
            Ok(())
        })
    }
}

impl<IO> Drop for Guard<IO> {
    fn drop(&mut self) {
        self.account.mark_ended();
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Guard<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn >= TURN_BYTES {
            // HTTP/2 reads until nothing is left, so a peer that always has more data would occupy the thread.
            self.turn = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if read.is_pending() {
            self.turn = 0;
        }
        ready!(read)?;
        let new = buffer.filled().get(before..).unwrap_or_default();
        self.turn += new.len();
        Poll::Ready(self.read(new))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Guard<IO> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(context, bytes))?;
        self.written(bytes.get(..written).unwrap_or_default())?;
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(context, slices))?;
        let mut left = written;
        for slice in slices {
            let part = slice.get(..left.min(slice.len())).unwrap_or_default();
            self.written(part)?;
            left -= part.len();
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_found_however_the_bytes_come_and_padding_is_no_payload() {
        let mut bytes = vec![0; PREFACE_BYTES];
        // DATA of stream 1: 5 bytes; DATA of stream 3: 4 bytes and 2 of padding; nothing but padding; PING.
        bytes.extend([0, 0, 5, DATA, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5]);
        bytes.extend([0, 0, 7, DATA, PADDED, 0x80, 0, 0, 3, 2, 1, 2, 3, 4, 0, 0]);
        bytes.extend([0, 0, 3, DATA, PADDED, 0, 0, 0, 5, 2, 0, 0]);
        bytes.extend([0, 0, 8, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let expected = [(DATA, 1, 5), (DATA, 3, 4), (DATA, 5, 0), (6, 0, 8)];
        for piece in [1, 2, 3, 7, 24, 1000] {
            let (mut frames, mut heads) = (FrameParser::new(PREFACE_BYTES), Vec::new());
            for part in bytes.chunks(piece) {
                frames
                    .feed(part, |event| {
                        if let FrameEvent::Head { kind, id, length } = event {
                            heads.push((kind, id, length));
                        }
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(heads, expected, "in pieces of {piece}");
        }
    }
}
