//! Reads a file as the processes of a network namespace see it: in their root filesystem, not in the daemon's.

use super::netns::id_at;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Maximum number of processes of one namespace that are tried.
const PROCESSES_MAX: usize = 16;

/// Maximum number of bytes that are read of a file. A longer one is cut.
const BYTES_MAX: u64 = 64 * 1024;

/// Searches the processes below `proc` for one in the network namespace `netns` (device and inode) whose file `path`
/// (without the leading slash) is accepted. Returns the process id and what `accept` made of the file's text.
///
/// Process `last`, which an earlier call found, is tried first. Then come processes with a mount namespace other than
/// the daemon's, as a pod's containers have, then the rest. The time grows with the number of processes on the machine.
/// Nothing is found if `proc` shows only the daemon's own processes.
pub fn read_file_in_netns<T>(
    proc: &Path,
    netns: (u64, u64),
    path: &str,
    last: Option<u32>,
    accept: impl Fn(&str) -> Option<T>,
) -> Option<(u32, T)> {
    let of = |pid: u32| proc.join(pid.to_string());
    let attempt = |pid: u32| {
        let inside = id(&of(pid), "net") == Some(netns);
        inside.then(|| read_in_root(&of(pid), path)).flatten().and_then(|text| accept(&text)).map(|read| (pid, read))
    };
    if let Some(found) = last.and_then(attempt) {
        return Some(found);
    }
    let mut pids: Vec<u32> = std::fs::read_dir(proc)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| id(&of(*pid), "net") == Some(netns))
        .collect();
    let own = id(Path::new("/proc/self"), "mnt");
    pids.sort_by_key(|pid| (id(&of(*pid), "mnt") == own, *pid));
    pids.into_iter().take(PROCESSES_MAX).find_map(attempt)
}

fn id(process: &Path, kind: &str) -> Option<(u64, u64)> {
    id_at(&process.join("ns").join(kind))
}

/// Reads a file as a process sees it. Symbolic links are resolved inside the process's root, so a container cannot make
/// the daemon read files of the host.
fn read_in_root(process: &Path, path: &str) -> Option<String> {
    let root = open(&process.join("root"), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    // Non-blocking, because the path may be a FIFO to which no process ever writes.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(root, path, how).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns::Netns;

    #[test]
    fn a_file_is_read_as_the_process_sees_it() {
        let here = Netns::open(Path::new("/proc/self/ns/net")).unwrap().id();
        let own = std::process::id();
        let read = |last, wanted: &'static str| {
            read_file_in_netns(Path::new("/proc"), here, "etc/passwd", last, move |text| {
                text.contains(wanted).then_some(())
            })
        };
        assert_eq!(read(Some(own), "root"), Some((own, ())));
        assert!(read(None, "root").is_some());
        assert!(read(Some(own), "nobody writes this").is_none());
        assert!(
            read_file_in_netns(Path::new("/proc"), (0, 0), "etc/passwd", Some(own), |_| Some(())).is_none(),
            "no process is in that namespace"
        );
        // A link out of the root, a directory or a device is not read.
        for not in ["proc/self/root/etc/passwd", "etc", "dev/zero", "nonexistent"] {
            assert_eq!(read_in_root(Path::new("/proc/self"), not), None, "{not}");
        }
    }
}
