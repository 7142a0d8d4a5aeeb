//! Certificates for peers that are not culvert: some that the built-in CA would issue, and some that it never would.

use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// The files of a certificate.
#[derive(Clone, Debug)]
pub struct Files {
    pub chain: PathBuf,
    pub key: PathBuf,
}

pub fn spiffe(name: &str) -> String {
    format!("spiffe://cluster.local/ns/ns/sa/{name}")
}

/// Signs a leaf with the CA in `ca`. It is valid from `from` to `to`, in seconds from now.
pub fn leaf(ca: &Path, dir: &Path, name: &str, uris: &[&str], from: i64, to: i64) -> Files {
    let key_pem = std::fs::read_to_string(ca.join("ca.key")).unwrap();
    let root_pem = std::fs::read_to_string(ca.join("ca.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&root_pem, KeyPair::from_pem(&key_pem).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|u| SanType::URI(Ia5String::try_from(*u).unwrap())).collect();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = OffsetDateTime::now_utc() + Duration::seconds(from);
    params.not_after = OffsetDateTime::now_utc() + Duration::seconds(to);
    let key = KeyPair::generate().unwrap();
    let files = Files { chain: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
    let leaf = params.signed_by(&key, &issuer).unwrap();
    std::fs::write(&files.chain, leaf.pem() + &root_pem).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    files
}

/// A valid leaf for `spiffe://cluster.local/ns/ns/sa/<name>`.
pub fn good(ca: &Path, dir: &Path, name: &str) -> Files {
    leaf(ca, dir, name, &[&spiffe(name)], -60, 3600)
}

/// The serial number of a certificate.
pub fn serial(certificate: &Path) -> rcgen::SerialNumber {
    let path = certificate.display().to_string();
    let output = std::process::Command::new("openssl").args(["x509", "-noout", "-serial", "-in", &path]).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let digits = text.trim().strip_prefix("serial=").unwrap().as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect::<Vec<u8>>().into()
}

/// A list of revoked certificates of the CA in `ca`.
pub fn crl(ca: &Path, serials: &[rcgen::SerialNumber]) -> String {
    let key = KeyPair::from_pem(&std::fs::read_to_string(ca.join("ca.key")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&std::fs::read_to_string(ca.join("ca.pem")).unwrap(), key).unwrap();
    super::control_plane::signed_crl(&issuer, serials)
}
