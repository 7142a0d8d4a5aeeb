//! The state file: the last known state of the mesh, so that a start without a control plane need not begin with nothing.
//!
//! Written beside and renamed over, mode 0600; a file that cannot be understood is left out and reported.

use crate::proto::culvert::state::{SavedState, SavedType};
use prost::Message;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the format.
const FORMAT: u32 = 1;

/// A file beside it that is older than this is being written by nobody.
const LEFTOVER: Duration = Duration::from_secs(60);

/// Largest file that is read.
const BYTES_MAX: u64 = 1 << 30;

/// Why there is no saved state.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It cannot be read or written.
    #[error("state file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error("state file {0}: {1}; it is not used")]
    Content(PathBuf, String),
}

/// What a state file held.
#[derive(Debug)]
pub struct Saved {
    /// When it was true.
    pub at: SystemTime,
    /// The resources.
    pub types: Vec<SavedType>,
}

impl Saved {
    /// How long ago it was true, in whole seconds; zero where this node's clock is behind.
    pub fn age(&self) -> Duration {
        Duration::from_secs(self.at.elapsed().unwrap_or_default().as_secs())
    }
}

/// Reads a state file; `None` where there is none yet.
pub fn read(path: &Path) -> Result<Option<Saved>, SavedError> {
    let file = |source| SavedError::File { path: path.to_owned(), source };
    let content = |reason: String| SavedError::Content(path.to_owned(), reason);
    remove_leftovers(path);
    let opened = match File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(file(error)),
    };
    let mut bytes = Vec::new();
    opened.take(BYTES_MAX).read_to_end(&mut bytes).map_err(file)?;
    decode(&bytes).map(Some).map_err(content)
}

/// Removes what a daemon that was killed while writing has left beside the file.
fn remove_leftovers(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return };
    let old = |entry: &std::fs::DirEntry| {
        let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > LEFTOVER)
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let beside = entry.file_name();
        let ours = beside.to_str().is_some_and(|b| b.starts_with(&format!("{name}.")) && b.ends_with(".new"));
        if ours && old(&entry) {
            // It only takes room; whoever may not remove it may not write either, and says so then.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Reads the content of a state file.
pub fn decode(bytes: &[u8]) -> Result<Saved, String> {
    let state = SavedState::decode(bytes).map_err(|error| format!("is not a state file: {error}"))?;
    if state.format != FORMAT {
        return Err(format!("has format {}, this version knows {FORMAT}", state.format));
    }
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(state.saved_at)).ok_or("has an impossible date")?;
    Ok(Saved { at, types: state.types })
}

/// Writes a state file, of what was true `at`: whole, or not at all.
pub fn write(path: &Path, at: SystemTime, control_plane: &str, types: Vec<SavedType>) -> Result<(), SavedError> {
    let file = |source| SavedError::File { path: path.to_owned(), source };
    let saved_at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let state = SavedState { format: FORMAT, saved_at, control_plane: control_plane.to_owned(), types };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Two daemons may write at once during an upgrade, and in containers both may have the same process id.
    name.push(format!(".{:016x}.new", rand::random::<u64>()));
    let beside = path.with_file_name(name);
    let written = (|| {
        let mut new = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        new.write_all(&state.encode_to_vec())?;
        new.sync_all()?;
        std::fs::rename(&beside, path)
    })();
    if written.is_err() {
        // Nothing half is left; that it cannot be removed adds nothing to why it could not be written.
        let _ = std::fs::remove_file(&beside);
    }
    written.map_err(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_whole_private_and_versioned() {
        let folder = std::env::temp_dir().join(format!("culvert-saved-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("state");
        assert!(read(&path).unwrap().is_none());
        let types = vec![SavedType { type_url: "t".into(), resources: vec![Default::default()] }];
        write(&path, SystemTime::now(), "istiod", types.clone()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap().unwrap().types, types);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
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
