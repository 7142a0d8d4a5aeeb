//! Whose turn it is to write: during an upgrade two daemons run on a node, and share its CNI folders, the rules in its pods, the
//! host's table of probes, and the annotations of its pods. One of them writes; the other serves what it has.
//!
//! Each has a file in a folder that both see, and holds a lock on it (flock) for as long as it lives, however it ends. The file's name
//! says whether its daemon could take over by now, and when it began, by a clock that nobody sets. Of those that are locked the last
//! name has the turn: the daemon that began last, whatever its version, or an earlier one again where that has died. It begins when
//! the one before has let go of a second lock, which is when that one writes nothing any more.

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

/// Beginning of the folder's name; what follows says whose node it is.
pub const FOLDER: &str = "turn-";
/// The lock of whoever writes.
const LOCK: &str = "lock";
/// Time between looks at whose turn it is: that a process has died is told by nobody.
const CHECK_EVERY: Duration = Duration::from_millis(250);
/// How long whoever had the turn may go on writing. One that hangs must not keep the node.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this daemon may write.
#[derive(Clone, Debug)]
pub struct ActiveRole {
    active: Arc<watch::Sender<bool>>,
    /// How much is being written now.
    writing: Arc<watch::Sender<usize>>,
    ready: Arc<watch::Sender<bool>>,
    /// How this daemon is called among those of its node.
    name: Arc<str>,
}

/// Something is being written; the turn is not handed on before it is dropped.
#[derive(Debug)]
pub struct Permit {
    writing: Arc<watch::Sender<usize>>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.writing.send_modify(|writing| *writing = writing.saturating_sub(1));
    }
}

impl ActiveRole {
    /// Where no other daemon writes what this one does.
    pub fn sole() -> Self {
        Self::new(true, "")
    }

    fn new(active: bool, name: &str) -> Self {
        let active = Arc::new(watch::Sender::new(active));
        Self { active, writing: Arc::default(), ready: Arc::default(), name: name.into() }
    }

    /// Whether it is this daemon's turn.
    pub fn is_active(&self) -> bool {
        *self.active.borrow()
    }

    /// Leave to write, where it is this daemon's turn.
    pub fn permit(&self) -> Option<Permit> {
        // First counted, then looked: whoever hands the turn on does it the other way round.
        self.writing.send_modify(|writing| *writing += 1);
        let permit = Permit { writing: self.writing.clone() };
        self.is_active().then_some(permit)
    }

