//! What the proxies of a subject use: CPU, memory and context switches of processes and their children, from `/proc`.

use std::collections::BTreeMap;
use std::fs;

/// Use of several processes together, at one time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Use {
    /// User and system time, in seconds.
    pub cpu: f64,
    /// Resident memory, in KiB. Pages that processes share count once for each of them.
    pub resident: u64,
    /// Voluntary and involuntary context switches of all threads that live.
    pub switches: u64,
}

/// The use of `roots` and of all processes below them.
pub fn of(roots: &[u32]) -> Use {
    family(roots).into_iter().filter_map(of_one).fold(Use::default(), |sum, one| Use {
        cpu: sum.cpu + one.cpu,
        resident: sum.resident + one.resident,
        switches: sum.switches + one.switches,
    })
}

/// Leaves a process, with all its threads, only one processor.
pub fn pin(pid: u32, processor: usize) {
    let mut only = nix::sched::CpuSet::new();
    only.set(processor).unwrap();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let thread = thread.file_name().to_string_lossy().parse().unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(thread), &only).unwrap();
    }
}

fn family(roots: &[u32]) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Some(fields) = stat(pid)
        {
            children.entry(fields[1].parse().unwrap_or(0)).or_default().push(pid);
        }
    }
    let mut all = roots.to_vec();
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        all.extend(children.get(pid).into_iter().flatten().copied().collect::<Vec<_>>());
        at += 1;
    }
    all
}

/// The fields of `/proc/PID/stat` from the third on, the state. The second is a name that may contain spaces.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

fn of_one(pid: u32) -> Option<Use> {
    let fields = stat(pid)?;
    let ticks: u64 = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let switches = threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok())
        .map(|text| number(&text, "voluntary_ctxt_switches:") + number(&text, "nonvoluntary_ctxt_switches:"))
        .sum();
    Some(Use { cpu: ticks as f64 / per_second as f64, resident: number(&status, "VmRSS:"), switches })
}

/// The number on the line that begins with `key`.
fn number(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
