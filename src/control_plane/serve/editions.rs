//! At which editions streams are brought: not at each, but at those of a common rhythm, so that all streams need the
//! same differences.

use crate::control_plane::Catalog;
use crate::control_plane::catalog::Edition;
use crate::control_plane::serve::metrics::Metrics;
use crate::control_plane::serve::subscription::MANY;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Shortest time between two editions that are sent. The first change after a pause is sent at once.
const RHYTHM: Duration = Duration::from_millis(50);
/// How long first answers are made of the same edition. What has changed since then follows them at once. It bounds how
/// many full lists are in memory while a thousand clients come back.
const CHECKPOINT: Duration = Duration::from_secs(2);

/// The editions that are sent.
#[derive(Debug, Default)]
pub struct Editions {
    current: watch::Sender<Arc<Edition>>,
    checkpoint: Mutex<Option<(Instant, Arc<Edition>)>>,
}

impl Editions {
    /// The current edition, and a notice of each new one.
    pub fn follow(&self) -> watch::Receiver<Arc<Edition>> {
        self.current.subscribe()
    }

    /// The edition for first answers.
    pub fn checkpoint(&self, current: &Arc<Edition>) -> Arc<Edition> {
        if current.addresses.size() + current.authorizations.size() < MANY {
            return current.clone();
        }
        let mut checkpoint = self.checkpoint.lock();
        if let Some((since, edition)) = checkpoint.as_ref()
            && since.elapsed() < CHECKPOINT
            && edition.complete
        {
            return edition.clone();
        }
        *checkpoint = Some((Instant::now(), current.clone()));
        current.clone()
    }

    /// Follows the catalog for as long as it is awaited.
    pub async fn pace(&self, catalog: &Catalog, metrics: &Metrics) {
        let mut all = catalog.follow();
        loop {
            let edition = all.borrow_and_update().clone();
            metrics.set_resources(&edition);
            self.current.send_replace(edition);
            tokio::time::sleep(RHYTHM).await;
            // The catalog outlives this future, which borrows it.
            if all.changed().await.is_err() {
                return;
            }
        }
    }
}
