//! Why a pod is not captured.

use super::capture_check::CaptureCheckError;
use super::redirect::RedirectError;
use crate::mesh::SpiffeName;
use crate::mesh::name::NameError;
use crate::sys::netns::NetnsError;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

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
    FactsIncomplete(&'static str),
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
    Identity(#[from] NameError),
    /// The namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
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
    HostNetns(PathBuf),
    /// The facts give the pod another identity than it was captured with.
    #[error("the pod's identity has changed from {0} to {1}; capturing it anew")]
    IdentityChanged(SpiffeName, SpiffeName),
    /// Another pod has this namespace.
    #[error("the namespace {0} is that of pod {1} already; a namespace belongs to one pod")]
    NetnsTaken(PathBuf, String),
    /// A port cannot be bound in the namespace.
    #[error("port {port} cannot be bound in the pod's namespace: {source}; {}", port_hint(source))]
    Port {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The rules cannot be written.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// A probe from inside was not captured.
    #[error(transparent)]
    CheckFailed(#[from] CaptureCheckError),
    /// Changes inside the namespace cannot be heard of.
    #[error("changes inside the pod's namespace cannot be heard of: {0}; they are found within 30 s")]
    ChangesUnavailable(io::Error),
    /// The namespace was there, and is no more.
    #[error("the namespace {0} has gone (the pod has ended?)")]
    Vanished(PathBuf),
}

fn port_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "the daemon needs CAP_NET_ADMIN",
        io::ErrorKind::AddrInUse => "something else listens there",
        _ => "see the kernel's reason",
    }
}

impl CaptureError {
    /// The word in `culvert_capture_failures_total{reason}`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NoFacts(_) => "no_facts",
            Self::FactsIncomplete(_) => "not_told",
            Self::ServiceAccount { .. } => "service_account",
            Self::Identity(_) => "identity",
            Self::Netns(_) => "netns",
            Self::NotThePod { .. } => "not_the_pod",
            Self::NoNetwork(_) => "no_network",
            Self::NoOwnAddress(_) => "no_own_address",
            Self::HostNetns(_) => "host_netns",
            Self::IdentityChanged(..) => "identity_changed",
            Self::NetnsTaken(..) => "netns_taken",
            Self::Port { .. } => "port",
            Self::Redirect(_) => "redirect",
            Self::CheckFailed(_) => "verify",
            Self::ChangesUnavailable(_) => "deaf",
            Self::Vanished(_) => "vanished",
        }
    }
}
