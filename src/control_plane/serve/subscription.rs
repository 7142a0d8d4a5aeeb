//! What one client wants of one type, and what it has been told. Pure.
//!
//! A client that wants everything (wildcard) is simply at an edition of the catalog. Of a client that asks for names it
//! is remembered which it has asked for and which resources it holds. Such a client gets what has a name that it asked
//! for, with a service its workloads, and the workloads of its own node; and what it has been told once is kept current
//! for it until it is gone, or the client no longer wants it.

use super::difference::{self, Difference, Differences};
use super::index::Index;
use crate::control_plane::catalog::{Edition, Kind, Resource, Resources};
use crate::mesh::Text;
use bytes::Bytes;
use parking_lot::RwLock;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// How many names one client may ask for, and how many bytes they may have.
const NAMES_MAX: usize = 70_000;
const NAME_BYTES_MAX: usize = 16 << 20;
/// Longest name.
const NAME_MAX: usize = 1024;

/// A list of this many resources is long.
pub(super) const MANY: usize = 1_000;

/// What all clients share.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The newest edition.
    pub current: &'a Arc<Edition>,
    /// A recent edition whose full list is probably encoded already: the first answer is made of it.
    pub checkpoint: &'a Arc<Edition>,
    /// The last differences between editions.
    pub differences: &'a Differences,
    /// The index of addresses. It is at the newest edition, or later, where clients ask by name.
    pub index: &'a RwLock<Index>,
}

/// A part of a response.
#[derive(Clone, Debug)]
pub enum Part {
    /// The resources of a difference.
    Resources(Arc<Difference>),
    /// The removals of a difference.
    Removed(Arc<Difference>),
    /// Resources for this client alone, with their further names.
    OwnResources(Vec<(Text, Arc<Resource>)>),
    /// Removals for this client alone.
    OwnRemoved(Vec<Text>),
}

impl Part {
    /// How many resources or names it has.
    pub fn count(&self) -> usize {
        match self {
            Self::Resources(difference) => difference.resources.len(),
            Self::Removed(difference) => difference.removed.len(),
            Self::OwnResources(resources) => resources.len(),
            Self::OwnRemoved(names) => names.len(),
        }
    }

    /// Whether it takes something away.
    pub fn removes(&self) -> bool {
        matches!(self, Self::Removed(_) | Self::OwnRemoved(_))
    }

    /// Its encoded form.
    pub fn bytes(&self, kind: Kind) -> Bytes {
        match self {
            Self::Resources(difference) => difference.resource_bytes(),
            Self::Removed(difference) => difference.removed_bytes(),
            Self::OwnResources(resources) => difference::resources(kind, resources, true),
            Self::OwnRemoved(names) => difference::removed(names),
        }
    }
}

/// A client asks for more than is served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {NAMES_MAX} names, {NAME_BYTES_MAX} bytes of names, or a name of more than {NAME_MAX} bytes")]
pub struct TooMuch;

/// What is wanted.
#[derive(Debug)]
enum Interest {
    /// Everything.
    All,
    /// What is asked for.
    Named(Named),
}

/// A subscription to one type.
#[derive(Debug)]
pub struct Subscription {
    kind: Kind,
    interest: Option<Interest>,
    /// What a client that wants everything says it holds, with versions, until it is answered.
    held: HashMap<Text, Text>,
    /// Whether the first answer is still to come.
    unanswered: bool,
    /// Names that have just been asked for, and are to be answered whether or not they are known.
    asked: BTreeSet<Text>,
    /// Their bytes, those of names that have been taken back included.
    asked_bytes: usize,
    /// The edition that the client has been told.
    at: Arc<Edition>,
    /// The response that it has not acknowledged yet.
    pub(super) outstanding: Option<String>,
}

impl Subscription {
    pub(super) fn new(kind: Kind) -> Self {
        let (held, asked, asked_bytes, at) = Default::default();
        Self { kind, interest: None, held, unanswered: false, asked, asked_bytes, at, outstanding: None }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.interest.is_some()
    }

    pub(super) fn is_on_demand(&self) -> bool {
        matches!(self.interest, Some(Interest::Named(_)))
    }

    pub(super) fn is_unanswered(&self) -> bool {
        self.unanswered
    }

    /// The number of the edition that the client has been told.
    pub(super) fn at(&self) -> u64 {
        self.at.number
    }

    /// How many resources the client said it holds, while that matters.
    pub(super) fn held(&self) -> usize {
        let known = if let Some(Interest::Named(named)) = &self.interest { named.known.len() } else { 0 };
        if self.unanswered { self.held.len() + known } else { 0 }
    }

