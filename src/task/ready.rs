//! Readiness: the names of what the process still waits for before it can serve.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// A shared list of pending names; ready when it is empty.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    pending: Arc<Mutex<BTreeSet<&'static str>>>,
}

/// One thing waited for; no longer once dropped.
#[derive(Debug)]
pub struct Pending {
    ready: Ready,
    name: &'static str,
}

impl Ready {
    /// Adds a name that readiness waits for until the returned guard is dropped.
    #[must_use]
    pub fn wait_for(&self, name: &'static str) -> Pending {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        Pending { ready: self.clone(), name }
    }

    /// What is still waited for, in alphabetical order.
    pub fn pending(&self) -> Vec<&'static str> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.ready.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(self.name);
    }
}
