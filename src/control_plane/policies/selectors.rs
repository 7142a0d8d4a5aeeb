//! Label selectors of one namespace, found by the labels that they select. Pure.

use super::object::Labels;
use std::collections::{BTreeMap, HashMap};

/// Selectors, each with a key. Each is filed under the first label that it asks for, so that a workload is compared only
/// with selectors that share a label with it.
#[derive(Clone, Debug)]
pub struct Selectors<K>(HashMap<String, HashMap<String, BTreeMap<K, Labels>>>);

impl<K> Default for Selectors<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Ord + Clone> Selectors<K> {
    /// Adds a selector, which must not be empty.
    pub fn insert(&mut self, selector: &Labels, key: K) {
        if let Some((label, value)) = selector.first_key_value() {
            let values = self.0.entry(label.clone()).or_default();
            values.entry(value.clone()).or_default().insert(key, selector.clone());
        }
    }

    /// Removes a selector.
    pub fn remove(&mut self, selector: &Labels, key: &K) {
        let Some((label, value)) = selector.first_key_value() else { return };
        let Some(values) = self.0.get_mut(label) else { return };
        let Some(filed) = values.get_mut(value) else { return };
        filed.remove(key);
        if filed.is_empty() {
            values.remove(value);
        }
        if values.is_empty() {
            self.0.remove(label);
        }
    }

    /// The keys of the selectors that select a workload with these labels: lists, each in order. Of those filed under one
    /// label, at most the first `most` are looked at.
    pub fn matching<'a>(
        &'a self,
        labels: &'a Labels,
        most: usize,
    ) -> impl Iterator<Item = impl Iterator<Item = &'a K>> {
        let filed = labels.iter().filter_map(|(label, value)| self.0.get(label)?.get(value));
        filed.map(move |filed| {
            let looked_at = filed.iter().take(most);
            looked_at.filter(|(_, selector)| is_part(selector, labels)).map(|(key, _)| key)
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether a workload with these labels has all that the selector asks for.
fn is_part(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(label, value)| labels.get(label) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels() -> impl Strategy<Value = Labels> {
        prop::collection::btree_map("[ab]", "[xy]", 0..3)
    }

    proptest! {
        #[test]
        fn the_selectors_that_are_found_are_those_that_match(
            steps in prop::collection::vec((any::<bool>(), 0..6u8, labels()), 0..20), workload in labels(),
        ) {
            let (mut selectors, mut plain) = (Selectors::default(), BTreeMap::<u8, Labels>::new());
            for (add, key, selector) in steps {
                if let Some(old) = plain.remove(&key) {
                    selectors.remove(&old, &key);
                }
                if add && !selector.is_empty() {
                    selectors.insert(&selector, key);
                    plain.insert(key, selector);
                }
            }
            let mut found: Vec<u8> = selectors.matching(&workload, usize::MAX).flatten().copied().collect();
            found.sort_unstable();
            let expected: Vec<u8> =
                plain.iter().filter(|(_, s)| s.iter().all(|(k, v)| workload.get(k) == Some(v))).map(|(k, _)| *k).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(selectors.is_empty(), plain.is_empty());
        }
    }
}
