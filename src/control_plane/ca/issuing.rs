//! A signing key with its certificates: checked once, then used to sign.
//!
//! Leaves are as istiod makes them: an empty subject, one URI SAN, digitalSignature and keyEncipherment, and both TLS
//! usages. The validity begins two minutes ago, because clocks differ, and ends at the latest with the signing
//! certificate's.

use crate::crypto::{certificate_pem, certificates_from_pem, provider};
use crate::mesh::SpiffeName;
use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

/// How far in the past the validity of a leaf begins.
const BACKDATE: Duration = Duration::from_secs(120);
/// Certificates in a chain and in a bundle of roots, at most.
const CERTIFICATES_MAX: usize = 32;

/// What a signing key is loaded from, unchecked: PEM texts in the layout of Istio's Secret `cacerts`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Material {
    /// Where it comes from, for messages: `Secret istio-system/cacerts`.
    pub origin: String,
    /// Differs between any two contents of one origin.
    pub version: String,
    /// The signing certificate (`ca-cert.pem`). Others may follow it.
    pub certificate: Vec<u8>,
    /// Its key (`ca-key.pem`).
    pub key: Zeroizing<Vec<u8>>,
    /// The certificates from the signing one to the root (`cert-chain.pem`); may be empty.
    pub chain: Vec<u8>,
    /// The roots that peers are verified against (`root-cert.pem`). If empty, the signing certificate is the root.
    pub roots: Vec<u8>,
    /// Revoked certificates (`ca-crl.pem`).
    pub crl: Option<Vec<u8>>,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Material({} {})", self.origin, self.version)
    }
}

