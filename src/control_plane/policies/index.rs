//! All objects, the policies that they come to, and which workloads list which of them. Pure.

use super::authentication;
use super::authorization;
use super::levels::{Effect, Levels};
use super::object::{Kind, Labels, Object};
use super::selectors::Selectors;
use super::served::{self, Served, too_many_key};
use super::status::{Condition, Reason, Said, Wanted};
use super::touched::Touched;
use crate::control_plane::Cluster;
use crate::mesh::policy::PolicyScope;
use crate::mesh::{Policy, Text};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Most policies that one workload lists.
pub const LISTED_MAX: usize = 256;

/// What has changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Policies by their key, `namespace/name`; `None` for one that is gone.
    pub policies: Vec<(Text, Option<Arc<Policy>>)>,
    /// The workloads whose lists may differ now.
    pub workloads: Touched,
    /// Statuses that objects should have and do not have.
    pub statuses: Vec<Wanted>,
    /// Namespaces that have too many policies now and had not before.
    pub closed: Vec<Text>,
}

/// All AuthorizationPolicies and PeerAuthentications.
#[derive(Debug)]
pub struct Index {
    root: Text,
    /// Selectors of the AuthorizationPolicies that nodes get, by namespace and name.
    selectors: BTreeMap<Text, Selectors<Text>>,
    /// The selector of each AuthorizationPolicy that nodes get and that has one, by key.
    selector_of: HashMap<Text, Labels>,
    levels: Levels,
    /// PeerAuthentications that have to be looked at again: a namespace with a name, or with none for all of them.
    stale: BTreeSet<(Text, Option<Text>)>,
    /// AuthorizationPolicies by namespace and name, with what is to be said of them.
    authorizations: BTreeMap<Text, BTreeMap<Text, Stated>>,
    policies: Served,
    workloads: Touched,
    statuses: BTreeMap<(Kind, Text, Text), Wanted>,
}

/// What is said of an AuthorizationPolicy, and what should be.
#[derive(Debug)]
struct Stated {
    generation: i64,
    said: Option<Said>,
    condition: Condition,
}

impl Index {
    /// Without objects.
    pub fn new(cluster: &Cluster) -> Self {
        let root = cluster.namespace.clone();
        Self {
            levels: Levels::new(root.clone()),
            policies: Served::new(root.clone()),
            root,
            selectors: BTreeMap::new(),
            selector_of: HashMap::new(),
            stale: BTreeSet::new(),
            authorizations: BTreeMap::new(),
            workloads: Touched::default(),
            statuses: BTreeMap::new(),
        }
    }

    /// Adds an AuthorizationPolicy, or replaces what was known of it.
    pub fn set_authorization(&mut self, object: Object) {
        let key = object.key();
        // Only names that the API does not allow could be those of converted policies.
        let converted = if object.name.contains('_') {
            let condition = Condition::new(Reason::NotEnforced, "its name is not one that the API allows");
            authorization::Converted { policy: None, selector: None, condition }
        } else {
            authorization::convert(&object, &self.root)
        };
        let stated =
            Stated { generation: object.generation, said: Said::of(&object.status), condition: converted.condition };
        let here = self.authorizations.entry(object.namespace.clone()).or_default();
        here.insert(object.name.clone(), stated);
        self.select(&object.namespace, &object.name, &key, converted.selector);
        if !object.name.contains('_') {
            self.policies.put(&object.namespace, &key, converted.policy);
        }
        self.say(&object.namespace, Some(&object.name));
    }

    /// Removes an AuthorizationPolicy.
    pub fn remove_authorization(&mut self, namespace: &str, name: &str) {
        let (namespace, name): (Text, Text) = (namespace.into(), name.into());
        let key: Text = format!("{namespace}/{name}").into();
        self.select(&namespace, &name, &key, None);
        if !name.contains('_') {
            self.policies.put(&namespace, &key, None);
        }
        if let Some(here) = self.authorizations.get_mut(&namespace) {
            here.remove(&name);
            if here.is_empty() {
                self.authorizations.remove(&namespace);
            }
        }
        self.statuses.remove(&(Kind::Authorization, namespace, name));
    }

