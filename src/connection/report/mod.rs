//! Step 6: say what happened, exactly once: one access log line, the metrics, and the list of what is live.

pub mod access_log;
pub mod details;
pub mod direction;
pub mod failure;
pub mod live;
pub mod metrics;
pub mod reason;
pub mod record;

pub use details::Details;
pub use direction::Direction;
pub use failure::Failure;
pub use record::{Record, Reporter};
