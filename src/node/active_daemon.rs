//! Decides which daemon of a node is active. During an upgrade two daemons run on a node and share its CNI folders, the
//! rules in its pods, the host's table for kubelet probes and the annotations of its pods. The active daemon writes
//! them. The one on standby goes on serving the connections it has.
//!
//! Each daemon has a file in a folder that all of them see, and holds a lock (flock) on it for as long as it lives; the
//! kernel releases the lock however the process ends. The file's name says whether its daemon is ready to take over and
//! when it began, by the clock since the machine's start, which nobody sets. The daemon with the last of the locked
//! names becomes active: the one that began last, whatever its version, or an earlier one again if that one has died.
//! It starts writing once the previous active daemon has released a second lock, and that one releases it after its
//! last write.

use crate::sys::clock;
use crate::task::Signal;
use crate::task::files::was_there;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Prefix of the folder's name; the node's tag follows.
pub const FOLDER: &str = "turn-";
/// File whose lock the active daemon holds.
const LOCK: &str = "lock";
/// Time between checks of which daemon is active. Nothing announces the death of a process.
const CHECK_EVERY: Duration = Duration::from_millis(250);
/// How long the previous active daemon may go on writing. A daemon that hangs must not block the node.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this daemon is the active one.
#[derive(Clone, Debug)]
pub struct ActiveRole {
    active: Arc<watch::Sender<bool>>,
    /// Number of writes in progress.
    writing: Arc<watch::Sender<usize>>,
    ready: Arc<watch::Sender<bool>>,
    /// Name of this daemon among those of its node.
    name: Arc<str>,
}

/// Permission for one write. The daemon does not go on standby before it is dropped.
#[derive(Debug)]
pub struct WriteGuard {
    writing: Arc<watch::Sender<usize>>,
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        self.writing.send_modify(|writing| *writing = writing.saturating_sub(1));
    }
}

impl ActiveRole {
    /// The role of a daemon that shares nothing with another one: always active.
    pub fn sole() -> Self {
        Self::new(true, "")
    }

    fn new(active: bool, name: &str) -> Self {
        let active = Arc::new(watch::Sender::new(active));
        Self { active, writing: Arc::default(), ready: Arc::default(), name: name.into() }
    }

    /// Whether this daemon is the active one.
    pub fn is_active(&self) -> bool {
        *self.active.borrow()
    }

    /// Permission to write, if this daemon is active.
    pub fn write_guard(&self) -> Option<WriteGuard> {
        // Count the write first and then check the role: a daemon that goes on standby does these in the opposite
        // order.
        self.writing.send_modify(|writing| *writing += 1);
        let write_guard = WriteGuard { writing: self.writing.clone() };
        self.is_active().then_some(write_guard)
    }

    /// A receiver that sees every change of the role.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.active.subscribe()
    }

    /// This daemon knows enough to take over from an earlier one. Before that it becomes active only if it is alone.
    pub fn set_ready(&self) {
        self.ready.send_if_modified(|ready| !std::mem::replace(ready, true));
    }

    /// Whether another daemon that has not begun to end lives in `folder`.
    pub fn has_successor(&self, folder: &Path) -> bool {
        any_daemon(folder, |name| !name.ends_with(&*self.name))
    }

    /// Joins the daemons of a node in `folder`. A daemon that is alone there is active at once.
    pub fn join(folder: &Path) -> (Self, Membership) {
        let began = clock::since_boot().unwrap_or_default().as_nanos();
        let name = format!("{began:020}-{:016x}", rand::random::<u64>());
        let role = Self::new(false, &name);
        let mut membership = Membership {
            role: role.clone(),
            folder: folder.to_owned(),
            name,
            ready: false,
            own: None,
            lock: None,
            waiting_since: None,
            said: None,
            is_first_check: true,
        };
        membership.check();
        (role, membership)
    }
}

/// Membership of this daemon among those of its node.
#[derive(Debug)]
pub struct Membership {
    role: ActiveRole,
    folder: PathBuf,
    name: String,
    ready: bool,
    /// This daemon's own file, locked.
    own: Option<File>,
    /// The lock of the active daemon, while this daemon holds it.
    lock: Option<File>,
    waiting_since: Option<Instant>,
    /// The last error of the folder that was logged.
    said: Option<String>,
    /// Whether the folder has not been read yet.
    is_first_check: bool,
}

impl Membership {
    /// Keeps the role up to date until the process is told to end; then another daemon may become active.
    pub async fn keep(mut self, drain: Signal) {
        let mut ready = self.role.ready.subscribe();
        loop {
            tokio::select! {
                () = drain.gentle() => break,
                () = tokio::time::sleep(CHECK_EVERY) => {}
                Ok(()) = ready.changed() => {}
            }
            if !self.check() && self.role.is_active() {
                self.stand_by().await;
            }
        }
        // Other daemons need not wait for this one from now on. If the file cannot be removed, its lock still ends with
        // the process.
        let _ = std::fs::remove_file(self.file());
        self.release().await;
    }