    /// Tells of changes.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.active.subscribe()
    }

    /// This daemon knows enough to take over from an earlier one. Before that it has the turn only where nobody else is there.
    pub fn set_ready(&self) {
        self.ready.send_if_modified(|ready| !std::mem::replace(ready, true));
    }

    /// Whether another daemon of the node lives in `folder` that has not been told to end.
    pub fn has_successor(&self, folder: &Path) -> bool {
        any_daemon(folder, |name| !name.ends_with(&*self.name))
    }

    /// Joins the daemons of a node in `folder`. Where no other one lives it is this one's turn at once.
    pub fn join(folder: &Path) -> (Self, Membership) {
        let began = clock::since_start().unwrap_or_default().as_nanos();
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

/// A daemon among those of its node.
#[derive(Debug)]
pub struct Membership {
    role: ActiveRole,
    folder: PathBuf,
    name: String,
    ready: bool,
    /// Our file, locked.
    own: Option<File>,
    /// The lock of whoever writes.
    lock: Option<File>,
    waiting_since: Option<Instant>,
    /// What has been said of a folder that cannot be used.
    said: Option<String>,
    /// Nothing has been seen yet.
    is_first_check: bool,
}

impl Membership {
    /// Takes turns until the process is told to end; then another one may begin.
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
        // Others need not wait for us from now on. That the file stays where it cannot be removed hurts nobody.
        let _ = std::fs::remove_file(self.file());
        self.release().await;
    }

    fn file(&self) -> PathBuf {
        self.folder.join(format!("{}-{}", u8::from(self.ready), self.name))
    }

    /// Looks at whose turn it is, and takes it where it is ours; whether it is.
    fn check(&mut self) -> bool {
        let newest = self.announce().and_then(|()| self.is_newest());
        let newest = match newest {
            Ok(newest) => {
                (self.said, self.is_first_check) = (None, false);
                newest
            }
            // At first nobody can be seen, and so nobody can be waited for. Later what was seen counts.
            Err(error) => {
                let (folder, error) = (self.folder.display(), error.to_string());
                if self.said.as_ref() != Some(&error) {
                    let writes = self.is_first_check || self.role.is_active();
                    tracing::error!(%folder, error, writes, "whether another daemon of this node writes cannot be seen");
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
                tracing::warn!("the daemon before this one does not let go of the node; going on without it");
                self.activate();
            }
        }
        true
    }

    fn activate(&mut self) {
        self.waiting_since = None;
        if self.role.active.send_if_modified(|active| !std::mem::replace(active, true)) {
            tracing::info!("this daemon writes what belongs to the node");
        }
    }

    /// Writes nothing any more, and lets the next one begin.
    async fn stand_by(&mut self) {
        tracing::info!(
            "another daemon of this node takes over: this one writes nothing any more, and serves what it has"
        );
        self.release().await;
    }

    /// Ends all writing, and then lets go of the lock.
    async fn release(&mut self) {
        self.role.active.send_replace(false);
        let mut writing = self.role.writing.subscribe();
        let done = writing.wait_for(|writing| *writing == 0);
        if tokio::time::timeout(PATIENCE, done).await.is_err() {
            tracing::warn!("something is still being written while another daemon takes over");
        }
        self.lock = None;
    }

    /// Makes sure that others see us, by the right name.
    fn announce(&mut self) -> io::Result<()> {
        let before = self.file();
        self.ready |= *self.role.ready.borrow();
        let file = self.file();
        if self.own.is_some() && before != file {
            // Where it has gone it is made anew.
            let _ = std::fs::rename(before, &file);
        }
        if self.own.is_some() && file.exists() {
            return Ok(());
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        // Not to be seen before it is locked: what is not locked is removed by whoever sees it.
        let hidden = self.folder.join(format!(".{}", self.name));
        let own = lock_file(&hidden)?.ok_or(io::ErrorKind::WouldBlock)?;
        std::fs::rename(hidden, file)?;
        self.own = Some(own);
        Ok(())
    }

    /// Whether no living daemon has a later name. Files of dead ones are removed.
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
            // Shared: two that look at the same moment do not take each other for the dead one.
            match other.try_lock_shared() {
                Ok(()) => drop(std::fs::remove_file(entry.path())),
                Err(TryLockError::WouldBlock) => newest &= own.file_name() > Some(&name),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(newest)
    }
}

/// Whether a daemon lives in `folder` that has not been told to end.
pub fn has_daemon(folder: &Path) -> bool {
    any_daemon(folder, |_| true)
}

/// Whether one of those that `counts` lives in `folder`.
fn any_daemon(folder: &Path, counts: impl Fn(&str) -> bool) -> bool {
    let is_one = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let counts = name.to_str().is_some_and(|name| is_daemon_file(name) && counts(name));
        counts && File::open(entry.path()).is_ok_and(|file| is_locked(&file))
    };
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(is_one)
}

/// Whether somebody holds a file's lock.
fn is_locked(file: &File) -> bool {
    // Shared: two that look at the same moment do not take each other for its holder.
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Whether a file's name is a daemon's.
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

/// A file with its lock; `None` where somebody else holds it.
fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes what is in `folder`, where no daemon lives any more; whether there was something.
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
    fn the_newest_that_is_able_and_lives_has_the_turn() {
        let folder = folder("newest");
        let (first, mut one) = ActiveRole::join(&folder);
        assert!(first.is_active() && !first.has_successor(&folder) && has_daemon(&folder), "nobody else is there");
        let (second, mut two) = ActiveRole::join(&folder);
        assert!(first.has_successor(&folder) && second.has_successor(&folder));
        assert!(!second.is_active());
        first.set_ready();
        assert!(one.check() && !two.check(), "the second knows nothing yet");
        second.set_ready();
        assert!(two.check() && !second.is_active(), "it is its turn, and the first has not let go");
        assert!(!one.check(), "which sees it");
        one.role.active.send_replace(false);
        one.lock = None;
        assert!(two.check() && second.is_active() && first.permit().is_none());
        // The second dies, without a word: its lock goes with it, the file stays.
        let left = two.file();
        drop(two);
        assert!(left.exists() && !first.has_successor(&folder) && has_daemon(&folder));
        assert!(one.check() && first.is_active() && !left.exists());
        // Somebody clears the folder.
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(one.check() && one.file().exists());
        // Two that began in the same moment agree on one.
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
    async fn the_next_begins_when_nothing_is_written_any_more_and_the_end_lets_go() {
        let folder = folder("next");
        let (first, member) = ActiveRole::join(&folder);
        first.set_ready();
        let (ends, second_ends) = (Drain::default(), Drain::default());
        let (one, two) = (Group::default(), Group::default());
        one.spawn(member.keep(ends.signal()));
        let permit = first.permit().unwrap();
        let (second, member) = ActiveRole::join(&folder);
        second.set_ready();
        two.spawn(member.keep(second_ends.signal()));
        let (mut of_first, mut of_second) = (first.subscribe(), second.subscribe());
        of_first.wait_for(|active| !active).await.unwrap();
        assert!(first.permit().is_none() && !second.is_active(), "the first still writes");
        drop(permit);
        of_second.wait_for(|active| *active).await.unwrap();
        second_ends.gently();
        two.finished().await;
        of_first.wait_for(|active| *active).await.unwrap();
        // One that is told to end writes nothing any more either, and what it writes just then is waited for.
        let permit = first.permit().unwrap();
        ends.gently();
        let write = async {
            of_first.wait_for(|active| !active).await.unwrap();
            assert!(lock_file(&folder.join(LOCK)).unwrap().is_none(), "the first still writes");
            drop(permit);
        };
        tokio::select! {
            () = write => one.finished().await,
            () = one.finished() => panic!("the end waits for nothing"),
        }
        assert!(first.permit().is_none() && lock_file(&folder.join(LOCK)).unwrap().is_some());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "the lock alone is left");
        assert!(!has_daemon(&folder));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn who_cannot_see_others_writes() {
        let (role, mut member) = ActiveRole::join(Path::new("/proc/nowhere"));
        assert!(role.is_active() && member.check() && role.permit().is_some());
        // One that has handed the turn on does not write again because it sees nothing just then.
        let folder = folder("unseen");
        let (role, mut member) = ActiveRole::join(&folder);
        role.active.send_replace(false);
        member.folder = PathBuf::from("/proc/nowhere");
        assert!(!member.check() && !role.is_active());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
