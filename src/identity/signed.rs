//! What a CA returns for one signing request.

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::time::{Duration, SystemTime};

/// A signed certificate with its key and the CA's roots.
#[derive(Debug)]
pub struct SignedCertificate {
    /// Private key of the leaf.
    pub key: PrivateKeyDer<'static>,
    /// The leaf, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Root certificates that the CA named, by which peers are verified.
    pub roots: Vec<CertificateDer<'static>>,
    /// Start of the validity.
    pub not_before: SystemTime,
    /// End of the validity.
    pub not_after: SystemTime,
    /// Length of the validity. Renewal times are derived from it, because neither this node's clock nor the CA's needs
    /// to be right for that.
    pub life: Duration,
}

impl Clone for SignedCertificate {
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
