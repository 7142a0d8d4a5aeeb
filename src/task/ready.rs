//! Readiness: the process is ready once nothing is pending any more.

use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::watch;

/// A shared list of pending names. The process is ready when it is empty.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    pending: Arc<watch::Sender<BTreeSet<&'static str>>>,
}

/// One pending name, which is removed when this is dropped.
#[derive(Debug)]
pub struct Pending {
    ready: Ready,
    name: &'static str,
}

impl Ready {
    /// Adds a pending name. Readiness waits for it until the returned guard is dropped.
    #[must_use]
    pub fn wait_for(&self, name: &'static str) -> Pending {
        self.pending.send_modify(|pending| {
            pending.insert(name);
        });
        Pending { ready: self.clone(), name }
    }

    /// All pending names, in alphabetical order.
    pub fn pending(&self) -> Vec<&'static str> {
        self.pending.borrow().iter().copied().collect()
    }

    /// Completes when a name is no longer pending.
    pub async fn until(self, name: &'static str) {
        // This cannot fail: `self` keeps the sender alive.
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
