//! The control plane of a mesh without Istio: watches the Kubernetes API and serves what daemons need, by the protocols
//! that they speak with istiod.
//!
//! | folder | what it does |
//! |---|---|
//! | `watch/` | follows the objects of the Kubernetes API and keeps what matters of them |
//! | `facts/` | turns Kubernetes objects into mesh facts; pure |
//! | `policies/` | turns AuthorizationPolicies and PeerAuthentications into mesh facts, and says what of them does not hold; pure |
//! | `serve/` | serves mesh facts (delta xDS) and certificates by gRPC, and health, metrics and dumps by HTTP |
//! | `ca/` | signs certificates, decides who may have which, and keeps the roots |
//!
//! They share three things: the [`Catalog`] of what is served, the [`RunningPods`] by which callers are judged, and the
//! [`Caller`] that the API says a token belongs to.

pub mod ca;
pub mod caller;
pub mod catalog;
pub mod facts;
pub mod policies;
pub mod running_pods;
pub mod serve;
pub mod watch;

pub use caller::Caller;
pub use catalog::Catalog;
pub use running_pods::RunningPods;

use crate::mesh::Text;
use crate::telemetry;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Settings of the control plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kubeconfig; `None` for the account of the control plane's own pod.
    pub kubeconfig: Option<PathBuf>,
    /// The cluster that it serves.
    pub cluster: Cluster,
    /// Port for daemons.
    pub port: u16,
    /// The certificate authority.
    pub ca: ca::Config,
    /// The log.
    pub log: telemetry::log::Config,
    /// The settings that were given, by variable, without secrets.
    pub settings: BTreeMap<&'static str, String>,
}

/// Names that are the same for a whole cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Namespace of the control plane, whose policies without a selector apply to the whole mesh.
    pub namespace: Text,
    /// Trust domain of the identities.
    pub trust_domain: Text,
    /// Name of the cluster in uids.
    pub id: Text,
    /// Domain of the cluster's DNS names.
    pub domain: Text,
}
