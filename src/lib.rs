//! culvert: a per-node L4 tunnel daemon for Kubernetes, ambient style.
//!
//! Modules in reading order; a module imports only from layers below its own (`tests/tidy.rs` holds this):
//!
//! | layer | modules |
//! |--:|---|
//! | 0 | `mesh`, `proto`, `sys`, `task`, `telemetry` |
//! | 1 | `hbone`, `identity` |
//! | 2 | `connection`, `control`, `admin` |
//! | 3 | `node` |
//! | 4 | `config` |
//! | 5 | `demo` |
//! | 6 | `daemon` |

mod admin;
mod config;
mod connection;
mod control;
mod daemon;
mod demo;
mod hbone;
mod identity;
mod mesh;
mod node;
mod proto;
mod sys;
mod task;
mod telemetry;

pub use config::args::Cli;
pub use daemon::run;
