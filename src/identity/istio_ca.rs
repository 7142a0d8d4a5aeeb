//! Istio's CA, asked by `CreateCertificate`. Each certificate has a new P-256 key and its own request, in which the
//! daemon of a node impersonates the identity of a pod of this node. In dedicated mode it impersonates nobody, and the CA
//! signs for the account of its token. (Source: istiod's CA and its node authorizer.)

use super::signed::SignedCertificate;
use super::verify::{PeerError, peer_name};
use crate::crypto::certificates_from_pem;
use crate::mesh::SpiffeName;
use crate::proto::istio::v1::auth::IstioCertificateRequest;
use crate::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::rpc::{self, Connection};
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, string::Ia5String};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tonic::{Code, Status};
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long one request may take, without connecting.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// How many certificates an answer may contain.
const CERTIFICATES_MAX: usize = 64;

/// Why Istio's CA has not issued a certificate.
#[derive(Debug, thiserror::Error)]
pub enum IstioCaError {
    /// There is no connection to it.
    #[error("cannot connect to the CA: {0}")]
    Connect(#[from] rpc::ConnectError),
    /// It refused.
    #[error("the CA refused: {}: {}", .0.code(), .0.message())]
    Refused(Box<Status>),
    /// It did not answer in time.
    #[error("the CA has not answered within {} s", CALL_DEADLINE.as_secs())]
    Deadline,
    /// The signing request could not be built.
    #[error("the signing request could not be built: {0}")]
    Request(#[from] rcgen::Error),
    /// Its answer is malformed.
    #[error("the CA's answer cannot be used: {0}")]
    Answer(String),
    /// It signed for another identity.
    #[error("the CA has signed for {signed}, but the request was for {asked}")]
    OtherIdentity {
        /// The identity in the certificate.
        signed: SpiffeName,
        /// The identity in the request.
        asked: SpiffeName,
    },
    /// The certificate holds no valid identity.
    #[error("the CA's certificate cannot be used: {0}")]
    Name(#[from] PeerError),
}

impl IstioCaError {
    /// Whether this may only mean that the CA does not know the pod yet.
    pub fn is_refusal(&self) -> bool {
        let code = |status: &Status| matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied);
        matches!(self, Self::Refused(status) if code(status))
    }
}

/// A client of Istio's CA.
#[derive(Debug)]
pub struct IstioCa {
    rpc: rpc::Config,
    life: Duration,
    /// Reused while it is open.
    connection: Mutex<Option<Connection>>,
}

impl IstioCa {
    /// A client of the CA at `rpc` that asks for certificates with this validity.
    pub fn new(rpc: rpc::Config, life: Duration) -> Self {
        Self { rpc, life, connection: Mutex::default() }
    }

    /// Generates a key for `identity` and has it signed. Unless the daemon `impersonates` the identity, its token must be
    /// that identity's.
    pub async fn sign(&self, identity: &SpiffeName, impersonates: bool) -> Result<SignedCertificate, IstioCaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let request = IstioCertificateRequest {
            csr: signing_request(identity, &key)?,
            validity_duration: i64::try_from(self.life.as_secs()).unwrap_or(i64::MAX),
            metadata: impersonates.then(|| impersonate(identity)),
        };
        let connection = self.connection().await?;
        let mut client = IstioCertificateServiceClient::with_origin(connection.clone(), self.rpc.address.clone());
        let answer = match tokio::time::timeout(CALL_DEADLINE, client.create_certificate(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                // Another replica may know the pod, so the next request should not go to this one again.
                self.disconnect(&connection);
                return Err(IstioCaError::Refused(Box::new(status)));
            }
            Err(_) => {
                self.disconnect(&connection);
                return Err(IstioCaError::Deadline);
            }
        };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        signed(identity, key, &answer.cert_chain)
    }

    /// The open connection, or a new one, made with the current token and roots.
    async fn connection(&self) -> Result<Connection, rpc::ConnectError> {
        let open = self.connection.lock().clone();
        if let Some(open) = open.filter(|open| !open.is_closed()) {
            return Ok(open);
        }
        let new = rpc::connect(&self.rpc).await?;
        // If another request has connected meanwhile, its connection is used and this one is closed.
        let mut kept = self.connection.lock();
        if let Some(open) = kept.as_ref().filter(|open| !open.is_closed()) {
            return Ok(open.clone());
        }
        *kept = Some(new.clone());
        Ok(new)
    }

    /// Drops a connection, so that the next request makes a new one. A connection that another request has made since
    /// stays.
    fn disconnect(&self, failed: &Connection) {
        let mut kept = self.connection.lock();
        kept.take_if(|kept| kept.is_same(failed));
    }
}

/// A signing request in PEM. The CA uses only its key; it contains the identity all the same.
fn signing_request(identity: &SpiffeName, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity.to_string())?)];
    params.serialize_request(key)?.pem()
}