/// Why a signing key cannot be used. The messages name the entry of the layout.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// An entry is missing or malformed.
    #[error("{0}: {1}")]
    Entry(&'static str, String),
    /// The signing certificate is not one of a CA.
    #[error("ca-cert.pem: {0}")]
    NotCa(&'static str),
    /// The key is not the certificate's.
    #[error("ca-key.pem is not the key of ca-cert.pem")]
    OtherKey,
    /// Its time is over, or has not come.
    #[error("ca-cert.pem is not valid now: from {from} to {to}", from = humantime::format_rfc3339_seconds(*.from), to = humantime::format_rfc3339_seconds(*.to))]
    Time {
        /// Begin.
        from: SystemTime,
        /// End.
        to: SystemTime,
    },
    /// A certificate signed by the key does not verify against the roots.
    #[error("a certificate that ca-key.pem signs does not lead to root-cert.pem by way of cert-chain.pem: {0}")]
    Chain(#[source] rustls::Error),
    /// Signing failed.
    #[error("signing fails: {0}")]
    Sign(#[from] rcgen::Error),
}

/// A key whose bytes are overwritten when it is dropped.
struct SecretKey(KeyPair);

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for SecretKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl SigningKey for SecretKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// What a leaf is for.
#[derive(Clone, Copy, Debug)]
pub enum Leaf<'a> {
    /// A workload, as client and as server.
    Workload(&'a SpiffeName),
    /// A server with these DNS names.
    Server(&'a [String]),
}

/// A signing key with its certificates.
pub struct Issuing {
    /// Where it comes from.
    pub origin: String,
    /// Differs between any two contents of one origin.
    pub version: String,
    /// The roots in PEM.
    pub roots_pem: Arc<str>,
    /// Revoked certificates in PEM, if they came with the key.
    pub crl: Option<Arc<str>>,
    /// When the signing certificate expires.
    pub not_after: SystemTime,
    /// When the first of the roots expires.
    pub roots_not_after: SystemTime,
    issuer: rcgen::Issuer<'static, SecretKey>,
    /// From the signing certificate to the last one below the root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

impl fmt::Debug for Issuing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Issuing({} {})", self.origin, self.version)
    }
}

impl Issuing {
    /// Checks a signing key: everything can be parsed, belongs together and is valid at `now`, and what it signs is
    /// verified by its roots.
    pub fn new(material: &Material, now: SystemTime) -> Result<Self, MaterialError> {
        let mut certificates = read("ca-cert.pem", &material.certificate)?.into_iter();
        let signing = certificates.next().ok_or_else(|| entry("ca-cert.pem", "holds no certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(&material.key)
            .map_err(|error| entry("ca-key.pem", &error.to_string()))
            .and_then(|key| KeyPair::try_from(&key).map_err(|error| entry("ca-key.pem", &error.to_string())))?;
        let key = SecretKey(key);
        let parsed = parse("ca-cert.pem", &signing)?;
        check_ca(&parsed)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(MaterialError::OtherKey);
        }
        let (from, to) = validity("ca-cert.pem", &parsed)?;
        if now < from || to <= now {
            return Err(MaterialError::Time { from, to });
        }
        let is_root = parsed.issuer().as_raw() == parsed.subject().as_raw();
        let mut intermediates: Vec<CertificateDer<'static>> = Vec::new();
        let chain = certificates.chain(read("cert-chain.pem", &material.chain)?);
        for certificate in std::iter::once(signing.clone()).filter(|_| !is_root).chain(chain) {
            let parsed = parse("cert-chain.pem", &certificate)?;
            let is_root = parsed.issuer().as_raw() == parsed.subject().as_raw();
            if !is_root && !intermediates.contains(&certificate) {
                intermediates.push(certificate);
            }
        }
        let roots = match read("root-cert.pem", &material.roots)? {
            roots if roots.is_empty() => vec![signing.clone()],
            roots => roots,
        };
        if roots.len() + intermediates.len() > CERTIFICATES_MAX {
            return Err(entry("root-cert.pem", "too many certificates"));
        }
        let mut roots_not_after = to;
        for root in &roots {
            roots_not_after = roots_not_after.min(validity("root-cert.pem", &parse("root-cert.pem", root)?)?.1);
        }
        let crl = material.crl.clone().map(|crl| String::from_utf8(crl).map(Arc::from));
        let crl = crl.transpose().map_err(|_| entry("ca-crl.pem", "is not text"))?;
        let made = Self {
            origin: material.origin.clone(),
            version: material.version.clone(),
            roots_pem: roots.iter().map(certificate_pem).collect::<String>().into(),
            crl,
            not_after: to,
            roots_not_after,
            issuer: rcgen::Issuer::from_ca_cert_der(&signing, key)?,
            intermediates,
            roots,
        };
        made.check(now)?;
        Ok(made)
    }

    /// Signs a leaf, and verifies it as a peer would.
    fn check(&self, now: SystemTime) -> Result<(), MaterialError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let name = SpiffeName::new("cluster.local", "culvert", "check");
        let name = name.map_err(|error| entry("ca-cert.pem", &error.to_string()))?;
        let (leaf, _) = self.leaf(&key, Leaf::Workload(&name), Duration::from_secs(60), now)?;
        let mut store = RootCertStore::empty();
        for root in &self.roots {
            store.add(root.clone()).map_err(|error| entry("root-cert.pem", &error.to_string()))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::new(provider()))
            .build()
            .map_err(|error| entry("root-cert.pem", &error.to_string()))?;
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        verifier.verify_client_cert(&leaf, &self.intermediates, now).map_err(MaterialError::Chain)?;
        Ok(())
    }

    /// Signs a leaf for a public key. Returns it with its end.
    pub fn leaf(
        &self,
        key: &impl PublicKeyData,
        what: Leaf<'_>,
        life: Duration,
        now: SystemTime,
    ) -> Result<(CertificateDer<'static>, SystemTime), rcgen::Error> {
        let mut params = CertificateParams::default();
        // Whole seconds, because a certificate holds no others.
        let not_after = now.checked_add(life).map_or(self.not_after, |end| end.min(self.not_after));
        params.distinguished_name = DistinguishedName::new();
        params.not_before = OffsetDateTime::from(now - BACKDATE);
        params.not_after = OffsetDateTime::from(not_after);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        match what {
            Leaf::Workload(name) => {
                params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(name.to_string())?)];
                params.extended_key_usages =
                    vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            }
            Leaf::Server(names) => {
                let names = names.iter().map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?)));
                params.subject_alt_names = names.collect::<Result<_, rcgen::Error>>()?;
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }
        }
        let leaf = params.signed_by(key, &self.issuer)?;
        Ok((leaf.der().clone(), not_after))
    }

    /// A leaf as Istio's CA answers: itself, each intermediate, and all roots in the last element.
    pub fn answer(&self, leaf: &CertificateDer<'_>) -> Vec<String> {
        let mut answer = vec![certificate_pem(leaf)];
        answer.extend(self.intermediates.iter().map(certificate_pem));
        answer.push(self.roots_pem.to_string());
        answer
    }

    /// A leaf with its intermediates.
    pub fn chain(&self, leaf: CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        std::iter::once(leaf).chain(self.intermediates.iter().cloned()).collect()
    }

    /// Whether the roots verify what `other` signs, as far as that can be told: they hold one of its roots.
    pub fn shares_a_root(&self, other: &Self) -> bool {
        self.roots.iter().any(|root| other.roots.contains(root))
    }
}

