//! Reads signing requests. Pure.
//!
//! Only the public key counts, and that the request is signed by it: names and extensions of a request are what the
//! caller wishes, and the CA decides them itself.

use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::der_parser::oid::Oid;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_NIST_EC_P521, OID_PKCS1_RSAENCRYPTION,
    OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ECDSA_WITH_SHA512, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

/// Longest request. One with an RSA key of 8192 bits and many names has less.
const BYTES_MAX: usize = 16 << 10;
/// Sizes of RSA keys, in bits. A larger one costs every peer time.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Algorithms of signatures. SHA-1 is not among them.
const SIGNATURES: [Oid<'static>; 7] = [
    OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384,
    OID_SIG_ECDSA_WITH_SHA512,
    OID_SIG_ED25519,
    OID_PKCS1_SHA256WITHRSA,
    OID_PKCS1_SHA384WITHRSA,
    OID_PKCS1_SHA512WITHRSA,
];
/// Elliptic curves of keys.
const CURVES: [Oid<'static>; 3] = [OID_EC_P256, OID_NIST_EC_P384, OID_NIST_EC_P521];

/// Why a signing request cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// It is too long.
    #[error("the signing request has {0} bytes, {BYTES_MAX} at most")]
    TooLong(usize),
    /// It is not PEM.
    #[error("the signing request is not a CERTIFICATE REQUEST in PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// The content of the PEM is not a request.
    #[error("the signing request cannot be parsed")]
    Malformed,
    /// Its key is of a kind that is not accepted.
    #[error("the key of the signing request is neither EC (P-256, P-384, P-521), Ed25519 nor RSA")]
    Key,
    /// Its RSA key is too short or too long.
    #[error("the RSA key of the signing request has {0} bits, from {min} to {max} are accepted", min = RSA_BITS.start(), max = RSA_BITS.end())]
    RsaBits(usize),
    /// It is signed by an algorithm that is not accepted.
    #[error("the signing request is signed by an algorithm that is not accepted ({0})")]
    Algorithm(String),
    /// It is not signed by its key.
    #[error("the signing request is not signed by the key in it")]
    NotSigned,
}

/// The public key of a signing request in PEM. The request proves that whoever made it has the private key.
pub fn public_key(pem: &str) -> Result<SubjectPublicKeyInfo, CsrError> {
    if pem.len() > BYTES_MAX {
        return Err(CsrError::TooLong(pem.len()));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(CsrError::Pem)?;
    let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed);
    }
    let key = &request.certification_request_info.subject_pki;
    let algorithm = &key.algorithm;
    if algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
        curve.filter(|curve| CURVES.contains(curve)).ok_or(CsrError::Key)?;
    } else if algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        let Ok(PublicKey::RSA(rsa)) = key.parsed() else { return Err(CsrError::Key) };
        let bits = bits(rsa.modulus);
        if !RSA_BITS.contains(&bits) {
            return Err(CsrError::RsaBits(bits));
        }
    } else if algorithm.algorithm != OID_SIG_ED25519 {
        return Err(CsrError::Key);
    }
    let signature = &request.signature_algorithm.algorithm;
    if !SIGNATURES.contains(signature) {
        return Err(CsrError::Algorithm(signature.to_id_string()));
    }
    request.verify_signature().map_err(|_| CsrError::NotSigned)?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CsrError::Key)
}

/// The number of bits of an integer without sign, the highest byte first.
fn bits(number: &[u8]) -> usize {
    let significant = number.iter().position(|byte| *byte != 0).and_then(|first| number.get(first..));
    let Some([highest, rest @ ..]) = significant else { return 0 };
    rest.len() * 8 + (u8::BITS - highest.leading_zeros()) as usize
}
