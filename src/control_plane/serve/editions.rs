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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::catalog::{Kind, Resource};

    fn set(catalog: &Catalog, names: std::ops::Range<usize>) {
        let (content, version) = (bytes::Bytes::new(), "".into());
        let resource = Resource { content, version, aliases: vec![], services: vec![], node: "".into() };
        let resource = Arc::new(resource);
        catalog.apply(names.map(|n| (Kind::Address, n.to_string().into(), Some(resource.clone()))).collect());
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_after_a_pause_is_sent_at_once_and_many_are_sent_in_a_rhythm() {
        let (catalog, metrics, editions) = (Catalog::default(), Metrics::default(), Editions::default());
        let mut sent = editions.follow();
        let test = async {
            tokio::time::sleep(RHYTHM * 20).await;
            sent.borrow_and_update();
            let begun = Instant::now();
            set(&catalog, 0..1);
            sent.changed().await.unwrap();
            assert_eq!(begun.elapsed(), Duration::ZERO);
            let mut count = 0;
            for n in 0..40 {
                set(&catalog, n..n + 1);
                tokio::time::sleep(RHYTHM / 10).await;
                count += usize::from(sent.has_changed().unwrap());
                sent.borrow_and_update();
            }
            assert!((3..=4).contains(&count), "{count}");
            tokio::time::sleep(RHYTHM).await;
            assert_eq!(sent.borrow().number, catalog.follow().borrow().number);
        };
        tokio::select! {
            () = test => {}
            () = editions.pace(&catalog, &metrics) => unreachable!("it goes on for as long as it is awaited"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn first_answers_of_a_large_mesh_are_made_of_one_edition_for_a_while() {
        let (catalog, editions) = (Catalog::default(), Editions::default());
        let current = || catalog.follow().borrow().clone();
        catalog.set_complete();
        set(&catalog, 0..10);
        assert_eq!(editions.checkpoint(&current()).number, 1);
        set(&catalog, 0..MANY);
        assert_eq!(editions.checkpoint(&current()).number, 2, "a small one costs nothing");
        set(&catalog, 0..1);
        assert_eq!(editions.checkpoint(&current()).number, 2);
        tokio::time::advance(CHECKPOINT).await;
        assert_eq!(editions.checkpoint(&current()).number, 3);
    }
}
