//! Tasks and their ends: every spawned task has an owner that can wait for it, and everything can be told to stop.

pub mod backoff;
pub mod drain;
pub mod files;
pub mod group;
pub mod ready;
pub mod slots;
pub mod thread;

pub use drain::{Drain, Signal};
pub use group::Group;
pub use ready::Ready;