    /// Adds a PeerAuthentication, or replaces what was known of it.
    pub fn set_authentication(&mut self, object: Object) {
        self.statuses.remove(&(Kind::Authentication, object.namespace.clone(), object.name.clone()));
        let effect = self.levels.set(&object);
        self.touch(&object.namespace, &object.name, effect);
    }

    /// Removes a PeerAuthentication.
    pub fn remove_authentication(&mut self, namespace: &str, name: &str) {
        let (namespace, name): (Text, Text) = (namespace.into(), name.into());
        let effect = self.levels.remove(&namespace, &name);
        self.policies.put(&namespace, &authentication::converted_key(&namespace, &name), None);
        self.touch(&namespace, &name, effect);
        self.statuses.remove(&(Kind::Authentication, namespace, name));
    }

    /// The keys of the policies that a workload lists, in order. All of them are policies that nodes get. Whoever would
    /// list too many lists one that refuses everything.
    pub fn of_workload(&self, namespace: &str, labels: &Labels) -> Vec<Text> {
        // Of a closed namespace nothing is served but the policy that refuses everything, which applies to all of it.
        let own = Some(namespace).filter(|namespace| !self.policies.is_closed(namespace));
        let root = Some(&*self.root).filter(|root| *root != namespace);
        let mut keys: Vec<Text> = own.and_then(|own| self.levels.of_workload(own, labels)).into_iter().collect();
        for from in own.into_iter().chain(root) {
            let names =
                self.selectors.get(from).into_iter().flat_map(|here| here.matching(labels, usize::MAX)).flatten();
            keys.extend(names.take(LISTED_MAX + 1).map(|name| Text::from(format!("{from}/{name}"))));
        }
        if keys.len() > LISTED_MAX {
            return vec![too_many_key(&self.root)];
        }
        keys.sort_unstable();
        keys
    }

    /// Whether these are the keys of a workload that would list too many.
    pub fn is_too_many(&self, keys: &[Text]) -> bool {
        matches!(keys, [only] if *only == too_many_key(&self.root))
    }

    /// How many namespaces have too many policies.
    pub fn closed(&self) -> usize {
        self.policies.closed()
    }

    /// What has changed since the last time.
    pub fn take_changes(&mut self) -> Changes {
        let mut stale = std::mem::take(&mut self.stale);
        for (namespace, one) in &stale {
            for (key, policy) in self.levels.converted(namespace, one.as_ref()) {
                self.policies.put(namespace, &key, policy);
            }
        }
        let (root, strict) = (&self.root, !self.levels.is_empty());
        let strict = strict.then(|| authentication::static_policy(root));
        self.policies.put(root, &authentication::static_key(root), strict);
        let many =
            (self.selector_of.len() > LISTED_MAX).then(|| served::refuse_all(root, PolicyScope::WorkloadSelector));
        self.policies.put(root, &too_many_key(root), many);
        let turned = self.policies.take_turned();
        for namespace in &turned {
            self.say(namespace, None);
            self.workloads.add(Touched::one(namespace));
            stale.insert((namespace.clone(), None));
        }
        for (namespace, one) in stale {
            let (kind, closed) = (Kind::Authentication, self.policies.is_closed(&namespace));
            for (name, generation, condition) in self.levels.unsaid(&namespace, one.as_ref(), closed) {
                let key = (kind, namespace.clone(), name.clone());
                let namespace = namespace.clone();
                self.statuses.insert(key, Wanted { kind, namespace, name, generation, condition });
            }
        }
        Changes {
            policies: self.policies.take(),
            workloads: std::mem::take(&mut self.workloads),
            statuses: std::mem::take(&mut self.statuses).into_values().collect(),
            closed: turned.into_iter().filter(|namespace| self.policies.is_closed(namespace)).collect(),
        }
    }

