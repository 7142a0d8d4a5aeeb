//! How an endpoint stands with this node: how many of the node's connections it has, and whether it is set aside
//! because a connection to it failed.
//!
//! ```text
//!   good ──failed──► set aside, for 1 s ──pause over──► one connection tries it ──failed──► set aside, twice as long
//!     ▲                                                        │
//!     └────────────────────────succeeded───────────────────────┘
//! ```
//!
//! A failure may be due to the pod that opened the connection, for example to a NetworkPolicy or to its share of a full
//! node, so it counts for that pod alone until another pod has seen one too. Then it counts for all pods of the node.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The first pause in milliseconds. It doubles with every further failure, up to [`PAUSE_MAX`].
const PAUSE: u64 = 1_000;

/// The longest pause in milliseconds.
const PAUSE_MAX: u64 = 60_000;

/// How long the one connection that tries an endpoint after its pause has, before another one may, in milliseconds.
const TRIAL: u64 = 3_000;

/// Why an endpoint is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// It refused the connection, or its node did because it cannot reach the application.
    Refused,
    /// It reset the connection before any byte was carried.
    Reset,
    /// It did not answer in time.
    TimedOut,
    /// There is no way to it.
    Unreachable,
    /// The handshake of its tunnel failed.
    Handshake,
    /// Its tunnel said that it is going away.
    GoingAway,
}

impl Evidence {
    /// The word in metrics and on the admin port.
    pub fn word(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::TimedOut => "timed_out",
            Self::Unreachable => "unreachable",
            Self::Handshake => "handshake",
            Self::GoingAway => "going_away",
        }
    }
}

/// The pod that has seen something: the number of its capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness(pub u64);

impl Witness {
    /// All pods of the node.
    pub const EVERYONE: Self = Self(u64::MAX);
}

/// How an endpoint stands. Times are milliseconds from any beginning.
#[derive(Debug, Default)]
pub struct Standing {
    in_flight: AtomicU32,
    /// It is set aside until then; 0 if it is not.
    aside: AtomicU64,
    /// It comes after others until then, because it failed.
    doubted: AtomicU64,
    /// The [`Witness`].
    witness: AtomicU64,
    failures: Mutex<Option<Failures>>,
}

/// The failures of an endpoint since it last succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    /// The last one.
    pub last: Evidence,
    /// How many led to a pause.
    pub pauses: u32,
}

impl Standing {
    /// Connections of this node to the endpoint, open or being opened.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Begins a connection. Says whether it is the first one after a pause.
    pub fn begin(&self, now: u64) -> bool {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let aside = self.aside.load(Ordering::Relaxed);
        // Fails if another connection is the first one.
        let end = || self.aside.compare_exchange(aside, 0, Ordering::Relaxed, Ordering::Relaxed);
        aside != 0 && aside <= now && end().is_ok()
    }

    /// Sets the endpoint aside until the outcome of the first connection after a pause.
    pub fn await_trial(&self, now: u64) {
        self.aside.store(now + TRIAL, Ordering::Relaxed);
    }

    /// Ends a connection.
    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether connections of a pod avoid the endpoint.
    pub fn is_aside(&self, pod: Witness, now: u64) -> bool {
        self.aside.load(Ordering::Relaxed) > now && self.concerns(pod)
    }

    /// Whether the endpoint comes after others for a pod.
    pub fn is_doubted(&self, pod: Witness, now: u64) -> bool {
        self.doubted.load(Ordering::Relaxed) > now && self.concerns(pod)
    }

    /// Milliseconds until the pause ends, and why there is one; `None` if no pod avoids the endpoint.
    pub fn pause(&self, now: u64) -> Option<(u64, Failures)> {
        let left = self.aside.load(Ordering::Relaxed).checked_sub(now).filter(|left| *left > 0)?;
        Some((left, (*self.failures.lock())?))
    }

    /// Whether the pause is for all pods of the node.
    pub fn is_for_everyone(&self) -> bool {
        self.witness.load(Ordering::Relaxed) == Witness::EVERYONE.0
    }

    fn concerns(&self, pod: Witness) -> bool {
        let witness = self.witness.load(Ordering::Relaxed);
        witness == pod.0 || witness == Witness::EVERYONE.0
    }

