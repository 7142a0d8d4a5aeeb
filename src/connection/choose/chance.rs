//! What decides where the facts leave a choice: chance, and what this node has learnt about endpoints.

use super::endpoints::{EndpointLists, Pick};
use super::standing::Witness;
use std::fmt;

/// What this node has learnt about endpoints, for the connection of one pod.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The lists of endpoints.
    pub endpoints: &'a EndpointLists,
    /// The pod.
    pub pod: Witness,
    /// The time of the lists.
    pub now: u64,
    /// Endpoints to which the connection has been tried. They are not chosen again.
    pub left: &'a [Pick],
}

/// What decides where the facts leave a choice.
pub struct Chance<'a> {
    /// Returns a number below its argument: a random one in the daemon, a chosen one in tests.
    pub random: &'a mut (dyn FnMut(u64) -> u64 + 'a),
    /// What this node has learnt; `None` for a choice by chance alone.
    pub known: Option<Known<'a>>,
}

impl fmt::Debug for Chance<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chance")
    }
}

impl Chance<'_> {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.random)(limit)
    }
}

#[cfg(any(test, fuzzing))]
impl<'a> Chance<'a> {
    /// Chance alone.
    pub fn of(random: &'a mut (dyn FnMut(u64) -> u64 + 'a)) -> Self {
        Self { random, known: None }
    }
}
