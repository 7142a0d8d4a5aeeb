//! The CA that signs certificates: the built-in one, or one that speaks Istio's protocol.

use super::builtin::{Builtin, BuiltinError};
use super::istio_ca::{IstioCa, IstioCaError};
use super::signed::SignedCertificate;
use crate::mesh::SpiffeName;

/// A certificate authority.
#[derive(Debug)]
pub enum CertificateAuthority {
    /// The built-in CA, in a directory.
    Builtin(Builtin),
    /// Istio's CA.
    Istio(Box<IstioCa>),
}

/// Why the CA has not signed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The built-in CA failed.
    #[error(transparent)]
    Builtin(#[from] BuiltinError),
    /// Istio's CA failed, or could not be asked.
    #[error(transparent)]
    Istio(#[from] IstioCaError),
}

impl CertificateAuthority {
    /// Generates a key for `identity` and has it signed. The CA has its own deadline.
    pub async fn sign(&self, identity: &SpiffeName) -> Result<SignedCertificate, AuthorityError> {
        match self {
            Self::Builtin(ca) => Ok(ca.sign(identity)?),
            Self::Istio(ca) => Ok(ca.sign(identity).await?),
        }
    }
}

impl AuthorityError {
    /// Whether this may only mean that the CA does not know the pod yet.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Istio(error) if error.is_refusal())
    }
}