    /// A connection of a pod succeeded.
    pub fn succeeded(&self, pod: Witness) {
        if self.doubted.load(Ordering::Relaxed) == 0 || !self.concerns(pod) {
            return;
        }
        let mut failures = self.failures.lock();
        *failures = None;
        self.aside.store(0, Ordering::Relaxed);
        self.doubted.store(0, Ordering::Relaxed);
    }

    /// A connection failed. `may_set_aside`: whether the endpoint may be set aside; otherwise it only comes after
    /// others. Says whether it is set aside now and was not before.
    pub fn failed(&self, why: Evidence, seen_by: Witness, now: u64, may_set_aside: bool) -> bool {
        let mut failures = self.failures.lock();
        let mut pauses = failures.map_or(0, |failures| failures.pauses);
        let (doubted, before) = (self.doubted.load(Ordering::Relaxed), self.aside.load(Ordering::Relaxed) > now);
        let until = if doubted > now {
            // Connections that were under way together fail together. They are one failure, with one pause.
            if self.witness.load(Ordering::Relaxed) != seen_by.0 {
                self.witness.store(Witness::EVERYONE.0, Ordering::Relaxed);
            }
            doubted
        } else {
            self.witness.store(seen_by.0, Ordering::Relaxed);
            pauses += 1;
            now + (PAUSE << (pauses - 1).min(16)).min(PAUSE_MAX)
        };
        *failures = Some(Failures { last: why, pauses });
        self.doubted.store(until, Ordering::Relaxed);
        if may_set_aside {
            self.aside.store(until, Ordering::Relaxed);
        } else if !before {
            self.aside.store(0, Ordering::Relaxed);
        }
        may_set_aside && !before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Witness = Witness(1);
    const B: Witness = Witness(2);

    #[test]
    fn the_pause_grows_and_one_connection_tries_after_it() {
        let standing = Standing::default();
        let mut now = 10;
        for pause in [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000] {
            assert!(!standing.is_aside(A, now), "tried after the pause");
            if standing.begin(now) {
                standing.await_trial(now);
            }
            assert!(pause == 1_000 || standing.is_aside(A, now), "by one connection only");
            standing.failed(Evidence::Refused, A, now, true);
            standing.failed(Evidence::Refused, A, now + 1, true);
            standing.end();
            assert!(standing.is_aside(A, now + pause - 1), "{pause}");
            now += pause;
        }
        assert_eq!(standing.pause(now - 5), Some((5, Failures { last: Evidence::Refused, pauses: 8 })));
        assert!(standing.begin(now) && !standing.begin(now), "only one is the first");
        standing.succeeded(A);
        assert!(!standing.is_aside(A, now) && standing.pause(now).is_none());
        standing.failed(Evidence::Reset, A, now, true);
        assert!(!standing.is_aside(A, now + PAUSE), "it begins again");
    }

    #[test]
    fn a_trial_without_an_outcome_is_followed_by_another() {
        let standing = Standing::default();
        standing.failed(Evidence::TimedOut, A, 1, true);
        assert!(standing.begin(2_000));
        standing.await_trial(2_000);
        assert!(standing.is_aside(A, 2_001) && standing.is_aside(A, 2_000 + TRIAL - 1));
        assert!(!standing.is_aside(A, 2_000 + TRIAL));
    }

    #[test]
    fn what_one_pod_sees_counts_for_others_once_another_has_seen_it() {
        let standing = Standing::default();
        assert!(standing.failed(Evidence::Refused, A, 1, true));
        assert!(standing.is_aside(A, 2) && !standing.is_aside(B, 2) && !standing.is_for_everyone());
        standing.succeeded(B);
        assert!(standing.is_aside(A, 2), "another pod's success is not its own");
        assert!(!standing.failed(Evidence::Refused, B, 2, true), "it was before");
        assert!(standing.is_aside(Witness(3), 3) && standing.is_for_everyone());
        standing.succeeded(Witness(3));
        assert!(!standing.is_aside(A, 3), "a success of any pod counts for all then");
    }

    #[test]
    fn one_that_may_not_be_set_aside_comes_after_others() {
        let standing = Standing::default();
        assert!(!standing.failed(Evidence::Refused, A, 1, false));
        assert!(!standing.is_aside(A, 2) && standing.is_doubted(A, 2) && !standing.is_doubted(A, 2 + PAUSE));
    }
}
