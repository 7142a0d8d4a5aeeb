//! The statuses that wait to be written: when which of them is due. Pure.

use super::{Condition, Wanted};
use crate::control_plane::policies::object::Kind;
use crate::mesh::Text;
use crate::task::backoff::Backoff;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;

/// Most statuses that wait. Objects beyond them get theirs when they change, or after a restart.
pub const WAITING_MAX: usize = 50_000;
/// How long a status settles before it is written: other replicas, and other objects on which it depends, may change it
/// again.
const SETTLE: Duration = Duration::from_millis(300);
/// First and longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// First and longest pause before the same status is written to the same object again. Somebody else writes another one,
/// such as a replica of another version, and neither must make the other write at once.
const PAUSE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// Most objects whose last written status is remembered. When there are more, all are forgotten.
const REMEMBERED_MAX: usize = 20_000;

/// An object.
pub type Key = (Kind, Text, Text);

/// What became of an attempt.
#[derive(Debug)]
pub enum Outcome {
    /// It is written.
    Written,
    /// There was nothing to write: the object says so already, is gone, or has changed, which will be heard of.
    Needless,
    /// It failed, and is tried again.
    Failed,
}

/// The statuses that wait.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: HashMap<Key, Waiting>,
    due: BTreeSet<(Instant, Key)>,
    in_flight: HashMap<Key, Backoff>,
    written: HashMap<Key, Written>,
}

#[derive(Debug)]
struct Waiting {
    wanted: Wanted,
    at: Instant,
    backoff: Backoff,
}

#[derive(Debug)]
struct Written {
    condition: Condition,
    generation: i64,
    pause: Duration,
}

fn key(wanted: &Wanted) -> Key {
    (wanted.kind, wanted.namespace.clone(), wanted.name.clone())
}

impl Queue {
    /// Adds a status, which takes the place of an earlier one of the same object. `false`: there is no room.
    pub fn add(&mut self, wanted: Wanted, now: Instant) -> bool {
        let key = key(&wanted);
        if self.waiting.len() >= WAITING_MAX && !self.waiting.contains_key(&key) {
            return false;
        }
        let wait = match self.written.get_mut(&key) {
            Some(last) if last.condition == wanted.condition && last.generation == wanted.generation => {
                let pause = last.pause;
                last.pause = (pause * 2).min(PAUSE.1);
                pause
            }
            _ => SETTLE,
        };
        let old = self.forget(&key);
        // A status that fails again and again is not tried more often because it is wanted more often.
        let at = old.as_ref().filter(|old| old.wanted == wanted).map_or(now + wait, |old| old.at);
        let backoff = old.map_or_else(|| Backoff::new(BACKOFF.0, BACKOFF.1), |old| old.backoff);
        self.wait(key, Waiting { wanted, at, backoff });
        true
    }

    /// The next status that is due. Its end must be told to [`Self::ended`].
    pub fn next(&mut self, now: Instant) -> Option<Wanted> {
        // The one that is in flight decides when the next of the same object is written.
        let key = self.due.iter().take_while(|(at, _)| *at <= now).find(|(_, key)| !self.in_flight.contains_key(key));
        let key = key.map(|(_, key)| key.clone())?;
        let Waiting { wanted, backoff, .. } = self.forget(&key)?;
        self.in_flight.insert(key, backoff);
        Some(wanted)
    }

    /// When the next status is due that is not in flight.
    pub fn due(&self) -> Option<Instant> {
        self.due.iter().find(|(_, key)| !self.in_flight.contains_key(key)).map(|(at, _)| *at)
    }