/// A serial number: 127 random bits, never zero.
fn serial() -> SerialNumber {
    let mut bytes = rand::random::<u128>().to_be_bytes();
    if let Some(first) = bytes.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    SerialNumber::from_slice(&bytes)
}

fn entry(name: &'static str, reason: &str) -> MaterialError {
    MaterialError::Entry(name, reason.to_owned())
}

fn read(name: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let all = certificates_from_pem(pem).map_err(|reason| entry(name, &reason))?;
    if all.len() > CERTIFICATES_MAX { Err(entry(name, "too many certificates")) } else { Ok(all) }
}

fn parse<'a>(name: &'static str, der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, MaterialError> {
    match X509Certificate::from_der(der) {
        Ok((_, parsed)) => Ok(parsed),
        Err(error) => Err(entry(name, &format!("a certificate cannot be parsed: {error}"))),
    }
}

/// Whether a certificate is one of a CA, and its name one that the library can write into leaves.
fn check_ca(parsed: &X509Certificate<'_>) -> Result<(), MaterialError> {
    if !matches!(parsed.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca) {
        return Err(MaterialError::NotCa("is not a CA's certificate (basicConstraints)"));
    }
    match parsed.key_usage() {
        Ok(Some(usage)) if !usage.value.key_cert_sign() => {
            return Err(MaterialError::NotCa("may not sign certificates (keyUsage)"));
        }
        Ok(_) => {}
        Err(_) => return Err(MaterialError::NotCa("has a malformed keyUsage")),
    }
    let mut kinds = Vec::new();
    for part in parsed.subject().iter() {
        let mut attributes = part.iter();
        let (Some(attribute), None) = (attributes.next(), attributes.next()) else {
            return Err(MaterialError::NotCa(
                "has a subject with a part of several attributes, which is not supported",
            ));
        };
        if kinds.contains(attribute.attr_type()) {
            return Err(MaterialError::NotCa("has a subject with two attributes of one kind, which is not supported"));
        }
        kinds.push(attribute.attr_type().clone());
    }
    Ok(())
}

