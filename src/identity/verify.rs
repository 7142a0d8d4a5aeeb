//! Verifies peers. webpki verifies the certificate chain; this file verifies revocation, trust domain and identity.
//!
//! The identity of a peer is its only URI SAN, which must be a SPIFFE name in its exact form.

use super::revoked::Revocations;
use crate::crypto::{delegate_signatures, with_clock_reason};
use crate::mesh::name::NameError;
use crate::mesh::{SpiffeName, Text};
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use std::io;
use std::sync::Arc;
use tokio::sync::Notify;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// Why a peer is refused although its chain may be valid.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// The certificate cannot be parsed.
    #[error("the peer's certificate cannot be parsed: {0}")]
    Unparsable(String),
    /// It does not have exactly one URI among its subject alternative names.
    #[error("the peer's certificate has {0} URI names, exactly one is needed")]
    NotOneUri(usize),
    /// The URI is not a SPIFFE name.
    #[error("the peer's URI name is not a workload identity: {0}")]
    Name(#[from] NameError),
    /// The certificate, or one in its chain, is revoked.
    #[error("the peer's certificate is revoked by CRL")]
    Revoked,
    /// The peer belongs to a trust domain that is not accepted.
    #[error("the peer {peer} is of a foreign trust domain (accepted: {accepted})")]
    TrustDomain {
        /// The identity of the peer.
        peer: SpiffeName,
        /// The accepted trust domains, joined.
        accepted: String,
    },
    /// The peer has another identity than the expected ones.
    #[error("the peer is {peer}, expected {expected}")]
    Unexpected {
        /// The identity of the peer.
        peer: SpiffeName,
        /// The expected identities, joined.
        expected: String,
    },
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// The reason of a failed handshake: our own if this file refused the peer's certificate, otherwise the library's.
pub fn tls_reason(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match inner {
        Some(Error::InvalidCertificate(CertificateError::Other(other))) => other.0.to_string(),
        _ => with_clock_reason(error),
    }
}

/// The identity in a certificate, which must have exactly one URI SAN: a SPIFFE name in its exact form.
pub fn peer_name(certificate: &CertificateDer<'_>) -> Result<SpiffeName, PeerError> {
    let unparsable = |error: &dyn std::fmt::Display| PeerError::Unparsable(error.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| unparsable(&e))?;
    let mut uris = Vec::new();
    for extension in parsed.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            uris.extend(names.general_names.iter().filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            }));
        }
    }
    match uris.as_slice() {
        [one] => Ok(SpiffeName::parse(one)?),
        other => Err(PeerError::NotOneUri(other.len())),
    }
}

/// Whether a handshake failed because the peer is revoked.
pub fn is_revoked(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let Some(Error::InvalidCertificate(CertificateError::Other(other))) = inner else { return false };
    matches!(other.0.downcast_ref::<PeerError>(), Some(PeerError::Revoked))
}

/// Verifies a peer's chain: signed by a known root, and not revoked.
#[derive(Clone, Debug)]
pub struct ChainVerifier {
    /// The verifier for client certificates, also used for servers: it checks no DNS name, and SPIFFE leaves have none.
    pub webpki: Arc<dyn ClientCertVerifier>,
    /// The revoked certificates.
    pub revocations: Arc<Revocations>,
    /// Notified when a chain ends at an unknown root.
    pub unknown_root: Arc<Notify>,
}

impl ChainVerifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeName, Error> {
        if let Err(error) = self.webpki.verify_client_cert(end_entity, intermediates, now) {
            // If an old and a new root have the same name, an unknown root shows as a bad signature.
            let unknown = CertificateError::UnknownIssuer;
            if matches!(&error, Error::InvalidCertificate(e) if *e == unknown || *e == CertificateError::BadSignature) {
                self.unknown_root.notify_one();
            }
            return Err(error);
        }
        let revoked =
            self.revocations.is_revoked(&[end_entity.as_ref().into()]) || self.revocations.is_revoked(intermediates);
        if revoked { Err(PeerError::Revoked.into()) } else { Ok(peer_name(end_entity)?) }
    }
}

/// Verifies servers: a valid chain, and one of the expected identities.
#[derive(Debug)]
pub struct ServerVerifier {
    /// Verifies the chain.
    pub chain: ChainVerifier,
    /// Trust domains that count as the same: our own and its aliases.
    pub trust_domains: Vec<Text>,
    /// Identities that the server may have. If empty, every server is refused.
    pub expected: Vec<SpiffeName>,
}

impl ServerVerifier {
    /// Whether a peer has an expected identity, or the same namespace and service account in a trust domain that counts
    /// as the same.
    fn is_expected(&self, peer: &SpiffeName) -> bool {
        let ours = |domain| self.trust_domains.contains(domain);
        self.expected.iter().any(|expected| {
            let same_domain = peer.trust_domain == expected.trust_domain
                || (ours(&peer.trust_domain) && ours(&expected.trust_domain));
            same_domain && peer.namespace == expected.namespace && peer.service_account == expected.service_account
        })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let peer = self.chain.check(end_entity, intermediates, now)?;
        if self.is_expected(&peer) {
            return Ok(ServerCertVerified::assertion());
        }
        let expected = join(self.expected.iter());
        Err(PeerError::Unexpected { peer, expected }.into())
    }

    delegate_signatures!(chain.webpki);
}

/// Verifies clients: a valid chain, and an accepted trust domain.
#[derive(Debug)]
pub struct ClientVerifier {
    /// Verifies the chain.
    pub chain: ChainVerifier,
    /// Our trust domain and its aliases.
    pub trust_domains: Vec<Text>,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Peers of the mesh have one certificate each, so they do not need the names of our roots to choose one.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let peer = self.chain.check(end_entity, intermediates, now)?;
        if self.trust_domains.contains(&peer.trust_domain) {
            return Ok(ClientCertVerified::assertion());
        }
        let accepted = join(self.trust_domains.iter());
        Err(PeerError::TrustDomain { peer, accepted }.into())
    }

    delegate_signatures!(chain.webpki);
}

fn join<T: ToString>(names: impl Iterator<Item = T>) -> String {
    let names: Vec<String> = names.map(|name| name.to_string()).collect();
    if names.is_empty() { "nobody".into() } else { names.join(" or ") }
}
