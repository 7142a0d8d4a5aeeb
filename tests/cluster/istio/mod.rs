//! A mesh of Istio: istiod announces the facts and signs certificates, culvert enrols pods by labels.

mod commands;
mod failures;
mod install;
mod rollouts;
mod seen;
mod sidecar;
mod traffic;

use crate::world::{Cluster, Mode};

fn cluster() -> Cluster {
    Cluster::of(Mode::Istio)
}
