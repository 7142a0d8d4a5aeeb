//! Errors of capture: why a pod is not captured.

use super::capture_check::{CHECK_EVERY, CaptureCheckError};
use super::redirect::RedirectError;
use crate::mesh::SpiffeName;
use crate::mesh::name::NameError;
use crate::sys::netns::NetnsError;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// Why a pod is not captured. Each message names the thing, the reason and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The mesh facts do not contain the pod yet.
    #[error("no workload {0} in the mesh facts yet; until there is, the pod's connections wait and are then refused")]
    NoFacts(String),
    /// The control plane has not sent all facts of one type yet.
    #[error("the control plane has not sent {0} yet; until it has, the pod's connections wait and are then refused")]
    FactsIncomplete(&'static str),
    /// The mesh facts give the pod another service account.
    #[error("the pod's service account is {own:?}, the mesh facts say {facts:?}; make them agree")]
    ServiceAccount {
        /// Service account by enrolment.
        own: String,
        /// Service account by the mesh facts.
        facts: String,
    },
    /// The mesh facts do not give a valid identity.
    #[error("the workload's identity is not valid: {0}")]
    Identity(#[from] NameError),
    /// The network namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The network namespace does not hold the pod's address, so it is another pod's.
    #[error(
        "the namespace {path} does not hold the workload's address {missing} (it holds: {held}); check the netns path"
    )]
    NotThePod {
        /// The namespace.
        path: PathBuf,
        /// The address that is missing.
        missing: IpAddr,
        /// The addresses that it holds.
        held: String,
    },
    /// The network namespace holds no address at all: it is being set up, or removed with its pod.
    #[error("the namespace {0} holds no address: the pod's network is not set up yet, or is being taken down")]
    NoNetwork(PathBuf),
    /// The mesh facts give the pod no address of its own, so its namespace cannot be verified.
    #[error("workload {0} has no address of its own in the mesh facts (no workloadIps, or networkMode HostNetwork)")]
    NoOwnAddress(String),
    /// The network namespace is the daemon's or the host's.
    #[error("the namespace {0} is the host's or the daemon's own; capturing it would cut the node off")]
    HostNetns(PathBuf),
    /// `culvert redirect` has written the rules of this network namespace.
    #[error(
        "the pod carries its own traffic already (culvert redirect has been run in it); a pod is captured by its node or by itself, not by \
         both: label it istio.io/dataplane-mode=none, or remove the sidecar"
    )]
    CarriesItself,
    /// It cannot be told whether the pod carries its own traffic.
    #[error("cannot tell whether the pod carries its own traffic (culvert redirect): {0}; trying again")]
    RulesUnknown(io::Error),
    /// The mesh facts now give the pod another identity than it was captured with.
    #[error("the pod's identity has changed from {0} to {1}; capturing it again")]
    IdentityChanged(SpiffeName, SpiffeName),
    /// Another pod has this network namespace.
    #[error("the namespace {0} already belongs to pod {1}; a namespace belongs to one pod")]
    NetnsTaken(PathBuf, String),
    /// A port cannot be bound in the network namespace.
    #[error("port {port} cannot be bound in the pod's namespace: {source}; {}", port_hint(source))]
    Port {
        /// The port.
        port: u16,
        /// The kernel's error.
        source: io::Error,
    },
    /// The redirection cannot be written.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// The capture check failed.
    #[error(transparent)]
    CheckFailed(#[from] CaptureCheckError),
    /// Changes in the network namespace are not announced to the daemon.
    #[error("cannot watch the pod's network namespace: {0}; falling back to a check every {every} s", every = CHECK_EVERY.as_secs())]
    ChangesUnavailable(io::Error),
    /// The network namespace no longer exists.
    #[error("the namespace {0} has gone (has the pod ended?)")]
    Vanished(PathBuf),
}

fn port_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "the daemon needs CAP_NET_ADMIN",
        io::ErrorKind::AddrInUse => "something else listens on it",
        _ => "see the kernel's reason",
    }
}

impl CaptureError {
    /// The value of `reason` in `culvert_capture_failures_total`.
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
            Self::CarriesItself => "carries_itself",
            Self::RulesUnknown(_) => "rules_unknown",
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
