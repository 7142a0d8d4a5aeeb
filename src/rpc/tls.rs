//! TLS towards the control plane, and the cryptography that everything of ours uses.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{AlertDescription, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether only post-quantum key exchange is offered and accepted.
static ONLY_POST_QUANTUM: AtomicBool = AtomicBool::new(false);

/// Where the certificates come from that vouch for the control plane.
#[derive(Clone, Debug)]
pub enum Roots {
    /// A file, which may appear late and change.
    File(PathBuf),
    /// What the system trusts.
    System,
    /// PEM text.
    Inline(String),
}

/// Why the control plane's roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("the control plane's root certificates {path} cannot be read: {source}; waiting for them")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing usable in them.
    #[error("the control plane's root certificates ({0}) hold no usable certificate: {1}")]
    Content(String, String),
    /// The control plane's name cannot be one.
    #[error("{0:?} is no name that a certificate can have")]
    Name(String),
}

/// Whether a certificate is refused because it is not valid now, by our clock.
pub fn is_about_time(error: &Error) -> bool {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let Error::InvalidCertificate(reason) = error else { return false };
    matches!(reason, Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
}

/// What to say of a handshake that failed because a certificate is not valid now, by either side's clock.
pub fn clock(error: &io::Error) -> Option<&'static str> {
    const OURS: &str =
        "by this node's clock that certificate is not valid now: one of the two clocks is off, or nobody renews it";
    const THEIRS: &str = "by the far end's clock our certificate is not valid now: one of the two clocks is off";
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) if is_about_time(error) => Some(OURS),
        Some(Error::AlertReceived(AlertDescription::CertificateExpired)) => Some(THEIRS),
        Some(_) => None,
        // HTTP/2 keeps the text alone.
        None => error.to_string().contains("alert: CertificateExpired").then_some(THEIRS),
    }
}

/// The error of a handshake, with what it means where it is about time.
pub fn with_clock(error: &io::Error) -> String {
    clock(error).map_or_else(|| error.to_string(), |clock| format!("{error}; {clock}"))
}

/// Only post-quantum key exchange from now on (`COMPLIANCE_POLICY=pqc`). Called once, before anything connects.
pub fn only_post_quantum() {
    ONLY_POST_QUANTUM.store(true, Ordering::Relaxed);
}

/// aws-lc-rs with AES-GCM suites of TLS 1.3 and the post-quantum hybrid first.
pub fn provider() -> CryptoProvider {
    let mut kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    if !ONLY_POST_QUANTUM.load(Ordering::Relaxed) {
        kx_groups.extend([aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1, aws_lc_rs::kx_group::SECP384R1]);
    }
    CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups,
        ..aws_lc_rs::default_provider()
    }
}

/// Settings for one connection to the control plane.
pub(super) struct Client {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

/// Reads the roots and makes the settings: TLS 1.3, `h2`, the server's name or the other one.
pub(super) fn client(roots: &Roots, host: &str, alt_host: Option<&str>) -> Result<Client, RootsError> {
    let name = |text: &str| ServerName::try_from(text.to_owned()).map_err(|_| RootsError::Name(text.to_owned()));
    let (host, alt) = (name(host)?, alt_host.map(name).transpose()?);
    let provider = Arc::new(provider());
    let content = |reason: String| RootsError::Content(roots.name(), reason);
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots.read()?), provider.clone())
        .build()
        .map_err(|error| content(error.to_string()))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| content(error.to_string()))?;
    let mut config =
        config.dangerous().with_custom_certificate_verifier(Arc::new(EitherName { chain, alt })).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Client { config: Arc::new(config), name: host })
}

impl Roots {
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::System => "SYSTEM".into(),
            Self::Inline(_) => "given inline".into(),
        }
    }

    fn read(&self) -> Result<RootCertStore, RootsError> {
        let content = |reason: String| RootsError::Content(self.name(), reason);
        let certificates: Vec<CertificateDer<'static>> = match self {
            Self::File(path) => {
                let text = std::fs::read(path).map_err(|source| RootsError::Read { path: path.clone(), source })?;
                from_pem(&text).map_err(content)?
            }
            Self::Inline(text) => from_pem(text.as_bytes()).map_err(content)?,
            Self::System => rustls_native_certs::load_native_certs().certs,
        };
        let mut store = RootCertStore::empty();
        let (added, _) = store.add_parsable_certificates(certificates);
        if added == 0 { Err(content("none could be parsed".into())) } else { Ok(store) }
    }
}

/// All certificates of a PEM text, other items left out.
pub fn from_pem(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// Verifies a server by its name, or by another that it may have as well.
#[derive(Debug)]
struct EitherName {
    chain: Arc<WebPkiServerVerifier>,
    alt: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let by_name = self.chain.verify_server_cert(end_entity, intermediates, name, ocsp, now);
        match (&by_name, &self.alt) {
            (Err(_), Some(alt)) => self.chain.verify_server_cert(end_entity, intermediates, alt, ocsp, now),
            _ => by_name,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::CertificateError;

    #[test]
    fn a_handshake_that_fails_by_a_clock_says_whose() {
        let of = |error: Error| clock(&io::Error::other(error)).unwrap_or_default();
        for error in [CertificateError::Expired, CertificateError::NotValidYet] {
            assert!(of(Error::InvalidCertificate(error)).starts_with("by this node's clock"));
        }
        assert!(of(Error::AlertReceived(AlertDescription::CertificateExpired)).starts_with("by the far end's clock"));
        // As HTTP/2 hands it on.
        let text = io::Error::other("received fatal alert: CertificateExpired");
        assert!(clock(&text).is_some_and(|said| said.starts_with("by the far end's clock")));
        for other in [Error::InvalidCertificate(CertificateError::UnknownIssuer), Error::DecryptError] {
            assert_eq!(of(other), "");
        }
        let error = io::Error::other(Error::InvalidCertificate(CertificateError::Expired));
        let said = crate::rpc::ConnectError::Tls { host: "istiod".into(), source: error }.to_string();
        assert!(said.starts_with("istiod is not who it must be: ") && said.contains("one of the two clocks"), "{said}");
    }
}
