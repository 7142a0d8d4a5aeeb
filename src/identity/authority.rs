//! Who signs certificates: the built-in CA, or one that speaks Istio's protocol.

use super::builtin::{Builtin, BuiltinError};
use super::istio_ca::{IstioCa, IstioCaError};
use crate::mesh::SpiffeName;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::time::{Duration, SystemTime};

/// What a signing gives.
#[derive(Debug)]
pub struct Signed {
    /// Private key of the leaf.
    pub key: PrivateKeyDer<'static>,
    /// Leaf, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Root certificates by which peers are verified.
    pub roots: Vec<CertificateDer<'static>>,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// How long it is valid in all. Renewal is reckoned by it and not by the clocks, ours or the CA's.
    pub life: Duration,
}

impl Clone for Signed {
    fn clone(&self) -> Self {
        Self {
            key: self.key.clone_key(),
            chain: self.chain.clone(),
            roots: self.roots.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            life: self.life,
        }
    }
}

/// A certificate authority.
#[derive(Debug)]
pub enum Authority {
    /// A directory.
    Builtin(Builtin),
    /// Istio's CA.
    Istio(Box<IstioCa>),
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The built-in CA.
    #[error(transparent)]
    Builtin(#[from] BuiltinError),
    /// Istio's CA.
    #[error(transparent)]
    Istio(#[from] IstioCaError),
}

impl Authority {
    /// Signs a fresh key for `identity`; takes as long as the CA's deadline at most.
    pub async fn sign(&self, identity: &SpiffeName) -> Result<Signed, AuthorityError> {
        match self {
            Self::Builtin(ca) => Ok(ca.sign(identity)?),
            Self::Istio(ca) => Ok(ca.sign(identity).await?),
        }
    }
}

impl AuthorityError {
    /// Whether a CA says this of a pod that it has not heard of yet.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Istio(error) if error.is_refusal())
    }
}
