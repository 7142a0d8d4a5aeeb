//! Everything that is served, by name, in the form in which it is sent.
//!
//! What watches the cluster writes here, a batch of changes at a time; each batch makes a new [`Edition`]. Streams read
//! editions, which never change, and learn from [`Catalog::follow`] that there is a new one. Editions share what they
//! have in common, so keeping an old one for a slow stream costs what has changed since.

use crate::mesh::Text;
use bytes::Bytes;
use rpds::HashTrieMapSync;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// How many batches of changes an edition remembers, and how many names in all. A stream that is further behind is
/// brought up to date by comparing everything.
const BATCHES_MAX: usize = 512;
const NAMES_MAX: usize = 50_000;

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
    /// Further names by which daemons ask for it: `network/ip`.
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
    /// When it was made.
    pub made: Option<Instant>,
    /// Bytes of the resources of each type.
    bytes: [usize; Kind::ALL.len()],
    /// The last batches of changes, oldest first.
    recent: VecDeque<Arc<Batch>>,
    /// How many names they have.
    recent_names: usize,
}

/// Which names a batch of changes concerned.
#[derive(Debug)]
struct Batch {
    /// The edition that it made.
    number: u64,
    names: Vec<(Kind, Text)>,
}

impl Edition {
    /// The resources of a type.
    pub fn of(&self, kind: Kind) -> &Resources {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.authorizations,
        }
    }

    /// Bytes of all resources of a type. A daemon that begins gets them in one answer.
    pub fn bytes(&self, kind: Kind) -> usize {
        self.bytes.get(kind as usize).copied().unwrap_or_default()
    }

    /// The names that changed after edition `number`, some of them several times. `None` if that was too long ago.
    pub fn changed_since(&self, number: u64) -> Option<impl Iterator<Item = &(Kind, Text)>> {
        let oldest = self.recent.front().map_or(self.number + 1, |batch| batch.number);
        let later = self.recent.iter().filter(move |batch| batch.number > number);
        (number + 1 >= oldest && number <= self.number).then(|| later.flat_map(|batch| &batch.names))
    }

    fn remember(&mut self, names: Vec<(Kind, Text)>) {
        self.recent_names += names.len();
        self.recent.push_back(Arc::new(Batch { number: self.number, names }));
        while self.recent.len() > BATCHES_MAX || self.recent_names > NAMES_MAX {
            let Some(oldest) = self.recent.pop_front() else { return };
            self.recent_names -= oldest.names.len();
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        self.number += 1;
        self.made = Some(Instant::now());
        self.remember(changes.iter().map(|(kind, name, _)| (*kind, name.clone())).collect());
        for (kind, name, resource) in changes {
            let resources = match kind {
                Kind::Address => &mut self.addresses,
                Kind::Authorization => &mut self.authorizations,
            };
            if let Some(bytes) = self.bytes.get_mut(kind as usize) {
                let size = |resource: Option<&Arc<Resource>>| resource.map_or(0, |resource| resource.content.len());
                *bytes = *bytes + size(resource.as_ref()) - size(resources.get(&name));
            }
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
    fn what_has_changed_since_is_known_as_far_back_as_there_is_room() {
        let catalog = Catalog::default();
        let current = || catalog.follow().borrow().clone();
        let since =
            |number: u64| current().changed_since(number).map(|names| names.map(|(_, n)| n.to_string()).collect());
        assert_eq!(since(0), Some(Vec::<String>::new()));
        let set = |names: &[&str]| {
            catalog.apply(names.iter().map(|name| (Kind::Address, (*name).into(), resource("1"))).collect());
        };
        set(&["a", "b"]);
        set(&["a"]);
        assert_eq!(since(0), Some(vec!["a".to_owned(), "b".into(), "a".into()]));
        assert_eq!((since(1), since(2), since(3)), (Some(vec!["a".to_owned()]), Some(vec![]), None));
        // A batch that has no room is not remembered, nor what was before it.
        let many: Vec<String> = (0..=NAMES_MAX).map(|n| n.to_string()).collect();
        set(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((since(2), since(3)), (None, Some(vec![])));
        (0..=BATCHES_MAX).for_each(|_| set(&["c"]));
        assert_eq!((since(3), since(4).map(|names| names.len())), (None, Some(BATCHES_MAX)));
    }

    #[test]
    fn an_edition_that_is_held_does_not_change() {
        let catalog = Catalog::default();
        catalog
            .apply(vec![(Kind::Address, "a".into(), resource("1")), (Kind::Authorization, "p".into(), resource("1"))]);
        let followed = catalog.follow();
        let first = followed.borrow().clone();
        catalog.apply(vec![(Kind::Address, "a".into(), None), (Kind::Address, "b".into(), resource("22"))]);
        assert!(followed.has_changed().unwrap());
        let second = followed.borrow().clone();
        assert_eq!(Kind::ALL.map(|kind| (first.bytes(kind), second.bytes(kind))), [(1, 2), (1, 1)]);
        assert!(first.addresses.contains_key("a") && !first.addresses.contains_key("b"));
        assert!(!second.addresses.contains_key("a") && second.addresses.contains_key("b"));
        assert!(second.of(Kind::Authorization).contains_key("p") && second.number == first.number + 1);
    }
}
