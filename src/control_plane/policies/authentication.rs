//! Reads a PeerAuthentication, and converts what it demands of peers into a DENY policy. Pure; accepts any JSON.

use super::notes::Notes;
use super::object::{Labels, Object, brief, present, quoted, selector};
use crate::mesh::policy::{Action, Attribute, Match, PolicyScope, Rule, StringMatch};
use crate::mesh::{Policy, Text};
use serde_json::Value;
use std::collections::BTreeMap;

/// Name of the policy that refuses peers without identity, in the root namespace.
pub const STATIC: &str = "istio_converted_static_strict";
/// Beginning of the names of converted policies. No Kubernetes name contains an underscore.
pub const CONVERTED: &str = "converted_peer_authentication_";

/// Fields of the spec.
pub(super) const FIELDS: [&str; 3] = ["mtls", "portLevelMtls", "selector"];

/// What is demanded of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// What the level above demands.
    #[default]
    Unset,
    /// Nothing. DISABLE too: a node accepts tunnels all the same.
    Permissive,
    /// An identity.
    Strict,
}

/// A PeerAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authentication {
    /// The labels of the workloads that it is about; `None` if it is about the whole namespace, or mesh.
    pub selector: Option<Labels>,
    /// Its mode.
    pub mode: Mode,
    /// Modes of single ports of the workloads.
    pub ports: BTreeMap<u16, Mode>,
}

/// What a PeerAuthentication means for the workloads that it selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Nothing is demanded.
    Nothing,
    /// An identity at every port: the static policy.
    Everywhere,
    /// An identity at some ports: a policy with these rules.
    Rules(Vec<Rule>),
}

/// Reads a PeerAuthentication. What cannot be read counts as STRICT.
pub fn read(object: &Object, notes: &mut Notes) -> Authentication {
    let spec = &object.spec;
    if !spec.is_object() && !spec.is_null() {
        notes.differs(|| "spec is not an object: taken as STRICT".into());
        return Authentication { mode: Mode::Strict, ..Authentication::default() };
    }
    for (name, value) in spec.as_object().into_iter().flatten() {
        if !value.is_null() && !FIELDS.contains(&name.as_str()) {
            notes.differs(|| format!("spec.{} is not known here", brief(name)));
        }
    }
    let mut mode = mode(spec, "mtls", notes);
    let selector = selector(spec).unwrap_or_else(|fault| {
        notes.differs(|| format!("{fault}: taken as STRICT for all workloads of its level"));
        mode = Mode::Strict;
        None
    });
    let mut ports = BTreeMap::new();
    let mut strict_somewhere = false;
    match present(spec, "portLevelMtls") {
        None => {}
        Some(Value::Object(list)) => {
            for (name, value) in list {
                let port_mode = port_mode(name, value, notes);
                match super::values::port(name) {
                    // Written in two ways, such as 80 and 080.
                    Ok(port) => {
                        if ports.insert(port, port_mode).is_some_and(|other| other != port_mode) {
                            notes.differs(|| {
                                format!("spec.portLevelMtls: port {port} is there twice: STRICT for all ports")
                            });
                            strict_somewhere = true;
                        }
                    }
                    Err(fault) => {
                        strict_somewhere |= port_mode == Mode::Strict;
                        let effect = if port_mode == Mode::Strict { "STRICT for all ports" } else { "left out" };
                        notes.differs(|| format!("spec.portLevelMtls: {fault}: {effect}"));
                    }
                }
            }
        }
        Some(_) => {
            notes.differs(|| "spec.portLevelMtls is not an object: STRICT for all ports".into());
            strict_somewhere = true;
        }
    }
    if selector.is_none() && !ports.is_empty() {
        let strict = ports.values().any(|mode| *mode == Mode::Strict);
        let effect = if strict { "STRICT for all ports" } else { "left out" };
        notes.differs(|| format!("spec.portLevelMtls needs a selector: {effect}"));
        strict_somewhere |= strict;
        ports.clear();
    }
    if strict_somewhere {
        (mode, ports) = (Mode::Strict, BTreeMap::new());
    }
    Authentication { selector, mode, ports }
}

fn mode(object: &Value, field: &'static str, notes: &mut Notes) -> Mode {
    match present(object, field) {
        None => Mode::Unset,
        Some(mtls) => mode_of(mtls, || format!("spec.{field}"), notes),
    }
}

