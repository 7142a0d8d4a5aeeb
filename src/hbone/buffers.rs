//! What peers make us hold: bytes that have come through tunnels and no application has taken yet, and bytes for peers
//! that they do not read. Every tunnel has an account, every account belongs to a holder (an identity), and all of them
//! together have one limit. Before it is passed, the largest tunnel of the largest holder is cut; the others go on.

use super::cut::CutReason;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::Waker;
use tokio_util::sync::CancellationToken;

/// What a frame costs beside its payload while it waits in a queue.
const FRAME_BYTES: usize = 256;

/// Bytes that may wait to be sent on one tunnel; its streams read no more from their applications until some have gone.
/// The socket below has a buffer of its own, so a tunnel that moves does not miss more.
const UNSENT_MAX: usize = 1 << 20;

/// The buffers of all tunnels of a node.
#[derive(Debug)]
pub struct Buffers {
    limit: usize,
    total: AtomicUsize,
    accounts: Mutex<Vec<Weak<Account>>>,
}

/// The buffers of one tunnel.
#[derive(Debug)]
pub struct Account {
    node: Arc<Buffers>,
    holder: Arc<str>,
    bytes: AtomicUsize,
    streams: Mutex<Streams>,
    cut: OnceLock<CutReason>,
    /// Type of the frame that came last.
    last: AtomicU8,
    cut_token: CancellationToken,
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct Streams {
    open: HashMap<u32, StreamBytes>,
    /// Streams that have sent bytes before anybody was told of them.
    early: Vec<u32>,
    /// The newest stream that somebody was told of; none newer sends bytes on a tunnel of our own.
    newest: u32,
    /// Bytes received and not passed on, of all streams.
    unread: usize,
    /// Bytes given to HTTP/2 and not sent, of all streams.
    unsent: usize,
    /// Who waits for room to send.
    waiting: Vec<Waker>,
    /// Who waits until all of a stream has been sent.
    flushing: Vec<Waker>,
}

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
    /// Buffers that hold `limit` bytes at most.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, total: AtomicUsize::new(0), accounts: Mutex::default() })
    }

    /// Bytes held now.
    pub fn held(&self) -> usize {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that may be held.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// An account of a tunnel to or from `holder`. On a tunnel that the peer opened, streams may send bytes before
    /// they have been accepted.
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

    /// Whether peers are to be given less room: half of it is used.
    fn scarce(&self) -> bool {
        self.held() > self.limit / 2
    }

    fn add(&self, bytes: usize) {
        let total = self.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if total > self.limit {
            self.cut_largest(total - self.limit);
        }
    }

    /// Cuts the largest tunnel of the largest holder, unless what has been cut already gives enough back.
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

    /// Bytes held for this tunnel.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Tells the tunnel to end; the first reason counts.
    pub(super) fn cut(&self, reason: CutReason) {
        let _ = self.cut.set(reason);
        self.cut_token.cancel();
    }

    /// Whether the tunnel is cut: nothing that is still to be sent is waited for.
    pub fn is_cut(&self) -> bool {
        self.cut.get().is_some()
    }

    /// The tunnel is no more: nothing that is queued will be sent.
    pub(super) fn mark_ended(&self) {
        self.ended.cancel();
    }

    /// Completes when the tunnel is no more.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Why the tunnel is to end, if it is.
    pub fn cut_reason(&self) -> Option<CutReason> {
        self.cut.get().copied()
    }

    /// A frame of this type came.
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

    /// Resolves when the tunnel is to end.
    pub(super) async fn cut_signal(&self) -> CutReason {
        self.cut_token.cancelled().await;
        // It was said before it was told.
        self.cut_reason().unwrap_or(CutReason::Memory)
    }

    /// A window for all streams together that the unread bytes of stalled ones cannot fill: `base` above them.
    pub(super) fn connection_window(&self, base: u32) -> u32 {
        let unread = u32::try_from(self.streams().unread).unwrap_or(u32::MAX);
        base.saturating_add(unread).min((1 << 31) - 1)
    }

    /// Whether peers are to be given less room.
    pub(super) fn scarce(&self) -> bool {
        self.node.scarce()
    }

    /// Whether there is plenty of room again.
    pub(super) fn plenty(&self) -> bool {
        self.node.held() < self.node.limit / 4
    }

    /// Somebody was told of a stream, and says so when it is over.
    pub(super) fn open(&self, id: u32) {
        let mut gone = 0;
        {
            let mut streams = self.streams();
            streams.open.entry(id).or_default();
            if streams.newest != u32::MAX {
                streams.newest = streams.newest.max(id);
                // Those in between were dropped before anybody was told of them.
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

    /// A stream is over, and whatever was held for it free.
    pub(super) fn close(&self, id: u32) {
        let gone = self.streams().remove(id);
        self.subtract(gone);
    }

    /// A DATA frame came. `false`: for a stream that is over.
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

    /// A frame has left the queue of HTTP/2.
    pub(super) fn frame_taken(&self, id: u32) {
        let gone = self.streams().open.get_mut(&id).map_or(0, |held| {
            let gone = held.frames.min(1);
            held.frames -= gone;
            gone * FRAME_BYTES
        });
        self.subtract(gone);
    }

    /// Bytes were passed on.
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

    /// Bytes were given to HTTP/2.
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

    /// Bytes went out.
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

    /// Whether there is room to send; if not, `waker` is woken when there is.
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

    /// Whether all of a stream has been sent; if not, `waker` is woken when it may have been.
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
    /// Forgets a stream; gives what it cost.
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
        assert!(three.data_received(3, 10_000), "which is too much for all together");
        assert_eq!([one.cut_reason(), two.cut_reason(), three.cut_reason()], [None, Some(CutReason::Memory), None]);
        assert!(three.data_received(3, 10_000));
        assert_eq!([one.cut_reason(), three.cut_reason()], [None; 2], "what was cut is about to be free");
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
        assert!(!account.data_received(3, 10), "dropped before anybody was told of it");
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
