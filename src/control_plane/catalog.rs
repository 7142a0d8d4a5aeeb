//! Everything that is served, by name, in the form in which it is sent.
//!
//! What watches the cluster writes here, a batch of changes at a time; each batch makes a new [`Edition`]. Streams read
//! editions, which never change, and learn from [`Catalog::follow`] that there is a new one. Editions share what they
//! have in common, so keeping an old one for a slow stream costs what has changed since.

use crate::mesh::Text;
use bytes::Bytes;
use rpds::HashTrieMapSync;
use std::sync::Arc;
use tokio::sync::watch;

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A workload or a service: `istio.workload.Address`.
    Address,
    /// A policy: `istio.security.Authorization`.
    Authorization,
}

impl Kind {
    /// All types, in the order in which they are sent.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The type's URL (source: Istio's xDS).
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }
}

/// One resource in the form in which it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The encoded message.
    pub content: Bytes,
    /// Changes when the content does: a hash of it, the same in every replica.
    pub version: Text,
    /// Further names by which daemons ask for it: `network/ip`, `network/ip/length`.
    pub aliases: Vec<Text>,
    /// For a workload: the names of its services. Whoever asks for a service needs its workloads too.
    pub services: Vec<Text>,
    /// For a workload: its node, which always needs it; empty otherwise.
    pub node: Text,
}

/// A change: a new content, or `None` for a resource that is gone.
pub type Change = (Kind, Text, Option<Arc<Resource>>);

/// Resources of one type by name.
pub type Resources = HashTrieMapSync<Text, Arc<Resource>>;

/// Everything that is served at one time.
#[derive(Clone, Debug, Default)]
pub struct Edition {
    /// Counts up with each batch of changes. It says nothing outside this process.
    pub number: u64,
    /// Whether everything has been listed once; daemons get nothing before that.
    pub complete: bool,
    /// Workloads and services.
    pub addresses: Resources,
    /// Policies.
    pub authorizations: Resources,
}

impl Edition {
    /// The resources of a type.
    pub fn of(&self, kind: Kind) -> &Resources {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.authorizations,
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        self.number += 1;
        for (kind, name, resource) in changes {
            let resources = match kind {
                Kind::Address => &mut self.addresses,
                Kind::Authorization => &mut self.authorizations,
            };
            match resource {
                Some(resource) => resources.insert_mut(name, resource),
                None => drop(resources.remove_mut(&name)),
            }
        }
    }
}

/// The current edition.
#[derive(Debug)]
pub struct Catalog(watch::Sender<Arc<Edition>>);

impl Default for Catalog {
    fn default() -> Self {
        Self(watch::Sender::new(Arc::default()))
    }
}

impl Catalog {
    /// Applies a batch of changes, which is one new edition.
    pub fn apply(&self, changes: Vec<Change>) {
        if !changes.is_empty() {
            self.0.send_modify(|edition| Arc::make_mut(edition).apply(changes));
        }
    }

    /// Says that everything has been listed.
    pub fn set_complete(&self) {
        self.0.send_modify(|edition| Arc::make_mut(edition).complete = true);
    }

    /// The current edition, and a notice of each new one.
    pub fn follow(&self) -> watch::Receiver<Arc<Edition>> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(content: &str) -> Option<Arc<Resource>> {
        let (content, version) = (Bytes::copy_from_slice(content.as_bytes()), content.into());
        Some(Arc::new(Resource { content, version, aliases: vec![], services: vec![], node: "".into() }))
    }

    #[test]
    fn an_edition_that_is_held_does_not_change() {
        let catalog = Catalog::default();
        catalog
            .apply(vec![(Kind::Address, "a".into(), resource("1")), (Kind::Authorization, "p".into(), resource("1"))]);
        let followed = catalog.follow();
        let first = followed.borrow().clone();
        catalog.apply(vec![(Kind::Address, "a".into(), None), (Kind::Address, "b".into(), resource("2"))]);
        assert!(followed.has_changed().unwrap());
        let second = followed.borrow().clone();
        assert!(first.addresses.contains_key("a") && !first.addresses.contains_key("b"));
        assert!(!second.addresses.contains_key("a") && second.addresses.contains_key("b"));
        assert!(second.of(Kind::Authorization).contains_key("p") && second.number == first.number + 1);
    }
}
