//! The command line and environment, as words. Where ztunnel has a variable, ours has its name, meaning and default.

use clap::{Args, Parser, Subcommand};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A per-node L4 tunnel for Kubernetes: captures pods' TCP and carries it as HBONE under workload identity.
#[derive(Debug, Parser)]
#[command(name = "culvert", disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What culvert can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run as this node's daemon.
    Node(Box<NodeArgs>),
    /// The same as `node`, under the words of Istio's ztunnel chart: `proxy ztunnel`.
    Proxy {
        /// `ztunnel`, or nothing.
        #[arg(value_parser = ["ztunnel"])]
        role: Option<String>,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Check a configuration, the mesh file and the pods file; start nothing.
    Check(Box<NodeArgs>),
    /// The built-in certificate authority.
    Ca {
        /// What to do with it.
        #[command(subcommand)]
        command: CaCommand,
    },
    /// See it work: two nodes and five pods on this machine, real traffic, and an account of it.
    Demo(DemoArgs),
    /// Look at this node, where the daemon runs: one line for each thing, and what to do where it is not well.
    Doctor(Box<NodeArgs>),
    /// The pods of this node as its daemon knows them: state, since when, and what should be known of each.
    Pods {
        /// What the admin port says of them, as it is.
        #[arg(long)]
        json: bool,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Remove every trace of culvert from this node, where no daemon runs any more.
    Cleanup(CleanupArgs),
    /// The CNI plugin, run by the container runtime (CNI_COMMAND, CNI_NETNS, CNI_ARGS, a configuration on standard input).
    Cni,
    /// Print the version.
    Version,
}

/// What can be done with the built-in certificate authority.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new authority (P-256) in a directory; an existing one is never overwritten.
    Init {
        /// The directory.
        dir: PathBuf,
    },
}

/// Settings of cleaning up.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Remove also the rules that another node's daemon has written in namespaces of this machine, or a version that did not
    /// say for which node.
    #[arg(long)]
    pub all: bool,
    /// Where a daemon runs, say so and wait for a signal: whoever starts this again must not find the node while that daemon is being
    /// restarted.
    #[arg(long)]
    pub once: bool,
    /// Remove nothing, and wait for a signal: a pod of a DaemonSet that has cleaned its node has to stay.
    #[arg(long)]
    pub stay: bool,
    /// Settings of the daemon that was here.
    #[command(flatten)]
    pub node: Box<NodeArgs>,
}

/// Settings of the demonstration.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Leave everything running until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON object instead of the account.
    #[arg(long)]
    pub json: bool,
    /// Seconds for each of the measurements.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
}

macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $field:ident $flag:literal $env:literal;)+) => {
        /// Settings of the daemon, unchecked: each an argument and an environment variable.
        #[derive(Clone, Debug, Default, Args)]
        pub struct NodeArgs {
            $($(#[doc = $doc])+ #[arg(long = $flag, env = $env, value_name = "VALUE")] pub $field: Option<String>,)+
        }

        impl NodeArgs {
            /// What is set, by variable.
            pub fn set(&self) -> BTreeMap<&'static str, &str> {
                let mut set = BTreeMap::new();
                $(set.extend(self.$field.as_deref().map(|value| ($env, value)));)+
                set
            }

            /// These settings, by variable, and no others.
            pub fn of(settings: &BTreeMap<String, String>) -> Self {
                Self { $($field: settings.get($env).cloned(),)+ }
            }
        }

        /// The argument of a variable, for messages that name both.
        pub fn flag_of(variable: &str) -> &'static str {
            match variable {
                $($env => $flag,)+
                _ => "",
            }
        }

    };
}

