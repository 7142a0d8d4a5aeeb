//! Metrics whose label values come from outside, such as names of workloads and services. A client that connects to
//! many addresses, or a tenant that creates many names, must not make them grow without bound.
//!
//! The number of label sets is limited; everything beyond the limit is counted under one common label set, whose names
//! are `overflow`. A label set that has been idle for long, and whose names are gone from the mesh, is shown once more
//! and then removed; so are idle ones of any names once the limit is reached. If a label set comes back later, it starts
//! at zero, which scrapers treat as a restarted counter.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The value of all labels from outside of what is counted beyond the limit.
pub const OVERFLOW: &str = "overflow";

/// Limits of label sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Most label sets besides the common one. With 5,000 a scrape has some 5 MB for each counter.
    pub max: usize,
    /// How long an unused label set is kept.
    pub idle: Duration,
}

impl Default for Config {
    /// The defaults of the settings.
    fn default() -> Self {
        Self { max: 5_000, idle: Duration::from_secs(600) }
    }
}

/// A set of labels with values from outside.
pub trait Labels: Clone + Eq + Hash {
    /// The same labels with all such values replaced by [`OVERFLOW`]. Everything beyond the limit is counted under
    /// these.
    fn overflow(&self) -> Self;
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
    limits: Config,
    begun: Instant,
    /// How often a label set was asked for beyond the limit.
    overflowed: AtomicU64,
    /// Time of the last search for idle label sets to make room, in seconds since `begun`, plus one.
    swept: AtomicU64,
    /// Time of the last search for names that are gone, in seconds since `begun`.
    looked: AtomicU64,
}

#[derive(Debug)]
struct LabelSet<L, M> {
    labels: Arc<L>,
    metrics: M,
    begun: Instant,
    /// When the last handle was dropped, in seconds since `begun`.
    used: AtomicU64,
    /// Whether it has been removed from the table.
    is_gone: AtomicBool,
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

/// Finds the metrics of a label set again without its labels. It does not keep them.
#[derive(Debug)]
pub struct SeriesTrace<L, M>(Weak<LabelSet<L, M>>);

impl<L, M> SeriesHandle<L, M> {
    /// By which the label set is found again.
    pub fn trace(&self) -> SeriesTrace<L, M> {
        SeriesTrace(Arc::downgrade(&self.0))
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
        Self::new(Config::default())
    }
}

impl<L: Labels, M: Default> Series<L, M> {
    /// Metrics with these limits.
    pub fn new(limits: Config) -> Self {
        let (sets, [swept, looked, overflowed]) = (RwLock::default(), [(); 3].map(|()| AtomicU64::new(0)));
        Self(Arc::new(Table { sets, limits, begun: Instant::now(), overflowed, swept, looked }))
    }

    /// The metrics of a label set, which is created if needed.
    pub fn of(&self, labels: &L) -> SeriesHandle<L, M> {
        let table = &*self.0;
        let now = || table.begun.elapsed().as_secs() + 1;
        {
            let sets = table.sets.read();
            if let Some(set) = sets.get(labels) {
                return SeriesHandle(set.clone());
            }
            // A client that causes many new names must not make every connection wait for the others' turns to write.
            if sets.len() >= table.limits.max
                && table.swept.load(Ordering::Relaxed) == now()
                && let Some(set) = sets.get(&labels.overflow())
            {
                table.overflowed.fetch_add(1, Ordering::Relaxed);
                return SeriesHandle(set.clone());
            }
        }
        // Freed after the lock.
        let mut _removed = Vec::new();
        let mut sets = table.sets.write();
        if sets.len() >= table.limits.max {
            // Once a second at most, or a client that causes many new names would make every connection search all of
            // them.
            let now = now();
            if table.swept.swap(now, Ordering::Relaxed) != now {
                _removed = sets.extract_if(|_, set| table.may_go(set)).collect();
            }
        }
        let is_full = sets.len() >= table.limits.max && !sets.contains_key(labels);
        let labels = if is_full { labels.overflow() } else { labels.clone() };
        table.overflowed.fetch_add(u64::from(is_full), Ordering::Relaxed);
        if let Some(set) = sets.get(&labels) {
            return SeriesHandle(set.clone());
        }
        let labels = Arc::new(labels);
        let (metrics, begun, used) = (M::default(), table.begun, AtomicU64::new(0));
        let set = Arc::new(LabelSet { labels: labels.clone(), metrics, begun, used, is_gone: AtomicBool::new(false) });
        sets.insert(labels, set.clone());
        SeriesHandle(set)
    }

