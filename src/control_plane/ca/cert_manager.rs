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

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::super::issuing::Issuing;
    use super::*;
    use parking_lot::Mutex;
    use rcgen::CertificateSigningRequestParams;
    use serde_json::Value;
    use std::sync::Arc;

    const FOLDER: &str = "/apis/cert-manager.io/v1/namespaces/istio-system/certificaterequests";

    fn issuer() -> Issuer {
        Issuer { kind: "ClusterIssuer".into(), name: "corp".into(), group: "cert-manager.io".into() }
    }

    fn cert_manager(api: &FakeApi) -> CertManager {
        CertManager::new(api.client(), "istio-system", issuer())
    }

    struct Corp {
        pem: String,
        issuer: rcgen::Issuer<'static, KeyPair>,
    }

    fn corp() -> Corp {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "corp");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Corp { pem, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Signs as cert-manager does: the request is made without a status, and has one when it is looked at again.
    fn sign(api: &FakeApi, corp: Corp, names_ca: bool) {
        let asked = Arc::<Mutex<Option<Value>>>::default();
        api.hook(move |method, path, body| match (method.as_str(), path) {
            ("POST", FOLDER) => {
                *asked.lock() = Some(body["spec"].clone());
                Answer::Go
            }
            ("GET", path) if path.starts_with(FOLDER) => {
                let spec = asked.lock().clone().unwrap();
                assert_eq!((&spec["isCA"], &spec["issuerRef"]["name"]), (&json!(true), &json!("corp")));
                let csr = STANDARD.decode(spec["request"].as_str().unwrap()).unwrap();
                let csr = CertificateSigningRequestParams::from_pem(&String::from_utf8(csr).unwrap()).unwrap();
                let signed = csr.signed_by(&corp.issuer).unwrap().pem();
                let ca = if names_ca { STANDARD.encode(&corp.pem) } else { String::new() };
                let chain = if names_ca { signed } else { signed + &corp.pem };
                let status = json!({"certificate": STANDARD.encode(chain), "ca": ca});
                Answer::Is(200, json!({"metadata": {"name": "x"}, "status": status}))
            }
            _ => Answer::Go,
        });
    }

    #[tokio::test(start_paused = true)]
    async fn an_intermediate_is_had_from_an_issuer_and_its_request_removed() {
        for names_ca in [true, false] {
            let (api, corp) = (FakeApi::default(), corp());
            let root = corp.pem.clone();
            sign(&api, corp, names_ca);
            let cert_manager = cert_manager(&api);
            let material = cert_manager.load(false).await.unwrap();
            let issuing = Issuing::new(&material, SystemTime::now()).unwrap();
            let expected = certificates_from_pem(root.as_bytes()).unwrap();
            assert_eq!(certificates_from_pem(issuing.roots_pem.as_bytes()).unwrap(), expected);
            assert_eq!(issuing.answer(&CertificateDer::from(vec![1])).len(), 3, "the intermediate is sent along");
            assert_eq!((api.count("POST", FOLDER), api.count("DELETE", FOLDER)), (1, 1));
            // The certificate holds, and is not asked for again and again.
            assert!(cert_manager.load(false).await.unwrap() == material);
            assert!(cert_manager.load(true).await.unwrap() == material);
            tokio::time::sleep(APART).await;
            assert!(cert_manager.load(false).await.unwrap() == material);
            assert!(cert_manager.load(true).await.unwrap() != material, "another one is wanted");
            assert_eq!(api.count("POST", FOLDER), 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_cert_manager_does_not_sign_is_an_error_that_says_why() {
        let condition = |kind: &str, status: &str, reason: &str| json!({"conditions": [{"type": kind, "status": status, "reason": reason, "message": "policy says no"}]});
        for (status, expected) in [
            (condition("Denied", "True", "policy.cert-manager.io"), "policy says no"),
            (condition("Ready", "False", "Failed"), "Failed: policy says no"),
            (condition("Ready", "False", "Denied"), "Denied: policy says no"),
            (condition("InvalidRequest", "True", "x"), "policy says no"),
            (condition("Ready", "False", "Pending"), "not signed within 60 s"),
            (json!({}), "not signed within 60 s"),
            (json!({"certificate": "*"}), "not base64"),
            (json!({"certificate": STANDARD.encode("x"), "ca": ""}), "names no root"),
            (json!({"certificate": STANDARD.encode("x"), "ca": STANDARD.encode(corp().pem)}), "holds no certificate"),
        ] {
            let api = FakeApi::default();
            let shown = status.clone();
            api.hook(move |method, _, _| match method.as_str() {
                "GET" => Answer::Is(200, json!({"metadata": {"name": "x"}, "status": status})),
                _ => Answer::Go,
            });
            let cert_manager = cert_manager(&api);
            let error = cert_manager.load(false).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{shown}: {error}");
            assert_eq!(api.count("DELETE", FOLDER), 1, "{shown}");
            // Asked again at once, it says the same without another request.
            assert_eq!(cert_manager.load(false).await.unwrap_err().to_string(), error);
            assert_eq!(api.count("POST", FOLDER), 1, "{shown}");
        }
        let api = FakeApi::default();
        api.hook(|_, _, _| Answer::Is(404, json!({"kind": "Status", "code": 404, "message": "no such resource"})));
        let error = cert_manager(&api).load(false).await.unwrap_err().to_string();
        assert!(error.contains("no such resource"), "{error}");
    }
}
