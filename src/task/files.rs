//! Files that others write, and files of the daemon itself.
//!
//! Files of others are read as YAML and watched. A change is reported once it has settled, however it was made: written
//! in place, renamed over, or by the symlink swap of a mounted ConfigMap. Files of the daemon are replaced atomically:
//! a reader finds the new content or the old, never a part.

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecursiveMode, Watcher};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How long a file must stay the same before a change is reported. Writing in place takes a while, and half a file may
/// well be valid.
const SETTLE: Duration = Duration::from_millis(150);

/// Interval at which files are checked without any event, for filesystems that send none.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// Age above which a temporary file is left over from a daemon that was killed while it wrote it.
const LEFTOVER: Duration = Duration::from_secs(60);

/// Reports changes of one file.
#[derive(Debug)]
pub struct FileWatch {
    path: PathBuf,
    seen: Stamp,
    events: mpsc::Receiver<()>,
    /// Kept because dropping it ends the watch. `None` if the system has no more watches.
    _watcher: Option<notify::RecommendedWatcher>,
}

/// Inode, length and modification time of a file; `None` if it does not exist. See [`stamp`].
pub type Stamp = Option<(u64, u64, SystemTime)>;

impl FileWatch {
    /// Watches a file, which need not exist yet.
    pub fn new(path: &Path) -> Self {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Its folder may hold a file that is written all the time, a log for example.
        let (name, is_link) = (path.file_name().map(ToOwned::to_owned), path.is_symlink());
        let concerns = move |event: &Event| {
            let named = event.paths.iter().any(|path| path.file_name() == name.as_deref());
            named || is_link || !is_write(event.kind)
        };
        let (watcher, events) = watch(folder, concerns);
        Self { path: path.to_owned(), seen: stamp(path), events, _watcher: watcher }
    }

    /// Completes when the file differs from what it was at the last call, or at the start.
    pub async fn changed(&mut self) {
        loop {
            // Without a watcher the channel is closed, and receiving returns at once. Sleep instead of spinning.
            match timeout(CHECK_EVERY, self.events.recv()).await {
                Ok(Some(())) => {}
                Ok(None) => tokio::time::sleep(CHECK_EVERY).await,
                Err(_) => {}
            }
            let mut now = stamp(&self.path);
            while now != self.seen {
                tokio::time::sleep(SETTLE).await;
                let later = stamp(&self.path);
                if later == now {
                    self.seen = now;
                    return;
                }
                now = later;
            }
        }
    }
}

/// Reports that something in a folder may have changed.
#[derive(Debug)]
pub struct FolderWatch {
    events: mpsc::Receiver<()>,
    /// Kept because dropping it ends the watch.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl FolderWatch {
    /// Watches a folder, which should exist.
    pub fn new(folder: &Path) -> Self {
        let (watcher, events) = watch(folder, |_| true);
        Self { events, _watcher: watcher }
    }

    /// Completes when something has changed and settled, and after [`CHECK_EVERY`] in any case.
    pub async fn changed(&mut self) {
        match timeout(CHECK_EVERY, self.events.recv()).await {
            Ok(None) => tokio::time::sleep(CHECK_EVERY).await,
            Ok(Some(())) => tokio::time::sleep(SETTLE).await,
            Err(_) => {}
        }
        let _ = self.events.try_recv();
    }
}

/// Whether an event may mean a change. Opening and reading a file are events too; counting them would make each check
/// cause the next one.
fn is_change(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Whether an event only says that the content of a file was written.
fn is_write(kind: EventKind) -> bool {
    matches!(kind, EventKind::Modify(ModifyKind::Data(_)) | EventKind::Access(_))
}

/// Watches a folder for events that concern the caller. Returns no watcher if the system has no more of them.
fn watch(
    folder: &Path,
    concerns: impl Fn(&Event) -> bool + Send + 'static,
) -> (Option<notify::RecommendedWatcher>, mpsc::Receiver<()>) {
    let (send, events) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| !is_change(event.kind) || !concerns(&event)) {
            return;
        }
        // If the channel is full, a check is due already.
        let _ = send.try_send(());
    });
    let watcher = watcher.and_then(|mut w| w.watch(folder, RecursiveMode::NonRecursive).map(|()| w));
    if let Err(error) = &watcher {
        let seconds = CHECK_EVERY.as_secs();
        tracing::warn!(folder = %folder.display(), %error, "cannot watch this folder; checking it every {seconds} s instead");
    }
    (watcher.ok(), events)
}

/// A unique name for a temporary file that is to replace `name`. It is random, because a process id is not unique: each
/// daemon is process 1 of its own pod.
pub fn temporary_name(name: &str) -> String {
    format!(".{name}.{:016x}", rand::random::<u64>())
}

/// Whether a file existed, from the result of removing it. A file that does not exist is no error.
pub fn was_there(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes temporary files for `name` that daemons left because they were killed while writing them.
pub fn remove_leftovers(folder: &Path, name: &str) {
    let start = format!(".{name}.");
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        let old = modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > LEFTOVER);
        if old && entry.file_name().to_str().is_some_and(|beside| beside.starts_with(&start)) {
            // A file that stays only takes room. If permissions are missing, the next write reports it.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Parses YAML. The error is a single line that names line and column.
///
/// An empty document is refused, because a file that is being written is empty at first.
pub fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.trim().is_empty() {
        return Err("the file is empty; if there is nothing to list, write an empty list such as `pods: []`".into());
    }
    serde_saphyr::from_str(text).map_err(|error| {
        let plain = error.without_snippet().render();
        plain.split_whitespace().collect::<Vec<_>>().join(" ")
    })
}

/// What tells a file from an earlier version of it.
pub fn stamp(path: &Path) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.len(), metadata.modified().ok()?))
}

/// Reads a file of at most `most` bytes; a longer one is an error. Returns `None` if it does not exist. Temporary files
/// for it that killed daemons left are removed.
pub fn read_bounded(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    if let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) {
        remove_leftovers(folder, name);
    }
    let opened = match File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    opened.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()).is_ok_and(|length| length <= most) {
        true => Ok(Some(bytes)),
        false => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("the file has more than {most} bytes"))),
    }
}

/// Replaces a file atomically: after a failure it is as before. Only the owner (root) can read it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(temporary_name(&name));
    let written = (|| {
        let mut new = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        new.write_all(bytes)?;
        new.sync_all()?;
        std::fs::rename(&beside, path)
    })();
    if written.is_err() {
        // Best effort: the error that is returned is why the file could not be written.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{CreateKind, ModifyKind, RemoveKind, RenameMode};

    #[test]
    fn reading_a_file_is_no_change() {
        for kind in [AccessKind::Open(AccessMode::Any), AccessKind::Read, AccessKind::Close(AccessMode::Read)] {
            assert!(!is_change(EventKind::Access(kind)), "{kind:?}");
        }
        for kind in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Create(CreateKind::File),
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            EventKind::Remove(RemoveKind::File),
            EventKind::Any,
            EventKind::Other,
        ] {
            assert!(is_change(kind), "{kind:?}");
        }
        assert_ne!(temporary_name("a"), temporary_name("a"), "whatever the process id is");
    }
}
