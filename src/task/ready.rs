//! Readiness: the names of what the process still waits for before it can serve.

use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::watch;

/// A shared list of pending names; ready when it is empty.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    pending: Arc<watch::Sender<BTreeSet<&'static str>>>,
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
        self.pending.send_modify(|pending| {
            pending.insert(name);
        });
        Pending { ready: self.clone(), name }
    }

    /// What is still waited for, in alphabetical order.
    pub fn pending(&self) -> Vec<&'static str> {
        self.pending.borrow().iter().copied().collect()
    }

    /// Completes when a name is no longer waited for.
    pub async fn until(self, name: &'static str) {
        // The sender is ours, so it does not go away meanwhile.
        let _ = self.pending.subscribe().wait_for(|pending| !pending.contains(name)).await;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.ready.pending.send_modify(|pending| {
            pending.remove(self.name);
        });
    }
}
