//! The control plane's own serving certificate, from its own CA. It is replaced while the server runs.

use super::issuing::{Issuing, Leaf};
use crate::crypto::{ALPN_H2, provider};
use arc_swap::ArcSwapOption;
use rcgen::KeyPair;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use zeroize::Zeroize;

/// Life of the certificate.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// Why there is no serving certificate.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// It cannot be signed.
    #[error("the serving certificate cannot be signed: {0}")]
    Sign(#[from] rcgen::Error),
    /// TLS cannot use it.
    #[error("the serving certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// The serving certificate.
#[derive(Default)]
pub struct Serving {
    current: ArcSwapOption<Certificate>,
}

struct Certificate {
    key: Arc<CertifiedKey>,
    /// The signing key that has signed it.
    version: String,
    not_after: SystemTime,
    renew: SystemTime,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serving(ready: {})", self.is_ready())
    }
}

impl Serving {
    /// Settings of the server, which present whatever certificate is the current one. Before there is one, handshakes
    /// fail.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        Ok(Arc::new(config))
    }

    /// Whether there is a certificate.
    pub fn is_ready(&self) -> bool {
        self.current.load().is_some()
    }

    /// Makes a new certificate if there is none, half of the life of the old one is over, or another key signs now.
    /// Returns when the certificate ends.
    pub fn renew(&self, issuing: &Issuing, names: &[String], now: SystemTime) -> Result<SystemTime, ServingError> {
        let version = format!("{} {}", issuing.origin, issuing.version);
        if let Some(current) = self.current.load().as_ref().filter(|c| c.version == version && now < c.renew) {
            return Ok(current.not_after);
        }
        let mut key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let (leaf, not_after) = issuing.leaf(&key, Leaf::Server(names), LIFE, now)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        key.zeroize();
        let certified = CertifiedKey::new(issuing.chain(leaf), provider().key_provider.load_private_key(der)?);
        let renew = now + not_after.duration_since(now).unwrap_or_default() / 2;
        self.current.store(Some(Arc::new(Certificate { key: Arc::new(certified), version, not_after, renew })));
        Ok(not_after)
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load().as_ref().map(|current| current.key.clone())
    }
}
