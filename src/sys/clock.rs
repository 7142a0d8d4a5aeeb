//! The machine's clocks.

use nix::libc;
use std::time::Duration;

/// Whether a time service keeps the clock (adjtimex(2)); `None` where the kernel does not say.
pub fn is_synchronized() -> Option<bool> {
    // SAFETY: all zeroes is a value of this structure of integers, and means that nothing is to be changed.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    let answer = unsafe { libc::adjtimex(&raw mut state) };
    (answer >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

/// Time since the machine has started, also while it slept; the same for all its processes, and never set (clock_gettime(2),
/// `CLOCK_BOOTTIME`). `None` where the kernel does not say.
pub fn since_boot() -> Option<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let (seconds, nanos) = (u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
    (answer == 0).then(|| Duration::new(seconds, nanos))
}
