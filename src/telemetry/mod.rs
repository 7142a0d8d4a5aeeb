//! Log, metrics output, and metrics of the process itself. It knows nothing of the modules that log and count.

pub mod changes;
pub mod exemplar;
pub mod exposition;
pub mod limit;
pub mod lines;
pub mod log;
pub mod outage;
pub mod printable;
pub mod process;
pub mod queue;
pub mod ring;
pub mod series;
pub mod units;
