//! All PeerAuthentications: which of them counts for a workload. Pure.
//!
//! Three levels: the mesh (the root namespace), the namespace, and the workloads that a selector selects. A lower level
//! counts, unless it sets no mode. On each level the oldest counts.

use super::authentication::{self, Authentication, Demand, Mode};
use super::notes::Notes;
use super::object::{Labels, Object};
use super::selectors::Selectors;
use super::status::{Condition, Reason, Said};
use super::touched::Touched;
use crate::mesh::policy::Rule;
use crate::mesh::{Policy, Text};
use std::collections::{BTreeMap, BTreeSet};

/// Most older objects with which one is compared to see whether it has any effect.
const COMPARED: usize = 64;

/// Orders objects by age: the oldest first, and those of the same second by name.
type Age = (i64, Text);

/// All PeerAuthentications.
#[derive(Debug)]
pub struct Levels {
    root: Text,
    namespaces: BTreeMap<Text, Namespace>,
}

#[derive(Debug, Default)]
struct Namespace {
    by_name: BTreeMap<Text, Entry>,
    /// Those of the namespace's own level.
    whole: BTreeSet<Age>,
    /// Those with selectors.
    selected: Selectors<Age>,
}

/// What a change of one object comes to.
#[derive(Debug)]
pub struct Effect {
    /// Whose demands may differ now.
    pub touched: Touched,
    /// Whether other objects of its namespace may be converted in another way now, or be said something else.
    pub others: bool,
}

/// One object.
#[derive(Debug)]
struct Entry {
    age: Age,
    authentication: Authentication,
    notes: Notes,
    generation: i64,
    said: Option<Said>,
    /// What its status was last asked to say.
    asked: Option<Condition>,
}

impl Namespace {
    /// What the oldest of its own level says.
    fn mode(&self) -> Mode {
        self.oldest().map_or(Mode::Unset, |entry| entry.authentication.mode)
    }

    fn oldest(&self) -> Option<&Entry> {
        self.by_name.get(&self.whole.first()?.1)
    }

    fn insert(&mut self, entry: Entry) {
        match &entry.authentication.selector {
            Some(selector) => self.selected.insert(selector, entry.age.clone()),
            None => drop(self.whole.insert(entry.age.clone())),
        }
        self.by_name.insert(entry.age.1.clone(), entry);
    }

    fn remove(&mut self, name: &str) -> Option<Entry> {
        let entry = self.by_name.remove(name)?;
        match &entry.authentication.selector {
            Some(selector) => self.selected.remove(selector, &entry.age),
            None => drop(self.whole.remove(&entry.age)),
        }
        Some(entry)
    }

    /// All objects, or one.
    fn objects<'a>(&'a self, one: Option<&'a Text>) -> impl Iterator<Item = (&'a Text, &'a Entry)> {
        let found = one.and_then(|name| self.by_name.get_key_value(name));
        let all = one.is_none().then_some(&self.by_name).into_iter().flatten();
        found.into_iter().chain(all)
    }

    /// The oldest one that selects these labels.
    fn of_labels(&self, labels: &Labels) -> Option<&Entry> {
        let oldest = self.selected.matching(labels, usize::MAX).filter_map(|mut ages| ages.next()).min()?;
        self.by_name.get(&oldest.1)
    }
}

