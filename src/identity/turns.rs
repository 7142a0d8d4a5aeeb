//! Turns at the CA: few requests at once, the most urgent first. Urgency may rise while a request waits.

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

/// Gives turns.
#[derive(Debug)]
pub struct Turns {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// In the order of their coming.
    queue: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    urgency: Arc<Urgency>,
    /// The turn goes with the call: should the waiter leave at that moment, it comes back.
    call: oneshot::Sender<Turn>,
}

/// One turn; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.pass_on();
    }
}

impl Turns {
    /// As many turns at once.
    pub fn new(at_once: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { free: at_once, queue: Vec::new() }) })
    }

    /// Waits for a turn.
    pub async fn take(self: &Arc<Self>, urgency: &Arc<Urgency>) -> Turn {
        loop {
            let called = {
                let mut state = self.state.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return Turn { turns: self.clone() };
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
            match state.queue.remove(next).call.send(Turn { turns: self.clone() }) {
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
        let turns = Turns::new(1);
        let urgency = |waiting, held| {
            Arc::new(Urgency { waiting: AtomicUsize::new(waiting), held: AtomicBool::new(held), ..Urgency::default() })
        };
        let first = turns.take(&urgency(0, true)).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let wait = |name: &'static str, urgency: Arc<Urgency>| {
            let (turns, order) = (turns.clone(), order.clone());
            async move {
                let _turn = turns.take(&urgency).await;
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
