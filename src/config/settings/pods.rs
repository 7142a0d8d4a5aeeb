//! Settings of where the node's pods come from, and of their capture.

use crate::config::kind::{Custom, File, Switch, Text, Words};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use crate::node::PodSource;
use crate::node::selectors::EnablementSelector;
use serde_json::{Value, json};

/// What enrols the node's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodsWord {
    /// Labels, as the Kubernetes API tells them.
    Kubernetes,
    /// The node's agent.
    Agent,
    /// A file.
    File,
}

/// Words of `CULVERT_PODS`.
const SOURCES: Words<PodsWord> =
    Words(&[("kubernetes", PodsWord::Kubernetes), ("agent", PodsWord::Agent), ("file", PodsWord::File)]);

settings! {
    PODS: Words<PodsWord> = Setting::new("pods", "CULVERT_PODS", SOURCES)
        .or_else("`file` if a pods file is set, `agent` otherwise")
        .help("What enrols this node's pods: `kubernetes` (labels), `agent` (istio-cni) or `file` (the pods file).")
        .shown("pods", |c| match &c.node.source {
            PodSource::File(_) => json!("file"),
            PodSource::Agent(_) => json!("agent"),
            PodSource::Kubernetes(_) => json!("kubernetes"),
            PodSource::Own(_) => Value::Null,
        });
    PODS_FILE: File = Setting::new("pods-file", "CULVERT_PODS_FILE", File)
        .help("YAML file of this node's pods. The daemon follows its changes, and redirects the pods itself.")
        .shown("podsFile", |c| match &c.node.source {
            PodSource::File(path) => json!(path.display().to_string()),
            PodSource::Agent(_) | PodSource::Kubernetes(_) | PodSource::Own(_) => Value::Null,
        });
    AGENT_SOCKET: File = Setting::new("agent-socket", "INPOD_UDS", File)
        .or("/var/run/ztunnel/ztunnel.sock")
        .help("Socket of the node's agent (istio-cni).")
        .shown("inpodUds", |c| match &c.node.source {
            PodSource::Agent(path) => json!(path.display().to_string()),
            PodSource::File(_) | PodSource::Kubernetes(_) | PodSource::Own(_) => Value::Null,
        });
    KUBECONFIG: File = Setting::new("kubeconfig", "KUBECONFIG", File)
        .or_else("the service account of the daemon's pod")
        .help("File that says how to reach the Kubernetes API.");
    SELECTORS: Custom<Vec<EnablementSelector>> =
        Setting::new("enablement-selectors", "AMBIENT_ENABLEMENT_SELECTOR", parse::SELECTORS)
            .or_else("Istio's label `istio.io/dataplane-mode: ambient`, of the pod or its namespace")
            .help("Which pods are enrolled: a YAML list of `podSelector` and `namespaceSelector`. A pod is enrolled if any entry selects it.");
    EXCLUDE_NAMESPACES: Text = Setting::new("exclude-namespaces", "EXCLUDE_NAMESPACES", Text)
        .or("kube-system")
        .help("Namespaces of which no pod is enrolled, separated by commas. An empty value excludes none.");
    CNI_BIN_DIR: File = Setting::new("cni-bin-dir", "CULVERT_CNI_BIN_DIR", File)
        .or_else("the CNI plugin is not installed")
        .help("The host's directory of CNI plugins. With this and `CULVERT_CNI_CONF_DIR` the daemon installs its CNI plugin.");
    CNI_CONF_DIR: File = Setting::new("cni-conf-dir", "CULVERT_CNI_CONF_DIR", File)
        .or_else("the CNI plugin is not installed")
        .help("The host's directory of CNI configurations. It is set together with `CULVERT_CNI_BIN_DIR`.");
    CNI_SOCKET: File = Setting::new("cni-socket", "CULVERT_CNI_SOCKET", File)
        .or("/var/run/culvert/cni.sock")
        .help(
            "Socket on which the daemon answers the CNI plugin. Its directory also holds the locks by which the daemons of a \
             node agree on the active one. The path must be the same in the container and on the host.",
        );
    DAEMONSET: Text = Setting::new("daemonset", "CULVERT_DAEMONSET", Text)
        .or("ztunnel")
        .help("Name of the daemon's own DaemonSet.");
    PROC: File = Setting::new("proc", "CULVERT_PROC", File)
        .or_else("/host/proc where it is mounted, else /proc")
        .help("The host's procfs.");
    HOST_NETNS: File = Setting::new("host-netns", "CULVERT_HOST_NETNS", File)
        .or_else("`1/ns/net` in the host's procfs")
        .help("The host's network namespace.");
    PACKET_MARK: Custom<u32> = Setting::new("packet-mark", "PACKET_MARK", parse::PACKET_MARK)
        .or("1337")
        .help(
            "Mark (SO_MARK) of the daemon's own packets, which the redirection leaves alone. In dedicated mode nothing is marked.",
        )
        .shown("packetMark", |c| if c.node.mark == 0 { Value::Null } else { json!(c.node.mark) });
    END_EARLIER_CONNECTIONS: Switch = Setting::new("end-earlier-connections", "CULVERT_END_EARLIER_CONNECTIONS", Switch)
        .or("false")
        .help("Reset a pod's pre-existing connections when the pod is captured. Otherwise they continue as they began, and `/pods` counts them.");
    PORT_REUSE: Switch = Setting::new("port-reuse", "INPOD_PORT_REUSE", Switch)
        .or("true")
        .help("Let a second daemon listen in the same pods during an upgrade.")
        .shown("inpodPortReuse", |c| json!(c.node.reuse_port));
}
