//! The TLS settings of one identity, built once per certificate generation and shared by every connection.
//!
//! TLS 1.3 only, AES-GCM, X25519MLKEM768 first; ALPN `h2`; no SNI, no resumption, no tickets: a session resumed at
//! another workload would skip the verification of who it is.

use super::revoked::{Chain, List, Revocations};
use super::signed::SignedCertificate;
use super::verify::{ClientVerifier, ServerVerifier, Vouch};
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

/// Bytes that TLS may hold encrypted and unsent: a whole frame at once, or it goes out in pieces.
pub const TLS_BUFFER_BYTES: usize = 512 * 1024;

/// Buffer under TLS of each tunnel: without it TLS reads a few KiB per system call.
pub const READ_BUFFER_BYTES: usize = 128 * 1024;

/// Why TLS settings cannot be made of a certificate.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// No usable root certificate.
    #[error("no usable root certificate: {0}")]
    Roots(String),
    /// The certificate does not chain to the roots that came with it.
    #[error(
        "the new certificate is not vouched for by the roots that came with it ({0}): the CA's key and root do not belong together"
    )]
    NotOurs(#[source] rustls::Error),
    /// It begins in the future, or has ended, by our clock.
    #[error("the new certificate is not valid now ({0}): the clocks of the CA and of this node differ")]
    Clock(#[source] rustls::Error),
    /// The certificate is for another key.
    #[error("the new certificate is not for the key that was made for it")]
    OtherKey,
    /// Key or chain are not usable.
    #[error("key or certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// Whom an identity trusts.
#[derive(Clone, Debug)]
pub struct Trust {
    /// Roots by which peers are verified.
    pub roots: Vec<CertificateDer<'static>>,
    /// Trust domains that peers may be of: its own first.
    pub trust_domains: Vec<Text>,
    /// Certificates that have been revoked.
    pub revocations: Arc<Revocations>,
    /// Told when a peer comes whose root is not among these.
    pub unknown_root: Arc<Notify>,
}

/// Key, certificate and TLS settings of one identity.
pub struct Credentials {
    /// Who this proves.
    pub identity: SpiffeName,
    /// Differs between any two certificates of one process.
    pub generation: u64,
    /// When it ends.
    pub not_after: SystemTime,
    /// As it came.
    pub(super) signed: SignedCertificate,
    pub(super) trust: Trust,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    vouch: Vouch,
    /// The revoked certificates by which they were built.
    revoked: Arc<List>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({} generation {})", self.identity, self.generation)
    }
}

impl Credentials {
    /// Builds the settings. The certificate must be vouched for by the roots of `trust`: one that is not would replace one
    /// that works.
    pub fn build(
        identity: SpiffeName,
        generation: u64,
        signed: SignedCertificate,
        trust: Trust,
    ) -> Result<Self, CredentialsError> {
        let (provider, revoked) = (Arc::new(provider()), trust.revocations.current());
        let mut roots = RootCertStore::empty();
        // A root, or what the CA calls one, may have been revoked like any other certificate.
        for root in trust.roots.iter().filter(|root| !trust.revocations.lists(std::slice::from_ref(*root))) {
            roots.add(root.clone()).map_err(|error| CredentialsError::Roots(error.to_string()))?;
        }
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| CredentialsError::Roots(error.to_string()))?;
        own(&*chain, &signed)?;
        let key = provider.key_provider.load_private_key(signed.key.clone_key())?;
        let certified = CertifiedKey::new(signed.chain.clone(), key);
        certified.keys_match().map_err(|_| CredentialsError::OtherKey)?;
        let certified = Arc::new(SingleCertAndKey::from(certified));

        let vouch = Vouch { chain, revocations: trust.revocations.clone(), unknown_root: trust.unknown_root.clone() };
        let verifier = ClientVerifier { vouch: vouch.clone(), trust_domains: trust.trust_domains.clone() };
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(certified.clone());
        server.alpn_protocols = vec![ALPN_H2.to_vec()];
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});

        let trust_domains = trust.trust_domains.clone();
        let nobody = Arc::new(ServerVerifier { vouch: vouch.clone(), trust_domains, expected: Vec::new() });
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(nobody)
            .with_client_cert_resolver(certified);
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();

        let not_after = signed.not_after;
        Ok(Self { identity, generation, not_after, signed, trust, server: Arc::new(server), client, vouch, revoked })
    }

    /// Builds settings that trust nobody but the roots that came with the certificate.
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

    /// The same certificate with other trust. Tunnels that use it go on: it is the same generation.
    pub fn with_trust(&self, trust: Trust) -> Result<Self, CredentialsError> {
        let trust = Trust { unknown_root: self.trust.unknown_root.clone(), ..trust };
        Self::build(self.identity.clone(), self.generation, self.signed.clone(), trust)
    }

    /// Whether the roots that came with this certificate vouch for another one.
    pub(super) fn would_vouch_for(&self, other: &Self) -> bool {
        let trust = Trust { roots: self.signed.roots.clone(), ..self.trust.clone() };
        Self::build(other.identity.clone(), other.generation, other.signed.clone(), trust).is_ok()
    }

    /// Whether the list of revoked certificates is still the one by which they were built.
    pub(super) fn is_current(&self) -> bool {
        Arc::ptr_eq(&self.revoked, &self.trust.revocations.current())
    }

    /// Whether it has begun and not ended, by our clock.
    pub(super) fn is_valid(&self) -> bool {
        let now = SystemTime::now();
        self.signed.not_before <= now && now < self.not_after
    }

    /// Resolves when this certificate, or one that vouches for it, is revoked.
    pub(super) async fn own_revoked(&self) {
        self.watch(self.chain()).revoked().await;
    }

    /// Time until it ends.
    pub(super) fn time_left(&self) -> Duration {
        self.not_after.duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// Its length.
    pub(super) fn life(&self) -> Duration {
        self.signed.life
    }

    /// The certificate, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.signed.chain
    }

    /// Roots by which peers are verified.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.trust.roots
    }

    /// Resolves when a peer has come whose root is not known.
    pub async fn unknown_root(&self) {
        self.trust.unknown_root.notified().await;
    }

    /// What is needed to hear that a peer of ours is revoked later.
    pub fn watch(&self, peer: &[CertificateDer<'_>]) -> Chain {
        self.trust.revocations.watch(peer)
    }

    /// Settings for accepting peers.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Settings for a connection to a server that must prove one of `expected`.
    pub fn client(&self, expected: &[SpiffeName]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let (vouch, trust_domains) = (self.vouch.clone(), self.trust.trust_domains.clone());
        let verifier = ServerVerifier { vouch, trust_domains, expected: expected.to_vec() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

/// Checks a new certificate by the roots that are to vouch for it.
fn own(chain: &dyn ClientCertVerifier, signed: &SignedCertificate) -> Result<(), CredentialsError> {
    let Some((leaf, intermediates)) = signed.chain.split_first() else {
        return Err(CredentialsError::Roots("the certificate is missing".into()));
    };
    match chain.verify_client_cert(leaf, intermediates, UnixTime::now()) {
        Ok(_) => Ok(()),
        Err(error) if is_about_time(&error) => Err(CredentialsError::Clock(error)),
        Err(error) => Err(CredentialsError::NotOurs(error)),
    }
}

/// What a finished handshake agreed on, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1_3`.
    pub version: &'static str,
    /// Key exchange group, e.g. `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// Cipher suite.
    pub cipher: &'static str,
}

impl TlsFacts {
    /// Reads them off a connection; unknown before its handshake is done.
    pub fn of(connection: &rustls::CommonState) -> Self {
        let name = |text: Option<&'static str>| text.unwrap_or("unknown");
        Self {
            version: name(connection.protocol_version().and_then(|v| v.as_str())),
            key_exchange: name(connection.negotiated_key_exchange_group().and_then(|g| g.name().as_str())),
            cipher: name(connection.negotiated_cipher_suite().and_then(|s| s.suite().as_str())),
        }
    }
}