    /// The metrics of a label set that was used before; `None` if it has been removed since then.
    pub fn again(&self, trace: &SeriesTrace<L, M>) -> Option<SeriesHandle<L, M>> {
        // Under the lock, because nothing is removed meanwhile: what is counted later would be lost.
        let _sets = self.0.sets.read();
        let set = trace.0.upgrade().filter(|set| !set.is_gone.load(Ordering::Relaxed));
        set.map(SeriesHandle)
    }

    /// How often a label set was asked for beyond the limit, and the common one was given instead.
    pub fn overflowed(&self) -> u64 {
        self.0.overflowed.load(Ordering::Relaxed)
    }

    /// Calls `write` with all label sets, once for each of `families`. Then removes those that are idle, except what
    /// `keep` takes out of the list of those.
    pub fn show<F, E>(
        &self,
        families: impl IntoIterator<Item = F>,
        keep: impl FnOnce(&mut Vec<Arc<L>>),
        mut write: impl FnMut(&F, &mut dyn Iterator<Item = (&L, &M)>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Not under the lock, because writing takes a while and must not delay new connections.
        let all: Vec<Arc<LabelSet<L, M>>> = self.0.sets.read().values().cloned().collect();
        for family in families {
            write(&family, &mut all.iter().map(|set| (&*set.labels, &set.metrics)))?;
        }
        // Not at each scrape, because the names are compared with those of the whole mesh.
        let (now, last) = (self.0.begun.elapsed().as_secs(), self.0.looked.load(Ordering::Relaxed));
        if now < last + self.0.limits.idle.as_secs() / 10 {
            return Ok(());
        }
        self.0.looked.store(now, Ordering::Relaxed);
        // `all` has each of them too.
        let mut gone: Vec<Arc<L>> =
            all.iter().filter(|set| self.0.is_idle(set, 2)).map(|set| set.labels.clone()).collect();
        drop(all);
        if gone.is_empty() {
            return Ok(());
        }
        keep(&mut gone);
        // Freed after the lock.
        let mut removed = Vec::new();
        let mut sets = self.0.sets.write();
        for labels in &gone {
            // It may have been used again meanwhile.
            if sets.get(labels).is_some_and(|set| self.0.may_go(set)) {
                removed.extend(sets.remove_entry(labels));
            }
        }
        Ok(())
    }
}

impl<L, M> Table<L, M> {
    /// Whether nobody has used a label set for long. `known` references to it are not uses of it.
    fn is_idle(&self, set: &Arc<LabelSet<L, M>>, known: usize) -> bool {
        let idle = self.begun.elapsed().as_secs().saturating_sub(set.used.load(Ordering::Relaxed));
        Arc::strong_count(set) <= known && idle >= self.limits.idle.as_secs()
    }

