//! Files that others write: reading YAML, and watching. A change is told once it has settled, however it was made (write in place,
//! rename over, or the symlink swap of a mounted ConfigMap). And files of ours that must be whole, or as they were.

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecursiveMode, Watcher};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How long a file must stay the same before a change is told: who writes in place takes a while, and half a file may
/// well be valid.
const SETTLE: Duration = Duration::from_millis(150);

/// Without any event the file is looked at this often, for filesystems that send none.
const LOOK_ANYWAY: Duration = Duration::from_secs(5);

/// A file beside one of ours that is older than this is being written by nobody.
const LEFTOVER: Duration = Duration::from_secs(60);

/// Tells of changes of one file.
#[derive(Debug)]
pub struct FileWatch {
    path: PathBuf,
    seen: Stamp,
    events: mpsc::Receiver<()>,
    /// Kept for its life only: dropping it ends the watch. `None` where the system offers no more watches.
    _watcher: Option<notify::RecommendedWatcher>,
}

/// See [`stamp`].
pub type Stamp = Option<(u64, u64, SystemTime)>;

impl FileWatch {
    /// Watches `path`, which need not exist yet.
    pub fn new(path: &Path) -> Self {
        let (watcher, events) = watch(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")));
        Self { path: path.to_owned(), seen: stamp(path), events, _watcher: watcher }
    }

    /// Completes when the file is another than at the last call (or than at the start).
    pub async fn changed(&mut self) {
        loop {
            // A closed channel (no watcher) must not spin: then only the timeout paces the loop.
            match timeout(LOOK_ANYWAY, self.events.recv()).await {
                Ok(Some(())) => {}
                Ok(None) => tokio::time::sleep(LOOK_ANYWAY).await,
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

/// Tells that something in a folder may have changed.
#[derive(Debug)]
pub struct FolderWatch {
    events: mpsc::Receiver<()>,
    /// Kept for its life only: dropping it ends the watch.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl FolderWatch {
    /// Watches a folder, which should exist.
    pub fn new(folder: &Path) -> Self {
        let (watcher, events) = watch(folder);
        Self { events, _watcher: watcher }
    }

    /// Completes when something has changed and settled, and every 5 s without.
    pub async fn changed(&mut self) {
        match timeout(LOOK_ANYWAY, self.events.recv()).await {
            Ok(None) => tokio::time::sleep(LOOK_ANYWAY).await,
            Ok(Some(())) => tokio::time::sleep(SETTLE).await,
            Err(_) => {}
        }
        let _ = self.events.try_recv();
    }
}

/// Whether something may be another than before. Whoever looks at a file opens it, and would be told of that, and look again.
fn is_change(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Watches a folder; no watcher where the system offers no more of them.
fn watch(folder: &Path) -> (Option<notify::RecommendedWatcher>, mpsc::Receiver<()>) {
    let (send, events) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| !is_change(event.kind)) {
            return;
        }
        // A full channel already says that there is something to look at.
        let _ = send.try_send(());
    });
    let watcher = watcher.and_then(|mut w| w.watch(folder, RecursiveMode::NonRecursive).map(|()| w));
    if let Err(error) = &watcher {
        tracing::warn!(folder = %folder.display(), %error, "no file events here; looking every 5 s instead");
    }
    (watcher.ok(), events)
}

/// A name for a file that is to replace `name`. Process ids do not tell daemons apart: in its own pod each is number 1.
pub fn temporary_name(name: &str) -> String {
    format!(".{name}.{:016x}", rand::random::<u64>())
}

/// Whether something was there, by how removing it has ended; what is not there is removed already.
pub fn was_there(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what a daemon that was killed while it wrote has left beside `name`.
pub fn remove_leftovers(folder: &Path, name: &str) {
    let start = format!(".{name}.");
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        let old = modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > LEFTOVER);
        if old && entry.file_name().to_str().is_some_and(|beside| beside.starts_with(&start)) {
            // It only takes room; whoever may not remove it may not write either, and says so then.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Reads YAML; an error is one line that names line and column.
///
/// An empty document is refused: a file that is being written is empty at first, and nothing must follow from that.
pub fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.trim().is_empty() {
        return Err("the file is empty; to say that there is nothing, write an empty list such as `pods: []`".into());
    }
    serde_saphyr::from_str(text).map_err(|error| {
        let plain = error.without_snippet().render();
        plain.split_whitespace().collect::<Vec<_>>().join(" ")
    })
}

/// What tells a file from what it was before: inode, length, time of writing; nothing where it is not there.
pub fn stamp(path: &Path) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.len(), metadata.modified().ok()?))
}

/// Reads a file of ours, of `most` bytes at most; `None` where there is none. What a daemon that was killed while writing has
/// left beside it is removed.
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
        false => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {most} bytes"))),
    }
}

/// Writes a file of ours: whole, or not at all; for nobody else to read.
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
        // Nothing half is left; that it cannot be removed adds nothing to why it could not be written.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{CreateKind, ModifyKind, RemoveKind, RenameMode};

    #[test]
    fn reading_is_no_change() {
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
