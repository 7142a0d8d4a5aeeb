//! The two halves of a stream. They book what they hold on the account of their tunnel.

use super::buffers::Account;
use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Frames smaller than this are copied together, up to [`TOGETHER_BYTES`]. Otherwise each of them costs an entry in a
/// queue, and keeps the whole buffer that it was read into, which is about this large.
const SMALL_BYTES: usize = 8 * 1024;
const TOGETHER_BYTES: usize = 16 * 1024;

/// A stream's entry on the account of its tunnel. It exists from when the stream is returned by HTTP/2 until both
/// halves are dropped.
#[derive(Debug)]
pub(super) struct StreamAccount {
    tunnel: Arc<Account>,
    id: u32,
}

impl StreamAccount {
    pub(super) fn new(account: &Arc<Account>, id: h2::StreamId) -> Self {
        account.open(id.as_u32());
        Self { tunnel: account.clone(), id: id.as_u32() }
    }
}

impl Drop for StreamAccount {
    fn drop(&mut self) {
        self.tunnel.close(self.id);
    }
}

/// The sending half of a stream.
pub(super) struct SendHalf {
    send: SendStream<Bytes>,
    account: Arc<StreamAccount>,
}

impl SendHalf {
    /// The tunnel's account.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account.tunnel
    }

    /// Completes when everything queued has been written to the byte stream below, or never will be.
    pub(super) async fn flushed(&mut self) {
        let Self { send, account } = self;
        let gone = poll_fn(|context| {
            let gone = account.tunnel.is_flushed(account.id, context.waker());
            if gone || send.poll_reset(context).is_ready() { Poll::Ready(()) } else { Poll::Pending }
        });
        tokio::select! { () = gone => {}, () = account.tunnel.ended() => {} }
    }

    /// See [`SendStream::reserve_capacity`].
    pub(super) fn reserve_capacity(&mut self, bytes: usize) {
        self.send.reserve_capacity(bytes);
    }

    /// Bytes that may be queued now, by the peer's window and the limit for the tunnel's queue.
    pub(super) fn capacity(&self) -> usize {
        if self.account.tunnel.has_room(None) { self.send.capacity() } else { 0 }
    }

    /// Waits for capacity. `None`: the stream accepts no more data.
    pub(super) fn poll_capacity(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<usize, h2::Error>>> {
        if !self.account.tunnel.has_room(Some(context.waker())) {
            return match self.send.poll_reset(context) {
                Poll::Ready(Ok(_)) => Poll::Ready(None),
                Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
                Poll::Pending => Poll::Pending,
            };
        }
        match self.send.capacity() {
            0 => self.send.poll_capacity(context),
            bytes => Poll::Ready(Some(Ok(bytes))),
        }
    }

    /// Queues bytes to be sent; `end` adds END_STREAM.
    pub(super) fn send_data(&mut self, bytes: Bytes, end: bool) -> Result<(), h2::Error> {
        let length = bytes.len();
        self.send.send_data(bytes, end)?;
        self.account.tunnel.bytes_queued(self.account.id, length);
        Ok(())
    }

    /// See [`SendStream::poll_reset`].
    pub(super) fn poll_reset(&mut self, context: &mut Context<'_>) -> Poll<Result<Reason, h2::Error>> {
        self.send.poll_reset(context)
    }

    /// Resets the stream.
    pub(super) fn send_reset(&mut self, reason: Reason) {
        self.send.send_reset(reason);
    }
}

/// The receiving half of a stream.
pub(super) struct ReceiveHalf {
    body: RecvStream,
    account: Arc<StreamAccount>,
    /// Data that was taken out of the queue of HTTP/2 and not returned yet: first these pieces, then `small`.
    whole: VecDeque<Bytes>,
    small: BytesMut,
    /// How the stream ended; returned after all gathered data.
    ended: Option<Option<h2::Error>>,
}

impl ReceiveHalf {
    /// The receiving half of the stream whose entry this is.
    pub(super) fn new(body: RecvStream, account: StreamAccount) -> Self {
        Self { body, account: Arc::new(account), whole: VecDeque::new(), small: BytesMut::new(), ended: None }
    }

    /// The sending half that belongs to it.
    pub(super) fn sending(&self, send: SendStream<Bytes>) -> SendHalf {
        SendHalf { send, account: self.account.clone() }
    }

    /// The next bytes; `None` at the end of the stream. Small frames that have already arrived are returned together.
    pub(super) async fn data(&mut self) -> Option<Result<Bytes, h2::Error>> {
        poll_fn(|context| self.poll_data(context)).await
    }

    fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        while self.whole.is_empty() && self.small.len() < TOGETHER_BYTES && self.ended.is_none() {
            if self.poll_gather(context).is_pending() {
                break;
            }
        }
        if let Some(bytes) = self.whole.pop_front() {
            return Poll::Ready(Some(Ok(bytes)));
        }
        if !self.small.is_empty() {
            return Poll::Ready(Some(Ok(self.small.split().freeze())));
        }
        match &mut self.ended {
            Some(ended) => Poll::Ready(ended.take().map(Err)),
            None => Poll::Pending,
        }
    }

    /// Takes one frame out of the queue of HTTP/2 and gathers it.
    fn poll_gather(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self.body.poll_data(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => self.ended = Some(None),
            Poll::Ready(Some(Err(error))) => self.ended = Some(Some(error)),
            Poll::Ready(Some(Ok(bytes))) => {
                self.account.tunnel.frame_taken(self.account.id);
                if bytes.len() < SMALL_BYTES && self.small.len() < TOGETHER_BYTES {
                    self.small.extend_from_slice(&bytes);
                } else {
                    if !self.small.is_empty() {
                        self.whole.push_back(self.small.split().freeze());
                    }
                    if bytes.len() < SMALL_BYTES {
                        self.small.extend_from_slice(&bytes);
                    } else {
                        self.whole.push_back(bytes);
                    }
                }
            }
        }
        Poll::Ready(())
    }

    /// Gathers frames while the caller cannot use them; never completes. The stream's window limits how much this can
    /// be.
    pub(super) async fn gather(&mut self) -> Infallible {
        poll_fn(|context| {
            while self.ended.is_none() {
                if self.poll_gather(context).is_pending() {
                    break;
                }
            }
            Poll::<Infallible>::Pending
        })
        .await
    }

    /// Returns window to the peer for bytes that were passed on.
    pub(super) fn release(&mut self, bytes: usize) -> Result<(), h2::Error> {
        self.account.tunnel.bytes_released(self.account.id, bytes);
        self.body.flow_control().release_capacity(bytes)
    }
}
