//! A map from a key to all that claim it, best first. Cheap to copy: a copy shares everything that is not changed later.
//!
//! Several may claim one key: services share a virtual address, workloads overlap on an IP. When the best one goes, the
//! next is there; an index that kept only one could not know it.

use rpds::HashTrieMapSync;
use std::cmp::Ordering;
use std::hash::Hash;
use std::sync::Arc;

/// What can be indexed: it has an order among those that claim the same key, and an identity.
pub trait Claimant: PartialEq {
    /// The better one comes first; never equal for two different ones.
    fn order(&self, other: &Self) -> Ordering;
    /// Whether both are the same thing, perhaps in different versions.
    fn same(&self, other: &Self) -> bool;
}

/// The index.
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
    /// All that claim `key`, best first.
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

    /// Takes a claim away.
    pub fn remove(&mut self, key: &K, item: &T) {
        let list: Vec<Arc<T>> = self.get(key).iter().filter(|other| !other.same(item)).cloned().collect();
        if list.is_empty() {
            self.map.remove_mut(key);
        } else {
            self.map.insert_mut(key.clone(), list.into());
        }
    }
}
