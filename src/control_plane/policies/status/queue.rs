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