fn port_mode(name: &str, value: &Value, notes: &mut Notes) -> Mode {
    if value.is_null() {
        return Mode::Unset;
    }
    mode_of(value, || format!("spec.portLevelMtls of port {}", brief(name)), notes)
}

fn mode_of(mtls: &Value, at: impl Fn() -> String, notes: &mut Notes) -> Mode {
    if !mtls.is_object() {
        notes.differs(|| format!("{} is not an object: taken as STRICT", at()));
        return Mode::Strict;
    }
    match present(mtls, "mode").map(Value::as_str) {
        None | Some(Some("UNSET")) => Mode::Unset,
        Some(Some("PERMISSIVE")) => Mode::Permissive,
        Some(Some("STRICT")) => Mode::Strict,
        Some(Some("DISABLE")) => {
            notes.differs(|| format!("{}: DISABLE is taken as PERMISSIVE: peers of the mesh still use tunnels", at()));
            Mode::Permissive
        }
        Some(Some(other)) => {
            notes.differs(|| format!("{}: mode {} is not known: taken as STRICT", at(), quoted(other)));
            Mode::Strict
        }
        Some(None) => {
            notes.differs(|| format!("{}: mode is not a text: taken as STRICT", at()));
            Mode::Strict
        }
    }
}

impl Authentication {
    /// What it means for the workloads that it selects, if the levels above demand an identity or not.
    pub fn demand(&self, above_is_strict: bool) -> Demand {
        let ports = |wanted: Mode| self.ports.iter().filter(move |(_, mode)| **mode == wanted).map(|(port, _)| *port);
        let strict = match self.mode {
            Mode::Unset => above_is_strict,
            Mode::Permissive => false,
            Mode::Strict => true,
        };
        if !strict {
            let one = |port| vec![vec![Match { destination_ports: any_of(port), ..without_identity() }]];
            let rules: Vec<Rule> = ports(Mode::Strict).map(one).collect();
            return if rules.is_empty() { Demand::Nothing } else { Demand::Rules(rules) };
        }
        let mut clauses: Rule = ports(Mode::Permissive)
            .map(|port| vec![Match { destination_ports: none_of(port), ..Match::default() }])
            .collect();
        if clauses.is_empty() {
            return Demand::Everywhere;
        }
        // The order of istiod.
        let at = if self.mode == Mode::Strict { 0 } else { clauses.len() };
        clauses.insert(at, vec![without_identity()]);
        Demand::Rules(vec![clauses])
    }
}

/// A peer without identity.
fn without_identity() -> Match {
    let principals = Attribute { any_of: Vec::new(), none_of: vec![StringMatch::Presence] };
    Match { principals, ..Match::default() }
}

fn any_of<T>(value: T) -> Attribute<T> {
    Attribute { any_of: vec![value], none_of: Vec::new() }
}

fn none_of<T>(value: T) -> Attribute<T> {
    Attribute { any_of: Vec::new(), none_of: vec![value] }
}

/// The policy that refuses peers without identity.
pub fn static_policy(root: &Text) -> Policy {
    policy(root, STATIC.into(), vec![vec![vec![without_identity()]]])
}

/// The policy of a PeerAuthentication with these rules.
pub fn converted_policy(namespace: &Text, name: &str, rules: Vec<Rule>) -> Policy {
    policy(namespace, format!("{CONVERTED}{name}").into(), rules)
}

/// `namespace/name` of the static policy.
pub fn static_key(root: &str) -> Text {
    format!("{root}/{STATIC}").into()
}

/// `namespace/name` of the policy of a PeerAuthentication.
pub fn converted_key(namespace: &str, name: &str) -> Text {
    format!("{namespace}/{CONVERTED}{name}").into()
}