    /// Whether a label set of the table may be removed. Then it is, so it is marked.
    fn may_go(&self, set: &Arc<LabelSet<L, M>>) -> bool {
        let may_go = self.is_idle(set, 1);
        set.is_gone.store(may_go, Ordering::Relaxed);
        may_go
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Name(String);

    impl Labels for Name {
        fn overflow(&self) -> Self {
            Self(OVERFLOW.into())
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
            .show(
                [()],
                |_| {},
                |(), all| {
                    found.extend(all.map(|(name, count)| (name.0.clone(), count.load(Ordering::Relaxed))));
                    Ok::<(), ()>(())
                },
            )
            .unwrap();
        found.sort();
        found
    }

    #[test]
    fn idle_label_sets_are_shown_once_more_and_removed() {
        let series = Counts::new(Config { max: 10_000, idle: Duration::ZERO });
        let open = count(&series, "open");
        (0..3000).for_each(|n| drop(count(&series, &format!("swept-{n}"))));
        assert_eq!(shown(&series).len(), 3001, "a scraper sees counters that have ended since the last scrape");
        assert_eq!(shown(&series), [("open".to_owned(), 1)], "label sets in use stay");
        drop(count(&series, "open"));
        drop(open);
        assert_eq!(shown(&series), [("open".to_owned(), 2)]);
        assert!(shown(&series).is_empty());
        let series = Counts::new(Config { max: 10_000, idle: Duration::from_secs(60) });
        drop(count(&series, "a while ago"));
        assert_eq!(
            (shown(&series).len(), shown(&series).len()),
            (1, 1),
            "a label set stays until it has been idle for long"
        );
    }

    #[test]
    fn a_label_set_is_found_again_until_it_is_removed() {
        let series = Counts::new(Config { max: 10, idle: Duration::ZERO });
        let trace = count(&series, "one").trace();
        series.again(&trace).unwrap().fetch_add(1, Ordering::Relaxed);
        let open = series.again(&trace).unwrap();
        assert_eq!((shown(&series), shown(&series).len()), (vec![("one".to_owned(), 2)], 1), "it is in use");
        drop(open);
        assert_eq!(shown(&series).len(), 1);
        assert!(series.again(&trace).is_none());
        let trace = count(&series, "two").trace();
        let removed: Vec<_> = series.0.sets.write().extract_if(|_, set| series.0.may_go(set)).collect();
        assert!(series.again(&trace).is_none(), "it exists for a moment, but nobody would see what is counted there");
        drop(removed);
    }

    #[test]
    fn beyond_the_limit_everything_is_counted_together_and_nothing_is_lost() {
        let series = Counts::new(Config { max: 100, idle: Duration::from_secs(60) });
        let held: Vec<_> = (0..250).map(|n| count(&series, &format!("name-{n}"))).collect();
        drop(count(&series, "name-0"));
        let all = shown(&series);
        assert_eq!(all.len(), 101);
        assert_eq!(all.iter().map(|(_, count)| count).sum::<u64>(), 251);
        assert!(all.contains(&("overflow".to_owned(), 150)) && all.contains(&("name-0".to_owned(), 2)));
        assert_eq!(held[200].labels(), &Name("overflow".into()));
        assert_eq!(series.overflowed(), 150);
        // Without scrapes, idle label sets still make room for new ones.
        let series = Counts::new(Config { max: 100, idle: Duration::ZERO });
        (0..250).for_each(|n| drop(count(&series, &format!("name-{n}"))));
        assert!(shown(&series).len() <= 101);
        drop(count(&series, "new"));
        assert_eq!(shown(&series), [("new".to_owned(), 1)]);
    }

    #[test]
    fn idle_label_sets_stay_while_their_names_are_in_the_mesh() {
        let series = Counts::new(Config { max: 2, idle: Duration::ZERO });
        let show = |kept: &str| {
            let mut found = Vec::new();
            let keep = |gone: &mut Vec<Arc<Name>>| gone.retain(|name| name.0 != kept);
            let write = |(): &(), all: &mut dyn Iterator<Item = (&Name, &AtomicU64)>| {
                found.extend(all.map(|(name, _)| name.0.clone()));
                Ok::<(), ()>(())
            };
            series.show([()], keep, write).unwrap();
            found.sort();
            found
        };
        ["here", "gone"].into_iter().for_each(|name| drop(count(&series, name)));
        assert_eq!(show("here"), ["gone", "here"]);
        assert_eq!(show("here"), ["here"]);
        // When there is no room, names that come need it more than those that are idle.
        ["one", "two"].into_iter().for_each(|name| drop(count(&series, name)));
        assert_eq!(show("here"), ["two"]);
        assert_eq!(series.overflowed(), 0);
    }
}
