//! Which pods are on this node, and capturing them: enter the namespace, listen, redirect, verify; and the way back.

pub mod active_daemon;
pub mod capture;
pub mod capture_check;
pub mod cleanup;
pub mod cni;
pub mod kubelet_probes;
pub mod kubernetes;
pub mod legs;
mod nft;
pub mod own_pod;
pub mod pod;
pub mod pods;
pub mod pods_file;
pub mod preexisting;
pub mod redirect;
pub mod routes;
pub mod status;
pub mod table_owner;
pub mod takeover;
pub mod upkeep;
pub mod zds;

pub use pods::{PodSpec, Pods, Settings};

use crate::sys::netns::id_at;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Letters of a node's name that are written.
const NAME_MAX: usize = 64;

/// Settings of capture.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where this node's pods come from.
    pub source: Source,
    /// Whether we write the rules that redirect, or an agent does.
    pub redirect: bool,
    /// The host's procfs.
    pub proc: PathBuf,
    /// Network namespace of the host, which is nobody's pod.
    pub host_netns: PathBuf,
    /// Whether connections that were open before a pod's capture are ended.
    pub end_earlier: bool,
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
    /// The node, for whoever looks for what has been left on it.
    pub fn remains(&self) -> cleanup::Node {
        cleanup::Node { whose: self.whose(), proc: self.proc.clone(), host_netns: self.host_netns.clone() }
    }

    /// Whose node this is, as it stands in what is written: a daemon and whoever cleans up after it say the same, two nodes on one
    /// machine do not. With an agent nobody knows the host's network namespace.
    pub fn whose(&self) -> String {
        let of = match &self.source {
            Source::Kubernetes(_) => id_at(&self.host_netns),
            Source::File(_) => id_at(Path::new("/proc/self/ns/net")),
            Source::Agent(_) => None,
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
        let name: String = self.node_name.chars().take(NAME_MAX).map(plain).collect();
        let name = if name.is_empty() { "node".to_owned() } else { name };
        of.map_or(name.clone(), |(_, inode)| format!("{name}-{inode}"))
    }
}

/// Where a node's pods come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file names them.
    File(PathBuf),
    /// An agent hands them over, on this socket.
    Agent(PathBuf),
    /// Labels say so, in the Kubernetes API.
    Kubernetes(Box<kubernetes::Config>),
}

/// Why a pod is not captured. Each names the thing, the reason and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Nothing is known about the pod yet.
    #[error(
        "no workload {0} in the mesh facts yet; until there is, what is captured of the pod waits and is then refused"
    )]
    NoFacts(String),
    /// Some facts have not been told at all yet.
    #[error("the control plane has not told of {0} yet; until it has, the pod's connections wait and are then refused")]
    NotTold(&'static str),
    /// The facts say that the pod has another service account.
    #[error("the pod's service account is {own:?}, the mesh facts say {facts:?}; make them agree")]
    ServiceAccount {
        /// What enrolment says.
        own: String,
        /// What the facts say.
        facts: String,
    },
    /// The facts do not give a valid identity.
    #[error("the workload's identity is not valid: {0}")]
    Identity(#[from] crate::mesh::name::NameError),
    /// The namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] crate::sys::netns::NetnsError),
    /// The namespace does not hold the pod's address: it is another pod's.
    #[error(
        "the namespace {path} does not hold the workload's address {missing} (it holds: {held}); check the netns path"
    )]
    NotThePod {
        /// The namespace.
        path: PathBuf,
        /// Which address is missing.
        missing: IpAddr,
        /// Which are there.
        held: String,
    },
    /// The namespace holds no address at all: it is being set up, or taken down with its pod.
    #[error("the namespace {0} holds no address: the pod's network is not set up yet, or is being taken down")]
    NoNetwork(PathBuf),
    /// The facts give the pod no address of its own, so its namespace cannot be told from another.
    #[error("workload {0} has no address of its own in the mesh facts (no workloadIps, or networkMode HostNetwork)")]
    NoOwnAddress(String),
    /// The namespace is that of the daemon or the host.
    #[error("the namespace {0} is the host's or the daemon's own; capturing it would cut the node off")]
    Host(PathBuf),
    /// The facts give the pod another identity than it was captured with.
    #[error("the pod's identity has changed from {0} to {1}; capturing it anew")]
    IdentityChanged(crate::mesh::SpiffeName, crate::mesh::SpiffeName),
    /// Another pod has this namespace.
    #[error("the namespace {0} is that of pod {1} already; a namespace belongs to one pod")]
    Taken(PathBuf, String),
    /// A port cannot be bound in the namespace.
    #[error("port {port} cannot be bound in the pod's namespace: {source}; {}", port_hint(source))]
    Port {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The rules cannot be written.
    #[error(transparent)]
    Redirect(#[from] redirect::RedirectError),
    /// A probe from inside was not captured.
    #[error(transparent)]
    Verify(#[from] capture_check::VerifyError),
    /// Changes inside the namespace cannot be heard of.
    #[error("changes inside the pod's namespace cannot be heard of: {0}; they are found within 30 s")]
    Deaf(std::io::Error),
    /// The namespace was there, and is no more.
    #[error("the namespace {0} has gone (the pod has ended?)")]
    Vanished(PathBuf),
}

fn port_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => "the daemon needs CAP_NET_ADMIN",
        std::io::ErrorKind::AddrInUse => "something else listens there",
        _ => "see the kernel's reason",
    }
}

impl CaptureError {
    /// The word in `culvert_capture_failures_total{reason}`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NoFacts(_) => "no_facts",
            Self::NotTold(_) => "not_told",
            Self::ServiceAccount { .. } => "service_account",
            Self::Identity(_) => "identity",
            Self::Netns(_) => "netns",
            Self::NotThePod { .. } => "not_the_pod",
            Self::NoNetwork(_) => "no_network",
            Self::NoOwnAddress(_) => "no_own_address",
            Self::Host(_) => "host_netns",
            Self::IdentityChanged(..) => "identity_changed",
            Self::Taken(..) => "netns_taken",
            Self::Port { .. } => "port",
            Self::Redirect(_) => "redirect",
            Self::Verify(_) => "verify",
            Self::Deaf(_) => "deaf",
            Self::Vanished(_) => "vanished",
        }
    }
}