fn impersonate(identity: &SpiffeName) -> prost_types::Struct {
    let kind = Some(prost_types::value::Kind::StringValue(identity.to_string()));
    let fields = [("ImpersonatedIdentity".to_owned(), prost_types::Value { kind })];
    prost_types::Struct { fields: fields.into() }
}

/// Reads an answer. The leaf comes first, the roots are in the last element, and everything between them is an
/// intermediate. One element may contain several certificates (istiod before 1.25).
fn signed(
    identity: &SpiffeName,
    key: PrivateKeyDer<'static>,
    elements: &[String],
) -> Result<SignedCertificate, IstioCaError> {
    let bad = |reason: &str| IstioCaError::Answer(reason.to_owned());
    let parse = |element: &String| certificates_from_pem(element.as_bytes()).map_err(IstioCaError::Answer);
    let (last, first) = elements.split_last().ok_or_else(|| bad("it holds no certificate"))?;
    if first.is_empty() {
        return Err(bad("it holds no root certificate"));
    }
    let mut chain: Vec<CertificateDer<'static>> = Vec::new();
    for element in first {
        chain.extend(parse(element)?);
    }
    let roots = parse(last)?;
    if chain.len() + roots.len() > CERTIFICATES_MAX {
        return Err(bad("it holds too many certificates"));
    }
    let leaf = chain.first().ok_or_else(|| bad("it holds no certificate"))?;
    if roots.is_empty() {
        return Err(bad("it holds no root certificate"));
    }
    let name = peer_name(leaf)?;
    if name != *identity {
        return Err(IstioCaError::OtherIdentity { signed: name, asked: identity.clone() });
    }
    let (not_before, not_after, life) =
        validity(leaf).ok_or_else(|| bad("the dates of its certificate are impossible"))?;
    Ok(SignedCertificate { key, chain, roots, not_before, not_after, life })
}

/// Reads an answer as [`IstioCa::sign`] does, for fuzzing.
#[cfg(any(fuzzing, test))]
pub fn read_answer(elements: &[String]) {
    if let Ok(identity) = SpiffeName::new("cluster.local", "a", "b") {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(Vec::new()));
        let _ = signed(&identity, key, elements);
    }
}

/// Start, end and length of a certificate's validity; `None` if they are impossible.
fn validity(leaf: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime, Duration)> {
    let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).ok();
    let (from, to) = (seconds(parsed.validity().not_before)?, seconds(parsed.validity().not_after)?);
    let life = Duration::from_secs(to.checked_sub(from)?);
    let at = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    Some((at(from)?, at(to)?, life))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::builtin::Builtin;
    use base64::Engine as _;

    fn pem(certificate: &CertificateDer<'_>) -> String {
        let body = base64::engine::general_purpose::STANDARD.encode(certificate);
        format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
    }

    #[test]
    fn an_answer_is_read_as_istiod_builds_it() {
        let folder = std::env::temp_dir().join(format!("culvert-answer-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        Builtin::init(&folder).unwrap();
        let identity = SpiffeName::new("cluster.local", "a", "b").unwrap();
        let made = Builtin::new(&folder, Duration::from_secs(3600)).sign(&identity).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let (leaf, root) = (pem(&made.chain[0]), pem(&made.roots[0]));
        let read = |elements: &[String]| signed(&identity, made.key.clone_key(), elements);
        let answer = read(&[leaf.clone(), root.clone() + &root]).unwrap();
        assert_eq!((answer.chain.len(), answer.roots.len()), (1, 2));
        assert!(answer.life >= Duration::from_secs(3600));
        let answer = read(&[leaf.clone() + &root, root.clone()]).unwrap();
        assert_eq!((answer.chain.len(), answer.roots.len()), (2, 1), "intermediates in the leaf's element");
        for (elements, word) in [
            (vec![], "no certificate"),
            (vec![leaf.clone()], "no root"),
            (vec![leaf.clone(), String::new()], "no root"),
            (vec![String::new(), root.clone()], "no certificate"),
            (vec![root.clone(), root.clone()], "URI names"),
            (vec!["-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----".into(), root.clone()], "cannot be used"),
        ] {
            let error = read(&elements).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let other = SpiffeName::new("cluster.local", "a", "c").unwrap();
        let error = signed(&other, made.key.clone_key(), &[leaf, root]).unwrap_err();
        assert!(matches!(error, IstioCaError::OtherIdentity { .. }));
    }
}
