//! The shipped binary in real network namespaces, driven only from outside: by files, sockets and signals.
//!
//! The binary under test is the path in `SUBJECT` (default: the binary of this build). The scenarios need root,
//! nftables, iproute2 and the Python environment that `scripts/need-python` makes. Without these a scenario fails; it is never
//! skipped.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test says what went wrong by panicking"
)]
#![allow(missing_docs, reason = "scenarios are read, not imported")]

mod world;

mod authorization;
mod capture;
mod certificates;
mod configuration;
mod control;
mod control_root;
mod demo;
mod dns;
mod doctor;
mod egress;
mod ending;
mod endpoints;
mod envoy;
mod explain;
mod gone;
mod history;
mod hostile;
mod inspect;
mod interop;
mod istio;
mod journeys;
mod kubernetes;
mod limits;
mod model;
mod networks;
mod otlp;
mod page;
mod prometheus;
mod remains;
mod sidecar;
mod socks;
mod stalls;
mod standalone;
mod system_calls;
mod tcp;
mod turns;
mod visible;
mod waypoint;
mod xds;
mod zds;
