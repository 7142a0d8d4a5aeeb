//! The clocks of the machine.

use nix::libc;
use std::time::Duration;

/// Whether a time service synchronizes the clock (adjtimex(2)); `None` if the kernel does not tell.
pub fn is_synchronized() -> Option<bool> {
    // SAFETY: all zeroes is a valid value of this structure of integers. It means that nothing is to be changed.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    let answer = unsafe { libc::adjtimex(&raw mut state) };
    (answer >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

/// Time since the machine booted, including time asleep. It is the same for all processes and cannot be set
/// (clock_gettime(2), `CLOCK_BOOTTIME`). `None` if the kernel does not tell.
pub fn since_boot() -> Option<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let (seconds, nanos) = (u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
    (answer == 0).then(|| Duration::new(seconds, nanos))
}
