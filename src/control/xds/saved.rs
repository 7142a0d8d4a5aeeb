//! The state file: the last known mesh facts, for a start without a control plane.
//!
//! The file has mode 0600 and is replaced atomically. A file that cannot be understood is not used, and is reported.

use crate::proto::culvert::state::{SavedState, SavedType};
use crate::task::files;
use prost::Message;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the format.
const FORMAT: u32 = 1;

/// Largest file that is read.
const BYTES_MAX: u64 = 1 << 30;

/// Why the state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It cannot be read or written.
    #[error("state file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Its content is not valid.
    #[error("state file {0}: {1}; it is not used")]
    Content(PathBuf, String),
}

/// The content of a state file.
#[derive(Debug)]
pub struct Saved {
    /// When the facts were last known to be true.
    pub at: SystemTime,
    /// The resources.
    pub types: Vec<SavedType>,
}

impl Saved {
    /// How long ago the facts were last known to be true, in whole seconds; zero if this node's clock is behind.
    pub fn age(&self) -> Duration {
        Duration::from_secs(self.at.elapsed().unwrap_or_default().as_secs())
    }
}

/// Reads a state file; `None` if there is none.
pub fn read(path: &Path) -> Result<Option<Saved>, SavedError> {
    let file = |source| SavedError::File { path: path.to_owned(), source };
    let content = |reason: String| SavedError::Content(path.to_owned(), reason);
    let bytes = files::read_bounded(path, BYTES_MAX).map_err(file)?;
    bytes.map(|bytes| decode(&bytes).map_err(content)).transpose()
}

/// Decodes the content of a state file.
pub fn decode(bytes: &[u8]) -> Result<Saved, String> {
    let state = SavedState::decode(bytes).map_err(|error| format!("is not a state file: {error}"))?;
    if state.format != FORMAT {
        return Err(format!("has format {}, this version knows {FORMAT}", state.format));
    }
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(state.saved_at)).ok_or("has an impossible date")?;
    Ok(Saved { at, types: state.types })
}

/// Writes a state file atomically. `at` is when the facts were last known to be true.
pub fn write(path: &Path, at: SystemTime, control_plane: &str, types: Vec<SavedType>) -> Result<(), SavedError> {
    let file = |source| SavedError::File { path: path.to_owned(), source };
    let saved_at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let state = SavedState { format: FORMAT, saved_at, control_plane: control_plane.to_owned(), types };
    files::write_atomically(path, &state.encode_to_vec()).map_err(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_is_complete_private_and_versioned() {
        let folder = std::env::temp_dir().join(format!("culvert-saved-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("state");
        assert!(read(&path).unwrap().is_none());
        let types = vec![SavedType { type_url: "t".into(), resources: vec![Default::default()] }];
        write(&path, SystemTime::now(), "istiod", types.clone()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap().unwrap().types, types);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
        let newer = SavedState { format: 2, ..SavedState::default() };
        std::fs::write(&path, newer.encode_to_vec()).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("format 2"));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(write(&path, SystemTime::now(), "istiod", Vec::new()).unwrap_err().to_string().contains("state file"));
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes: Vec<u8>) {
            drop(decode(&bytes));
        }
    }
}
