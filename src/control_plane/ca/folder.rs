//! The signing key in a directory with the files of the Secret `cacerts`, such as a mounted volume.

use super::issuing::Material;
use super::kept::material;
use super::secrets::Data;
use aws_lc_rs::digest::{SHA256, digest};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Files of the layout.
const FILES: [&str; 8] =
    ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem", "ca-crl.pem", "tls.crt", "tls.key", "ca.crt"];
/// Largest file, as large as a Secret may be.
const BYTES_MAX: u64 = 1 << 20;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file is missing.
    #[error("{0} is missing")]
    Missing(PathBuf),
}

/// Reads a directory. What is returned is unchecked.
pub fn load(folder: &Path) -> Result<Material, FolderError> {
    let (mut data, mut all) = (Data::new(), Vec::new());
    for name in FILES {
        let path = folder.join(name);
        let read = read(&path).map_err(|source| FolderError::File { path, source })?;
        if let Some(content) = read {
            all.extend_from_slice(digest(&SHA256, &content).as_ref());
            all.extend_from_slice(name.as_bytes());
            data.insert(name.to_owned(), content.into());
        }
    }
    let version: String = digest(&SHA256, &all).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let origin = format!("directory {}", folder.display());
    material(&data, origin, version).map_err(|name| FolderError::Missing(folder.join(name)))
}

/// The content of a file; `None` if there is none.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let opened = match File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut content = Vec::new();
    opened.take(BYTES_MAX + 1).read_to_end(&mut content)?;
    match content.len() as u64 > BYTES_MAX {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {BYTES_MAX} bytes"))),
        false => Ok(Some(content)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_says_whether_any_file_has_changed_and_errors_name_the_file() {
        let folder = std::env::temp_dir().join(format!("culvert-ca-folder-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        let error = load(&folder).unwrap_err().to_string();
        assert!(error.contains("ca-key.pem is missing") || error.contains("ca-cert.pem is missing"), "{error}");
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        for (name, text) in [("ca-cert.pem", "a"), ("ca-key.pem", "b"), ("root-cert.pem", "c")] {
            write(name, text);
        }
        let mut seen = vec![load(&folder).unwrap().version];
        assert_eq!(load(&folder).unwrap().version, seen[0]);
        for (name, text) in [("ca-cert.pem", "x"), ("ca-key.pem", "y"), ("cert-chain.pem", "y"), ("ca-crl.pem", "y")] {
            write(name, text);
            let version = load(&folder).unwrap().version;
            assert!(!seen.contains(&version), "{name}");
            seen.push(version);
        }
        assert_eq!(load(&folder).unwrap().crl.unwrap(), b"y");
        write("ca-cert.pem", &"x".repeat(1 << 20));
        load(&folder).unwrap();
        write("ca-cert.pem", &"x".repeat((1 << 20) + 1));
        let error = load(&folder).unwrap_err().to_string();
        assert!(error.contains("ca-cert.pem") && error.contains("more than"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