    /// Notes the statuses that AuthorizationPolicies of a namespace, or one of them, should have and do not have.
    fn say(&mut self, namespace: &Text, one: Option<&Text>) {
        let Some(here) = self.authorizations.get(namespace) else { return };
        let found = one.and_then(|name| here.get_key_value(name)).into_iter();
        let all = one.is_none().then_some(here).into_iter().flatten();
        let (kind, closed) = (Kind::Authorization, self.policies.is_closed(namespace));
        for (name, Stated { generation, said, condition }) in found.chain(all) {
            let (key, generation) = ((kind, namespace.clone(), name.clone()), *generation);
            let condition = condition.in_namespace(closed);
            if said.as_ref().is_some_and(|said| said.is(&condition, generation)) {
                self.statuses.remove(&key);
            } else {
                let (namespace, name) = (namespace.clone(), name.clone());
                self.statuses.insert(key, Wanted { kind, namespace, name, generation, condition });
            }
        }
    }

    /// Files the selector of an AuthorizationPolicy.
    fn select(&mut self, namespace: &Text, name: &Text, key: &Text, selector: Option<Labels>) {
        if self.selector_of.get(key) == selector.as_ref() {
            return;
        }
        let here = self.selectors.entry(namespace.clone()).or_default();
        if let Some(old) = self.selector_of.remove(key) {
            here.remove(&old, name);
        }
        if let Some(new) = selector {
            here.insert(&new, name.clone());
            self.selector_of.insert(key.clone(), new);
        }
        if here.is_empty() {
            self.selectors.remove(namespace);
        }
        let in_root = *namespace == self.root;
        self.workloads.add(if in_root { Touched::All } else { Touched::one(namespace) });
    }

