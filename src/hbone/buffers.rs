//! What peers make the node buffer: bytes that arrived through tunnels and that no application has read yet, and bytes
//! for peers that do not read them. Every tunnel has an account. Every account belongs to a holder, which is an
//! identity or a pod, and all accounts of the node share one limit. When the limit is exceeded, the largest tunnel of
//! the largest holder is cut; the others continue.

use super::cut::CutReason;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::Waker;
use tokio_util::sync::CancellationToken;

/// Memory of a queued frame besides its payload, in bytes.
const FRAME_BYTES: usize = 256;

/// Most bytes that may wait to be sent on one tunnel. Beyond it, its streams stop reading from their applications until
/// some have been sent. The socket below has its own buffer, so a tunnel that makes progress does not need more.
const UNSENT_MAX: usize = 1 << 20;

/// The accounts of all tunnels of a node, with their limit.
#[derive(Debug)]
pub struct Buffers {
    limit: usize,
    total: AtomicUsize,
    accounts: Mutex<Vec<Weak<Account>>>,
}

/// The account of one tunnel.
#[derive(Debug)]
pub struct Account {
    node: Arc<Buffers>,
    holder: Arc<str>,
    bytes: AtomicUsize,
    streams: Mutex<Streams>,
    cut: OnceLock<CutReason>,
    /// Type of the frame that arrived last.
    last: AtomicU8,
    cut_token: CancellationToken,
    ended: CancellationToken,
}

/// The streams of a tunnel.
#[derive(Debug, Default)]
struct Streams {
    open: HashMap<u32, StreamBytes>,
    /// Streams whose data arrived before HTTP/2 returned the stream.
    early: Vec<u32>,
    /// The newest stream that HTTP/2 has returned. On a tunnel that this node opened it is the largest number, because
    /// no data arrives there for a stream that was not returned.
    newest: u32,
    /// Bytes that were received and not passed on, of all streams.
    unread: usize,
    /// Bytes that were given to HTTP/2 and not sent, of all streams.
    unsent: usize,
    /// Tasks that wait for room to send.
    waiting: Vec<Waker>,
    /// Tasks that wait until everything of a stream has been sent.
    flushing: Vec<Waker>,
}

/// Bytes and frames that are held for one stream.
#[derive(Clone, Copy, Debug, Default)]
struct StreamBytes {
    unread: usize,
    frames: usize,
    unsent: usize,
}

impl StreamBytes {
    fn cost(self) -> usize {
        self.unread + self.frames * FRAME_BYTES + self.unsent
    }
}

impl Buffers {
    /// Buffers with this limit in bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, total: AtomicUsize::new(0), accounts: Mutex::default() })
    }

    /// Bytes that are held now.
    pub fn held(&self) -> usize {
        self.total.load(Ordering::Relaxed)
    }

    /// Most bytes that may be held.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// An account for a tunnel of `holder`. On a tunnel that the peer opened, data of a stream may arrive before HTTP/2
    /// returns the stream.
    pub fn account(self: &Arc<Self>, holder: &str, opened_by_peer: bool) -> Arc<Account> {
        let newest = if opened_by_peer { 0 } else { u32::MAX };
        let account = Arc::new(Account {
            node: self.clone(),
            holder: holder.into(),
            bytes: AtomicUsize::new(0),
            streams: Mutex::new(Streams { newest, ..Streams::default() }),
            cut: OnceLock::new(),
            last: AtomicU8::new(u8::MAX),
            cut_token: CancellationToken::new(),
            ended: CancellationToken::new(),
        });
        let mut accounts = self.accounts.lock();
        if accounts.len() == accounts.capacity() {
            accounts.retain(|account| account.strong_count() > 0);
        }
        accounts.push(Arc::downgrade(&account));
        account
    }

    /// Whether peers should get smaller windows: more than half of the limit is used.
    fn scarce(&self) -> bool {
        self.held() > self.limit / 2
    }

    fn add(&self, bytes: usize) {
        let total = self.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if total > self.limit {
            self.cut_largest(total - self.limit);
        }
    }

    /// Cuts the largest tunnel of the largest holder, unless tunnels that have been cut already will free enough.
    fn cut_largest(&self, wanted: usize) {
        let (cut, accounts): (Vec<_>, Vec<_>) = {
            let accounts = self.accounts.lock();
            accounts.iter().filter_map(Weak::upgrade).partition(|account| account.cut.get().is_some())
        };
        if cut.iter().map(|account| account.bytes()).sum::<usize>() >= wanted {
            return;
        }
        let mut holders: HashMap<&str, usize> = HashMap::new();
        for account in &accounts {
            *holders.entry(&account.holder).or_default() += account.bytes();
        }
        let Some((holder, _)) = holders.into_iter().max_by_key(|(_, bytes)| *bytes) else { return };
        let of_holder = accounts.iter().filter(|account| &*account.holder == holder);
        if let Some(largest) = of_holder.max_by_key(|account| account.bytes()) {
            largest.cut(CutReason::Memory);
        }
    }
}