    fn file(&self) -> PathBuf {
        self.folder.join(format!("{}-{}", u8::from(self.ready), self.name))
    }

    /// Checks which daemon is active, and becomes active if no newer daemon that is ready lives. Returns whether this
    /// daemon is the newest.
    fn check(&mut self) -> bool {
        let newest = self.announce().and_then(|()| self.is_newest());
        let newest = match newest {
            Ok(newest) => {
                (self.said, self.is_first_check) = (None, false);
                newest
            }
            // On the first check no other daemon is known, so there is none to wait for. Later the last known role
            // stays.
            Err(error) => {
                let (folder, error) = (self.folder.display(), error.to_string());
                if self.said.as_ref() != Some(&error) {
                    let active = self.is_first_check || self.role.is_active();
                    tracing::error!(%folder, error, active, "cannot read which daemons of this node are running; this daemon keeps its role");
                }
                self.said = Some(error);
                if self.is_first_check {
                    self.is_first_check = false;
                    self.activate();
                }
                return self.role.is_active();
            }
        };
        if !newest {
            self.waiting_since = None;
            return false;
        }
        if self.lock.is_none() {
            self.lock = lock_file(&self.folder.join(LOCK)).ok().flatten();
        }
        if self.lock.is_some() {
            self.activate();
        } else if !self.role.is_active() {
            let since = *self.waiting_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= PATIENCE {
                tracing::warn!("the previous daemon did not hand over in time; taking over without it");
                self.activate();
            }
        }
        true
    }

    fn activate(&mut self) {
        self.waiting_since = None;
        if self.role.active.send_if_modified(|active| !std::mem::replace(active, true)) {
            tracing::info!("this daemon is active: it writes rules, annotations and CNI files");
        }
    }

    /// Goes on standby: stops writing, and lets the next daemon begin.
    async fn stand_by(&mut self) {
        tracing::info!(
            "another daemon of this node takes over: this one is on standby and serves the connections it has"
        );
        self.release().await;
    }

    /// Ends all writing and then releases the lock.
    async fn release(&mut self) {
        self.role.active.send_replace(false);
        let mut writing = self.role.writing.subscribe();
        let done = writing.wait_for(|writing| *writing == 0);
        if tokio::time::timeout(PATIENCE, done).await.is_err() {
            tracing::warn!("a write is still in progress while another daemon takes over");
        }
        self.lock = None;
    }

