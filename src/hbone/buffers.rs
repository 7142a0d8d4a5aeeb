//! What peers make the node buffer: bytes that arrived through tunnels and that no application has read yet, and bytes
//! for peers that do not read them. Every tunnel has an account. Every account belongs to a holder, which is an
//! identity or a pod, and all accounts of the node share one limit. When the limit is exceeded, the largest tunnel of
//! the largest holder is cut; the others continue.

use super::cut::CutReason;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use tokio_util::sync::CancellationToken;

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
    cut: OnceLock<CutReason>,
    cut_token: CancellationToken,
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

    /// An account for a tunnel of `holder`.
    pub fn account(self: &Arc<Self>, holder: &str) -> Arc<Account> {
        let account = Arc::new(Account {
            node: self.clone(),
            holder: holder.into(),
            bytes: AtomicUsize::new(0),
            cut: OnceLock::new(),
            cut_token: CancellationToken::new(),
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
    /// Bytes that are held for this tunnel.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Tells the tunnel to end. The first reason counts.
    fn cut(&self, reason: CutReason) {
        let _ = self.cut.set(reason);
        self.cut_token.cancel();
    }

    /// Resolves when the tunnel is cut.
    pub(super) async fn cut_signal(&self) -> CutReason {
        self.cut_token.cancelled().await;
        // The reason is set before the token is cancelled, so it is there.
        self.cut.get().copied().unwrap_or(CutReason::Memory)
    }

    /// Whether peers should get smaller windows.
    pub(super) fn scarce(&self) -> bool {
        self.node.scarce()
    }

    /// Books bytes that are held from now on.
    pub(super) fn hold(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            self.node.add(bytes);
        }
    }

    /// Books that bytes are not held any more.
    pub(super) fn free(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.node.total.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Corrects a booking to what is held now.
    pub(super) fn rebook(&self, booked: &mut usize, now: usize) {
        match now.checked_sub(*booked) {
            Some(more) => self.hold(more),
            None => self.free(*booked - now),
        }
        *booked = now;
    }

    /// Hands over bytes that are booked already. They stay booked until the result is dropped.
    pub(super) fn handed_over(self: &Arc<Self>, bytes: usize) -> Held {
        Held { account: self.clone(), bytes }
    }
}

/// Bytes that are booked on an account until this is dropped.
#[derive(Debug)]
pub struct Held {
    account: Arc<Account>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.account.free(self.bytes);
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

    impl Account {
        fn cut_reason(&self) -> Option<CutReason> {
            self.cut.get().copied()
        }
    }

    #[test]
    fn the_largest_tunnel_of_the_largest_holder_is_cut_and_nobody_else() {
        let buffers = Buffers::new(100_000);
        let [one, two, three] = [("a", 30_000), ("a", 40_000), ("b", 25_000)].map(|(holder, bytes)| {
            let account = buffers.account(holder);
            account.hold(bytes);
            account
        });
        assert_eq!([one.cut_reason(), two.cut_reason(), three.cut_reason()], [None; 3]);
        three.hold(10_000);
        assert_eq!(
            [one.cut_reason(), two.cut_reason(), three.cut_reason()],
            [None, Some(CutReason::Memory), None],
            "the limit for all together is exceeded"
        );
        three.hold(10_000);
        assert_eq!([one.cut_reason(), three.cut_reason()], [None; 2], "what was cut will be free soon");
        drop(two);
        three.hold(60_000);
        assert_eq!([one.cut_reason(), three.cut_reason()], [None, Some(CutReason::Memory)]);
        drop((one, three));
        assert_eq!(buffers.held(), 0);
    }

    #[test]
    fn what_is_handed_over_stays_booked_until_it_is_dropped() {
        let buffers = Buffers::new(usize::MAX);
        let account = buffers.account("a");
        let mut booked = 0;
        account.rebook(&mut booked, 500);
        account.hold(100);
        let held = account.handed_over(100);
        account.rebook(&mut booked, 200);
        drop(account);
        assert_eq!(buffers.held(), 300);
        drop(held);
        assert_eq!(buffers.held(), 0);
    }
}
