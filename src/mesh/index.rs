//! A persistent map from a key to all items that claim it, the highest-ranked first.
//!
//! Several items may claim one key: services share a virtual address, workloads overlap on an IP address. All of them
//! are kept, so that the next one takes over when the first one is removed. Copies are cheap because they share
//! everything that does not change later.

use rpds::HashTrieMapSync;
use std::cmp::Ordering;
use std::hash::Hash;
use std::sync::Arc;

/// An item that can be indexed. It has an identity and a rank among the items that claim the same key.
pub trait Claimant: PartialEq {
    /// Compares ranks: the better item is less. Two different items are never equal.
    fn order(&self, other: &Self) -> Ordering;
    /// Whether both are versions of the same item.
    fn same(&self, other: &Self) -> bool;
}

/// The map from keys to their claimants.
#[derive(Clone, Debug)]
pub struct Index<K: Eq + Hash, T> {
    map: HashTrieMapSync<K, Arc<[Arc<T>]>>,
}

impl<K: Eq + Hash, T> Default for Index<K, T> {
    fn default() -> Self {
        Self { map: HashTrieMapSync::default() }
    }
}

impl<K: Eq + Hash, T: PartialEq> PartialEq for Index<K, T> {
    fn eq(&self, other: &Self) -> bool {
        self.map == other.map
    }
}

impl<K: Eq + Hash + Clone, T: Claimant> Index<K, T> {
    /// All claimants of `key`, the highest-ranked first.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> &[Arc<T>]
    where
        K: std::borrow::Borrow<Q>,
    {
        self.map.get(key).map_or(&[], |list| list)
    }

    /// Adds a claim.
    pub fn add(&mut self, key: K, item: &Arc<T>) {
        let mut list: Vec<Arc<T>> = self.get(&key).to_vec();
        let at = list.partition_point(|other| other.order(item) == Ordering::Less);
        list.insert(at, item.clone());
        self.map.insert_mut(key, list.into());
    }

    /// Removes a claim.
    pub fn remove(&mut self, key: &K, item: &T) {
        let list: Vec<Arc<T>> = self.get(key).iter().filter(|other| !other.same(item)).cloned().collect();
        if list.is_empty() {
            self.map.remove_mut(key);
        } else {
            self.map.insert_mut(key.clone(), list.into());
        }
    }
}
