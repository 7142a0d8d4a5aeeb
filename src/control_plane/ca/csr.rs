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

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn request(key: &KeyPair) -> String {
        CertificateParams::default().serialize_request(key).unwrap().pem().unwrap()
    }

    #[test]
    fn requests_with_good_keys_are_read() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let read = public_key(&request(&key)).unwrap();
            assert_eq!(rcgen::PublicKeyData::der_bytes(&read), key.public_key_raw(), "{algorithm:?}");
        }
        for pem in [
            include_str!("../../../fuzz/corpus/csr/p256.pem"),
            include_str!("../../../fuzz/corpus/csr/ed25519.pem"),
            // It wishes to be a CA and somebody else. Nobody asks.
            include_str!("../../../fuzz/corpus/csr/wishes.pem"),
        ] {
            public_key(pem).unwrap();
        }
    }

    #[test]
    fn requests_that_cannot_be_used_are_refused_for_a_reason() {
        let good = include_str!("../../../fuzz/corpus/csr/p256.pem");
        let der = CertificateSigningRequestDer::from_pem_slice(good.as_bytes()).unwrap();
        let pem = |der: &[u8]| {
            use base64::Engine as _;
            let body = base64::engine::general_purpose::STANDARD.encode(der);
            format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
        };
        let (mut forged, mut longer) = (der.to_vec(), der.to_vec());
        *forged.last_mut().unwrap() ^= 1;
        longer.push(0);
        for (text, reason) in [
            (String::new(), "not a CERTIFICATE REQUEST in PEM"),
            ("hello".into(), "not a CERTIFICATE REQUEST in PEM"),
            ("-----BEGIN CERTIFICATE REQUEST-----\nMIIB".into(), "not a CERTIFICATE REQUEST in PEM"),
            (good.replace("CERTIFICATE REQUEST", "CERTIFICATE"), "not a CERTIFICATE REQUEST in PEM"),
            (format!("{good}{}", " ".repeat(BYTES_MAX)), "16384 at most"),
            (pem(&[]), "cannot be parsed"),
            (pem(&[0x30, 0]), "cannot be parsed"),
            (pem(&der[..der.len() / 2]), "cannot be parsed"),
            (pem(&longer), "cannot be parsed"),
            (pem(&forged), "not signed by the key in it"),
            (include_str!("../../../fuzz/corpus/csr/rsa1024.pem").into(), "has 1024 bits, from 2048 to 8192"),
            (
                include_str!("../../../fuzz/corpus/csr/sha1.pem").into(),
                "algorithm that is not accepted (1.2.840.113549.1.1.5)",
            ),
            (include_str!("../../../fuzz/corpus/csr/pss.pem").into(), "algorithm that is not accepted"),
            (include_str!("../../../fuzz/corpus/csr/secp256k1.pem").into(), "neither EC (P-256"),
            (include_str!("../../../fuzz/corpus/csr/ed448.pem").into(), "neither EC (P-256"),
            (include_str!("../../../fuzz/corpus/csr/dsa.pem").into(), "neither EC (P-256"),
        ] {
            let error = public_key(&text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}, expected {reason}");
        }
    }

    #[test]
    fn a_number_has_the_bits_from_its_highest_one() {
        for (number, expected) in
            [(&[][..], 0), (&[0, 0], 0), (&[1], 1), (&[0, 0x80], 8), (&[1, 0], 9), (&[0xff; 256], 2048)]
        {
            assert_eq!(bits(number), expected);
        }
    }
}
