//! The log, the metrics registry, and facts about the process itself. It does not know whose lines or metrics they are.

pub mod exposition;
pub mod limit;
pub mod log;
pub mod process;
pub mod series;