settings! {
    /// Mesh facts from a YAML file of workloads, services and policies, re-read when it changes [from the control plane].
    mesh_file "mesh-file" "LOCAL_XDS_PATH";
    /// Where this node's pods come from: `kubernetes` (labels), `agent` (istio-cni), or `file` [file with a pods file, else agent].
    pods "pods" "CULVERT_PODS";
    /// This node's pods from a YAML file, re-read when it changes [from the agent].
    pods_file "pods-file" "CULVERT_PODS_FILE";
    /// Certificates from the built-in CA in this directory (make one with `culvert ca init`) [from Istio's CA].
    ca_dir "ca-dir" "CULVERT_CA_DIR";
    /// The control plane [https://istiod.istio-system.svc:15012 in a cluster, https://localhost:15012 elsewhere].
    xds_address "xds-address" "XDS_ADDRESS";
    /// Certificates that vouch for the control plane: a file, SYSTEM, or PEM text [./var/run/secrets/istio/root-cert.pem].
    xds_root_ca "xds-root-ca" "XDS_ROOT_CA";
    /// Another name that the control plane's certificate may have.
    alt_xds_hostname "alt-xds-hostname" "ALT_XDS_HOSTNAME";
    /// Ask the control plane for addresses when they are needed, instead of being told all [false].
    xds_on_demand "xds-on-demand" "XDS_ON_DEMAND";
    /// Keep the last known state of the mesh in this file, and start from it where the control plane is away [off].
    state_file "state-file" "CULVERT_STATE_FILE";
    /// Older than this it is not used: whoever has an address by now need not be who had it then [24h].
    state_file_max_age "state-file-max-age" "CULVERT_STATE_FILE_MAX_AGE";
    /// Istio's CA [as the control plane].
    ca_address "ca-address" "CA_ADDRESS";
    /// Certificates that vouch for the CA, as for the control plane.
    ca_root_ca "ca-root-ca" "CA_ROOT_CA";
    /// Another name that the CA's certificate may have.
    alt_ca_hostname "alt-ca-hostname" "ALT_CA_HOSTNAME";
    /// What proves to control plane and CA who we are: a file, or the token itself [./var/run/secrets/tokens/istio-token].
    auth_token "auth-token" "AUTH_TOKEN";
    /// Revoked certificates: a file of CRLs, re-read when it changes [none].
    crl_path "crl-path" "CRL_PATH";
    /// Socket of the node's agent [/var/run/ztunnel/ztunnel.sock].
    agent_socket "agent-socket" "INPOD_UDS";
    /// The Kubernetes API as this file says [as a pod of the cluster].
    kubeconfig "kubeconfig" "KUBECONFIG";
    /// Which pods are in: a YAML list of podSelector and namespaceSelector [Istio's: label istio.io/dataplane-mode].
    selectors "enablement-selectors" "AMBIENT_ENABLEMENT_SELECTOR";
    /// Namespaces of which no pod is in, comma-joined [kube-system].
    exclude_namespaces "exclude-namespaces" "EXCLUDE_NAMESPACES";
    /// Folder of CNI plugins on the host; with the next, culvert installs its plugin [no plugin].
    cni_bin_dir "cni-bin-dir" "CULVERT_CNI_BIN_DIR";
    /// Folder of CNI configurations on the host.
    cni_conf_dir "cni-conf-dir" "CULVERT_CNI_CONF_DIR";
    /// Socket on which the CNI plugin asks the daemon [/var/run/culvert/cni.sock].
    cni_socket "cni-socket" "CULVERT_CNI_SOCKET";
    /// Name of the daemon's own DaemonSet [ztunnel].
    daemonset "daemonset" "CULVERT_DAEMONSET";
    /// The host's procfs [/host/proc where that is, else /proc].
    proc "proc" "CULVERT_PROC";
    /// The host's network namespace [1/ns/net in the host's procfs].
    host_netns "host-netns" "CULVERT_HOST_NETNS";
    /// Name of this node; tells this node's pods from others of the same name.
    node_name "node-name" "NODE_NAME";
    /// Name of the daemon's own pod.
    pod_name "pod-name" "POD_NAME";
    /// Namespace of the daemon's own pod.
    pod_namespace "pod-namespace" "POD_NAMESPACE";
    /// Service account of the daemon's own pod.
    service_account "service-account" "SERVICE_ACCOUNT";
    /// Address of the daemon's own pod.
    instance_ip "instance-ip" "INSTANCE_IP";
    /// Trust domain of the daemon's own pod [cluster.local].
    trust_domain "trust-domain" "TRUST_DOMAIN";
    /// Network of this node [the default one].
    network "network" "NETWORK";
    /// Cluster of this node; ISTIO_META_CLUSTER_ID wins [Kubernetes].
    cluster_id "cluster-id" "CLUSTER_ID";
    /// `pqc`: only post-quantum key exchange.
    compliance_policy "compliance-policy" "COMPLIANCE_POLICY";
    /// Life of certificates [24h].
    secret_ttl "secret-ttl" "SECRET_TTL";
    /// Take pods' DNS; a pod's own setting wins [true].
    dns_capture "dns-capture" "ISTIO_META_DNS_CAPTURE";
    /// Domain of the cluster [cluster.local].
    cluster_domain "cluster-domain" "CLUSTER_DOMAIN";
    /// Among services of one host name, prefer this namespace's after the pod's own and canonical ones.
    preferred_namespace "preferred-service-namespace" "PREFERED_SERVICE_NAMESPACE";
    /// Time to live of DNS answers from the mesh [30s].
    dns_ttl "dns-ttl" "CULVERT_DNS_TTL";
    /// Answers of its resolvers kept for each pod, for as long as they say; 0: none [256].
    dns_cache "dns-cache" "CULVERT_DNS_CACHE_ENTRIES";
    /// Trust domains accepted beside a workload's own, comma-joined.
    trust_domain_aliases "trust-domain-aliases" "CULVERT_TRUST_DOMAIN_ALIASES";
    /// Mark of the daemon's own packets [1337].
    packet_mark "packet-mark" "PACKET_MARK";
    /// End the connections that were open before a pod's capture, which go on in plaintext otherwise [false].
    end_earlier "end-earlier-connections" "CULVERT_END_EARLIER_CONNECTIONS";
    /// Let a second daemon listen beside this one, for upgrades [true].
    port_reuse "port-reuse" "INPOD_PORT_REUSE";
    /// Use IPv6 [true].
    ipv6 "ipv6" "IPV6_ENABLED";
    /// Show applications the original client's address [true].
    keep_source "keep-source" "ENABLE_ORIG_SRC";
    /// Worker threads: a number (0: all CPUs) or a share such as 50% [a quarter of the CPUs, 2 at least].
    workers "workers" "ZTUNNEL_WORKER_THREADS";
    /// CPUs to reckon with, where they are not the machine's.
    cpu_limit "cpu-limit" "ZTUNNEL_CPU_LIMIT";
    /// CPU limit of the daemon's container, such as 2 or 500m.
    resource_cpu_limit "resource-cpu-limit" "ZTUNNEL_RESOURCE_CPU_LIMIT";
    /// CPU request of the daemon's container, such as 2 or 500m.
    resource_cpu_request "resource-cpu-request" "ZTUNNEL_RESOURCE_CPU_REQUEST";
    /// Istio's proxy configuration, YAML or JSON: discoveryAddress, proxyAdminPort, statsPort, concurrency, proxyMetadata.
    proxy_config "proxy-config" "PROXY_CONFIG";
    /// Connections open at once [40% of the open-files limit]; further ones are reset and counted.
    max_connections "max-connections" "CULVERT_MAX_CONNECTIONS";
    /// Streams on one tunnel before another is opened [100].
    pool_streams "pool-streams" "POOL_MAX_STREAMS_PER_CONNECTION";
    /// Idle time after which a tunnel is closed [5m].
    pool_idle "pool-idle" "POOL_UNUSED_RELEASE_TIMEOUT";
    /// HTTP/2 window of a stream, in bytes [4194304].
    stream_window "stream-window" "HTTP2_STREAM_WINDOW_SIZE";
    /// HTTP/2 window of a tunnel, in bytes [16777216].
    connection_window "connection-window" "HTTP2_CONNECTION_WINDOW_SIZE";
    /// Largest HTTP/2 frame accepted, in bytes [1048576].
    frame_size "frame-size" "HTTP2_FRAME_SIZE";
    /// TCP keepalive on every leg [true].
    keepalive "keepalive" "KEEPALIVE_ENABLED";
    /// Silence before the first keepalive probe [180s].
    keepalive_time "keepalive-time" "KEEPALIVE_TIME";
    /// Time between keepalive probes [180s].
    keepalive_interval "keepalive-interval" "KEEPALIVE_INTERVAL";
    /// Unanswered keepalive probes before a connection is given up [9].
    keepalive_retries "keepalive-retries" "KEEPALIVE_RETRIES";
    /// Give up unacknowledged data after time + retries x interval of keepalive [true; ztunnel: false].
    user_timeout "user-timeout" "USER_TIMEOUT_ENABLED";
    /// Silence of one direction after the other has closed, before a connection is given up [1h].
    half_closed "half-closed" "CULVERT_HALF_CLOSED_TIMEOUT";
    /// How long connections may take to finish when the daemon ends or a pod is released [5s].
    drain_deadline "drain-deadline" "CONNECTION_TERMINATION_DEADLINE";
    /// The pod's grace period in seconds; gives the drain deadline where that is not set.
    grace_period "grace-period" "TERMINATION_GRACE_PERIOD_SECONDS";
    /// Send the accepting workload's baggage with the 200 [true].
    response_baggage "response-baggage" "ENABLE_RESPONSE_BAGGAGE";
    /// Hand streams with a PROXY protocol header to the pod's loopback address [true].
    localhost_app_tunnel "localhost-app-tunnel" "LOCALHOST_APP_TUNNEL";
    /// Log filter, e.g. `info` or `warn,access=info` [info].
    log "log" "RUST_LOG";
    /// Log format: `text` or `json` [text].
    log_format "log-format" "LOG_FORMAT";
}
