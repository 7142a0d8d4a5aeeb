//! The built-in CA: a directory with `ca.pem` (root certificates, the signing one first) and `ca.key` (mode 0600).
//!
//! It is meant for one machine, for tests and for small installations; several nodes may share the directory. Key and
//! roots are read for each signing, so replacing the files rotates the CA without a restart. An existing CA is never
//! overwritten.

use super::credentials::Credentials;
use super::signed::SignedCertificate;
use crate::crypto::certificates_from_pem;
use crate::mesh::SpiffeName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;

/// How far in the past the validity of a leaf starts, because the clocks of nodes differ.
const BACKDATE: Duration = Duration::from_secs(60);

/// Validity of a root made by [`Builtin::init`].
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why the CA directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// A file cannot be read or written.
    #[error("CA directory: {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file exists, but its content or mode is wrong.
    #[error("CA directory: {path}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Signing failed.
    #[error("cannot sign a certificate for {identity}: {source}")]
    Sign {
        /// The identity that the certificate is for.
        identity: SpiffeName,
        /// The library's error.
        source: rcgen::Error,
    },
}

/// A CA in a directory.
#[derive(Clone, Debug)]
pub struct Builtin {
    folder: PathBuf,
    leaf_life: Duration,
}

impl Builtin {
    /// A CA in `folder` that signs leaves valid for `leaf_life`.
    pub fn new(folder: &Path, leaf_life: Duration) -> Self {
        Self { folder: folder.to_owned(), leaf_life }
    }

    /// Creates a CA in `folder`: a P-256 key (mode 0600) and a self-signed root. Fails if there is one already.
    pub fn init(folder: &Path) -> Result<(), BuiltinError> {
        let key_path = folder.join("ca.key");
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| BuiltinError::File { path, source }
        };
        let bad = |source: rcgen::Error| BuiltinError::Content { path: key_path.clone(), reason: source.to_string() };
        std::fs::create_dir_all(folder).map_err(file(folder))?;
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(bad)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "culvert built-in CA");
        // A unique name, so that the old and the new root can be distinguished during a rotation.
        let unique_name = format!("{:032x}", rand::random::<u128>());
        params.distinguished_name.push(DnType::CommonName, unique_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let now = SystemTime::now();
        params.not_before = OffsetDateTime::from(now - BACKDATE);
        params.not_after = OffsetDateTime::from(now + ROOT_LIFE);
        let root = params.self_signed(&key).map_err(bad)?;
        write_new(&key_path, key.serialize_pem().as_bytes(), 0o600).map_err(file(&key_path))?;
        let root_path = folder.join("ca.pem");
        write_new(&root_path, root.pem().as_bytes(), 0o644).map_err(file(&root_path))
    }

    /// Checks that the directory holds a usable CA, by signing a leaf that is then dropped.
    pub fn check(&self) -> Result<(), BuiltinError> {
        let content = |reason: String| BuiltinError::Content { path: self.folder.join("ca.key"), reason };
        let identity = SpiffeName::new("cluster.local", "culvert", "check").map_err(|e| content(e.to_string()))?;
        let signed = self.sign(&identity)?;
        Credentials::alone(identity, signed).map(drop).map_err(|e| content(e.to_string()))
    }

    /// Generates a P-256 key for `identity` and signs it. The certificate has an empty subject and exactly one URI SAN,
    /// the SPIFFE name, which is critical.
    pub fn sign(&self, identity: &SpiffeName) -> Result<SignedCertificate, BuiltinError> {
        let key_path = self.folder.join("ca.key");
        let root_path = self.folder.join("ca.pem");
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|source| BuiltinError::File { path: path.clone(), source })
        };
        let content = |path: &PathBuf, reason: String| BuiltinError::Content { path: path.clone(), reason };
        let mode = std::fs::metadata(&key_path)
            .map_err(|source| BuiltinError::File { path: key_path.clone(), source })?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            let reason = format!(
                "others may read the key (mode {:o}); run chmod 600 on it, or set `defaultMode: 0400` if it comes from a Secret volume",
                mode & 0o777
            );
            return Err(content(&key_path, reason));
        }
        let ca_key = KeyPair::from_pem(&read(&key_path)?).map_err(|e| content(&key_path, e.to_string()))?;
        let roots =
            certificates_from_pem(read(&root_path)?.as_bytes()).map_err(|reason| content(&root_path, reason))?;
        let first = roots.first().ok_or_else(|| content(&root_path, "holds no certificate".into()))?;
        let issuer = Issuer::from_ca_cert_der(first, ca_key).map_err(|e| content(&root_path, e.to_string()))?;

        let issued = SystemTime::now();
        let sign = || -> Result<SignedCertificate, rcgen::Error> {
            let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity.to_string())?)];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            params.not_before = OffsetDateTime::from(issued - BACKDATE);
            params.not_after = OffsetDateTime::from(issued + self.leaf_life);
            let leaf = params.signed_by(&key, &issuer)?;
            Ok(SignedCertificate {
                key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
                chain: vec![leaf.der().clone()],
                roots: roots.clone(),
                not_before: issued - BACKDATE,
                not_after: issued + self.leaf_life,
                life: self.leaf_life,
            })
        };
        sign().map_err(|source| BuiltinError::Sign { identity: identity.clone(), source })
    }
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::verify::peer_name;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("culvert-ca-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        path
    }

    #[test]
    fn a_leaf_proves_its_identity_and_the_key_is_private() {
        let folder = folder("leaf");
        Builtin::init(&folder).unwrap();
        let mode = std::fs::metadata(folder.join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let identity = SpiffeName::new("cluster.local", "a", "b").unwrap();
        let signed = Builtin::new(&folder, Duration::from_secs(3600)).sign(&identity).unwrap();
        assert_eq!(peer_name(&signed.chain[0]).unwrap(), identity);
        assert!(Builtin::init(&folder).is_err(), "an existing CA is not overwritten");
        Builtin::new(&folder, Duration::from_secs(3600)).check().unwrap();
        let other = self::folder("other");
        Builtin::init(&other).unwrap();
        std::fs::copy(other.join("ca.pem"), folder.join("ca.pem")).unwrap();
        let error = Builtin::new(&folder, Duration::from_secs(3600)).check().unwrap_err().to_string();
        assert!(error.contains("do not belong together"), "{error}");
        std::fs::remove_dir_all(&other).unwrap();
        std::fs::set_permissions(folder.join("ca.key"), Permissions::from_mode(0o644)).unwrap();
        let error = Builtin::new(&folder, Duration::from_secs(1)).check().unwrap_err().to_string();
        assert!(error.contains("ca.key") && error.contains("chmod 600"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = Builtin::new(Path::new("/nonexistent/ca"), Duration::from_secs(1)).check().unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca/ca.key"), "{error}");
    }
}
