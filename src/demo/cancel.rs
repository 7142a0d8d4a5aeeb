//! Cancels a demonstration that the user interrupts.

use std::sync::atomic::{AtomicBool, Ordering};

/// Set when the demonstration must end early; never unset.
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Asks the demonstration to end early.
pub fn cancel() {
    CANCELLED.store(true, Ordering::Relaxed);
}

/// Whether the demonstration must end early.
pub fn is_cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}
