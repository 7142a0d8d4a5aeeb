//! Settings of `culvert control`.

use crate::config::kind::{Number, Text};
use crate::config::setting::{Described, Setting};

settings! {
    KUBECONFIG: Text = Setting::new("kubeconfig", "KUBECONFIG", Text)
        .or_else("the account of the control plane's own pod")
        .help("Kubeconfig file for the Kubernetes API.");
    NAMESPACE: Text = Setting::new("namespace", "POD_NAMESPACE", Text)
        .or("istio-system")
        .help("Namespace of the control plane. Policies of this namespace without a selector apply to the whole mesh.");
    TRUST_DOMAIN: Text = Setting::new("trust-domain", "TRUST_DOMAIN", Text)
        .or("cluster.local")
        .help("Trust domain of the mesh's identities.");
    CLUSTER_ID: Text = Setting::new("cluster-id", "CLUSTER_ID", Text)
        .or("Kubernetes")
        .help("Name of the cluster in the uids of workloads. The daemons' CLUSTER_ID must be the same.");
    CLUSTER_DOMAIN: Text = Setting::new("cluster-domain", "CLUSTER_DOMAIN", Text)
        .or("cluster.local")
        .help("Domain of the cluster's DNS names.");
    PORT: Number<u16> = Setting::new("control-port", "CULVERT_CONTROL_PORT", Number(1, u16::MAX))
        .or("15012")
        .help("Port for daemons: mesh facts and certificates, by TLS.");
}
