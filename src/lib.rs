//! culvert: a per-node L4 tunnel daemon for Kubernetes, ambient style.
//!
//! Modules in reading order; a module imports only from layers below its own (`tests/tidy.rs` holds this):
//!
//! | layer | modules |
//! |--:|---|
//! | 0 | `mesh`, `sys`, `task`, `telemetry` |
//! | 1 | `hbone`, `identity` |
//! | 2 | `connection`, `control`, `admin` |
//! | 3 | `node` |
//! | 4 | `config` |
//! | 5 | `demo` |
//! | 6 | `daemon` |

mod connection;
mod node;
mod control;
mod identity;
mod hbone;
mod mesh;
mod admin;
mod telemetry;
mod task;
mod sys;
mod config;
mod demo;
mod daemon;

pub use config::args::Cli;
pub use daemon::run;
