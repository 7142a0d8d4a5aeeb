//! The CA that signs certificates: the built-in one, or one that speaks Istio's protocol.

use super::builtin::{Builtin, BuiltinError};
use super::istio_ca::{IstioCa, IstioCaError};
use super::signed::SignedCertificate;
use crate::mesh::{SpiffeName, Text};

/// A certificate authority, and whose certificates are requested from it.
#[derive(Debug)]
pub struct CertificateAuthority {
    /// What signs.
    pub signer: Signer,
    /// Namespace and service account of the only workload for which a certificate may be requested; `None` where the
    /// daemon serves a node.
    pub only: Option<(Text, Text)>,
}

/// What signs certificates.
#[derive(Debug)]
pub enum Signer {
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
    /// The identity is another workload's.
    #[error("a certificate of {0} is not requested: in dedicated mode the daemon asks for its own workload's only")]
    NotOwn(SpiffeName),
}

impl CertificateAuthority {
    /// Generates a key for `identity` and has it signed. The CA has its own deadline.
    pub async fn sign(&self, identity: &SpiffeName) -> Result<SignedCertificate, AuthorityError> {
        let is_other = |(namespace, account): &(Text, Text)| {
            *namespace != identity.namespace || *account != identity.service_account
        };
        if self.only.as_ref().is_some_and(is_other) {
            return Err(AuthorityError::NotOwn(identity.clone()));
        }
        match &self.signer {
            Signer::Builtin(ca) => Ok(ca.sign(identity)?),
            Signer::Istio(ca) => Ok(ca.sign(identity, self.only.is_none()).await?),
        }
    }
}

impl AuthorityError {
    /// Whether this may only mean that the CA does not know the pod yet.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Istio(error) if error.is_refusal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_workload_that_serves_itself_gets_a_certificate_of_its_own_account_only() {
        let folder = std::env::temp_dir().join(format!("culvert-own-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        Builtin::init(&folder).unwrap();
        let signer = || Signer::Builtin(Builtin::new(&folder, Duration::from_secs(3600)));
        let own = CertificateAuthority { signer: signer(), only: Some(("shop".into(), "cart".into())) };
        let any = CertificateAuthority { signer: signer(), only: None };
        let name = |domain, namespace, account| SpiffeName::new(domain, namespace, account).unwrap();
        for (identity, allowed) in [
            (name("cluster.local", "shop", "cart"), true),
            // The mesh facts say the trust domain.
            (name("other.local", "shop", "cart"), true),
            (name("cluster.local", "shop", "till"), false),
            (name("cluster.local", "other", "cart"), false),
        ] {
            assert!(any.sign(&identity).await.is_ok());
            let refused = matches!(own.sign(&identity).await, Err(AuthorityError::NotOwn(named)) if named == identity);
            assert_eq!(refused, !allowed, "{identity}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
