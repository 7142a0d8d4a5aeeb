//! Who signs certificates: the built-in CA, or one that speaks Istio's protocol.

use super::builtin::{Builtin, BuiltinError};
use super::istio_ca::{IstioCa, IstioCaError};
use super::signed::SignedCertificate;
use crate::mesh::SpiffeName;

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
    pub async fn sign(&self, identity: &SpiffeName) -> Result<SignedCertificate, AuthorityError> {
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
