//! The queue of signing requests at the CA: a few at once, the most urgent first. A request may become more urgent
//! while it waits.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::{Notify, oneshot};

/// How urgently an identity needs a certificate.
#[derive(Debug, Default)]
pub struct Urgency {
    /// Connections that wait for the certificate.
    pub waiting_connections: AtomicUsize,
    /// Whether there is a valid certificate already.
    pub has_certificate: AtomicBool,
    /// Notified when a pod comes that has no valid certificate. The renewal task then asks again soon, however long it
    /// would wait after earlier failures.
    pub pod_arrived: Notify,
}

impl Urgency {
    /// Lower is sooner: first identities that connections wait for, then those without a certificate, then renewals.
    fn class(&self) -> u8 {
        match (self.waiting_connections.load(Ordering::Relaxed), self.has_certificate.load(Ordering::Relaxed)) {
            (1.., false) => 0,
            (0, false) => 1,
            (_, true) => 2,
        }
    }
}

/// Hands out slots for requests at the CA.
#[derive(Debug)]
pub struct CaQueue {
    state: Mutex<QueueState>,
}

#[derive(Debug)]
struct QueueState {
    free: usize,
    /// In order of arrival.
    waiters: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    urgency: Arc<Urgency>,
    /// Carries the slot itself: if the waiter leaves at this moment, the slot is dropped and so comes back to the
    /// queue.
    call: oneshot::Sender<CaSlot>,
}

/// Permission for one request; dropping it passes it on to the most urgent waiter.
#[derive(Debug)]
pub struct CaSlot {
    queue: Arc<CaQueue>,
}

impl Drop for CaSlot {
    fn drop(&mut self) {
        self.queue.pass_on();
    }
}

impl CaQueue {
    /// A queue with this many slots.
    pub fn new(slots: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(QueueState { free: slots, waiters: Vec::new() }) })
    }

    /// Waits for a slot.
    pub async fn enter(self: &Arc<Self>, urgency: &Arc<Urgency>) -> CaSlot {
        loop {
            let called = {
                let mut state = self.state.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return CaSlot { queue: self.clone() };
                }
                let (call, called) = oneshot::channel();
                state.waiters.push(Waiter { urgency: urgency.clone(), call });
                called
            };
            // A waiter leaves the list only when it is called. Should the call be lost all the same, it queues again.
            if let Ok(slot) = called.await {
                return slot;
            }
        }
    }

    fn pass_on(self: &Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            let waiters = state.waiters.iter().enumerate();
            let Some(next) = waiters.min_by_key(|(_, waiter)| waiter.urgency.class()).map(|(at, _)| at) else {
                state.free += 1;
                return;
            };
            match state.waiters.remove(next).call.send(CaSlot { queue: self.clone() }) {
                Ok(()) => return,
                // This waiter has left. Dropping the slot would pass it on once more, so it is forgotten and the loop
                // goes on.
                Err(slot) => std::mem::forget(slot),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn the_most_urgent_request_goes_first_and_one_that_left_is_skipped() {
        let queue = CaQueue::new(1);
        let urgency = |waiting, has_certificate| {
            Arc::new(Urgency {
                waiting_connections: AtomicUsize::new(waiting),
                has_certificate: AtomicBool::new(has_certificate),
                ..Urgency::default()
            })
        };
        let first = queue.enter(&urgency(0, true)).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let wait = |name: &'static str, urgency: Arc<Urgency>| {
            let (queue, order) = (queue.clone(), order.clone());
            async move {
                let _slot = queue.enter(&urgency).await;
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
                    rising.waiting_connections.store(1, Ordering::Relaxed);
                    drop(first);
                }
            )
        };
        assert!((&mut left).now_or_never().is_none());
        drop(left);
        all.await;
        assert_eq!(*order.lock(), ["rising", "connection", "warm-up", "renewal"]);
    }
}
