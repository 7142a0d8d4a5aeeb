//! The policies of each namespace, and which of them are served. Pure.
//!
//! All policies together are one answer to a daemon, and each daemon keeps all of them. So a namespace whose policies are
//! too many or too large is closed: none of them is served, and one that refuses everything takes their place. The root
//! namespace is never closed: who writes there may refuse everything anyway.

use crate::control::xds::encode;
use crate::mesh::policy::{Action, PolicyScope};
use crate::mesh::{Policy, Text};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Most policies of one namespace.
pub const COUNT_MAX: usize = 4_096;
/// Most bytes of the policies of one namespace, in the form in which daemons get them.
pub const BYTES_MAX: usize = 2 << 20;
/// Name of the policy that refuses every connection. No Kubernetes name contains an underscore.
const TOO_MANY: &str = "culvert_too_many_policies";

/// The policies of all namespaces.
#[derive(Debug)]
pub struct Served {
    root: Text,
    spaces: HashMap<Text, Space>,
    /// What those that have changed were before, by key.
    before: BTreeMap<Text, Option<Arc<Policy>>>,
    /// Namespaces that have been closed or opened.
    turned: BTreeSet<Text>,
}

/// The policies of one namespace.
#[derive(Debug, Default)]
struct Space {
    /// Policies and their sizes, by key.
    policies: BTreeMap<Text, (Arc<Policy>, usize)>,
    bytes: usize,
    /// The policy that takes their place, while there are too many.
    closure: Option<Arc<Policy>>,
}

impl Space {
    /// What is served under a key.
    fn get(&self, key: &Text) -> Option<Arc<Policy>> {
        match &self.closure {
            Some(closure) => (closure.key == *key).then(|| closure.clone()),
            None => self.policies.get(key).map(|(policy, _)| policy.clone()),
        }
    }

    fn replace(&mut self, key: &Text, policy: Option<Policy>) {
        if let Some((_, size)) = self.policies.remove(key) {
            self.bytes -= size;
        }
        if let Some(policy) = policy {
            let size = encode::policy(&policy).len();
            self.bytes += size;
            self.policies.insert(key.clone(), (Arc::new(policy), size));
        }
    }
}

impl Served {
    /// None yet.
    pub fn new(root: Text) -> Self {
        Self { root, spaces: HashMap::new(), before: BTreeMap::new(), turned: BTreeSet::new() }
    }

    /// Adds a policy of a namespace, replaces it, or removes it.
    pub fn put(&mut self, namespace: &Text, key: &Text, policy: Option<Policy>) {
        let space = self.spaces.entry(namespace.clone()).or_default();
        if space.policies.get(key).map(|(old, _)| &**old) != policy.as_ref() {
            let before = space.get(key);
            space.replace(key, policy);
            self.before.entry(key.clone()).or_insert(before);
            let is_open = space.policies.len() <= COUNT_MAX && space.bytes <= BYTES_MAX || *namespace == self.root;
            if is_open == space.closure.is_some() {
                let closure = (!is_open).then(|| Arc::new(refuse_all(namespace, PolicyScope::Namespace)));
                let keys = space.policies.keys().chain([key]).cloned().chain([too_many_key(namespace)]);
                let before: Vec<_> = keys.map(|key| (space.get(&key), key)).collect();
                space.closure = closure;
                for (policy, key) in before {
                    self.before.entry(key).or_insert(policy);
                }
                self.turned.insert(namespace.clone());
            }
        }
        if space.policies.is_empty() {
            self.spaces.remove(namespace);
        }
    }

    /// Whether a namespace is closed.
    pub fn is_closed(&self, namespace: &str) -> bool {
        self.spaces.get(namespace).is_some_and(|space| space.closure.is_some())
    }

    /// How many namespaces are closed.
    pub fn closed(&self) -> usize {
        self.spaces.values().filter(|space| space.closure.is_some()).count()
    }

    /// Whether there are no policies.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.spaces.is_empty()
    }

    /// The namespaces that have been closed or opened since the last time.
    pub fn take_turned(&mut self) -> BTreeSet<Text> {
        std::mem::take(&mut self.turned)
    }

    /// What is served in another way than the last time, by key; `None` for what is not served any more.
    pub fn take(&mut self) -> Vec<(Text, Option<Arc<Policy>>)> {
        let of = |key: &Text| self.spaces.get(key.split_once('/')?.0)?.get(key);
        let changed = std::mem::take(&mut self.before).into_iter().map(|(key, before)| (of(&key), key, before));
        changed.filter(|(now, _, before)| now != before).map(|(now, key, _)| (key, now)).collect()
    }
}

