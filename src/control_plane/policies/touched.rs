//! Whose lists of policies may differ. Pure.

use crate::mesh::Text;
use std::collections::BTreeSet;

/// The workloads whose lists of policies may differ from before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Those of these namespaces.
    Namespaces(BTreeSet<Text>),
    /// All.
    All,
}

impl Default for Touched {
    fn default() -> Self {
        Self::Namespaces(BTreeSet::new())
    }
}

impl Touched {
    /// Those of one namespace.
    pub fn one(namespace: &Text) -> Self {
        Self::Namespaces([namespace.clone()].into())
    }

    /// Adds others.
    pub fn add(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::All, _) => {}
            (Self::Namespaces(these), Self::Namespaces(others)) => these.extend(others),
            (Self::Namespaces(_), Self::All) => *self = Self::All,
        }
    }

    /// Whether a namespace is among them.
    #[cfg(test)]
    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Self::All => true,
            Self::Namespaces(these) => these.contains(namespace),
        }
    }
}