fn validity(name: &'static str, parsed: &X509Certificate<'_>) -> Result<(SystemTime, SystemTime), MaterialError> {
    let time = |time: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).ok();
        seconds.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
    };
    let (from, to) = (time(parsed.validity().not_before), time(parsed.validity().not_after));
    from.zip(to).ok_or_else(|| entry(name, "its validity is impossible"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::verify::peer_name;
    use rcgen::{BasicConstraints, DnType, IsCa};

    struct Ca {
        pem: String,
        key: String,
        issuer: rcgen::Issuer<'static, KeyPair>,
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn made(params: CertificateParams, by: Option<&Ca>) -> Ca {
        made_with(KeyPair::generate().unwrap(), params, by)
    }

    fn made_with(key: KeyPair, params: CertificateParams, by: Option<&Ca>) -> Ca {
        let pem = match by {
            Some(by) => params.signed_by(&key, &by.issuer).unwrap().pem(),
            None => params.self_signed(&key).unwrap().pem(),
        };
        Ca { pem, key: key.serialize_pem(), issuer: rcgen::Issuer::new(params, key) }
    }

    fn material(signing: &Ca, chain: &str, roots: &str) -> Material {
        Material {
            origin: "test".into(),
            certificate: signing.pem.clone().into_bytes(),
            key: signing.key.clone().into_bytes().into(),
            chain: chain.as_bytes().to_vec(),
            roots: roots.as_bytes().to_vec(),
            ..Material::default()
        }
    }

    #[test]
    fn a_leaf_is_what_peers_and_istio_expect() {
        let root = made(params("root"), None);
        let issuing = Issuing::new(&material(&root, "", &root.pem), SystemTime::now()).unwrap();
        let (key, now) = (KeyPair::generate().unwrap(), SystemTime::now());
        let name = SpiffeName::new("cluster.local", "shop", "web").unwrap();
        let (leaf, end) = issuing.leaf(&key, Leaf::Workload(&name), Duration::from_secs(3600), now).unwrap();
        assert_eq!((peer_name(&leaf).unwrap(), end), (name.clone(), now + Duration::from_secs(3600)));
        let (_, parsed) = X509Certificate::from_der(&leaf).unwrap();
        assert_eq!(parsed.subject().iter().count(), 0);
        let san = parsed.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical && san.value.general_names.len() == 1);
        let usage = parsed.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
        let extended = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.server_auth && extended.client_auth);
        assert!(!parsed.basic_constraints().unwrap().is_some_and(|constraints| constraints.value.ca));
        let since_1970 = now.duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
        assert_eq!(parsed.validity().not_before.timestamp(), since_1970 - 120);
        assert_eq!(parsed.validity().not_after.timestamp(), since_1970 + 3600);
        let (other, _) = issuing.leaf(&key, Leaf::Workload(&name), Duration::from_secs(3600), now).unwrap();
        let (_, other) = X509Certificate::from_der(&other).unwrap();
        assert_ne!(parsed.raw_serial(), other.raw_serial(), "each has a serial number of its own");
        assert!(!format!("{issuing:?}").contains("KEY"));
    }

    #[test]
    fn a_leaf_ends_at_the_latest_with_the_signing_certificate() {
        let mut short = params("root");
        short.not_after = OffsetDateTime::from(SystemTime::now() + Duration::from_secs(100));
        let root = made(short, None);
        let issuing = Issuing::new(&material(&root, "", ""), SystemTime::now()).unwrap();
        let (key, name) = (KeyPair::generate().unwrap(), SpiffeName::new("c.l", "a", "b").unwrap());
        for life in [Duration::from_secs(3600), Duration::MAX] {
            let (leaf, end) = issuing.leaf(&key, Leaf::Workload(&name), life, SystemTime::now()).unwrap();
            let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
            assert_eq!(end, issuing.not_after);
            assert_eq!(validity("", &leaf).unwrap().1, issuing.not_after);
        }
    }

    #[test]
    fn the_answer_has_the_leaf_then_each_intermediate_then_all_roots() {
        let (old, new) = (made(params("old"), None), made(params("new"), None));
        let middle = made(params("middle"), Some(&old));
        let low = made(params("low"), Some(&middle));
        let (key, name) = (KeyPair::generate().unwrap(), SpiffeName::new("c.l", "a", "b").unwrap());
        let with_all = low.pem.clone() + &middle.pem + &old.pem;
        // A chain with and without the signing certificate, and all of it in ca-cert.pem.
        let mut in_one = material(&low, "", &(old.pem.clone() + &new.pem));
        in_one.certificate = with_all.clone().into_bytes();
        for material in [
            material(&low, &with_all, &(old.pem.clone() + &new.pem)),
            material(&low, &middle.pem, &(old.pem.clone() + "\nsome words\n" + &new.pem)),
            in_one,
        ] {
            let issuing = Issuing::new(&material, SystemTime::now()).unwrap();
            let (leaf, _) =
                issuing.leaf(&key, Leaf::Workload(&name), Duration::from_secs(60), SystemTime::now()).unwrap();
            let answer = issuing.answer(&leaf);
            let ders: Vec<_> = answer.iter().map(|pem| certificates_from_pem(pem.as_bytes()).unwrap()).collect();
            let pems = |pems: &[&Ca]| {
                pems.iter().flat_map(|ca| certificates_from_pem(ca.pem.as_bytes()).unwrap()).collect::<Vec<_>>()
            };
            assert_eq!(ders, [vec![leaf], pems(&[&low]), pems(&[&middle]), pems(&[&old, &new])]);
        }
        let issuing = Issuing::new(&material(&old, &old.pem, &old.pem), SystemTime::now()).unwrap();
        assert_eq!(issuing.answer(&CertificateDer::from(vec![1])).len(), 2, "a root is no intermediate");
    }

    #[test]
    fn keys_of_every_kind_and_form_sign() {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_RSA_SHA256] {
            let root = made_with(KeyPair::generate_for(algorithm).unwrap(), params("root"), None);
            Issuing::new(&material(&root, "", ""), SystemTime::now()).unwrap();
        }
        // What `openssl ecparam -genkey` writes: parameters first.
        let root = made(params("root"), None);
        let mut with_parameters = material(&root, "", "");
        let parameters = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
        with_parameters.key = [parameters.as_bytes(), root.key.as_bytes()].concat().into();
        Issuing::new(&with_parameters, SystemTime::now()).unwrap();
    }

    #[test]
    fn what_does_not_belong_together_is_refused_by_name() {
        let (root, other, now) = (made(params("root"), None), made(params("other"), None), SystemTime::now());
        let (mut leaf, mut no_usage, mut old, mut early) = (params("a"), params("a"), params("a"), params("a"));
        leaf.is_ca = IsCa::NoCa;
        no_usage.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        old.not_after = OffsetDateTime::from(now - Duration::from_secs(1));
        early.not_before = OffsetDateTime::from(now + Duration::from_secs(60));
        let of = |params| {
            let ca = made(params, None);
            material(&ca, "", "")
        };
        let low = made(params("low"), Some(&root));
        let mut other_key = material(&root, "", "");
        other_key.key = other.key.clone().into_bytes().into();
        let with = |change: fn(&mut Material)| {
            let mut material = material(&root, "", &root.pem);
            change(&mut material);
            material
        };
        const EMPTY: &[u8] = b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        const BROKEN: &[u8] = b"-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n";
        const NO_KEY: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
        for (material, reason) in [
            (with(|m| m.certificate.clear()), "ca-cert.pem: holds no certificate"),
            (with(|m| m.certificate = EMPTY.to_vec()), "ca-cert.pem: a certificate cannot be parsed"),
            (with(|m| m.certificate = BROKEN.to_vec()), "ca-cert.pem: "),
            (with(|m| m.key = Vec::new().into()), "ca-key.pem: "),
            (with(|m| m.key = NO_KEY.to_vec().into()), "ca-key.pem: "),
            (with(|m| m.roots = EMPTY.to_vec()), "root-cert.pem: "),
            (with(|m| m.chain = EMPTY.to_vec()), "cert-chain.pem: "),
            (with(|m| m.roots = m.roots.repeat(40)), "root-cert.pem: too many"),
            (with(|m| m.crl = Some(vec![0xff])), "ca-crl.pem: is not text"),
            (other_key, "ca-key.pem is not the key of ca-cert.pem"),
            (of(leaf), "not a CA's certificate"),
            (of(no_usage), "may not sign certificates"),
            (of(old), "ca-cert.pem is not valid now"),
            (of(early), "ca-cert.pem is not valid now"),
            (material(&root, "", &other.pem), "does not lead to root-cert.pem"),
            (material(&made(params("lower"), Some(&low)), "", &root.pem), "does not lead to root-cert.pem"),
        ] {
            let error = Issuing::new(&material, now).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}, expected {reason}");
            assert!(!error.contains("KEY-----"), "{error}");
        }
    }
}
