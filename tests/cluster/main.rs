//! culvert on a real Kubernetes with a real Istio, driven by what a user has: kubectl, helm, istioctl, and a node's power switch.
//!
//! `scripts/cluster test` runs it. Each mode of `scripts/cluster up` has a cluster of its own, which all its scenarios share one
//! after the other; each begins by making the cluster what `up` leaves.

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
mod istio;