/// A policy that refuses every connection, to workloads of its namespace or to those that list it.
pub fn refuse_all(namespace: &Text, scope: PolicyScope) -> Policy {
    let (name, key) = (TOO_MANY.into(), too_many_key(namespace));
    let (action, rules) = (Action::Deny, vec![Vec::new()]);
    Policy { name, namespace: namespace.clone(), key, scope, action, dry_run: false, rules }
}

/// `namespace/name` of that policy.
pub fn too_many_key(namespace: &str) -> Text {
    format!("{namespace}/{TOO_MANY}").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::{Attribute, Match, StringMatch};

    /// A policy of about this size.
    fn policy(namespace: &str, name: &str, bytes: usize) -> Policy {
        let text = StringMatch::Exact("x".repeat(bytes).as_str().into());
        let one = Match { namespaces: Attribute { any_of: vec![text], none_of: Vec::new() }, ..Match::default() };
        let key = format!("{namespace}/{name}").into();
        let (scope, action) = (PolicyScope::Namespace, Action::Allow);
        let (name, namespace) = (name.into(), namespace.into());
        Policy { name, namespace, key, scope, action, dry_run: false, rules: vec![vec![vec![one]]] }
    }

    fn put(served: &mut Served, namespace: &str, name: &str, bytes: Option<usize>) {
        let key = format!("{namespace}/{name}").into();
        served.put(&namespace.into(), &key, bytes.map(|bytes| policy(namespace, name, bytes)));
    }

    fn taken(served: &mut Served) -> Vec<(String, bool)> {
        served.take().into_iter().map(|(key, policy)| (key.to_string(), policy.is_some())).collect()
    }

    #[test]
    fn a_namespace_with_too_much_is_closed_until_it_has_less_and_no_other() {
        let large = BYTES_MAX - 1_000;
        let mut served = Served::new("root".into());
        for namespace in ["a", "b", "root"] {
            put(&mut served, namespace, "p", Some(10));
        }
        assert_eq!((taken(&mut served).len(), served.take_turned().len()), (3, 0));
        put(&mut served, "a", "large", Some(large));
        assert_eq!(taken(&mut served), [("a/large".into(), true)]);
        put(&mut served, "a", "more", Some(2_000));
        assert!(served.is_closed("a") && !served.is_closed("b"));
        assert_eq!(served.take_turned(), [Text::from("a")].into());
        let closed = [("a/culvert_too_many_policies", true), ("a/large", false), ("a/p", false)];
        assert_eq!(taken(&mut served), closed.map(|(key, there)| (key.to_owned(), there)));
        put(&mut served, "a", "p", Some(20));
        put(&mut served, "a", "q", Some(20));
        assert_eq!(taken(&mut served), [], "nothing of a closed namespace is served");
        put(&mut served, "a", "large", None);
        assert_eq!((served.is_closed("a"), served.closed(), served.take_turned().len()), (false, 0, 1));
        let open = [("a/culvert_too_many_policies", false), ("a/more", true), ("a/p", true), ("a/q", true)];
        assert_eq!(taken(&mut served), open.map(|(key, there)| (key.to_owned(), there)));
        // Closed and opened between two calls: nothing has changed.
        put(&mut served, "a", "large", Some(large + 1_000));
        put(&mut served, "a", "large", None);
        assert_eq!(taken(&mut served), []);
        put(&mut served, "root", "large", Some(2 * BYTES_MAX));
        assert!(!served.is_closed("root"));
    }

    #[test]
    fn many_small_policies_close_a_namespace_too() {
        let mut served = Served::new("root".into());
        (0..COUNT_MAX).for_each(|n| put(&mut served, "a", &format!("p{n}"), Some(1)));
        assert!(!served.is_closed("a"));
        put(&mut served, "a", "p", Some(1));
        assert!(served.is_closed("a"));
        let all = served.take();
        let [(key, Some(only))] = all.as_slice() else { panic!("{} policies", all.len()) };
        assert_eq!((&**key, &only.scope), ("a/culvert_too_many_policies", &PolicyScope::Namespace));
        assert!(only.rules == vec![Vec::<Vec<Match>>::new()] && only.action == Action::Deny, "it refuses everything");
        (0..COUNT_MAX).for_each(|n| put(&mut served, "a", &format!("p{n}"), None));
        put(&mut served, "a", "p", None);
        assert_eq!(taken(&mut served), [("a/culvert_too_many_policies".to_owned(), false)]);
        assert!(served.is_empty());
    }
}
