//! A signing certificate from cert-manager.
//!
//! The control plane asks for one intermediate certificate and signs leaves with it itself. The other way would be to
//! pass on each workload's request: then every pod's start would wait for cert-manager, a mesh of thousands of pods would
//! make as many CertificateRequests a day, and the issuer would have to be trusted with the choice of identities. The key
//! of the intermediate is made here and is in no Secret and no file. Each replica has its own.

use super::Issuer;
use super::issuing::Material;
use crate::crypto::{certificate_pem, certificates_from_pem};
use crate::telemetry::limit::shortened;
use crate::telemetry::log::with_causes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::Client;
use kube::api::{DeleteParams, GetParams, PostParams};
use kube::core::Request;
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::json;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

/// Validity that is asked for. The issuer may give less.
const LIFE_HOURS: u64 = 30 * 24;
/// How long the API may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long cert-manager may take to sign, and how often it is asked whether it has.
const SIGNED_WITHIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(1));
/// Shortest time between two requests.
const APART: Duration = Duration::from_secs(60);
/// Where in its life a certificate is replaced.
const RENEWAL: f64 = 0.66;

/// Why there is no certificate from cert-manager.
#[derive(Debug, thiserror::Error)]
pub enum CertManagerError {
    /// The API refuses or cannot be reached.
    #[error("cert-manager: {}", shortened(with_causes(.0)))]
    Api(#[from] kube::Error),
    /// It does not answer in time.
    #[error("cert-manager: {0} within {1} s")]
    Late(&'static str, u64),
    /// The request cannot be made.
    #[error("the request to cert-manager cannot be made: {0}")]
    Request(#[from] rcgen::Error),
    /// It is denied, or has failed.
    #[error("cert-manager does not sign CertificateRequest {0}: {1}")]
    Refused(String, String),
    /// The answer is malformed.
    #[error("the answer of cert-manager cannot be used: {0}")]
    Answer(String),
    /// The last attempt was only a moment ago.
    #[error("{0}")]
    Again(String),
}

/// What is asked of cert-manager, and what it gave.
pub struct CertManager {
    client: Client,
    requests: Request,
    issuer: Issuer,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What is in force, and when it is to be replaced.
    held: Option<(Material, SystemTime)>,
    /// When it was asked last, and what came of it.
    asked: Option<(Instant, Option<String>)>,
}

impl std::fmt::Debug for CertManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CertManager({} {})", self.issuer.kind, self.issuer.name)
    }
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    name: String,
}

#[derive(Default, Deserialize)]
struct Status {
    #[serde(default)]
    certificate: Option<String>,
    #[serde(default)]
    ca: Option<String>,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

impl CertManager {
    /// Asks an issuer, by requests in `namespace`.
    pub fn new(client: Client, namespace: &str, issuer: Issuer) -> Self {
        let requests = Request::new(format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests"));
        Self { client, requests, issuer, state: Mutex::default() }
    }

    /// The certificate in force. A new one if there is none, if the time has come, or if it is `wanted`. cert-manager is
    /// asked at most once in [`APART`].
    pub async fn load(&self, wanted: bool) -> Result<Material, CertManagerError> {
        {
            let state = self.state.lock();
            let held = state.held.as_ref().filter(|(_, renew)| !wanted && SystemTime::now() < *renew);
            if let Some((material, _)) = held {
                return Ok(material.clone());
            }
            if let Some((_, outcome)) = state.asked.as_ref().filter(|(at, _)| at.elapsed() < APART) {
                return match (&state.held, outcome) {
                    (_, Some(error)) => Err(CertManagerError::Again(error.clone())),
                    (Some((material, _)), None) => Ok(material.clone()),
                    (None, None) => Err(CertManagerError::Again("cert-manager is being asked".into())),
                };
            }
        }
        let asked = self.ask().await;
        let mut state = self.state.lock();
        state.asked = Some((Instant::now(), asked.as_ref().err().map(ToString::to_string)));
        let (material, renew) = asked?;
        state.held = Some((material.clone(), renew));
        Ok(material)
    }

    async fn ask(&self) -> Result<(Material, SystemTime), CertManagerError> {
        let mut key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "culvert");
        params
            .distinguished_name
            .push(DnType::CommonName, format!("mesh intermediate {:032x}", rand::random::<u128>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let csr = params.serialize_request(&key)?.pem()?;
        let key_pem = Zeroizing::new(key.serialize_pem().into_bytes());
        key.zeroize();
        let Issuer { kind, name, group } = &self.issuer;
        let body = json!({
            "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
            "metadata": {
                "generateName": "culvert-control-", "labels": {"app.kubernetes.io/managed-by": "culvert"},
            },
            "spec": {
                "request": STANDARD.encode(csr), "isCA": true, "duration": format!("{LIFE_HOURS}h"),
                "usages": ["cert sign", "crl sign"],
                "issuerRef": {"kind": kind, "name": name, "group": group},
            },
        });
        let made: Object =
            self.send(self.requests.create(&PostParams::default(), body.to_string().into_bytes())).await?;
        let name = made.metadata.name;
        let signed = self.signed(&name).await;
        // The answer is here, or will not be used. What remains would only be read by people who wonder about it.
        let deleted = self.requests.delete(&name, &DeleteParams::default());
        if let Err(error) = self.send::<serde_json::Value>(deleted).await {
            tracing::debug!(%error, name, "a CertificateRequest stays");
        }
        let (certificate, roots) = signed?;
        read(key_pem, certificate, &roots, &format!("cert-manager {kind} {}", self.issuer.name))
    }

    /// Waits until a request is signed. Returns certificate and roots.
    async fn signed(&self, name: &str) -> Result<(Vec<u8>, Vec<u8>), CertManagerError> {
        let begun = Instant::now();
        loop {
            let object: Object = self.send(self.requests.get(name, &GetParams::default())).await?;
            let status = object.status;
            let failed = status.conditions.iter().find(|condition| {
                let is_true = condition.status == "True";
                let has_failed = condition.kind == "Ready" && matches!(condition.reason.as_str(), "Failed" | "Denied");
                has_failed || (is_true && matches!(condition.kind.as_str(), "Denied" | "InvalidRequest"))
            });
            if let Some(Condition { message, reason, .. }) = failed {
                return Err(CertManagerError::Refused(name.to_owned(), shortened(format!("{reason}: {message}"))));
            }
            if let Some(certificate) = status.certificate.filter(|certificate| !certificate.is_empty()) {
                let decode =
                    |text: &str| STANDARD.decode(text).map_err(|_| CertManagerError::Answer("it is not base64".into()));
                return Ok((decode(&certificate)?, decode(status.ca.as_deref().unwrap_or_default())?));
            }
            if begun.elapsed() >= SIGNED_WITHIN.0 {
                return Err(CertManagerError::Late("the request is not signed", SIGNED_WITHIN.0.as_secs()));
            }
            tokio::time::sleep(SIGNED_WITHIN.1).await;
        }
    }

    async fn send<T: serde::de::DeserializeOwned>(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, CertManagerError> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        match tokio::time::timeout(DEADLINE, self.client.request(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(CertManagerError::Late("the Kubernetes API has not answered", DEADLINE.as_secs())),
        }
    }
}

/// Reads an answer: the certificate with what is between it and the root, and the root. Where cert-manager does not know
/// the root, the last certificate of the chain must be it.
fn read(
    key: Zeroizing<Vec<u8>>,
    certificate: Vec<u8>,
    roots: &[u8],
    origin: &str,
) -> Result<(Material, SystemTime), CertManagerError> {
    let bad = CertManagerError::Answer;
    let chain = certificates_from_pem(&certificate).map_err(bad)?;
    let mut roots = certificates_from_pem(roots).map_err(bad)?;
    let is_root = |der: &CertificateDer<'_>| {
        X509Certificate::from_der(der).is_ok_and(|(_, parsed)| parsed.issuer().as_raw() == parsed.subject().as_raw())
    };
    if roots.is_empty() {
        roots.extend(chain.iter().filter(|der| is_root(der)).cloned());
    }
    if roots.is_empty() {
        return Err(bad("it names no root; this kind of issuer does not say which one it has".into()));
    }
    let first = chain.first().ok_or_else(|| bad("it holds no certificate".into()))?;
    let (_, parsed) = X509Certificate::from_der(first).map_err(|error| bad(error.to_string()))?;
    let time = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or_default();
    let (from, to) = (time(parsed.validity().not_before), time(parsed.validity().not_after));
    let renew = Duration::from_secs(to.saturating_sub(from)).mul_f64(RENEWAL);
    let renew = UNIX_EPOCH.checked_add(Duration::from_secs(from).saturating_add(renew));
    let renew = renew.ok_or_else(|| bad("its validity is impossible".into()))?;
    let version = parsed.raw_serial_as_string();
    let roots = roots.iter().map(certificate_pem).collect::<String>().into_bytes();
    let origin = origin.to_owned();
    Ok((Material { origin, version, certificate, key, chain: Vec::new(), roots, crl: None }, renew))
}
