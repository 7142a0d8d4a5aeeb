//! Settings that say which node this is, and which pod the daemon runs in.

use crate::config::kind::{Custom, Text};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use serde_json::json;

settings! {
    NODE_NAME: Text = Setting::new("node-name", "NODE_NAME", Text)
        .help("Name of this node, for the Kubernetes API. It also tells this node's pods from others of the same name.")
        .shown("localNode", |c| json!(c.node_name));
    POD_NAME: Text = Setting::new("pod-name", "POD_NAME", Text)
        .help(
            "Name of the daemon's own pod. With this, `POD_NAMESPACE` and `SERVICE_ACCOUNT` the daemon's metrics can be read through the \
             mesh, on port 15008. In dedicated mode these three name the workload.",
        );
    POD_NAMESPACE: Text = Setting::new("pod-namespace", "POD_NAMESPACE", Text)
        .help("Namespace of the daemon's own pod. With enrolment by labels the default is `istio-system`.");
    SERVICE_ACCOUNT: Text = Setting::new("service-account", "SERVICE_ACCOUNT", Text)
        .help("Service account of the daemon's own pod.");
    INSTANCE_IP: Custom<String> = Setting::new("instance-ip", "INSTANCE_IP", parse::IP)
        .or("1.1.1.1")
        .help("Address of the daemon's own pod, as it is reported to the control plane.");
    NETWORK: Text = Setting::new("network", "NETWORK", Text)
        .or_else("the default network")
        .help("Network of this node. It is only shown: the network of a pod is the one in its mesh facts.")
        .shown("network", |c| json!(c.network));
    CLUSTER_ID: Text = Setting::new("cluster-id", "CLUSTER_ID", Text)
        .or("Kubernetes")
        .help(
            "Cluster of this node. Facts that name another cluster never describe this node's pods. `ISTIO_META_CLUSTER_ID` takes \
             precedence. With a mesh file there is no default, and facts of any cluster may describe the node's pods.",
        )
        .shown("clusterId", |c| json!(c.node.cluster_id));
}
