//! What enrolment says about a pod, as plain types: its identity, its network namespace and its own settings.

use crate::mesh::Text;
use crate::sys::netns::{Netns, NetnsError};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// Where a pod's network namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsRef {
    /// Behind a path.
    Path(PathBuf),
    /// An open descriptor.
    Handle(Netns),
}

impl NetnsRef {
    /// Opens the namespace.
    pub fn open(&self) -> Result<Netns, NetnsError> {
        match self {
            Self::Path(path) => Netns::open(path),
            Self::Handle(netns) => Ok(netns.clone()),
        }
    }
}

impl fmt::Display for NetnsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Handle(netns) => netns.path().display().fmt(f),
        }
    }
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Name of the pod.
    pub name: Text,
    /// Its Kubernetes namespace.
    pub namespace: Text,
    /// Its service account.
    pub service_account: Text,
    /// Its uid, unique on the node.
    pub uid: Text,
    /// Its network namespace.
    pub netns: NetnsRef,
    /// The pod's addresses, if the enrolment source supplied them. The network namespace must then hold one of them,
    /// and the pod is redirected before its workload is known; its connections wait, and are not passed in plaintext.
    pub ips: Vec<IpAddr>,
    /// Settings, which may change while the pod lives.
    pub settings: Settings,
    /// Capabilities over its own network, if they are known.
    pub powers: Option<Powers>,
}

impl PodSpec {
    /// Whether both describe the same pod in the same network namespace, whatever their settings.
    pub fn is_same_pod(&self, other: &Self) -> bool {
        let who = |spec: &Self| (spec.name.clone(), spec.namespace.clone(), spec.service_account.clone());
        self.uid == other.uid && self.netns == other.netns && who(self) == who(other)
    }
}

/// Capabilities of a pod inside its own network namespace, which nothing outside can prevent. With either, a pod can
/// mark its packets as the daemon's, or send frames past its rules; that traffic is not captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Powers {
    /// CAP_NET_ADMIN: it may change its rules, and mark packets.
    pub net_admin: bool,
    /// CAP_NET_RAW: it may send arbitrary frames, and mark packets.
    pub net_raw: bool,
}

/// A pod's own settings (Istio's annotations). Changes take effect on a running pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Whether its DNS is captured; `None`: the node's default.
    pub dns: Option<bool>,
    /// Whether inbound plaintext is not redirected ("ingress mode"). Policy is not enforced on it.
    pub bypass_inbound: bool,
    /// Inbound TCP on these interfaces is treated as the pod's own outbound traffic.
    pub virtual_interfaces: Vec<Interface>,
}

/// Name of a network interface that is safe to write into an nft rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface(Text);

/// Most virtual interfaces that one pod may name.
pub const INTERFACES_MAX: usize = 64;

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Interface {
    /// Checks a name. The kernel allows other names as well; these contain nothing that an nft script could misread.
    pub fn new(name: &str) -> Option<Self> {
        let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
        ((1..=15).contains(&name.len()) && name.bytes().all(fine)).then(|| Self(name.into()))
    }
}
