//! Which objects of a kind are known, and which of them a new list lacks.

use super::object::Key;
use std::collections::HashSet;

/// The objects of one kind.
#[derive(Debug, Default)]
pub struct Known {
    all: HashSet<Key>,
    /// Those of the list that is being received.
    seen: Option<HashSet<Key>>,
    listed: bool,
}

impl Known {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether they have been listed once.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// A list begins. If one was being received, it counts for nothing.
    pub fn begin(&mut self) {
        self.seen = Some(HashSet::new());
    }

    /// An object is there.
    pub fn set(&mut self, key: &Key) {
        if let Some(seen) = &mut self.seen {
            seen.insert(key.clone());
        }
        self.all.insert(key.clone());
    }

    /// An object is gone.
    pub fn remove(&mut self, key: &Key) {
        if let Some(seen) = &mut self.seen {
            seen.remove(key);
        }
        self.all.remove(key);
    }

    /// The list is complete. Returns the objects that it lacks.
    pub fn end(&mut self) -> Vec<Key> {
        self.listed = true;
        let Some(seen) = self.seen.take() else { return Vec::new() };
        let gone = self.all.difference(&seen).cloned().collect();
        self.all = seen;
        gone
    }
}
