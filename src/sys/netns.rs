//! Network namespaces: opens them, and runs short work inside them.
//!
//! A thread never stays in a foreign namespace: it returns to its own after each piece of work, also after a panic. If
//! it cannot return, the process aborts.

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};
use std::cell::{Cell, OnceCell};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Filesystem type of namespace files (linux/magic.h, `NSFS_MAGIC`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

nix::ioctl_none_bad!(
    /// `NS_GET_NSTYPE` of linux/nsfs.h: the type of the namespace behind a descriptor, as a clone flag.
    ns_get_nstype,
    0xb703
);

/// Device and inode of a file, such as that of a namespace. The caller need not have the right to open the file.
pub fn id_at(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Why a network namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The path cannot be opened.
    #[error("{path}: cannot open the network namespace: {source}")]
    Open {
        /// The path as configured.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path is not a network namespace.
    #[error("{0}: not a network namespace (expected a file such as /run/netns/NAME or /proc/PID/ns/net)")]
    NotNetns(PathBuf),
    /// The kernel refused to let the thread enter it.
    #[error("cannot enter the network namespace {path}: {source} (CAP_SYS_ADMIN and CAP_NET_ADMIN are needed)")]
    Enter {
        /// The path as configured.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A handle on a network namespace. The namespace exists at least as long as the handle.
#[derive(Clone)]
pub struct Netns {
    inner: Arc<Inner>,
}

struct Inner {
    file: File,
    path: PathBuf,
    /// Whether the namespace can be opened by `path`; otherwise `path` is only a name for display.
    by_path: bool,
    /// Device and inode. Two handles with the same pair are of the same namespace.
    id: (u64, u64),
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({} {:?})", self.inner.path.display(), self.inner.id)
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.inner.id == other.inner.id
    }
}

impl Eq for Netns {}

thread_local! {
    /// The thread's own namespace, with its device and inode, opened before the thread leaves it for the first time.
    static HOME: OnceCell<(File, (u64, u64))> = const { OnceCell::new() };
    /// Whether the thread is in another namespace at the moment.
    static AWAY: Cell<bool> = const { Cell::new(false) };
}

/// Returns the thread to its own namespace when dropped. A thread that could not return would from then on make other
/// pods' sockets in a foreign namespace, so the process aborts instead.
struct HomeGuard;

impl Drop for HomeGuard {
    fn drop(&mut self) {
        let home = HOME.with(|home| home.get().map(|(file, _)| setns(file.as_fd(), CloneFlags::CLONE_NEWNET)));
        if !matches!(home, Some(Ok(()))) {
            tracing::error!("a thread cannot return from a pod's network namespace; the process aborts");
            std::process::abort();
        }
        AWAY.set(false);
    }
}

impl Netns {
    /// Opens a namespace file, and checks that it is a network namespace.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        // Non-blocking, because a FIFO at this path would block the thread until another process writes to it.
        let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
        Self::of(opened.map_err(|source| NetnsError::Open { path: path.to_owned(), source })?, path)
    }

    /// Makes a new namespace. The calling thread stays in it for good, so call this on a separate thread.
    pub fn fresh() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(Self::open(Path::new("/proc/thread-self/ns/net")).map_err(io::Error::other)?.without_path())
    }

    /// Takes over a descriptor that another process has opened, after checking that it is of a network namespace.
    /// `name` is for display.
    pub fn handed_over(descriptor: OwnedFd, name: &str) -> Result<Self, NetnsError> {
        Ok(Self::of(File::from(descriptor), Path::new(name))?.without_path())
    }

    /// The same handle, but not to be opened again by its path, which may lead elsewhere once a process has ended.
    pub fn without_path(mut self) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.by_path = false;
        }
        self
    }

    fn of(file: File, path: &Path) -> Result<Self, NetnsError> {
        let metadata = file.metadata().map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        let not = || NetnsError::NotNetns(path.to_owned());
        if fstatfs(&file).map_err(|_| not())?.filesystem_type() != NSFS_MAGIC {
            return Err(not());
        }
        // SAFETY: the descriptor is open for the duration of the call, and this ioctl takes no argument.
        let kind = unsafe { ns_get_nstype(file.as_raw_fd()) }.map_err(|_| not())?;
        if kind != CloneFlags::CLONE_NEWNET.bits() {
            return Err(not());
        }
        let id = (metadata.dev(), metadata.ino());
        Ok(Self { inner: Arc::new(Inner { file, path: path.to_owned(), by_path: true, id }) })
    }

    /// The path by which it was opened, or its name for display.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether it can be opened again by its path.
    pub fn has_path(&self) -> bool {
        self.inner.by_path
    }

    /// The descriptor of this handle, by which other processes find it below `/proc/PID/fd`.
    pub fn descriptor(&self) -> RawFd {
        self.inner.file.as_raw_fd()
    }

    /// Device and inode. They are equal for two handles exactly if the namespace is the same.
    pub fn id(&self) -> (u64, u64) {
        self.inner.id
    }

    /// Runs `work` on this thread inside the namespace, and returns to the thread's own namespace, also if `work`
    /// panics. `work` must be short and must not wait, because the thread serves other pods too. Nothing is entered
    /// where this is the thread's own namespace, so that this needs no right.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let failed = |source| NetnsError::Enter { path: self.inner.path.clone(), source };
        let own = HOME.with(|home| {
            if let Some((_, id)) = home.get() {
                return Ok(*id);
            }
            let file = File::open("/proc/thread-self/ns/net").map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            let id = (metadata.dev(), metadata.ino());
            // The cell belongs to this thread, so it is still empty.
            let _ = home.set((file, id));
            Ok(id)
        })?;
        if own == self.inner.id && !AWAY.get() {
            return Ok(work());
        }
        setns(self.inner.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| failed(e.into()))?;
        AWAY.set(true);
        let _guard = HomeGuard;
        Ok(work())
    }

    /// The addresses of all interfaces in this namespace with their prefix lengths, without loopback addresses.
    pub fn addresses(&self) -> Result<Vec<(IpAddr, u8)>, NetnsError> {
        let failed = |source| NetnsError::Enter { path: self.inner.path.clone(), source };
        let found = self.enter(nix::ifaddrs::getifaddrs)?.map_err(|e| failed(e.into()))?;
        let ip_of = |storage: nix::sys::socket::SockaddrStorage| {
            let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        };
        let mut addresses = Vec::new();
        for interface in found {
            let (Some(ip), mask) = (interface.address.and_then(ip_of), interface.netmask.and_then(ip_of)) else {
                continue;
            };
            if !ip.is_loopback() {
                let length = mask.and_then(|mask| ipnet::ip_mask_to_prefix(mask).ok());
                addresses.push((ip, length.unwrap_or(if ip.is_ipv4() { 32 } else { 128 })));
            }
        }
        Ok(addresses)
    }

    /// Whether IPv6 can be used in this namespace: the kernel supports it, and it is not disabled on the loopback
    /// interface.
    pub fn has_ipv6(&self) -> Result<bool, NetnsError> {
        let disabled = self.enter(|| std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6"))?;
        Ok(disabled.is_ok_and(|text| text.trim() == "0"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_a_path_that_is_not_a_network_namespace() {
        for (path, word) in [
            ("/etc/hostname", "not a network namespace"),
            ("/proc/self/ns/mnt", "not a network namespace"),
            ("/nonexistent/ns", "cannot open"),
        ] {
            let error = Netns::open(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(path), "{error}");
        }
        assert!(Netns::open(Path::new("/proc/self/ns/net")).is_ok());
    }

    #[test]
    fn the_own_namespace_needs_no_right() {
        let without_rights = std::thread::spawn(|| {
            let own = Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap();
            let other = std::thread::spawn(|| Netns::fresh().unwrap()).join().unwrap();
            // Of this thread only: the library would change the whole process.
            // SAFETY: the call takes three numbers and touches no memory.
            let dropped = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, 65_534, 65_534, 65_534) };
            assert_eq!(dropped, 0);
            (own.enter(|| 7).ok(), other.enter(|| 7).is_err())
        });
        assert_eq!(without_rights.join().unwrap(), (Some(7), true));
    }

    #[test]
    fn a_thread_returns_after_a_panic() {
        let here = Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap();
        let made = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap()
        });
        let other = made.join().unwrap();
        assert_ne!(here.id(), other.id());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.enter(|| panic!("inside"))));
        assert!(panicked.is_err());
        // The own namespace is entered from inside another one as well.
        let now = || Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap().id();
        let inner = other.enter(|| (now(), here.enter(now).unwrap())).unwrap();
        assert_eq!(inner, (other.id(), here.id()));
        assert_eq!(Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap().id(), here.id());
    }
}
