//! Settings of capture and of enrolment.

use super::active_daemon;
use super::cni::install;
use super::selectors::Enablement;
use crate::sys::netns::id_at;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Letters of a node's name that are written.
const NAME_MAX: usize = 64;

/// Settings of capture.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where this node's pods come from.
    pub source: PodSource,
    /// Whether we write the rules that redirect, or an agent does.
    pub redirect: bool,
    /// The host's procfs.
    pub proc: PathBuf,
    /// Network namespace of the host, which is nobody's pod.
    pub host_netns: PathBuf,
    /// Whether connections that were open before a pod's capture are ended.
    pub end_preexisting: bool,
    /// Name of this node, where it has been said.
    pub node_name: String,
    /// Cluster of this node, for the uids of its pods in the mesh.
    pub cluster_id: String,
    /// Trust domain of pods of which the mesh has not told yet: their certificates are asked for in it.
    pub trust_domain: String,
    /// `SO_MARK` of the daemon's sockets.
    pub mark: u32,
    /// Whether a second daemon may listen beside this one, for upgrades without a gap.
    pub reuse_port: bool,
    /// Whether IPv6 is used at all.
    pub ipv6: bool,
    /// How long a released pod's connections may take to finish.
    pub release_deadline: Duration,
}

impl Config {
    /// Whose node this is, as it stands in what is written: a daemon and whoever cleans up after it say the same, two nodes on one
    /// machine do not. With an agent nobody knows the host's network namespace.
    pub fn node_tag(&self) -> String {
        let of = match &self.source {
            PodSource::Kubernetes(_) => id_at(&self.host_netns),
            PodSource::File(_) => id_at(Path::new("/proc/self/ns/net")),
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
    /// A file names them.
    File(PathBuf),
    /// An agent hands them over, on this socket.
    Agent(PathBuf),
    /// Labels say so, in the Kubernetes API.
    Kubernetes(Box<KubernetesConfig>),
}

/// Settings of enrolment by Kubernetes.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// Name of this node.
    pub node_name: String,
    /// Name of the daemon's own DaemonSet.
    pub daemonset: String,
    /// Who is in.
    pub enablement: Enablement,
    /// The host's procfs.
    pub proc: PathBuf,
    /// How the API is reached; `None`: as a pod of the cluster.
    pub kubeconfig: Option<PathBuf>,
    /// The CNI plugin, where it is wanted.
    pub cni: Option<install::Config>,
    /// The daemon's own socket for the plugin.
    pub cni_socket: PathBuf,
    /// Where the pods that are enrolled are kept, for a start without the API.
    pub memory: Option<PathBuf>,
}

impl KubernetesConfig {
    /// The folder by which the daemons of a node agree on whose turn it is to write.
    pub fn daemons_folder(&self, node_tag: &str) -> PathBuf {
        self.cni_socket.with_file_name(format!("{}{node_tag}", active_daemon::FOLDER))
    }
}
