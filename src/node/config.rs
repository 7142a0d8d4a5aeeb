//! Settings of enrolment and capture.

use super::active_daemon;
use super::cni::install;
use super::selectors::Enablement;
use crate::mesh::Text;
use crate::sys::netns::id_at;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest part of a node's name that is used in its tag.
const NAME_MAX: usize = 64;

/// Settings of capture.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where this node's pods come from.
    pub source: PodSource,
    /// Whether the daemon writes the redirection; otherwise an agent does.
    pub redirect: bool,
    /// The host's procfs.
    pub proc: PathBuf,
    /// Network namespace of the host, which is never captured.
    pub host_netns: PathBuf,
    /// Whether pre-existing connections are ended when a pod is captured.
    pub end_preexisting: bool,
    /// Name of this node; empty if it is not set.
    pub node_name: String,
    /// Cluster of this node; part of the uids of its pods in the mesh facts.
    pub cluster_id: String,
    /// Trust domain of pods that the mesh does not know yet; their certificates are requested in it.
    pub trust_domain: String,
    /// `SO_MARK` of the daemon's sockets; 0 where it has no right to mark them.
    pub mark: u32,
    /// Whether a second daemon may listen beside this one, for upgrades without a gap.
    pub reuse_port: bool,
    /// Whether IPv6 is used at all.
    pub ipv6: bool,
    /// Whether the daemon serves SOCKS5 in pods.
    pub socks: bool,
    /// How long the connections of a released pod may take to end.
    pub release_deadline: Duration,
}

impl Config {
    /// Tag of this node in tables and file names. A daemon and the tool that cleans up after it use the same tag; two
    /// nodes on one machine have different ones, by the inode of their host network namespace. With an agent that
    /// namespace is not known.
    pub fn node_tag(&self) -> String {
        let of = match &self.source {
            PodSource::Kubernetes(_) => id_at(&self.host_netns),
            PodSource::File(_) | PodSource::Own(_) => id_at(Path::new("/proc/self/ns/net")),
            PodSource::Agent(_) => None,
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
        let name: String = self.node_name.chars().take(NAME_MAX).map(plain).collect();
        let name = if name.is_empty() { "node".to_owned() } else { name };
        of.map_or(name.clone(), |(_, inode)| format!("{name}-{inode}"))
    }
}

/// Where a node's pods come from.
#[derive(Clone, Debug)]
pub enum PodSource {
    /// The pods file.
    File(PathBuf),
    /// An agent, on this socket.
    Agent(PathBuf),
    /// Labels in the Kubernetes API.
    Kubernetes(Box<KubernetesConfig>),
    /// The one workload in whose network namespace the daemon runs. The daemon has no rights over that namespace.
    Own(OwnWorkload),
}

/// The one workload that a daemon in dedicated mode serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnWorkload {
    /// Its Kubernetes namespace.
    pub namespace: Text,
    /// Its name.
    pub name: Text,
    /// Its service account.
    pub service_account: Text,
    /// User id of the daemon, by which the rules know its packets.
    pub user: u32,
}

/// Settings of enrolment by the Kubernetes API.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// Name of this node.
    pub node_name: String,
    /// Name of the daemon's own DaemonSet.
    pub daemonset: String,
    /// Which pods are enrolled.
    pub enablement: Enablement,
    /// The host's procfs.
    pub proc: PathBuf,
    /// Kubeconfig for the API; `None`: the account of the daemon's own pod.
    pub kubeconfig: Option<PathBuf>,
    /// The CNI plugin, if it is to be installed.
    pub cni: Option<install::Config>,
    /// The daemon's socket for the CNI plugin.
    pub cni_socket: PathBuf,
    /// File of the enrolled pods, for a start without the API.
    pub saved_pods: Option<PathBuf>,
}

impl KubernetesConfig {
    /// Folder in which the daemons of a node agree on the active one.
    pub fn daemons_folder(&self, node_tag: &str) -> PathBuf {
        self.cni_socket.with_file_name(format!("{}{node_tag}", active_daemon::FOLDER))
    }
}
