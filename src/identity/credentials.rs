//! The TLS settings of one identity, built once for each certificate and again when trust changes, and shared by every
//! connection.
//!
//! TLS 1.3 only, with AES-GCM, X25519MLKEM768 preferred, and ALPN `h2`. There is no SNI, and there are no tickets and
//! no session resumption: a session that is resumed at another workload would skip the verification of its identity.

use super::revoked::{Chain, RevocationList, Revocations};
use super::signed::SignedCertificate;
use super::verify::{ChainVerifier, ClientVerifier, ServerVerifier};
use crate::crypto::{ALPN_H2, is_about_time, provider};
use crate::mesh::{SpiffeName, Text};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;

/// Why TLS settings cannot be built from a certificate.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// There is no usable root certificate.
    #[error("no usable root certificate: {0}")]
    Roots(String),
    /// The certificate does not chain to the roots that came with it.
    #[error(
        "the roots that came with the new certificate do not verify it ({0}): the CA's key and root do not belong together"
    )]
    NotOurs(#[source] rustls::Error),
    /// By this node's clock, its validity has not begun yet or has ended.
    #[error("the new certificate is not valid now ({0}): the clocks of the CA and of this node differ")]
    Clock(#[source] rustls::Error),
    /// The certificate was issued for another key.
    #[error("the new certificate does not belong to the key in its request")]
    OtherKey,
    /// Key or chain cannot be used.
    #[error("key or certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// Which peers an identity trusts.
#[derive(Clone, Debug)]
pub struct Trust {
    /// Roots that verify peers.
    pub roots: Vec<CertificateDer<'static>>,
    /// Trust domains of acceptable peers, its own first.
    pub trust_domains: Vec<Text>,
    /// Revoked certificates.
    pub revocations: Arc<Revocations>,
    /// Notified when a peer presents a certificate of an unknown root.
    pub unknown_root: Arc<Notify>,
}

/// Key, certificate and TLS settings of one identity.
pub struct Credentials {
    /// The identity that the certificate proves.
    pub identity: SpiffeName,
    /// Differs between any two certificates of one process.
    pub generation: u64,
    /// When the certificate expires.
    pub not_after: SystemTime,
    /// The answer of the CA.
    pub(super) signed: SignedCertificate,
    pub(super) trust: Trust,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    chain: ChainVerifier,
    /// The revocation list at the time of building.
    revoked: Arc<RevocationList>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({} generation {})", self.identity, self.generation)
    }
}

impl Credentials {
    /// Builds the settings. Fails if the roots of `trust` do not verify the certificate, because it would replace one
    /// that works.
    pub fn build(
        identity: SpiffeName,
        generation: u64,
        signed: SignedCertificate,
        trust: Trust,
    ) -> Result<Self, CredentialsError> {
        let (provider, revoked) = (Arc::new(provider()), trust.revocations.current());
        let mut roots = RootCertStore::empty();
        // The CA may name an intermediate as a root, and a CRL may list it like any other certificate.
        for root in trust.roots.iter().filter(|root| !trust.revocations.is_revoked(std::slice::from_ref(*root))) {
            roots.add(root.clone()).map_err(|error| CredentialsError::Roots(error.to_string()))?;
        }
        let webpki = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| CredentialsError::Roots(error.to_string()))?;
        verify_own(&*webpki, &signed)?;
        let key = provider.key_provider.load_private_key(signed.key.clone_key())?;
        let certified = CertifiedKey::new(signed.chain.clone(), key);
        certified.keys_match().map_err(|_| CredentialsError::OtherKey)?;
        let certified = Arc::new(SingleCertAndKey::from(certified));

        let chain =
            ChainVerifier { webpki, revocations: trust.revocations.clone(), unknown_root: trust.unknown_root.clone() };
        let verifier = ClientVerifier { chain: chain.clone(), trust_domains: trust.trust_domains.clone() };
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(certified.clone());
        server.alpn_protocols = vec![ALPN_H2.to_vec()];
        server.send_tls13_tickets = 0;
        // The tunnel protects its records itself, with the keys of the handshake.
        server.enable_secret_extraction = true;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});

        let trust_domains = trust.trust_domains.clone();
        // Refuses every server; `Credentials::client` replaces it for each connection.
        let refuse_all = Arc::new(ServerVerifier { chain: chain.clone(), trust_domains, expected: Vec::new() });
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(refuse_all)
            .with_client_cert_resolver(certified);
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        client.enable_sni = false;
        client.enable_secret_extraction = true;
        client.resumption = rustls::client::Resumption::disabled();

        let not_after = signed.not_after;
        Ok(Self { identity, generation, not_after, signed, trust, server: Arc::new(server), client, chain, revoked })
    }

    /// Builds settings that trust only the roots that came with the certificate.
    pub fn alone(identity: SpiffeName, signed: SignedCertificate) -> Result<Self, CredentialsError> {
        let trust_domains = vec![identity.trust_domain.clone()];
        let trust = Trust {
            roots: signed.roots.clone(),
            trust_domains,
            revocations: Arc::default(),
            unknown_root: Arc::default(),
        };
        Self::build(identity, 0, signed, trust)
    }

    /// The same certificate with other trust. The generation stays the same, so tunnels that use it continue.
    pub fn with_trust(&self, trust: Trust) -> Result<Self, CredentialsError> {
        let trust = Trust { unknown_root: self.trust.unknown_root.clone(), ..trust };
        Self::build(self.identity.clone(), self.generation, self.signed.clone(), trust)
    }

    /// Whether the roots that came with this certificate verify another one.
    pub(super) fn own_roots_verify(&self, other: &Self) -> bool {
        let trust = Trust { roots: self.signed.roots.clone(), ..self.trust.clone() };
        Self::build(other.identity.clone(), other.generation, other.signed.clone(), trust).is_ok()
    }

    /// Whether the revocation list is still the one that these were built with.
    pub(super) fn is_current(&self) -> bool {
        Arc::ptr_eq(&self.revoked, &self.trust.revocations.current())
    }

    /// Whether the certificate is valid now, by this node's clock.
    pub(super) fn is_valid(&self) -> bool {
        let now = SystemTime::now();
        self.signed.not_before <= now && now < self.not_after
    }

    /// Resolves when this certificate, or one in its chain, is revoked.
    pub(super) async fn own_revoked(&self) {
        self.watch(self.chain()).revoked().await;
    }

    /// Time until the certificate expires.
    pub(super) fn time_left(&self) -> Duration {
        self.not_after.duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// Length of the certificate's validity.
    pub(super) fn life(&self) -> Duration {
        self.signed.life
    }

    /// The certificate, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.signed.chain
    }

    /// Roots that verify peers.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.trust.roots
    }

    /// Resolves when a peer has presented a certificate of an unknown root.
    pub async fn unknown_root(&self) {
        self.trust.unknown_root.notified().await;
    }

    /// A handle that reports when a peer's chain is revoked or expires.
    pub fn watch(&self, peer: &[CertificateDer<'_>]) -> Chain {
        self.trust.revocations.watch(peer)
    }

    /// Settings for accepting peers.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Settings for a connection to a server that must have one of the `expected` identities.
    pub fn client(&self, expected: &[SpiffeName]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let (chain, trust_domains) = (self.chain.clone(), self.trust.trust_domains.clone());
        let verifier = ServerVerifier { chain, trust_domains, expected: expected.to_vec() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

/// Verifies a new certificate of our own by the trusted roots.
fn verify_own(webpki: &dyn ClientCertVerifier, signed: &SignedCertificate) -> Result<(), CredentialsError> {
    let Some((leaf, intermediates)) = signed.chain.split_first() else {
        return Err(CredentialsError::Roots("the certificate is missing".into()));
    };
    match webpki.verify_client_cert(leaf, intermediates, UnixTime::now()) {
        Ok(_) => Ok(()),
        Err(error) if is_about_time(&error) => Err(CredentialsError::Clock(error)),
        Err(error) => Err(CredentialsError::NotOurs(error)),
    }
}

/// What the far end of a tunnel has proven. All connections of the tunnel share it.
#[derive(Debug, PartialEq, Eq)]
pub struct Proven {
    /// Its identity.
    pub identity: SpiffeName,
    /// The identity of the gateway, if the tunnel leads through one to another network.
    pub gateway: Option<SpiffeName>,
    /// What its handshake agreed on.
    pub tls: TlsFacts,
}

/// What a finished handshake agreed on, for the admin port and the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1_3`.
    pub version: &'static str,
    /// Key exchange group, e.g. `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// Cipher suite.
    pub cipher: &'static str,
}
