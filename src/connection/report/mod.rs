//! Step 6: how did it end? Each connection has one [`Record`], which is written exactly once: a line in the access log,
//! the metrics, and the entry in the list of live connections. [`Failure`] lists every way in which a connection can
//! end badly.

pub mod access_log;
pub mod details;
pub mod direction;
pub mod export;
pub mod failure;
pub mod history;
pub mod known;
pub mod labels;
pub mod live;
pub mod measured;
pub mod metrics;
pub mod plaintext;
pub mod pods;
pub mod reason;
pub mod recent;
pub mod record;
pub mod stage_times;
pub mod stages;

pub use details::Details;
pub use direction::Direction;
pub use failure::Failure;
pub use record::{Record, Reporter};