impl Account {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock()
    }

    /// Bytes that are held for this tunnel.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Tells the tunnel to end. The first reason counts.
    pub(super) fn cut(&self, reason: CutReason) {
        let _ = self.cut.set(reason);
        self.cut_token.cancel();
    }

    /// Whether the tunnel has been cut. Nothing waits for unsent data then.
    pub fn is_cut(&self) -> bool {
        self.cut.get().is_some()
    }

    /// Records that the tunnel has ended: nothing that is still queued will be sent.
    pub(super) fn mark_ended(&self) {
        self.ended.cancel();
    }

    /// Completes when the tunnel has ended.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Why the tunnel has been cut; `None` if it has not.
    pub fn cut_reason(&self) -> Option<CutReason> {
        self.cut.get().copied()
    }

    /// Records that a frame of this type arrived.
    pub(super) fn frame_received(&self, kind: u8) {
        self.last.store(kind, Ordering::Relaxed);
    }

    /// The word for too many frames of the type that came last (RFC 9113 section 6).
    pub(super) fn flood(&self) -> &'static str {
        match self.last.load(Ordering::Relaxed) {
            0 => "empty_frames",
            1 | 3 => "rapid_reset",
            9 => "continuation_flood",
            _ => "flood",
        }
    }

    /// Resolves when the tunnel is cut.
    pub(super) async fn cut_signal(&self) -> CutReason {
        self.cut_token.cancelled().await;
        // The reason is set before the token is cancelled, so it is there.
        self.cut_reason().unwrap_or(CutReason::Memory)
    }

    /// The window for all streams together: `base` plus the unread bytes, so that stalled streams cannot use it up.
    pub(super) fn connection_window(&self, base: u32) -> u32 {
        let unread = u32::try_from(self.streams().unread).unwrap_or(u32::MAX);
        base.saturating_add(unread).min((1 << 31) - 1)
    }

    /// Whether peers should get smaller windows.
    pub(super) fn scarce(&self) -> bool {
        self.node.scarce()
    }

    /// Whether peers can get full windows again.
    pub(super) fn plenty(&self) -> bool {
        self.node.held() < self.node.limit / 4
    }

    /// Opens the entry of a stream that HTTP/2 has returned. The caller closes it again.
    pub(super) fn open(&self, id: u32) {
        let mut gone = 0;
        {
            let mut streams = self.streams();
            streams.open.entry(id).or_default();
            if streams.newest != u32::MAX {
                streams.newest = streams.newest.max(id);
                // HTTP/2 returns streams in order, so older ones that were not returned never will be.
                let early = std::mem::take(&mut streams.early);
                for other in early {
                    match other.cmp(&id) {
                        std::cmp::Ordering::Less => gone += streams.remove(other),
                        std::cmp::Ordering::Equal => {}
                        std::cmp::Ordering::Greater => streams.early.push(other),
                    }
                }
            }
        }
        self.subtract(gone);
    }

    /// Closes the entry of a stream; what was held for it is free.
    pub(super) fn close(&self, id: u32) {
        let gone = self.streams().remove(id);
        self.subtract(gone);
    }

    /// Books a DATA frame. `false` if its stream is closed.
    pub(super) fn data_received(&self, id: u32, payload: usize) -> bool {
        {
            let mut streams = self.streams();
            if !streams.open.contains_key(&id) {
                if id <= streams.newest {
                    return false;
                }
                streams.early.push(id);
            }
            let held = streams.open.entry(id).or_default();
            held.unread += payload;
            held.frames += 1;
            streams.unread += payload;
        }
        self.bytes.fetch_add(payload + FRAME_BYTES, Ordering::Relaxed);
        self.node.add(payload + FRAME_BYTES);
        true
    }

    /// Books that a frame was taken out of the queue of HTTP/2.
    pub(super) fn frame_taken(&self, id: u32) {
        let gone = self.streams().open.get_mut(&id).map_or(0, |held| {
            let gone = held.frames.min(1);
            held.frames -= gone;
            gone * FRAME_BYTES
        });
        self.subtract(gone);
    }

    /// Books that received bytes were passed on.
    pub(super) fn bytes_released(&self, id: u32, bytes: usize) {
        let gone = {
            let mut streams = self.streams();
            let gone = streams.open.get_mut(&id).map_or(0, |held| {
                let gone = held.unread.min(bytes);
                held.unread -= gone;
                gone
            });
            streams.unread = streams.unread.saturating_sub(gone);
            gone
        };
        self.subtract(gone);
    }

    /// Books that bytes were given to HTTP/2 to be sent.
    pub(super) fn bytes_queued(&self, id: u32, bytes: usize) {
        {
            let mut streams = self.streams();
            let Some(held) = streams.open.get_mut(&id) else { return };
            held.unsent += bytes;
            streams.unsent += bytes;
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.node.add(bytes);
    }

    /// Books that bytes were written to the byte stream below.
    pub(super) fn bytes_sent(&self, id: u32, bytes: usize) {
        let gone = {
            let mut streams = self.streams();
            let (gone, left) = streams.open.get_mut(&id).map_or((0, 0), |held| {
                let gone = held.unsent.min(bytes);
                held.unsent -= gone;
                (gone, held.unsent)
            });
            streams.unsent = streams.unsent.saturating_sub(gone);
            if left == 0 {
                streams.flushing.drain(..).for_each(Waker::wake);
            }
            streams.wake();
            gone
        };
        self.subtract(gone);
    }

    /// Whether there is room to send. If not, `waker` is woken when there is.
    pub(super) fn has_room(&self, waker: Option<&Waker>) -> bool {
        let mut streams = self.streams();
        if streams.unsent < UNSENT_MAX {
            return true;
        }
        if let Some(waker) = waker
            && !streams.waiting.iter().any(|other| other.will_wake(waker))
        {
            streams.waiting.push(waker.clone());
        }
        false
    }

    /// Whether everything of a stream has been sent. If not, `waker` is woken when that may have changed.
    pub(super) fn is_flushed(&self, id: u32, waker: &Waker) -> bool {
        let mut streams = self.streams();
        if streams.open.get(&id).is_none_or(|held| held.unsent == 0) {
            return true;
        }
        if !streams.flushing.iter().any(|other| other.will_wake(waker)) {
            streams.flushing.push(waker.clone());
        }
        false
    }

    fn subtract(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.node.total.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Streams {
    /// Removes a stream and returns what was held for it.
    fn remove(&mut self, id: u32) -> usize {
        let Some(held) = self.open.remove(&id) else { return 0 };
        self.unread = self.unread.saturating_sub(held.unread);
        self.unsent = self.unsent.saturating_sub(held.unsent);
        self.wake();
        held.cost()
    }

    fn wake(&mut self) {
        if self.unsent < UNSENT_MAX / 2 {
            self.waiting.drain(..).for_each(Waker::wake);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        self.node.total.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_largest_tunnel_of_the_largest_holder_is_cut_and_nobody_else() {
        let buffers = Buffers::new(100_000);
        let [one, two, three] = [("a", 30_000), ("a", 40_000), ("b", 25_000)].map(|(holder, bytes)| {
            let account = buffers.account(holder, true);
            assert!(account.data_received(1, bytes));
            account
        });
        assert_eq!([one.cut_reason(), two.cut_reason(), three.cut_reason()], [None; 3]);
        assert!(three.data_received(3, 10_000), "which exceeds the limit for all together");
        assert_eq!([one.cut_reason(), two.cut_reason(), three.cut_reason()], [None, Some(CutReason::Memory), None]);
        assert!(three.data_received(3, 10_000));
        assert_eq!([one.cut_reason(), three.cut_reason()], [None; 2], "what was cut will be free soon");
        drop(two);
        assert!(three.data_received(3, 60_000));
        assert_eq!([one.cut_reason(), three.cut_reason()], [None, Some(CutReason::Memory)]);
        drop((one, three));
        assert_eq!(buffers.held(), 0);
    }

    #[test]
    fn late_bytes_of_a_stream_that_is_over_are_not_held_against_anybody() {
        let buffers = Buffers::new(100_000);
        let account = buffers.account("a", true);
        assert!(account.data_received(1, 10), "before it is accepted");
        account.open(1);
        account.close(1);
        assert!(!account.data_received(1, 10), "after it is over");
        assert!(account.data_received(3, 10) && account.data_received(5, 10));
        account.open(5);
        assert!(!account.data_received(3, 10), "dropped before it was returned");
        account.close(5);
        assert_eq!((account.bytes(), buffers.held()), (0, 0));
    }

    proptest! {
        #[test]
        fn nothing_is_left_of_streams_that_are_over(steps in prop::collection::vec((0..6u8, 1..8u32, 0..5000usize), 0..200)) {
            let buffers = Buffers::new(usize::MAX);
            let account = buffers.account("a", true);
            for (step, id, bytes) in steps {
                match step {
                    0 => account.open(id),
                    1 => { account.data_received(id, bytes); }
                    2 => account.frame_taken(id),
                    3 => account.bytes_released(id, bytes),
                    4 => account.bytes_queued(id, bytes),
                    _ => account.bytes_sent(id, bytes),
                }
                let streams = account.streams();
                let all: usize = streams.open.values().map(|held| held.cost()).sum();
                prop_assert_eq!((account.bytes(), buffers.held()), (all, all));
            }
            (0..8).for_each(|id| account.open(id));
            (0..8).for_each(|id| account.close(id));
            let streams = account.streams();
            prop_assert_eq!((account.bytes(), streams.unread, streams.unsent), (0, 0, 0));
        }
    }
}