    /// Records what became of a status. Returns how long it waits if it is tried again.
    pub fn ended(&mut self, wanted: Wanted, outcome: &Outcome, now: Instant) -> Option<Duration> {
        let key = key(&wanted);
        let mut backoff = self.in_flight.remove(&key)?;
        match outcome {
            Outcome::Written => {
                if self.written.len() >= REMEMBERED_MAX {
                    self.written.clear();
                }
                let pause = match self.written.remove(&key) {
                    Some(last) if last.condition == wanted.condition && last.generation == wanted.generation => {
                        last.pause
                    }
                    _ => PAUSE.0,
                };
                let (condition, generation) = (wanted.condition, wanted.generation);
                self.written.insert(key, Written { condition, generation, pause });
                None
            }
            Outcome::Needless => None,
            Outcome::Failed if self.waiting.contains_key(&key) => None,
            Outcome::Failed => {
                let wait = backoff.next();
                self.wait(key, Waiting { wanted, at: now + wait, backoff });
                Some(wait)
            }
        }
    }

    fn wait(&mut self, key: Key, waiting: Waiting) {
        self.due.insert((waiting.at, key.clone()));
        self.waiting.insert(key, waiting);
    }

    fn forget(&mut self, key: &Key) -> Option<Waiting> {
        let waiting = self.waiting.remove(key)?;
        self.due.remove(&(waiting.at, key.clone()));
        Some(waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reason;
    use super::*;

    fn wanted(name: &str, message: &str) -> Wanted {
        let condition = Condition::new(Reason::Accepted, message);
        Wanted { kind: Kind::Authorization, namespace: "a".into(), name: name.into(), generation: 1, condition }
    }

    #[test]
    fn the_last_status_of_an_object_counts_and_one_is_in_flight() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert!(
            queue.add(wanted("p", "1"), now) && queue.add(wanted("p", "2"), now) && queue.add(wanted("q", "1"), now)
        );
        assert_eq!(queue.next(now), None, "they settle first");
        let later = now + SETTLE;
        assert_eq!(queue.due(), Some(later));
        assert_eq!((queue.next(later), queue.next(later)), (Some(wanted("p", "2")), Some(wanted("q", "1"))));
        // A newer one waits for the one in flight, and takes its place if that fails.
        queue.add(wanted("p", "3"), later);
        let later = later + SETTLE;
        assert_eq!((queue.next(later), queue.due()), (None, None));
        assert_eq!(queue.ended(wanted("p", "2"), &Outcome::Failed, later), None);
        assert_eq!(queue.next(later), Some(wanted("p", "3")));
        queue.ended(wanted("p", "3"), &Outcome::Needless, later);
        queue.ended(wanted("q", "1"), &Outcome::Written, later);
        assert!(queue.waiting.is_empty() && queue.in_flight.is_empty() && queue.due.is_empty());
    }

    #[test]
    fn what_fails_is_tried_less_and_less_often_however_often_it_is_wanted() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.add(wanted("p", "1"), now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            now = queue.due().unwrap();
            let one = queue.next(now).unwrap();
            waits.push(queue.ended(one, &Outcome::Failed, now).unwrap());
            let due = queue.due();
            queue.add(wanted("p", "1"), now);
            assert_eq!(queue.due(), due, "wanting it again changes nothing");
        }
        assert!(waits[0] <= BACKOFF.0 && waits[11] >= BACKOFF.1 / 2 && waits[11] <= BACKOFF.1, "{waits:?}");
    }

    #[test]
    fn the_same_status_is_not_written_again_at_once() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..10 {
            queue.add(wanted("p", "1"), now);
            let due = queue.due().unwrap();
            waits.push((due - now).as_secs());
            now = due;
            let one = queue.next(now).unwrap();
            queue.ended(one, &Outcome::Written, now);
        }
        assert_eq!(waits, [0, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]);
        queue.add(wanted("p", "2"), now);
        assert_eq!(queue.due(), Some(now + SETTLE), "another one is");
    }

    #[test]
    fn the_queue_has_an_end() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert!((0..WAITING_MAX).all(|n| queue.add(wanted(&n.to_string(), "1"), now)));
        assert!(!queue.add(wanted("more", "1"), now));
        assert!(queue.add(wanted("1", "2"), now), "one of those that wait may change");
        assert_eq!((queue.waiting.len(), queue.due.len()), (WAITING_MAX, WAITING_MAX));
    }
}
