//! Tasks, threads, and what they share: draining, backoff, readiness, slots for unauthenticated peers, and files on
//! disk.
//!
//! This is the only module that spawns. Every spawned task has an owner that can wait for it or end it.

pub mod backoff;
pub mod drain;
pub mod files;
pub mod group;
pub mod ready;
pub mod slots;
pub mod thread;
mod ticks;

pub use drain::{Drain, Signal};
pub use group::Group;
pub use ready::Ready;
pub use ticks::Ticks;
