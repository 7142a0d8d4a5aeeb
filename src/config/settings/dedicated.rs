//! Settings of dedicated mode: one workload, without a node.

use crate::config::kind::{Custom, Number, Words};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use crate::mesh::Text;
use crate::node::PodSource;
use serde_json::json;

/// Whom the daemon serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The pods of a node.
    #[default]
    Shared,
    /// The workload in whose network namespace it runs.
    Dedicated,
}

/// Words of `PROXY_MODE`.
const MODES: Words<Mode> = Words(&[("shared", Mode::Shared), ("dedicated", Mode::Dedicated)]);

settings! {
    MODE: Words<Mode> = Setting::new("proxy-mode", "PROXY_MODE", MODES)
        .or("shared")
        .help(
            "`shared`: the daemon serves the pods of its node. `dedicated`: it serves one workload, in the network namespace that it \
             runs in, as a sidecar container or on a virtual machine. It then needs no capability, and `culvert redirect` has to be \
             run there first.",
        )
        .shown("proxyMode", |c| match &c.node.source {
            PodSource::Own(_) => json!("Dedicated"),
            PodSource::File(_) | PodSource::Agent(_) | PodSource::Kubernetes(_) => json!("Shared"),
        });
    WORKLOAD_INFO: Custom<[Text; 3]> = Setting::new("proxy-workload-info", "PROXY_WORKLOAD_INFO", parse::WORKLOAD)
        .or_else("`POD_NAMESPACE`, `POD_NAME` and `SERVICE_ACCOUNT`")
        .help("In dedicated mode: the workload that the daemon serves.");
    REDIRECT_UID: Number<u32> = Setting::new("redirect-uid", "CULVERT_REDIRECT_UID", Number(1, u32::MAX - 1))
        .or("1337")
        .help(
            "User id of the daemon in dedicated mode. `culvert redirect` leaves the traffic of this user alone, so nothing else may run as \
             it, and the daemon runs as no other.",
        );
    EXCLUDE_INBOUND_PORTS: Custom<Vec<u16>> =
        Setting::new("exclude-inbound-ports", "CULVERT_EXCLUDE_INBOUND_PORTS", parse::PORTS)
            .help(
                "Ports of which `culvert redirect` does not redirect inbound plaintext, such as ports of kubelet probes, or that of SSH on a \
                 virtual machine. No policy applies to them. The ports of the daemon's metrics and readiness are always among them.",
            );
}
