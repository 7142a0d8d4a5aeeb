//! culvert: a per-node L4 tunnel daemon for Kubernetes that takes the place of Istio's ztunnel in ambient mode.
//!
//! The modules by layer. A module imports only from layers below its own, which `tests/tidy/` checks:
//!
//! | layer | modules |
//! |--:|---|
//! | 0 | `crypto`, `mesh`, `ports`, `proto`, `sys`, `task`, `telemetry` |
//! | 1 | `hbone`, `rpc` |
//! | 2 | `dns`, `identity` |
//! | 3 | `connection`, `control`, `admin`, `cluster` |
//! | 4 | `node`, `otlp`, `control_plane` |
//! | 5 | `config` |
//! | 6 | `demo`, `doctor`, `inspect` |
//! | 7 | `daemon` |

mod admin;
mod cluster;
mod config;
mod connection;
mod control;
mod control_plane;
mod crypto;
mod daemon;
mod demo;
mod dns;
mod doctor;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzz;
mod hbone;
mod identity;
mod inspect;
mod mesh;
mod node;
mod otlp;
mod ports;
#[doc(hidden)]
#[allow(
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    reason = "generated code, whose shape is that of the protocol"
)]
pub mod proto;
mod rpc;
mod sys;
mod task;
mod telemetry;

pub use config::command_line::Cli;
#[doc(hidden)]
pub use connection::choose::measured;
#[doc(hidden)]
pub use connection::report::measured as measured_history;
#[doc(hidden)]
pub use control_plane::serve::measured as measured_control;
#[doc(hidden)]
pub use control_plane::watch::measured as measured_facts;
#[doc(hidden)]
pub use daemon::docs;
pub use daemon::{cli, run, run_as_plugin};