    /// Notes that a PeerAuthentication has changed.
    fn touch(&mut self, namespace: &Text, name: &Text, Effect { touched, others }: Effect) {
        self.stale.insert((namespace.clone(), (!others).then(|| name.clone())));
        if touched == Touched::All {
            self.stale.extend(self.levels.namespaces().map(|namespace| (namespace.clone(), None)));
        }
        self.workloads.add(touched);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::Action;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const ROOT: &str = "istio-system";

    fn index() -> Index {
        let cluster = Cluster {
            namespace: ROOT.into(),
            trust_domain: "cluster.local".into(),
            id: "Kubernetes".into(),
            domain: "cluster.local".into(),
        };
        Index::new(&cluster)
    }

    fn object(namespace: &str, name: &str, created: i64, spec: Value) -> Object {
        let created = Some(created);
        Object { namespace: namespace.into(), name: name.into(), created, generation: 1, spec, ..Object::default() }
    }

    fn labels(list: &[(&str, &str)]) -> Labels {
        list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn listed(index: &Index, namespace: &str) -> Vec<String> {
        index.of_workload(namespace, &labels(&[("app", "x"), ("tier", "1")])).iter().map(Text::to_string).collect()
    }

    fn mode(mode: &str) -> Value {
        json!({"mtls": {"mode": mode}})
    }

    fn selected(mode: &str, ports: Value) -> Value {
        json!({"selector": {"matchLabels": {"app": "x"}}, "mtls": {"mode": mode}, "portLevelMtls": ports})
    }

    const STATIC: &str = "istio-system/istio_converted_static_strict";

    #[test]
    fn the_lowest_level_with_a_mode_counts_and_the_oldest_of_a_level() {
        let exempt = json!({"80": {"mode": "PERMISSIVE"}});
        let converted = "a/converted_peer_authentication_w";
        for (objects, expected) in [
            (vec![], None),
            (vec![object(ROOT, "m", 1, mode("STRICT"))], Some(STATIC)),
            (
                vec![object(ROOT, "m", 1, json!({"selector": {"matchLabels": {}}, "mtls": {"mode": "STRICT"}}))],
                Some(STATIC),
            ),
            (vec![object(ROOT, "m", 1, selected("STRICT", Value::Null))], None),
            (vec![object(ROOT, "m", 1, mode("STRICT")), object("a", "n", 1, mode("PERMISSIVE"))], None),
            (vec![object(ROOT, "m", 1, mode("STRICT")), object("a", "n", 1, mode("UNSET"))], Some(STATIC)),
            (vec![object(ROOT, "m", 2, mode("STRICT")), object(ROOT, "o", 1, mode("DISABLE"))], None),
            (vec![object(ROOT, "m", 1, mode("STRICT")), object(ROOT, "o", 1, mode("DISABLE"))], Some(STATIC)),
            (vec![object("b", "n", 1, mode("STRICT"))], None),
            (vec![object("a", "n", 1, mode("STRICT")), object("a", "w", 1, selected("PERMISSIVE", Value::Null))], None),
            (
                vec![object("a", "n", 1, mode("PERMISSIVE")), object("a", "w", 1, selected("STRICT", Value::Null))],
                Some(STATIC),
            ),
            (
                vec![
                    object("a", "v", 1, selected("STRICT", Value::Null)),
                    object("a", "w", 2, selected("DISABLE", Value::Null)),
                ],
                Some(STATIC),
            ),
            (vec![object("a", "w", 1, selected("STRICT", exempt.clone()))], Some(converted)),
            // Between a strict mesh and a workload, a namespace without a mode changes nothing.
            (
                vec![
                    object(ROOT, "m", 1, mode("STRICT")),
                    object("a", "n", 1, json!({})),
                    object("a", "w", 1, selected("UNSET", exempt.clone())),
                ],
                Some(converted),
            ),
            (
                vec![
                    object(ROOT, "m", 1, mode("STRICT")),
                    object("a", "w", 1, selected("UNSET", json!({"80": {"mode": "DISABLE"}}))),
                ],
                Some(converted),
            ),
            (vec![object("a", "w", 1, selected("UNSET", exempt.clone()))], None),
        ] {
            let mut index = index();
            objects.iter().for_each(|object| index.set_authentication(object.clone()));
            assert_eq!(listed(&index, "a"), Vec::from_iter(expected), "{objects:?}");
            let keys: Vec<Text> = index.take_changes().policies.into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys.contains(&STATIC.into()), !objects.is_empty(), "{keys:?}");
            assert!(expected.is_none_or(|key| keys.contains(&key.into())), "{keys:?}");
            objects.iter().for_each(|object| index.remove_authentication(&object.namespace, &object.name));
            assert!(index.take_changes().policies.iter().all(|(_, policy)| policy.is_none()));
            assert!(index.policies.is_empty());
        }
    }

    #[test]
    fn what_the_levels_above_say_changes_the_policies_of_workloads() {
        let mut index = index();
        index.set_authentication(object("a", "w", 1, selected("UNSET", json!({"80": {"mode": "DISABLE"}}))));
        index.take_changes();
        let key = Text::from("a/converted_peer_authentication_w");
        for (namespace, name) in [(ROOT, "m"), ("a", "n")] {
            index.set_authentication(object(namespace, name, 1, mode("STRICT")));
            let policies = index.take_changes().policies;
            assert!(matches!(policies.as_slice(), [(found, Some(_))] if *found == key), "{policies:?}");
            index.remove_authentication(namespace, name);
            assert_eq!(index.take_changes().policies, [(key.clone(), None)]);
        }
    }

    #[test]
    fn workloads_list_the_policies_with_selectors_of_their_own_and_the_root_namespace() {
        let mut index = index();
        let app = json!({"selector": {"matchLabels": {"app": "x"}}});
        let both = json!({"selector": {"matchLabels": {"app": "x", "tier": "1"}}});
        let target = json!({"selector": {"matchLabels": {"app": "x"}}, "targetRefs": [{"kind": "Service"}]});
        for (namespace, name, spec) in [
            ("a", "q", app.clone()),
            ("a", "p", both),
            ("a", "whole", json!({})),
            ("a", "other", json!({"selector": {"matchLabels": {"app": "y"}}})),
            ("a", "target", target),
            ("b", "p", app.clone()),
            (ROOT, "r", app.clone()),
        ] {
            index.set_authorization(object(namespace, name, 1, spec));
        }
        assert_eq!(listed(&index, "a"), ["a/p", "a/q", "istio-system/r"]);
        assert_eq!(listed(&index, ROOT), ["istio-system/r"]);
        assert_eq!(listed(&index, "c"), ["istio-system/r"]);
        assert_eq!(index.take_changes().workloads, Touched::All);
        let touched = |index: &mut Index| index.take_changes().workloads;
        index.set_authorization(object("a", "whole", 1, json!({"action": "DENY"})));
        assert_eq!(touched(&mut index), Touched::default(), "policies without selectors are on no list");
        index.set_authorization(object("a", "q", 1, json!({"action": "DENY", "selector": app["selector"]})));
        assert_eq!(touched(&mut index), Touched::default(), "the list is the same");
        index.set_authorization(object("a", "q", 1, json!({"action": "AUDIT", "selector": app["selector"]})));
        assert_eq!((touched(&mut index), listed(&index, "a").len()), (Touched::one(&"a".into()), 2));
        index.set_authentication(object("a", "n", 1, mode("STRICT")));
        assert_eq!(touched(&mut index), Touched::one(&"a".into()));
        index.set_authentication(object(ROOT, "m", 1, mode("PERMISSIVE")));
        assert_eq!(touched(&mut index), Touched::one(&ROOT.into()));
        index.set_authentication(object(ROOT, "m", 1, mode("STRICT")));
        assert_eq!(touched(&mut index), Touched::All);
    }

    #[test]
    fn a_namespace_with_too_many_policies_is_closed_says_so_and_opens_again() {
        let mut index = index();
        let app = json!({"selector": {"matchLabels": {"app": "x"}}});
        let values: Vec<String> = (0..20_000).map(|n| format!("{n:08}")).collect();
        let large = json!({"rules": [{"from": [{"source": {"namespaces": values}}]}]});
        index.set_authorization(object("a", "target", 1, json!({"targetRefs": [{"kind": "Service"}]})));
        index.set_authorization(object("a", "listed", 1, app.clone()));
        index.set_authentication(object("a", "peers", 1, selected("STRICT", json!({"80": {"mode": "PERMISSIVE"}}))));
        index.set_authorization(object(ROOT, "root", 1, app));
        (0..10).for_each(|n| index.set_authorization(object("a", &format!("large{n}"), 1, large.clone())));
        (0..10).for_each(|n| index.set_authorization(object(ROOT, &format!("large{n}"), 1, large.clone())));
        let all = index.take_changes();
        let of = |all: &Changes, reason: Reason| all.statuses.iter().filter(|w| w.condition.reason == reason).count();
        assert_eq!((all.closed, index.closed()), (vec![Text::from("a")], 1));
        assert_eq!(listed(&index, "a"), ["istio-system/root"], "what is not served is not listed");
        let mut known: BTreeMap<Text, Arc<Policy>> =
            all.policies.into_iter().filter_map(|(key, policy)| Some((key, policy?))).collect();
        let in_a = |known: &BTreeMap<Text, Arc<Policy>>| known.keys().filter(|key| key.starts_with("a/")).count();
        assert!(in_a(&known) == 1 && known.contains_key("a/culvert_too_many_policies"), "{:?}", known.keys());
        let said = Changes { statuses: all.statuses, ..Changes::default() };
        assert_eq!(
            (of(&said, Reason::TooMany), of(&said, Reason::NotEnforced), of(&said, Reason::Accepted)),
            (12, 1, 11)
        );
        for n in 0..5 {
            index.remove_authorization("a", &format!("large{n}"));
        }
        let opened = index.take_changes();
        assert_eq!((&opened.workloads, &opened.closed), (&Touched::one(&"a".into()), &vec![]));
        assert_eq!((of(&opened, Reason::TooMany), of(&opened, Reason::Accepted)), (0, 7));
        for (key, policy) in opened.policies {
            match policy {
                Some(policy) => drop(known.insert(key, policy)),
                None => drop(known.remove(&key).unwrap()),
            }
        }
        assert_eq!(in_a(&known), 7);
        assert_eq!(listed(&index, "a"), ["a/converted_peer_authentication_peers", "a/listed", "istio-system/root"]);
    }

    #[test]
    fn a_workload_that_would_list_too_many_policies_lists_one_that_refuses_everything() {
        let mut index = index();
        let add = |index: &mut Index, n: usize| {
            let name = format!("p{n}");
            index.set_authorization(object("a", &name, 1, json!({"selector": {"matchLabels": {"app": "x"}}})));
        };
        (0..LISTED_MAX).for_each(|n| add(&mut index, n));
        assert_eq!(index.take_changes().policies.len(), LISTED_MAX);
        assert_eq!(listed(&index, "a").len(), LISTED_MAX);
        add(&mut index, LISTED_MAX);
        let changes = index.take_changes();
        let key = "istio-system/culvert_too_many_policies";
        assert_eq!(listed(&index, "a"), [key]);
        assert!(index.is_too_many(&index.of_workload("a", &labels(&[("app", "x")]))));
        assert_eq!(index.of_workload("a", &labels(&[("app", "y")])), Vec::<Text>::new());
        let policy = changes.policies.iter().find(|(found, _)| **found == *key).unwrap().1.clone().unwrap();
        assert_eq!((policy.action, policy.rules.len(), policy.scope), (Action::Deny, 1, PolicyScope::WorkloadSelector));
        index.remove_authorization("a", "p0");
        assert_eq!(index.take_changes().policies, [("a/p0".into(), None), (key.into(), None)]);
        assert_eq!(listed(&index, "a").len(), LISTED_MAX);
    }

    #[test]
    fn a_name_that_the_api_does_not_allow_never_takes_the_place_of_a_converted_policy() {
        let mut index = index();
        index.set_authentication(object(ROOT, "m", 1, mode("STRICT")));
        let before = index.take_changes().policies;
        index.set_authorization(object(ROOT, "istio_converted_static_strict", 1, json!({})));
        assert_eq!(index.take_changes().policies, []);
        index.remove_authorization(ROOT, "istio_converted_static_strict");
        assert_eq!(index.take_changes().policies, []);
        assert_eq!(before.len(), 1);
    }

    /// The reasons of the statuses that are wanted, by name.
    fn reasons(index: &mut Index) -> Vec<(String, Reason, String)> {
        let one = |wanted: Wanted| (wanted.name.to_string(), wanted.condition.reason, wanted.condition.message);
        index.take_changes().statuses.into_iter().map(one).collect()
    }

    #[test]
    fn the_younger_of_one_level_is_told_so_and_again_when_the_older_is_gone() {
        let mut index = index();
        index.set_authentication(object("a", "old", 1, mode("STRICT")));
        index.set_authentication(object("a", "young", 2, mode("PERMISSIVE")));
        index.set_authentication(object("a", "wide", 1, selected("STRICT", Value::Null)));
        let narrow = json!({"selector": {"matchLabels": {"app": "x", "tier": "1"}}});
        index.set_authentication(object("a", "narrow", 2, narrow.clone()));
        index.set_authentication(object("a", "before", 0, narrow));
        index.set_authentication(object(ROOT, "root", 1, selected("STRICT", Value::Null)));
        let said = reasons(&mut index);
        let of =
            |name: &str| said.iter().find(|(found, ..)| found == name).map(|(_, reason, why)| (*reason, why.as_str()));
        assert_eq!(of("old"), Some((Reason::Accepted, "enforced as it is written")));
        let (reason, why) = of("young").unwrap();
        assert!(reason == Reason::Shadowed && why.contains("PeerAuthentication old "), "{why}");
        assert_eq!(of("wide").unwrap().0, Reason::Accepted, "it also selects others than the older one");
        assert!(of("narrow").unwrap().1.contains("PeerAuthentication before "), "{said:?}");
        assert_eq!(of("before").unwrap().0, Reason::Accepted);
        assert_eq!(of("root").unwrap().0, Reason::NotEnforced);
        assert_eq!(reasons(&mut index), [], "each is asked once");
        index.remove_authentication("a", "old");
        let said = reasons(&mut index);
        assert!(matches!(said.as_slice(), [(name, Reason::Accepted, _)] if name == "young"), "{said:?}");
    }

    #[test]
    fn an_object_that_says_what_it_should_is_left_alone() {
        for (kind, spec) in [
            (Kind::Authorization, json!({"rules": [{"to": [{"operation": {"paths": ["/"]}}]}]})),
            (Kind::Authentication, json!({"mtls": {"mode": "DISABLE"}})),
        ] {
            let mut index = index();
            let mut set = |object: &Object| {
                match kind {
                    Kind::Authorization => index.set_authorization(object.clone()),
                    Kind::Authentication => index.set_authentication(object.clone()),
                }
                index.take_changes().statuses
            };
            let mut object = object("a", "p", 1, spec);
            let wanted = set(&object).pop().unwrap();
            assert_eq!((wanted.kind, wanted.generation, wanted.condition.reason), (kind, 1, Reason::PartlyEnforced));
            // The write makes an event, which must not make another write.
            object.status =
                crate::control_plane::policies::status::merged(&object.status, &wanted, &json!("2026-01-01T00:00:00Z"));
            assert_eq!(set(&object), []);
            object.generation = 2;
            assert_eq!(set(&object).len(), 1, "the status is about an older generation");
            object.status = json!({});
            assert_eq!(set(&object).len(), 1, "somebody has removed it");
        }
    }

    fn specs(kind: Kind) -> impl Strategy<Value = Value> {
        let selector = prop_oneof![
            Just(Value::Null),
            Just(json!({"matchLabels": {"app": "x"}})),
            Just(json!({"matchLabels": {"app": "x", "tier": "1"}})),
            Just(json!({"matchLabels": {"app": "y"}})),
        ];
        let mode = || prop::sample::select(&["UNSET", "UNSET", "PERMISSIVE", "DISABLE", "STRICT", "STRICT"][..]);
        let rest = match kind {
            Kind::Authorization => prop::sample::select(vec![
                json!({"action": "ALLOW", "rules": [{}]}),
                json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/"]}}]}]}),
                json!({"action": "AUDIT"}),
            ])
            .boxed(),
            Kind::Authentication => (mode(), prop::option::of(mode()))
                .prop_map(|(mode, port)| {
                    json!({"mtls": {"mode": mode}, "portLevelMtls": port.map(|mode| json!({"80": {"mode": mode}}))})
                })
                .boxed(),
        };
        (selector, rest).prop_map(|(selector, mut rest)| {
            rest["selector"] = selector;
            rest
        })
    }

    #[derive(Clone, Debug)]
    struct Step {
        kind: Kind,
        namespace: &'static str,
        name: &'static str,
        set: Option<(i64, Value)>,
        take: bool,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let kind = prop_oneof![1 => Just(Kind::Authorization), 2 => Just(Kind::Authentication)];
        let one = kind.prop_flat_map(|kind| {
            let namespace = prop_oneof![Just("a"), Just("b"), Just(ROOT)];
            let name = prop_oneof![Just("p"), Just("q"), Just("r")];
            let set = prop::option::weighted(0.7, (0..3i64, specs(kind)));
            let step = move |(namespace, name, set, take)| Step { kind, namespace, name, set, take };
            (namespace, name, set, any::<bool>()).prop_map(step)
        });
        prop::collection::vec(one, 0..24)
    }

    fn apply(index: &mut Index, kind: Kind, namespace: &str, name: &str, set: Option<(i64, Value)>) {
        match (kind, set) {
            (Kind::Authorization, Some((age, spec))) => index.set_authorization(object(namespace, name, age, spec)),
            (Kind::Authorization, None) => index.remove_authorization(namespace, name),
            (Kind::Authentication, Some((age, spec))) => index.set_authentication(object(namespace, name, age, spec)),
            (Kind::Authentication, None) => index.remove_authentication(namespace, name),
        }
    }

    fn workloads() -> Vec<(&'static str, Labels)> {
        let kinds =
            [labels(&[]), labels(&[("app", "x")]), labels(&[("app", "x"), ("tier", "1")]), labels(&[("app", "y")])];
        ["a", "b", "c", ROOT]
            .into_iter()
            .flat_map(|namespace| kinds.clone().map(|labels| (namespace, labels)))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        /// Whoever follows the changes knows what a list from scratch says: policies, lists and statuses.
        #[test]
        fn changes_in_any_order_lead_to_what_a_list_from_scratch_gives(steps in steps()) {
            let (mut followed, mut state) = (index(), BTreeMap::new());
            let mut policies = BTreeMap::<Text, Arc<Policy>>::new();
            let mut lists: BTreeMap<(&str, Labels), Vec<Text>> =
                workloads().into_iter().map(|workload| (workload, Vec::new())).collect();
            let mut said = BTreeMap::new();
            let last = steps.len().saturating_sub(1);
            for (at, step) in steps.into_iter().enumerate() {
                let Step { kind, namespace, name, set, take } = step;
                apply(&mut followed, kind, namespace, name, set.clone());
                match set {
                    Some(set) => drop(state.insert((kind, namespace, name), set)),
                    None => {
                        state.remove(&(kind, namespace, name));
                        said.remove(&(kind, Text::from(namespace), Text::from(name)));
                    }
                }
                if !take && at != last {
                    continue;
                }
                let changes = followed.take_changes();
                for (key, policy) in changes.policies {
                    match policy {
                        Some(policy) => prop_assert_ne!(policies.insert(key, policy.clone()), Some(policy), "no change"),
                        None => prop_assert!(policies.remove(&key).is_some(), "it was not there"),
                    }
                }
                for ((namespace, labels), list) in lists.iter_mut().filter(|(workload, _)| changes.workloads.includes(workload.0)) {
                    *list = followed.of_workload(namespace, labels);
                }
                for wanted in changes.statuses {
                    said.insert((wanted.kind, wanted.namespace.clone(), wanted.name.clone()), wanted.condition);
                }
            }
            let mut fresh = index();
            for ((kind, namespace, name), set) in state {
                apply(&mut fresh, kind, namespace, name, Some(set));
            }
            let all = fresh.take_changes();
            let expected: BTreeMap<Text, Arc<Policy>> =
                all.policies.into_iter().filter_map(|(key, policy)| Some((key, policy?))).collect();
            prop_assert_eq!(&policies, &expected);
            for ((namespace, labels), list) in lists {
                prop_assert_eq!(&list, &fresh.of_workload(namespace, &labels));
                prop_assert!(list.iter().all(|key| policies.contains_key(key)), "every listed policy is sent");
            }
            let expected: BTreeMap<_, _> =
                all.statuses.into_iter().map(|w| ((w.kind, w.namespace, w.name), w.condition)).collect();
            prop_assert_eq!(said, expected);
        }
    }
}