impl Levels {
    /// None yet.
    pub fn new(root: Text) -> Self {
        Self { root, namespaces: BTreeMap::new() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }

    /// Adds an object, or replaces it.
    pub fn set(&mut self, object: &Object) -> Effect {
        let mut notes = Notes::default();
        let authentication = authentication::read(object, &mut notes);
        let entry = Entry {
            age: (object.created.unwrap_or(i64::MAX), object.name.clone()),
            authentication,
            notes,
            generation: object.generation,
            said: Said::of(&object.status),
            asked: None,
        };
        self.replace(&object.namespace, &object.name, Some(entry))
    }

    /// Removes an object.
    pub fn remove(&mut self, namespace: &Text, name: &str) -> Effect {
        self.replace(namespace, name, None)
    }

    fn replace(&mut self, namespace: &Text, name: &str, new: Option<Entry>) -> Effect {
        let mesh_before = self.mesh_is_strict();
        let here = self.namespaces.entry(namespace.clone()).or_default();
        let mode_before = here.mode();
        let old = here.remove(name);
        let part = |entry: &Entry| (entry.authentication.clone(), entry.age.clone());
        let (before, after) = (old.as_ref().map(part), new.as_ref().map(part));
        let others = before != after;
        let selects =
            |part: &Option<(Authentication, Age)>| part.as_ref().is_some_and(|part| part.0.selector.is_some());
        let differs = others && (selects(&before) || selects(&after));
        if let Some(new) = new {
            here.insert(new);
        }
        let mode = here.mode();
        if here.by_name.is_empty() {
            self.namespaces.remove(namespace);
        }
        let touched = if mesh_before != self.mesh_is_strict() {
            Touched::All
        } else if mode_before != mode || (differs && *namespace != self.root) {
            Touched::one(namespace)
        } else {
            Touched::default()
        };
        Effect { touched, others }
    }

    fn mesh_is_strict(&self) -> bool {
        self.namespaces.get(&self.root).is_some_and(|root| root.mode() == Mode::Strict)
    }

    /// Whether the levels above workloads demand an identity.
    fn is_strict(&self, namespace: &str) -> bool {
        match self.namespaces.get(namespace).map_or(Mode::Unset, Namespace::mode) {
            Mode::Unset => self.mesh_is_strict(),
            Mode::Permissive => false,
            Mode::Strict => true,
        }
    }

    /// The key of the policy by which a workload demands an identity, if it does.
    pub fn of_workload(&self, namespace: &str, labels: &Labels) -> Option<Text> {
        let strict = self.is_strict(namespace);
        let of_labels = |here: &Namespace| {
            let entry = here.of_labels(labels)?;
            Some((entry.authentication.demand(strict), entry.age.1.clone()))
        };
        let chosen = self.namespaces.get(namespace).filter(|_| *namespace != *self.root).and_then(of_labels);
        match chosen {
            None => strict.then(|| authentication::static_key(&self.root)),
            Some((Demand::Nothing, _)) => None,
            Some((Demand::Everywhere, _)) => Some(authentication::static_key(&self.root)),
            Some((Demand::Rules(_), name)) => Some(authentication::converted_key(namespace, &name)),
        }
    }

    /// The namespaces with objects.
    pub fn namespaces(&self) -> impl Iterator<Item = &Text> {
        self.namespaces.keys()
    }

    /// The converted policy of each object of a namespace, or of one, by its key.
    pub fn converted(&self, namespace: &Text, one: Option<&Text>) -> Vec<(Text, Option<Policy>)> {
        let strict = self.is_strict(namespace);
        let rules = |entry: &Entry| -> Option<Vec<Rule>> {
            entry.authentication.selector.as_ref().filter(|_| *namespace != self.root)?;
            match entry.authentication.demand(strict) {
                Demand::Rules(rules) => Some(rules),
                Demand::Nothing | Demand::Everywhere => None,
            }
        };
        let convert = |(name, entry): (&Text, &Entry)| {
            let policy = rules(entry).map(|rules| authentication::converted_policy(namespace, name, rules));
            (authentication::converted_key(namespace, name), policy)
        };
        self.namespaces.get(namespace).into_iter().flat_map(|here| here.objects(one)).map(convert).collect()
    }

    /// The objects of a namespace, or the one, whose status should be another one: name, generation and condition. Each is
    /// said once. `closed`: the namespace has too many policies.
    pub fn unsaid(&mut self, namespace: &Text, one: Option<&Text>, closed: bool) -> Vec<(Text, i64, Condition)> {
        let in_root = *namespace == self.root;
        let Some(here) = self.namespaces.get_mut(namespace) else { return Vec::new() };
        let conditions: Vec<_> = here
            .objects(one)
            .map(|(name, entry)| (name.clone(), condition(here, entry, in_root).in_namespace(closed)))
            .collect();
        let mut wanted = Vec::new();
        for (name, condition) in conditions {
            let Some(entry) = here.by_name.get_mut(&name) else { continue };
            let is_said = entry.said.as_ref().is_some_and(|said| said.is(&condition, entry.generation));
            if is_said {
                entry.asked = None;
            } else if entry.asked.as_ref() != Some(&condition) {
                entry.asked = Some(condition.clone());
                wanted.push((name, entry.generation, condition));
            }
        }
        wanted
    }
}

/// What is said of an object.
fn condition(here: &Namespace, entry: &Entry, in_root: bool) -> Condition {
    let selector = entry.authentication.selector.as_ref();
    if in_root && selector.is_some() {
        let why = "in the root namespace it has no effect with a selector: its namespace is that of the workloads";
        return Condition::new(Reason::NotEnforced, why);
    }
    let older = match selector {
        None => here.whole.first(),
        // One that asks for no more labels selects all that this one selects.
        Some(selector) => here.selected.matching(selector, COMPARED).filter_map(|mut ages| ages.next()).min(),
    };
    match older {
        Some(older) if *older < entry.age => {
            let message = format!("the older PeerAuthentication {} of the same level takes its place", older.1);
            Condition::new(Reason::Shadowed, message)
        }
        _ => Condition::of_notes(&entry.notes, Reason::Accepted, ""),
    }
}
