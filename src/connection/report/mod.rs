//! Step 6: say what happened, exactly once: one access log line, the metrics, and the list of what is live.

pub mod access_log;
pub mod failure;
pub mod live;
pub mod metrics;
pub mod reason;
pub mod record;

pub use failure::Failure;
pub use record::{Details, Direction, Record, Reporter};
