//! Ending a demonstration before its time.

use std::sync::atomic::{AtomicBool, Ordering};

/// Set once, when the demonstration is to end before its time.
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Ends the demonstration.
pub fn cancel() {
    CANCELLED.store(true, Ordering::Relaxed);
}

/// Whether the demonstration is to end.
pub fn is_cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}
