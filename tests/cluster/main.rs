//! culvert on a real Kubernetes with a real Istio, driven by the tools of a user: kubectl, helm, istioctl, and a node's
//! power switch.
//!
//! `scripts/cluster test` runs it. Each mode of `scripts/cluster up` has its own cluster. All scenarios of a mode share
//! it, one after the other, and each begins by restoring what `up` leaves.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a test says what went wrong by panicking"
)]
#![allow(missing_docs, reason = "scenarios are read, not imported")]

mod world;

mod agent;
mod alone;
mod control;
mod istio;
