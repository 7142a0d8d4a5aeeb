//! TLS towards the control plane and towards a collector: TLS 1.3. The server is verified by the configured roots and
//! by its name.

use crate::crypto::{certificates_from_pem, delegate_signatures, provider};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, Error, RootCertStore};
use std::path::PathBuf;
use std::sync::Arc;

/// The source of the roots that verify a server.
#[derive(Clone, Debug)]
pub enum Roots {
    /// A file, which may appear late and change.
    File(PathBuf),
    /// The roots of the operating system.
    System,
    /// PEM text.
    Inline(String),
}

/// Why roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("the root certificates {path} cannot be read: {source}; waiting for them")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// They contain no usable certificate.
    #[error("the root certificates ({0}) hold no usable certificate: {1}")]
    Content(String, String),
    /// The server's name is not a valid one.
    #[error("{0:?} is not a name that a certificate can have")]
    Name(String),
}

/// Settings for one connection to a server.
#[derive(Debug)]
pub struct Client {
    /// How it is verified.
    pub config: Arc<ClientConfig>,
    /// Its name.
    pub name: ServerName<'static>,
}

/// Reads the roots and builds the settings for a server named `host` or `alt_host` that speaks `alpn`.
pub fn client(roots: &Roots, host: &str, alt_host: Option<&str>, alpn: &[u8]) -> Result<Client, RootsError> {
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
    config.alpn_protocols = vec![alpn.to_vec()];
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
                certificates_from_pem(&text).map_err(content)?
            }
            Self::Inline(text) => certificates_from_pem(text.as_bytes()).map_err(content)?,
            Self::System => rustls_native_certs::load_native_certs().certs,
        };
        let mut store = RootCertStore::empty();
        let (added, _) = store.add_parsable_certificates(certificates);
        if added == 0 { Err(content("none could be parsed".into())) } else { Ok(store) }
    }
}

/// Verifies a server by its name, or by an alternative one.
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

    delegate_signatures!(chain);
}
