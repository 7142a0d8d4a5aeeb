//! Mesh facts from istiod, or any other server that speaks delta xDS: one stream at a time.
//!
//! ```text
//!   connect ──► stream ──► each response is applied and answered ──► the stream ends ──► wait a little ──► connect
//! ```
//! While there is no stream, the known facts stay in force, however long that takes.

pub mod config;
pub mod decode;
pub mod delta;
pub mod encode;
mod error;
pub mod freshness;
pub mod metrics;
pub mod policy;
mod resources;
pub mod saved;
mod stream;

pub use config::Config;
pub use freshness::Freshness;
pub use metrics::Metrics;
pub use stream::Client;