    /// The first request of a stream.
    pub(super) fn begin(
        &mut self,
        subscribe: Vec<String>,
        unsubscribe: &[String],
        versions: HashMap<String, String>,
    ) -> Result<(), TooMuch> {
        let is_all = |names: &[String]| names.iter().any(|name| name == "*");
        let versions = versions.into_iter().map(|(name, version)| (name.into(), version.into())).collect();
        self.unanswered = true;
        if !is_all(unsubscribe) && (subscribe.is_empty() || is_all(&subscribe)) {
            self.held = versions;
            self.interest = Some(Interest::All);
            return Ok(());
        }
        self.interest = Some(Interest::Named(Named { known: versions, ..Named::default() }));
        self.ask(subscribe)
    }

    /// A later request.
    pub(super) fn change(&mut self, subscribe: Vec<String>, unsubscribe: &[String]) -> Result<(), TooMuch> {
        for name in unsubscribe {
            self.asked.remove(name.as_str());
            match &mut self.interest {
                Some(Interest::Named(named)) => named.forget(name),
                // Who gives up everything is told nothing any more, and so is taken to hold nothing.
                Some(interest) if name == "*" => *interest = Interest::Named(Named::default()),
                _ => {}
            }
        }
        let wants_all = subscribe.iter().any(|name| name == "*") && !unsubscribe.iter().any(|name| name == "*");
        if wants_all && let Some(Interest::Named(named)) = &mut self.interest {
            self.held = std::mem::take(&mut named.known);
            (self.interest, self.unanswered) = (Some(Interest::All), true);
        }
        self.ask(subscribe)
    }

    fn ask(&mut self, names: Vec<String>) -> Result<(), TooMuch> {
        for name in names.into_iter().filter(|name| name != "*") {
            // Names of resources are names of objects and hosts, so that a longer one is none.
            if name.len() > NAME_MAX {
                return Err(TooMuch);
            }
            let name = Text::from(name);
            if let Some(Interest::Named(named)) = &mut self.interest {
                named.want(name.clone())?;
            }
            let bytes = name.len();
            if self.asked.insert(name) {
                self.asked_bytes += bytes;
            }
            if self.asked.len() > NAMES_MAX || self.asked_bytes > NAME_BYTES_MAX {
                return Err(TooMuch);
            }
        }
        Ok(())
    }

    /// Whether there may be something to say about an edition.
    pub(super) fn is_due(&self, to: &Edition) -> bool {
        self.is_wanted() && (self.unanswered || !self.asked.is_empty() || self.at.number < to.number)
    }

    /// What has to be said so that the client knows `to`. After this it is taken to know it.
    pub(super) fn tell(&mut self, to: &Arc<Edition>, node: &Text, view: &View<'_>) -> Vec<Part> {
        let from = std::mem::replace(&mut self.at, to.clone());
        let asked = std::mem::take(&mut self.asked);
        self.asked_bytes = 0;
        let first = std::mem::take(&mut self.unanswered);
        let mut parts = match &mut self.interest {
            None => Vec::new(),
            Some(Interest::All) => {
                let held = std::mem::take(&mut self.held);
                let mut parts = match first {
                    true => everything(self.kind, &held, to, view),
                    false => {
                        let difference = view.differences.between(self.kind, &from, to);
                        vec![Part::Resources(difference.clone()), Part::Removed(difference)]
                    }
                };
                parts.extend(by_name(asked, to.of(self.kind)));
                parts
            }
            Some(Interest::Named(named)) => {
                let index = view.index.read();
                let look = Look { kind: self.kind, to, index: &index, node };
                named.tell((!first).then_some(&*from), asked, &look)
            }
        };
        parts.retain(|part| part.count() > 0);
        parts
    }
}

/// The first answer to somebody who wants everything and holds something already.
fn everything(kind: Kind, held: &HashMap<Text, Text>, to: &Edition, view: &View<'_>) -> Vec<Part> {
    let all = to.of(kind);
    let is_held = |name: &Text, resource: &Resource| held.get(name).is_some_and(|version| *version == resource.version);
    let gone = held.keys().filter(|name| !all.contains_key(*name)).cloned().collect();
    let same = if held.is_empty() { 0 } else { all.iter().filter(|(name, resource)| is_held(name, resource)).count() };
    // The full list is there for all; a list for one client costs memory for as long as that client reads it.
    if held.is_empty() || (all.size() >= MANY && same < all.size() / 2) {
        let full = view.differences.between(kind, &Edition::default(), to);
        return vec![Part::Resources(full), Part::OwnRemoved(gone)];
    }
    let new = all.iter().filter(|(name, resource)| !is_held(name, resource));
    let new = new.map(|(name, resource)| (name.clone(), resource.clone())).collect();
    vec![Part::OwnResources(new), Part::OwnRemoved(gone)]
}

/// Answers names that somebody asks for who is told everything anyway.
fn by_name(asked: BTreeSet<Text>, all: &Resources) -> [Part; 2] {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for name in asked {
        match all.get(&name) {
            Some(resource) => found.push((name, resource.clone())),
            None => missing.push(name),
        }
    }
    [Part::OwnResources(found), Part::OwnRemoved(missing)]
}

