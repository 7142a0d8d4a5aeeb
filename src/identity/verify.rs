//! Verifying a peer: the chain by webpki, the name by us. A peer is who its one SPIFFE URI SAN says, exactly.

use super::revoked::Revocations;
use crate::crypto::{delegate_signatures, with_clock_reason};
use crate::mesh::SpiffeName;
use crate::mesh::name::NameError;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use std::io;
use std::sync::Arc;
use tokio::sync::Notify;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// Why a certificate that may be valid is still not the peer we talk to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// The certificate cannot be parsed.
    #[error("the peer's certificate cannot be parsed: {0}")]
    Unparsable(String),
    /// Not exactly one URI among the subject alternative names.
    #[error("the peer's certificate has {0} URI names, exactly one is needed")]
    NotOneUri(usize),
    /// The URI is not a SPIFFE name.
    #[error("the peer's URI name is not a workload identity: {0}")]
    Name(#[from] NameError),
    /// The peer's certificate, or one that vouches for it, has been revoked.
    #[error("the peer's certificate is revoked by CRL")]
    Revoked,
    /// The peer is of a trust domain that is not ours.
    #[error("the peer {peer} is of a foreign trust domain (accepted: {accepted})")]
    TrustDomain {
        /// Who the peer is.
        peer: SpiffeName,
        /// Whom we accept, joined.
        accepted: String,
    },
    /// The peer is somebody else.
    #[error("the peer is {peer}, expected {expected}")]
    Unexpected {
        /// Who the peer is.
        peer: SpiffeName,
        /// Whom we expected, joined.
        expected: String,
    },
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// What a failed handshake is to say: our own reason where we refused the peer's certificate, else the library's.
pub fn tls_reason(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match inner {
        Some(Error::InvalidCertificate(CertificateError::Other(other))) => other.0.to_string(),
        _ => with_clock_reason(error),
    }
}

/// The identity in a certificate: exactly one URI SAN, and that a SPIFFE name in its exact form.
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

/// Vouches for a peer's chain: by our roots, and by no list of revoked certificates.
#[derive(Clone, Debug)]
pub struct Vouch {
    /// webpki's, for client certificates: it checks no DNS name, which SPIFFE leaves have none of.
    pub chain: Arc<dyn ClientCertVerifier>,
    /// What is revoked.
    pub revocations: Arc<Revocations>,
    /// Told when a chain ends at a root that is not ours.
    pub unknown_root: Arc<Notify>,
}

impl Vouch {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeName, Error> {
        if let Err(error) = self.chain.verify_client_cert(end_entity, intermediates, now) {
            // The signature says so too where an old and a new root have the same name.
            let unknown = CertificateError::UnknownIssuer;
            if matches!(&error, Error::InvalidCertificate(e) if *e == unknown || *e == CertificateError::BadSignature) {
                self.unknown_root.notify_one();
            }
            return Err(error);
        }
        let revoked = self.revocations.lists(&[end_entity.as_ref().into()]) || self.revocations.lists(intermediates);
        if revoked { Err(PeerError::Revoked.into()) } else { Ok(peer_name(end_entity)?) }
    }
}

/// Verifies servers: chain under our roots, identity among the expected ones.
#[derive(Debug)]
pub struct ServerVerifier {
    /// Verifies the chain.
    pub vouch: Vouch,
    /// Trust domains that are one: our own and its aliases.
    pub trust_domains: Vec<crate::mesh::Text>,
    /// Who the server may be. Empty means nobody.
    pub expected: Vec<SpiffeName>,
}

impl ServerVerifier {
    /// Whether a peer is one of those expected: the same name, or the same but for a trust domain that is one with it.
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
        let peer = self.vouch.check(end_entity, intermediates, now)?;
        if self.is_expected(&peer) {
            return Ok(ServerCertVerified::assertion());
        }
        let expected = join(self.expected.iter());
        Err(PeerError::Unexpected { peer, expected }.into())
    }

    delegate_signatures!(vouch.chain);
}

/// Verifies clients: chain under our roots, trust domain among the accepted ones.
#[derive(Debug)]
pub struct ClientVerifier {
    /// Verifies the chain.
    pub vouch: Vouch,
    /// Our trust domain and its aliases.
    pub trust_domains: Vec<crate::mesh::Text>,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Names of our roots would help nobody: every peer of the mesh has one certificate.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let peer = self.vouch.check(end_entity, intermediates, now)?;
        if self.trust_domains.contains(&peer.trust_domain) {
            return Ok(ClientCertVerified::assertion());
        }
        let accepted = join(self.trust_domains.iter());
        Err(PeerError::TrustDomain { peer, accepted }.into())
    }

    delegate_signatures!(vouch.chain);
}

fn join<T: ToString>(names: impl Iterator<Item = T>) -> String {
    let names: Vec<String> = names.map(|name| name.to_string()).collect();
    if names.is_empty() { "nobody".into() } else { names.join(" or ") }
}
