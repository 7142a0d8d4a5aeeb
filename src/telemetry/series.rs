//! Metrics whose label values come from outside, such as names of workloads and services. A client that connects to
//! many addresses, or a tenant that creates many names, must not make them grow without bound.
//!
//! The number of label sets is limited; everything beyond the limit is counted under one common label set. A label set
//! that has been idle for long is shown once more and then removed. If it comes back later, it starts at zero, which
//! scrapers treat as a restarted counter.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Default limit on the number of label sets. A scrape then has some 5 MB for each counter.
pub const SETS_MAX: usize = 5_000;

/// How long an unused label set is kept by default. It is longer than scrapers look back.
pub const IDLE: Duration = Duration::from_secs(15 * 60);

/// A set of labels with values from outside.
pub trait Labels: Clone + Eq + Hash {
    /// The same labels with all such values replaced by a constant. Everything beyond the limit is counted under these.
    fn other(&self) -> Self;
}

/// Metrics `M` by labels `L`. Clones share the same metrics.
#[derive(Debug)]
pub struct Series<L, M>(Arc<Table<L, M>>);

impl<L, M> Clone for Series<L, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

type Sets<L, M> = HashMap<Arc<L>, Arc<LabelSet<L, M>>>;

#[derive(Debug)]
struct Table<L, M> {
    sets: RwLock<Sets<L, M>>,
    max: usize,
    idle: Duration,
    begun: Instant,
    /// Time of the last search for idle label sets, in seconds since `begun`, plus one.
    swept: AtomicU64,
}

#[derive(Debug)]
struct LabelSet<L, M> {
    labels: Arc<L>,
    metrics: M,
    begun: Instant,
    /// When the last handle was dropped, in seconds since `begun`.
    used: AtomicU64,
}

/// A handle on the metrics of one label set, which is kept for as long as a handle exists.
#[derive(Debug)]
pub struct SeriesHandle<L, M>(Arc<LabelSet<L, M>>);

impl<L, M> SeriesHandle<L, M> {
    /// The labels. Beyond the limit these are the common ones, not those that were asked for.
    pub fn labels(&self) -> &L {
        &self.0.labels
    }
}

impl<L, M> Deref for SeriesHandle<L, M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.0.metrics
    }
}

impl<L, M> Drop for SeriesHandle<L, M> {
    fn drop(&mut self) {
        self.0.used.store(self.0.begun.elapsed().as_secs(), Ordering::Relaxed);
    }
}

impl<L: Labels, M: Default> Default for Series<L, M> {
    fn default() -> Self {
        Self::new(SETS_MAX, IDLE)
    }
}

impl<L: Labels, M: Default> Series<L, M> {
    /// Metrics with at most `max` label sets besides the common one. Unused label sets are kept for `idle`.
    pub fn new(max: usize, idle: Duration) -> Self {
        let (sets, swept) = (RwLock::default(), AtomicU64::new(0));
        Self(Arc::new(Table { sets, max, idle, begun: Instant::now(), swept }))
    }

    /// The metrics of a label set, which is created if needed.
    pub fn of(&self, labels: &L) -> SeriesHandle<L, M> {
        let table = &*self.0;
        if let Some(set) = table.sets.read().get(labels) {
            return SeriesHandle(set.clone());
        }
        let mut sets = table.sets.write();
        if sets.len() >= table.max {
            // Once a second at most, or a client that causes many new names would make every connection search all of
            // them.
            let now = table.begun.elapsed().as_secs() + 1;
            if table.swept.swap(now, Ordering::Relaxed) != now {
                table.sweep(&mut sets);
            }
        }
        let labels = Arc::new(if sets.len() < table.max { labels.clone() } else { labels.other() });
        let set = sets.entry(labels.clone()).or_insert_with(|| {
            Arc::new(LabelSet { labels, metrics: M::default(), begun: table.begun, used: AtomicU64::new(0) })
        });
        SeriesHandle(set.clone())
    }

    /// Calls `write` with all label sets, once for each of `families`. Then removes the idle ones.
    pub fn show<F, E>(
        &self,
        families: impl IntoIterator<Item = F>,
        mut write: impl FnMut(&F, &mut dyn Iterator<Item = (&L, &M)>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Not under the lock, because writing takes a while and must not delay new connections.
        let all: Vec<Arc<LabelSet<L, M>>> = self.0.sets.read().values().cloned().collect();
        for family in families {
            write(&family, &mut all.iter().map(|set| (&*set.labels, &set.metrics)))?;
        }
        drop(all);
        self.0.sweep(&mut self.0.sets.write());
        Ok(())
    }
}

impl<L: Eq + Hash, M> Table<L, M> {
    fn sweep(&self, sets: &mut Sets<L, M>) {
        let now = self.begun.elapsed().as_secs();
        sets.retain(|_, set| {
            let idle = now.saturating_sub(set.used.load(Ordering::Relaxed));
            Arc::strong_count(set) > 1 || idle < self.idle.as_secs()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Name(String);

    impl Labels for Name {
        fn other(&self) -> Self {
            Self("other".into())
        }
    }

    type Counts = Series<Name, AtomicU64>;

    fn count(series: &Counts, name: &str) -> SeriesHandle<Name, AtomicU64> {
        let held = series.of(&Name(name.into()));
        held.fetch_add(1, Ordering::Relaxed);
        held
    }

    fn shown(series: &Counts) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        series
            .show([()], |(), all| {
                found.extend(all.map(|(name, count)| (name.0.clone(), count.load(Ordering::Relaxed))));
                Ok::<(), ()>(())
            })
            .unwrap();
        found.sort();
        found
    }

    #[test]
    fn idle_label_sets_are_shown_once_more_and_removed() {
        let series = Counts::new(10_000, Duration::ZERO);
        let open = count(&series, "open");
        (0..3000).for_each(|n| drop(count(&series, &format!("swept-{n}"))));
        assert_eq!(shown(&series).len(), 3001, "a scraper sees counters that have ended since the last scrape");
        assert_eq!(shown(&series), [("open".to_owned(), 1)], "label sets in use stay");
        drop(count(&series, "open"));
        drop(open);
        assert_eq!(shown(&series), [("open".to_owned(), 2)]);
        assert!(shown(&series).is_empty());
        let series = Counts::new(10_000, Duration::from_secs(60));
        drop(count(&series, "a while ago"));
        assert_eq!(
            (shown(&series).len(), shown(&series).len()),
            (1, 1),
            "a label set stays until it has been idle for long"
        );
    }

    #[test]
    fn beyond_the_limit_everything_is_counted_together_and_nothing_is_lost() {
        let series = Counts::new(100, Duration::from_secs(60));
        let held: Vec<_> = (0..250).map(|n| count(&series, &format!("name-{n}"))).collect();
        drop(count(&series, "name-0"));
        let all = shown(&series);
        assert_eq!(all.len(), 101);
        assert_eq!(all.iter().map(|(_, count)| count).sum::<u64>(), 251);
        assert!(all.contains(&("other".to_owned(), 150)) && all.contains(&("name-0".to_owned(), 2)));
        assert_eq!(held[200].labels(), &Name("other".into()));
        // Without scrapes, idle label sets still make room for new ones.
        let series = Counts::new(100, Duration::ZERO);
        (0..250).for_each(|n| drop(count(&series, &format!("name-{n}"))));
        assert!(shown(&series).len() <= 101);
        drop(count(&series, "new"));
        assert_eq!(shown(&series), [("new".to_owned(), 1)]);
    }
}