/// Where names are looked up.
struct Look<'a> {
    kind: Kind,
    to: &'a Edition,
    index: &'a Index,
    node: &'a Text,
}

impl Look<'_> {
    fn get(&self, name: &str) -> Option<&Arc<Resource>> {
        self.to.of(self.kind).get(name)
    }

    /// The resources that a name means: the one that has it, otherwise those that have it as a further name.
    fn meant_by(&self, name: &Text) -> Vec<Text> {
        if self.get(name).is_some() {
            return vec![name.clone()];
        }
        let has = |found: &&Text| self.get(found).is_some_and(|resource| resource.aliases.contains(name));
        self.index.with_alias(name).filter(has).cloned().collect()
    }
}

/// Names that a client has asked for, and what it holds.
#[derive(Debug, Default)]
struct Named {
    names: HashSet<Text>,
    bytes: usize,
    /// Resources that were meant by a name: where they are services, their workloads are wanted too.
    meant: HashSet<Text>,
    /// Versions of the resources that it holds.
    known: HashMap<Text, Text>,
}

impl Named {
    fn want(&mut self, name: Text) -> Result<(), TooMuch> {
        let bytes = self.bytes + name.len();
        if self.names.insert(name) {
            self.bytes = bytes;
        }
        if self.names.len() > NAMES_MAX || self.bytes > NAME_BYTES_MAX { Err(TooMuch) } else { Ok(()) }
    }

    fn forget(&mut self, name: &str) {
        if self.names.remove(name) {
            self.bytes = self.bytes.saturating_sub(name.len());
        }
        self.known.remove(name);
        self.meant.remove(name);
    }

    /// Whether a resource is wanted for something other than its own name.
    fn wants(&self, resource: &Resource, node: &Text) -> bool {
        resource.aliases.iter().any(|alias| self.names.contains(alias))
            || resource.services.iter().any(|service| self.meant.contains(service))
            || (!node.is_empty() && resource.node == *node)
    }

    /// What has to be said. `from` is `None` for the first answer.
    fn tell(&mut self, from: Option<&Edition>, asked: BTreeSet<Text>, look: &Look<'_>) -> Vec<Part> {
        let mut touched = BTreeSet::new();
        match from.and_then(|from| look.to.changed_since(from.number)) {
            Some(changed) => {
                let names = changed.filter(|(kind, _)| *kind == look.kind);
                names.for_each(|(_, name)| self.touch(name, &mut touched, look));
            }
            None => {
                touched.extend(self.known.keys().cloned());
                self.meant.clear();
                for name in &self.names {
                    self.meant.extend(look.meant_by(name));
                }
                for name in &self.meant {
                    touched.insert(name.clone());
                    touched.extend(look.index.of_service(name).cloned());
                }
                touched.extend(look.index.on_node(look.node).cloned());
            }
        }
        let (mut again, mut unknown) = (BTreeSet::new(), Vec::new());
        for name in asked {
            let meant = look.meant_by(&name);
            if meant.is_empty() && !self.known.contains_key(&name) {
                unknown.push(name);
            }
            for name in meant {
                again.extend(look.index.of_service(&name).cloned());
                self.meant.insert(name.clone());
                again.insert(name);
            }
        }
        touched.extend(again.iter().cloned());
        let (mut resources, mut removed) = (Vec::new(), unknown);
        for name in touched {
            match (self.known.get(&name), look.get(&name)) {
                (Some(known), Some(now)) if *known == now.version && !again.contains(&name) => {}
                (_, Some(now)) if self.has_reason(&name, now, look) => {
                    self.known.insert(name.clone(), now.version.clone());
                    resources.push((name, now.clone()));
                }
                (None, _) => {}
                (Some(_), _) => {
                    self.known.remove(&name);
                    self.meant.remove(&name);
                    removed.push(name);
                }
            }
        }
        vec![Part::OwnResources(resources), Part::OwnRemoved(removed)]
    }

    /// Whether a resource that may be told is wanted indeed. The index may be newer than the edition.
    fn has_reason(&self, name: &Text, now: &Resource, look: &Look<'_>) -> bool {
        self.known.contains_key(name) || self.names.contains(name) || self.wants(now, look.node)
    }

    /// Adds what may have to be told because a resource has changed.
    fn touch(&mut self, name: &Text, touched: &mut BTreeSet<Text>, look: &Look<'_>) {
        let is_named = self.names.contains(name);
        let Some(now) = look.get(name) else {
            if self.known.contains_key(name) {
                touched.insert(name.clone());
            }
            return;
        };
        let is_meant = is_named || now.aliases.iter().any(|alias| self.names.contains(alias));
        if is_meant && self.meant.insert(name.clone()) {
            touched.extend(look.index.of_service(name).cloned());
        }
        if is_meant || self.known.contains_key(name) || self.wants(now, look.node) {
            touched.insert(name.clone());
        }
    }
}
