//! The certificate authority of the control plane.
//!
//! | file | what it does |
//! |---|---|
//! | `service` | answers one request: who asks, what it may have, the certificate |
//! | `review` | asks the Kubernetes API to whom a token belongs |
//! | `authorize` | decides who may have which identity; pure |
//! | `csr` | reads signing requests; pure |
//! | `issuing` | checks a signing key with its certificates, and signs with it |
//! | `authority` | keeps the signing key that is in force, and follows where it comes from |
//! | `kept`, `secrets`, `folder`, `cert_manager` | where it comes from: Secrets, a directory, cert-manager |
//! | `own_root`, `rotate` | the mesh's own root, and its replacement in steps |
//! | `serving` | the control plane's own serving certificate |
//! | `publish` | writes the roots into every namespace |
//!
//! The signing key is in no log line, no debug form and no dump. Where this program holds its bytes, they are overwritten
//! when they are dropped.

pub mod authority;
pub mod authorize;
mod cert_manager;
pub mod csr;
#[cfg(test)]
mod fake_api;
mod folder;
pub mod issuing;
mod kept;
pub mod metrics;
mod own_root;
pub mod publish;
mod quota;
pub mod review;
pub mod rotate;
mod secrets;
pub mod service;
mod serving;

pub use authority::Authority;
pub use authorize::{Account, Rules};
pub use metrics::Metrics;
pub use review::{ReviewError, Reviewer};
pub use service::Service;

use crate::mesh::Text;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of the certificate authority.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the signing key comes from.
    pub source: Source,
    /// Namespace of the control plane.
    pub namespace: Text,
    /// Trust domain of the identities that it signs for.
    pub trust_domain: Text,
    /// DNS names of the control plane, for its serving certificate.
    pub names: Vec<String>,
    /// A token must be for one of these audiences.
    pub audiences: Vec<String>,
    /// Service accounts of daemons, which may have certificates for the pods of their node.
    pub trusted: Vec<Account>,
    /// Life of a certificate, where the request does not say it.
    pub default_life: Duration,
    /// Longest life that may be asked for.
    pub max_life: Duration,
}

impl Config {
    /// Whether daemons, or the control plane, run in this namespace.
    pub fn has_daemons(&self, namespace: &str) -> bool {
        *self.namespace == *namespace || self.trusted.iter().any(|account| *account.namespace == *namespace)
    }
}

/// Where the signing key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Secret `cacerts` if there is one, else our own root in the Secret `culvert-ca`.
    Secrets,
    /// A directory with the files of the Secret `cacerts`.
    Folder(PathBuf),
    /// An intermediate certificate from cert-manager.
    CertManager(Issuer),
}

/// An issuer of cert-manager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// `Issuer`, `ClusterIssuer`, or an external kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its API group.
    pub group: String,
}
