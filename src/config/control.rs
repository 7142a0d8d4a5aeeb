//! Checks the settings of `culvert control`. Pure.

use super::Faults;
use super::args::ControlArgs;
use super::checker::Checker;
use super::settings::control;
use crate::control_plane::{Cluster, Config};

/// Checks the settings of the control plane.
pub fn check(args: &ControlArgs) -> Result<Config, Faults> {
    let mut checker = Checker::new(args);
    let c = &mut checker;
    let config = Config {
        kubeconfig: c.path(&control::KUBECONFIG),
        cluster: Cluster {
            namespace: c.read(&control::NAMESPACE).into(),
            trust_domain: c.read(&control::TRUST_DOMAIN).into(),
            id: c.read(&control::CLUSTER_ID).into(),
            domain: c.read(&control::CLUSTER_DOMAIN).into(),
        },
        port: c.read(&control::PORT),
    };
    if checker.faults.is_empty() { Ok(config) } else { Err(Faults(checker.faults)) }
}
