//! Names of objects by one of their labels.

use crate::mesh::Text;
use std::collections::{HashMap, HashSet};

/// Names by key and value of a label.
#[derive(Debug, Default)]
pub struct LabelIndex(HashMap<String, HashMap<String, HashSet<Text>>>);

impl LabelIndex {
    /// Adds a name to a label.
    pub fn add(&mut self, key: &str, value: &str, name: &Text) {
        if !self.0.contains_key(key) {
            self.0.insert(key.to_owned(), HashMap::new());
        }
        let Some(values) = self.0.get_mut(key) else { return };
        match values.get_mut(value) {
            Some(names) => drop(names.insert(name.clone())),
            None => drop(values.insert(value.to_owned(), HashSet::from([name.clone()]))),
        }
    }

    /// Removes a name from a label.
    pub fn remove(&mut self, key: &str, value: &str, name: &str) {
        let Some(values) = self.0.get_mut(key) else { return };
        let Some(names) = values.get_mut(value) else { return };
        names.remove(name);
        if names.is_empty() {
            values.remove(value);
            if values.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// The names with a label.
    pub fn get(&self, key: &str, value: &str) -> Option<&HashSet<Text>> {
        self.0.get(key)?.get(value)
    }

    /// How many names have a label.
    pub fn count(&self, key: &str, value: &str) -> usize {
        self.get(key, value).map_or(0, HashSet::len)
    }
}