fn policy(namespace: &Text, name: Text, rules: Vec<Rule>) -> Policy {
    let key = format!("{namespace}/{name}").into();
    let (scope, action) = (PolicyScope::WorkloadSelector, Action::Deny);
    Policy { name, namespace: namespace.clone(), key, scope, action, dry_run: false, rules }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(spec: Value) -> (Authentication, String) {
        let mut notes = Notes::default();
        let read = read(&Object { spec, ..Object::default() }, &mut notes);
        (read, notes.text())
    }

    fn selected(mode: Value, ports: Value) -> Authentication {
        let selector = json!({"matchLabels": {"a": "b"}});
        let (read, notes) = of(json!({"selector": selector, "mtls": {"mode": mode}, "portLevelMtls": ports}));
        assert!(notes.is_empty() || notes.contains("DISABLE"), "{notes}");
        read
    }

    #[test]
    fn ports_make_rules_as_the_mode_asks() {
        let p = without_identity;
        let open = |port| Match { destination_ports: none_of(port), ..Match::default() };
        let closed = |port| vec![vec![Match { destination_ports: any_of(port), ..p() }]];
        let ports = |list: &[(&str, &str)]| {
            Value::Object(list.iter().map(|(port, mode)| ((*port).to_owned(), json!({"mode": mode}))).collect())
        };
        for (mode, list, above, expected) in [
            ("STRICT", &[][..], false, Demand::Everywhere),
            ("PERMISSIVE", &[], true, Demand::Nothing),
            ("DISABLE", &[], true, Demand::Nothing),
            ("UNSET", &[], true, Demand::Everywhere),
            ("UNSET", &[], false, Demand::Nothing),
            ("STRICT", &[("80", "STRICT"), ("90", "UNSET")], false, Demand::Everywhere),
            (
                "STRICT",
                &[("80", "PERMISSIVE"), ("90", "DISABLE"), ("99", "STRICT")],
                false,
                Demand::Rules(vec![vec![vec![p()], vec![open(80)], vec![open(90)]]]),
            ),
            (
                "UNSET",
                &[("80", "PERMISSIVE"), ("90", "DISABLE"), ("99", "STRICT")],
                true,
                Demand::Rules(vec![vec![vec![open(80)], vec![open(90)], vec![p()]]]),
            ),
            ("UNSET", &[("80", "DISABLE")], true, Demand::Rules(vec![vec![vec![open(80)], vec![p()]]])),
            ("UNSET", &[("80", "STRICT"), ("90", "PERMISSIVE")], false, Demand::Rules(vec![closed(80)])),
            ("PERMISSIVE", &[("80", "STRICT"), ("90", "STRICT")], true, Demand::Rules(vec![closed(80), closed(90)])),
            ("DISABLE", &[("80", "UNSET"), ("90", "PERMISSIVE")], true, Demand::Nothing),
        ] {
            assert_eq!(selected(json!(mode), ports(list)).demand(above), expected, "{mode} {list:?} {above}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_strict_and_said() {
        let labels = json!({"matchLabels": {"a": "b"}});
        for spec in [
            json!("x"),
            json!({"mtls": "STRICT"}),
            json!({"mtls": {"mode": "strict"}}),
            json!({"mtls": {"mode": 1}}),
            json!({"selector": [], "mtls": {"mode": "PERMISSIVE"}}),
            json!({"selector": labels, "portLevelMtls": []}),
            json!({"selector": labels, "portLevelMtls": {"http": {"mode": "STRICT"}}}),
            json!({"selector": labels, "portLevelMtls": {"0": {"mode": "Strict"}}}),
            json!({"mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"80": {"mode": "STRICT"}}}),
        ] {
            let (read, notes) = of(spec.clone());
            assert_eq!((read.mode, read.ports.len()), (Mode::Strict, 0), "{spec}");
            assert!(notes.contains("STRICT"), "{spec}: {notes}");
        }
        let (read, notes) = of(json!({"selector": labels, "portLevelMtls": {"x": {"mode": "PERMISSIVE"}, "80": null}}));
        assert_eq!((read.mode, read.ports), (Mode::Unset, [(80, Mode::Unset)].into()));
        assert!(notes.contains("\"x\" is not a port: left out"), "{notes}");
        let (read, notes) = of(json!({"mtls": {"mode": "STRICT"}, "portLevelMtls": {"80": {"mode": "PERMISSIVE"}}}));
        assert_eq!((read.mode, read.ports.len()), (Mode::Strict, 0));
        assert!(notes.contains("needs a selector: left out"), "{notes}");
        for nothing in [json!(null), json!({}), json!({"mtls": null}), json!({"mtls": {"mode": "UNSET"}})] {
            assert_eq!(of(nothing), (Authentication::default(), String::new()));
        }
    }
}
