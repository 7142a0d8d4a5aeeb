//! A bounded queue from threads that have other things to do to one that sends what they push. A push costs one short
//! lock and never waits; what does not fit comes back.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::Notify;

/// How much a queue may hold, and how much of it is taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries that it may hold.
    pub entries: usize,
    /// Entries of a batch.
    pub batch: usize,
    /// How long an entry may wait for the others of its batch.
    pub delay: Duration,
}

/// A bounded queue with one reader.
#[derive(Debug)]
pub struct Queue<T> {
    limits: Limits,
    held: Mutex<VecDeque<T>>,
    has_batch: Notify,
}

impl<T> Queue<T> {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self { limits, held: Mutex::default(), has_batch: Notify::new() }
    }

    /// Adds an entry, or gives it back because the queue is full.
    pub fn push(&self, entry: T) -> Result<(), T> {
        let held = {
            let mut held = self.held.lock();
            if held.len() >= self.limits.entries {
                return Err(entry);
            }
            held.push_back(entry);
            held.len()
        };
        if held == self.limits.batch {
            self.has_batch.notify_one();
        }
        Ok(())
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.held.lock().len()
    }

    /// Whether it has no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the next batch as it is, which may be empty.
    pub fn take(&self) -> Vec<T> {
        let mut held = self.held.lock();
        let count = held.len().min(self.limits.batch);
        held.drain(..count).collect()
    }

    /// Waits until a batch is full, or for the longest time that an entry may wait, and takes it.
    pub async fn batch(&self) -> Vec<T> {
        if self.len() < self.limits.batch {
            // Late is as good as full. A notification of an earlier batch only makes this one smaller.
            let _ = tokio::time::timeout(self.limits.delay, self.has_batch.notified()).await;
        }
        self.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_taken_when_it_is_full_or_late_and_what_does_not_fit_comes_back() {
        let delay = Duration::from_secs(5);
        let queue = Queue::new(Limits { entries: 5, batch: 3, delay });
        let refused: Vec<u32> = (0..7).filter_map(|n| queue.push(n).err()).collect();
        assert_eq!((refused, queue.len()), (vec![5, 6], 5));
        let begin = tokio::time::Instant::now();
        assert_eq!(queue.batch().await, [0, 1, 2]);
        assert_eq!(begin.elapsed(), Duration::ZERO);
        queue.has_batch.notified().await;
        assert_eq!(queue.batch().await, [3, 4]);
        assert_eq!(begin.elapsed(), delay);
        assert_eq!(queue.batch().await, Vec::<u32>::new());
        let push = async {
            tokio::time::sleep(delay / 2).await;
            (0..3).for_each(|n| queue.push(n).unwrap());
        };
        let (batch, ()) = tokio::join!(queue.batch(), push);
        assert_eq!((batch, begin.elapsed()), (vec![0, 1, 2], delay * 5 / 2));
    }
}