    /// Makes sure that this daemon's file exists under the right name.
    fn announce(&mut self) -> io::Result<()> {
        let before = self.file();
        self.ready |= *self.role.ready.borrow();
        let file = self.file();
        if self.own.is_some() && before != file {
            // If the file has been removed, it is created again below.
            let _ = std::fs::rename(before, &file);
        }
        if self.own.is_some() && file.exists() {
            return Ok(());
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        // The file appears only once it is locked: any daemon removes a file that is not.
        let hidden = self.folder.join(format!(".{}", self.name));
        let own = lock_file(&hidden)?.ok_or(io::ErrorKind::WouldBlock)?;
        std::fs::rename(hidden, file)?;
        self.own = Some(own);
        Ok(())
    }

    /// Whether no living daemon has a later name. Removes the files of dead ones.
    fn is_newest(&self) -> io::Result<bool> {
        let own = self.file();
        let mut newest = true;
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.to_str().is_some_and(is_daemon_file) || entry.path() == own {
                continue;
            }
            let other = match OpenOptions::new().read(true).open(entry.path()) {
                Ok(other) => other,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // A shared lock, so that two daemons that check at the same moment do not block each other.
            match other.try_lock_shared() {
                Ok(()) => drop(std::fs::remove_file(entry.path())),
                Err(TryLockError::WouldBlock) => newest &= own.file_name() > Some(&name),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(newest)
    }
}

/// Whether a daemon that has not begun to end lives in `folder`.
pub fn has_daemon(folder: &Path) -> bool {
    any_daemon(folder, |_| true)
}

/// Whether a daemon whose file name `counts` lives in `folder`.
fn any_daemon(folder: &Path, counts: impl Fn(&str) -> bool) -> bool {
    let is_one = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let counts = name.to_str().is_some_and(|name| is_daemon_file(name) && counts(name));
        counts && File::open(entry.path()).is_ok_and(|file| is_locked(&file))
    };
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(is_one)
}

/// Whether another process holds a file's lock.
fn is_locked(file: &File) -> bool {
    // A shared lock, so that two daemons that check at the same moment do not take each other for its holder.
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Whether a file name is that of a daemon.
fn is_daemon_file(name: &str) -> bool {
    let mut parts = name.split('-');
    let mut part = |length, fine: fn(&u8) -> bool| {
        parts.next().is_some_and(|part| part.len() == length && part.as_bytes().iter().all(fine))
    };
    part(1, |b| matches!(b, b'0' | b'1'))
        && part(20, u8::is_ascii_digit)
        && part(16, u8::is_ascii_hexdigit)
        && parts.next().is_none()
}

/// Opens a file and locks it; `None` if another process holds its lock.
fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes `folder`, once no daemon lives in it. Returns whether it existed.
pub fn remove_folder(folder: &Path) -> io::Result<bool> {
    was_there(std::fs::remove_dir_all(folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Drain, Group};

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-turn-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn the_newest_ready_and_living_daemon_is_active() {
        let folder = folder("newest");
        let (first, mut one) = ActiveRole::join(&folder);
        assert!(first.is_active() && !first.has_successor(&folder) && has_daemon(&folder), "it is alone");
        let (second, mut two) = ActiveRole::join(&folder);
        assert!(first.has_successor(&folder) && second.has_successor(&folder));
        assert!(!second.is_active());
        first.set_ready();
        assert!(one.check() && !two.check(), "the second is not ready yet");
        second.set_ready();
        assert!(two.check() && !second.is_active(), "it is the newest, and the first has not released the lock");
        assert!(!one.check(), "the first sees the newer one");
        one.role.active.send_replace(false);
        one.lock = None;
        assert!(two.check() && second.is_active() && first.write_guard().is_none());
        // The second dies without cleaning up: its lock ends with it, its file stays.
        let left = two.file();
        drop(two);
        assert!(left.exists() && !first.has_successor(&folder) && has_daemon(&folder));
        assert!(one.check() && first.is_active() && !left.exists());
        // Another program empties the folder.
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(one.check() && one.file().exists());
        // Two that began at the same moment agree on one.
        let (_, mut a) = ActiveRole::join(&folder);
        let (_, mut b) = ActiveRole::join(&folder);
        for (member, id) in [(&mut a, 7), (&mut b, 8)] {
            std::fs::remove_file(member.file()).unwrap();
            (member.name, member.own) = (format!("{:020}-{id:016x}", u64::MAX), None);
            member.role.set_ready();
            member.check();
        }
        assert!(!a.check() && b.check() && !one.check());
        for name in ["lock", ".hidden", "1-2-3", "1-00000000000000000001-000000000000000g"] {
            assert!(!is_daemon_file(name), "{name}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[tokio::test]
    async fn the_next_daemon_begins_after_the_last_write_of_the_previous_one() {
        let folder = folder("next");
        let (first, member) = ActiveRole::join(&folder);
        first.set_ready();
        let (ends, second_ends) = (Drain::default(), Drain::default());
        let (one, two) = (Group::default(), Group::default());
        one.spawn(member.keep(ends.signal()));
        let write_guard = first.write_guard().unwrap();
        let (second, member) = ActiveRole::join(&folder);
        second.set_ready();
        two.spawn(member.keep(second_ends.signal()));
        let (mut of_first, mut of_second) = (first.subscribe(), second.subscribe());
        of_first.wait_for(|active| !active).await.unwrap();
        assert!(first.write_guard().is_none() && !second.is_active(), "the first still writes");
        drop(write_guard);
        of_second.wait_for(|active| *active).await.unwrap();
        second_ends.gently();
        two.finished().await;
        of_first.wait_for(|active| *active).await.unwrap();
        // A daemon that is told to end stops writing too, and waits for the write in progress.
        let write_guard = first.write_guard().unwrap();
        ends.gently();
        let write = async {
            of_first.wait_for(|active| !active).await.unwrap();
            assert!(lock_file(&folder.join(LOCK)).unwrap().is_none(), "the first still writes");
            drop(write_guard);
        };
        tokio::select! {
            () = write => one.finished().await,
            () = one.finished() => panic!("it ends without waiting for the write"),
        }
        assert!(first.write_guard().is_none() && lock_file(&folder.join(LOCK)).unwrap().is_some());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "only the lock file is left");
        assert!(!has_daemon(&folder));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_daemon_that_cannot_read_the_folder_is_active() {
        let (role, mut member) = ActiveRole::join(Path::new("/proc/nowhere"));
        assert!(role.is_active() && member.check() && role.write_guard().is_some());
        // A daemon on standby does not write again just because it cannot read the folder for a moment.
        let folder = folder("unseen");
        let (role, mut member) = ActiveRole::join(&folder);
        role.active.send_replace(false);
        member.folder = PathBuf::from("/proc/nowhere");
        assert!(!member.check() && !role.is_active());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
