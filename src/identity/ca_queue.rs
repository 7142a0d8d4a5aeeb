//! CaQueue at the CA: few requests at once, the most urgent first. Urgency may rise while a request waits.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::{Notify, oneshot};

/// How urgent an identity's certificate is.
#[derive(Debug, Default)]
pub struct Urgency {
    /// Connections that wait for it.
    pub waiting: AtomicUsize,
    /// Whether there is one already.
    pub held: AtomicBool,
    /// Told when a pod comes for which there is none: what failed before it came is no reason to wait any more.
    pub came: Notify,
}

impl Urgency {
    /// Lower is sooner: connections wait; a pod has none yet; renewal.
    fn class(&self) -> u8 {
        match (self.waiting.load(Ordering::Relaxed), self.held.load(Ordering::Relaxed)) {
            (1.., false) => 0,
            (0, false) => 1,
            (_, true) => 2,
        }
    }
}

/// Gives queue.
#[derive(Debug)]
pub struct CaQueue {
    state: Mutex<QueueState>,
}

#[derive(Debug)]
struct QueueState {
    free: usize,
    /// In the order of their coming.
    queue: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    urgency: Arc<Urgency>,
    /// The turn goes with the call: should the waiter leave at that moment, it comes back.
    call: oneshot::Sender<Slot>,
}

/// One turn; given back when dropped.
#[derive(Debug)]
pub struct Slot {
    queue: Arc<CaQueue>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.queue.pass_on();
    }
}

impl CaQueue {
    /// As many queue at once.
    pub fn new(at_once: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(QueueState { free: at_once, queue: Vec::new() }) })
    }

    /// Waits for a turn.
    pub async fn enter(self: &Arc<Self>, urgency: &Arc<Urgency>) -> Slot {
        loop {
            let called = {
                let mut state = self.state.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return Slot { queue: self.clone() };
                }
                let (call, called) = oneshot::channel();
                state.queue.push(Waiter { urgency: urgency.clone(), call });
                called
            };
            // A queue never loses a waiter that it has not called; should it, the waiter queues again.
            if let Ok(turn) = called.await {
                return turn;
            }
        }
    }

    fn pass_on(self: &Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            let next =
                state.queue.iter().enumerate().min_by_key(|(_, waiter)| waiter.urgency.class()).map(|(at, _)| at);
            let Some(next) = next else {
                state.free += 1;
                return;
            };
            match state.queue.remove(next).call.send(Slot { queue: self.clone() }) {
                Ok(()) => return,
                // Who does not wait any more is passed over; the turn is still ours to give.
                Err(turn) => std::mem::forget(turn),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_most_urgent_goes_first_and_who_left_is_passed_over() {
        let queue = CaQueue::new(1);
        let urgency = |waiting, held| {
            Arc::new(Urgency { waiting: AtomicUsize::new(waiting), held: AtomicBool::new(held), ..Urgency::default() })
        };
        let first = queue.enter(&urgency(0, true)).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let wait = |name: &'static str, urgency: Arc<Urgency>| {
            let (queue, order) = (queue.clone(), order.clone());
            async move {
                let _turn = queue.enter(&urgency).await;
                order.lock().push(name);
            }
        };
        let rising = urgency(0, false);
        let mut left = Box::pin(wait("left", urgency(1, false)));
        let all = async {
            tokio::join!(
                wait("renewal", urgency(0, true)),
                wait("warm-up", urgency(0, false)),
                wait("rising", rising.clone()),
                wait("connection", urgency(1, false)),
                async {
                    tokio::task::yield_now().await;
                    rising.waiting.store(1, Ordering::Relaxed);
                    drop(first);
                }
            )
        };
        assert!(futures_poll_once(&mut left).await.is_none());
        drop(left);
        all.await;
        assert_eq!(*order.lock(), ["rising", "connection", "warm-up", "renewal"]);
    }

    async fn futures_poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|cx| match std::pin::Pin::new(&mut *future).poll(cx) {
            std::task::Poll::Ready(value) => std::task::Poll::Ready(Some(value)),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await
    }
}
