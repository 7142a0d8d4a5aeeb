//! Limits of the process: open files, and what the process may do.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one; returns what is in force afterwards.
pub fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        return hard;
    }
    soft
}

/// How many files this process has open now; `None` where /proc is not there.
pub fn open_files() -> Option<usize> {
    // The directory itself is open while it is read.
    std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1))
}

/// Whether the process runs as root, which entering namespaces and writing rules needs.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
