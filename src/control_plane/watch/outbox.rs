//! Statuses that wait until the queue to their writer has room; only the last one of each object.

use crate::control_plane::policies::Kind;
use crate::control_plane::policies::status::Wanted;
use crate::mesh::Text;
use std::collections::BTreeMap;

/// Statuses that wait. There is at most one for each object, so it needs no other bound.
#[derive(Debug, Default)]
pub struct Outbox(BTreeMap<(Kind, Text, Text), Wanted>);

impl Outbox {
    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one, in place of an earlier one of the same object.
    pub fn add(&mut self, wanted: Wanted) {
        self.0.insert((wanted.kind, wanted.namespace.clone(), wanted.name.clone()), wanted);
    }

    /// Forgets an object that is gone.
    pub fn remove(&mut self, kind: Kind, namespace: &Text, name: &Text) {
        self.0.remove(&(kind, namespace.clone(), name.clone()));
    }

    /// Takes one.
    pub fn next(&mut self) -> Option<Wanted> {
        self.0.pop_first().map(|(_, wanted)| wanted)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
