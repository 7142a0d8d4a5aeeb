//! The current snapshot: one writer replaces it, any number of readers load it without waiting.

use super::snapshot::{Facts, Snapshot};
use arc_swap::ArcSwap;
use std::sync::Arc;
use tokio::sync::watch;

/// Holds the current facts of the mesh and tells who asks when they change.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    changed: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self { current: ArcSwap::default(), changed: watch::Sender::new(0) }
    }
}

impl Store {
    /// The facts as of now; hold the result for one decision, not for a connection's life.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Replaces all facts at once. There is one writer: `control`.
    pub fn replace(&self, facts: Facts) -> u64 {
        let version = self.current.load().version + 1;
        self.current.store(Arc::new(Snapshot::build(version, facts)));
        self.changed.send_replace(version);
        version
    }

    /// A receiver that sees the version of every later change.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
