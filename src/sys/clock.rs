//! The machine's clock.

use nix::libc;

/// Whether a time service keeps the clock (adjtimex(2)); `None` where the kernel does not say.
pub fn is_kept() -> Option<bool> {
    // SAFETY: all zeroes is a value of this structure of integers, and means that nothing is to be changed.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    let answer = unsafe { libc::adjtimex(&raw mut state) };
    (answer >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}
