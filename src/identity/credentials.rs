//! The TLS settings of one identity, built once per certificate generation and shared by every connection.
//!
//! TLS 1.3 only, AES-GCM, X25519MLKEM768 first; ALPN `h2`; no SNI, no resumption, no tickets: a session resumed at
//! another workload would skip the verification of who it is.

use super::authority::Signed;
use super::verify::{ClientVerifier, ServerVerifier};
use crate::mesh::{SpiffeName, Text};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// Protocol name of HTTP/2 in TLS.
const ALPN_H2: &[u8] = b"h2";

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
    #[error("the new certificate is not vouched for by its own roots ({0}): ca.key and ca.pem do not belong together")]
    NotOurs(#[source] rustls::Error),
    /// Key or chain are not usable.
    #[error("key or certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// Key, certificate and TLS settings of one identity.
pub struct Credentials {
    /// Who this proves.
    pub identity: SpiffeName,
    /// Differs between any two certificates of one process.
    pub generation: u64,
    /// When it was signed.
    pub issued: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Roots by which peers are verified.
    pub roots: Vec<CertificateDer<'static>>,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    chain_verifier: Arc<dyn ClientCertVerifier>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({} generation {})", self.identity, self.generation)
    }
}

impl Credentials {
    /// Builds the settings. `aliases` are trust domains accepted beside the identity's own.
    pub fn build(
        identity: SpiffeName,
        generation: u64,
        signed: Signed,
        aliases: &[Text],
    ) -> Result<Self, CredentialsError> {
        let provider = Arc::new(provider());
        let mut roots = RootCertStore::empty();
        for root in &signed.roots {
            roots.add(root.clone()).map_err(|error| CredentialsError::Roots(error.to_string()))?;
        }
        let chain_verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| CredentialsError::Roots(error.to_string()))?;
        // A leaf that our own roots do not vouch for would replace one that works: the CA's key and root do not match.
        if let Some((leaf, intermediates)) = signed.chain.split_first() {
            chain_verifier
                .verify_client_cert(leaf, intermediates, UnixTime::now())
                .map_err(CredentialsError::NotOurs)?;
        }
        let key = provider.key_provider.load_private_key(signed.key)?;
        let certified = Arc::new(SingleCertAndKey::from(CertifiedKey::new(signed.chain.clone(), key)));

        let mut trust_domains = vec![identity.trust_domain.clone()];
        trust_domains.extend(aliases.iter().cloned());
        let verifier = Arc::new(ClientVerifier { chain: chain_verifier.clone(), trust_domains });
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(certified.clone());
        server.alpn_protocols = vec![ALPN_H2.to_vec()];
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});

        let nobody = Arc::new(ServerVerifier { chain: chain_verifier.clone(), expected: Vec::new() });
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(nobody)
            .with_client_cert_resolver(certified);
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();

        Ok(Self {
            identity,
            generation,
            issued: signed.issued,
            not_after: signed.not_after,
            chain: signed.chain,
            roots: signed.roots,
            server: Arc::new(server),
            client,
            chain_verifier,
        })
    }

    /// Settings for accepting peers.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Settings for a connection to a server that must prove one of `expected`.
    pub fn client(&self, expected: &[SpiffeName]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let chain = self.chain_verifier.clone();
        let verifier = ServerVerifier { chain, expected: expected.to_vec() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

/// aws-lc-rs with AES-GCM suites of TLS 1.3 and the post-quantum hybrid first.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
            aws_lc_rs::kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
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
