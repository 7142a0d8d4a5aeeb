//! The path of a connection. The folders are its steps, and their alphabetical order is their order in time:
//! accept → authorize → choose → dial → forward → report. A step names only steps before it; `journeys` knows all.

pub mod accept;
pub mod authorize;
pub mod budget;
pub mod capture_checks;
pub mod choose;
pub mod config;
pub mod dial;
pub mod forward;
pub mod headers;
mod journeys;
pub mod pod;
pub mod ports;
pub mod report;
pub mod worker;
pub mod workers;

pub use config::Config;
pub use pod::Pod;
pub use worker::Shared;
pub use workers::{Entrance, Workers};
