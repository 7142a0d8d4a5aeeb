//! Limits and rights of the process: open files, memory, capabilities.

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{SysconfVar, sysconf};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Raises the soft limit of open files to the hard limit, and returns the limit that is then in force.
pub fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        return hard;
    }
    soft
}

/// Limits the memory of a child process. Best effort: if it fails, the child runs without a limit.
pub fn bound_memory(pid: u32, bytes: u64) {
    let (Ok(pid), limit) = (i32::try_from(pid), nix::libc::rlimit { rlim_cur: bytes, rlim_max: bytes }) else { return };
    // SAFETY: the limit is only read, and only during the call; the null pointer asks for no old value.
    let _ = unsafe { nix::libc::prlimit(pid, nix::libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
}

/// The number of files that this process has open; `None` without /proc.
pub fn open_files() -> Option<usize> {
    // The directory itself is open while it is read, and does not count.
    std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1))
}

/// What this process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of all threads, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory, in bytes; `None` without /proc.
    pub resident_bytes: Option<u64>,
}

/// What this process has used so far; `None` if the kernel does not say.
pub fn usage() -> Option<Usage> {
    let all = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |time: TimeVal| Duration::from_micros(time.num_microseconds().try_into().unwrap_or(0)).as_secs_f64();
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| u64::try_from(bytes).ok());
    Some(Usage {
        cpu_seconds: seconds(all.user_time()) + seconds(all.system_time()),
        resident_bytes: pages.zip(page).map(|(pages, page)| pages.saturating_mul(page)),
    })
}

/// The memory limit and usage of the process's cgroup.
#[derive(Debug)]
pub struct Memory {
    used: PathBuf,
    stat: PathBuf,
    max: u64,
}

impl Memory {
    /// Finds the cgroup of this process, version 2 or 1 (cgroups(7)). `None` if it has no visible limit.
    pub fn of_process() -> Option<Self> {
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let (two, one) =
            (("cgroup2", "memory.max", "memory.current"), ("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes"));
        [two, one].into_iter().find_map(|(kind, max, used)| {
            let path = own.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                let ours = if kind == "cgroup2" { controllers.is_empty() } else { controllers == "memory" };
                ours.then_some(path)
            })?;
            let mount = mounts.lines().find_map(|line| {
                let mut words = line.split(' ').skip(1);
                let (mount, this, options) = (words.next()?, words.next()?, words.next()?);
                let memory = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
                (this == kind && memory).then_some(mount)
            })?;
            // Inside a container the mount itself may be the cgroup.
            let inside = [Path::new(mount).join(path.trim_start_matches('/')), PathBuf::from(mount)];
            inside.into_iter().find_map(|folder| {
                let max = std::fs::read_to_string(folder.join(max)).ok()?.trim().parse().ok()?;
                // Version 1 expresses "no limit" by a number near the maximum.
                (max < 1 << 60).then(|| Self { used: folder.join(used), stat: folder.join("memory.stat"), max })
            })
        })
    }

    /// Memory in use, without the page cache that can be dropped, and the limit; both in bytes.
    pub fn now(&self) -> Option<(u64, u64)> {
        let used: u64 = std::fs::read_to_string(&self.used).ok()?.trim().parse().ok()?;
        let stat = std::fs::read_to_string(&self.stat).unwrap_or_default();
        let of = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let files = of("total_inactive_file ").or_else(|| of("inactive_file ")).unwrap_or(0);
        Some((used.saturating_sub(files), self.max))
    }
}

/// The user id of this process, by which the kernel judges it; 0 is root.
pub fn user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The effective capabilities of this process, as a bit mask by number (capabilities(7), linux/capability.h).
pub fn capabilities() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
