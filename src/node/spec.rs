//! What enrolment says of a pod, as plain types: who it is, where its network namespace is, and its own settings.

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
    /// In our hands.
    Handle(Netns),
}

impl NetnsRef {
    /// The namespace, as of now.
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
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Service account.
    pub service_account: Text,
    /// Uid; unique on the node.
    pub uid: Text,
    /// Its network namespace.
    pub netns: NetnsRef,
    /// Addresses that whoever enrols the pod says it has. Where there are any the namespace must hold one of them, and is
    /// captured before the mesh knows who the pod is: what it sends waits, and is not passed in plaintext.
    pub ips: Vec<IpAddr>,
    /// What may change while the pod lives.
    pub settings: Settings,
    /// What it may do to its own network, where that is known.
    pub powers: Option<Powers>,
}

impl PodSpec {
    /// Whether both speak of the same pod in the same namespace, with whatever settings.
    pub fn is_same_pod(&self, other: &Self) -> bool {
        let who = |spec: &Self| (spec.name.clone(), spec.namespace.clone(), spec.service_account.clone());
        self.uid == other.uid && self.netns == other.netns && who(self) == who(other)
    }
}

/// What a pod may do inside its own network namespace, which nobody outside of it can prevent: with either it can mark its
/// packets as ours are, or send frames past its rules, and is then not captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Powers {
    /// Whether it may change its rules, and mark packets.
    pub net_admin: bool,
    /// Whether it may send whatever frames it likes, and mark packets.
    pub net_raw: bool,
}

/// A pod's own settings (Istio's annotations); they take effect on a live pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Whether its DNS is taken; `None`: as the node is set.
    pub dns: Option<bool>,
    /// Plaintext that comes in is left alone ("ingress mode"). Policy is not enforced on it.
    pub bypass_inbound: bool,
    /// TCP that comes in through these interfaces is treated as the pod's own outbound traffic.
    pub virtual_interfaces: Vec<Interface>,
}

/// Name of a network interface that may stand in a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface(Text);

/// Interfaces that one pod may have named.
pub const INTERFACES_MAX: usize = 64;

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Interface {
    /// Checks a name: the kernel takes others, nothing that an nft script could misread.
    pub fn new(name: &str) -> Option<Self> {
        let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
        ((1..=15).contains(&name.len()) && name.bytes().all(fine)).then(|| Self(name.into()))
    }
}
