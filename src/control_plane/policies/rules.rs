//! Converts the rules of an AuthorizationPolicy. Pure; accepts any JSON.
//!
//! Some tests cannot be made here: those on HTTP, on fields that are not known, and on values that cannot be read. Such a
//! test may pass or not, so an ALLOW rule counts it as one that does not pass, and a DENY rule as one that does. Thereby
//! an ALLOW policy never admits more than it says, and a DENY policy never less. An ALLOW rule with a test on HTTP, or
//! with a field that is not known, is dropped as a whole, as istiod does.

use super::notes::Notes;
use super::object::{brief, present, quoted};
use super::values;
use crate::mesh::policy::{Action, Attribute, Clause, Match, Rule};
use serde_json::Value;
use std::fmt;

/// Fields that need HTTP, a token of the user, or a proxy's word.
pub(super) const HTTP: [&str; 10] = [
    "hosts",
    "notHosts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];
/// Fields of a source that are tested here.
pub(super) const SOURCE: [&str; 8] = [
    "namespaces",
    "notNamespaces",
    "principals",
    "notPrincipals",
    "serviceAccounts",
    "notServiceAccounts",
    "ipBlocks",
    "notIpBlocks",
];
/// Fields of an operation that are tested here.
pub(super) const OPERATION: [&str; 2] = ["ports", "notPorts"];
/// Fields of a condition.
pub(super) const CONDITION: [&str; 3] = ["key", "values", "notValues"];

/// Converts rules. The effect of all that differs from what is written is noted.
pub fn rules(list: &[Value], action: Action, namespace: &str, notes: &mut Notes) -> Vec<Rule> {
    let mut reader = Reader { action, namespace, notes, at: At::default(), foreign: false, never: false };
    list.iter().enumerate().filter_map(|(index, rule)| reader.rule(index, rule)).collect()
}

/// A place in a policy.
#[derive(Clone, Copy, Default)]
struct At {
    rule: usize,
    part: Option<(&'static str, usize)>,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule[{}]", self.rule)?;
        match self.part {
            Some((list, index)) => write!(f, ".{list}[{index}]"),
            None => Ok(()),
        }
    }
}

/// What a group of tests comes to.
enum Tested {
    /// No connection passes.
    Never,
    /// Every connection passes.
    Always,
    /// Those pass that match.
    If(Box<Match>),
}

struct Reader<'a> {
    action: Action,
    namespace: &'a str,
    notes: &'a mut Notes,
    at: At,
    /// Whether the rule has a field that is not tested here.
    foreign: bool,
    /// Whether a part of the rule never passes.
    never: bool,
}

impl Reader<'_> {
    /// `None`: no connection matches it.
    fn rule(&mut self, index: usize, value: &Value) -> Option<Rule> {
        self.at = At { rule: index, part: None };
        (self.foreign, self.never) = (false, false);
        let mut clauses = Vec::new();
        if value.is_object() {
            self.fields(value, &["from", "to", "when"]);
            // The order of istiod.
            clauses.extend(self.clause(value, "to", |reader, item| {
                reader.one_field(item, "operation", |reader, fields| reader.operation(fields))
            }));
            clauses.extend(self.clause(value, "from", |reader, item| {
                reader.one_field(item, "source", |reader, fields| reader.source(fields))
            }));
            clauses.extend(self.conditions(value));
        } else {
            self.unreadable("", "is not an object");
            self.never = self.action == Action::Allow;
        }
        self.at.part = None;
        if self.never || (self.foreign && self.action == Action::Allow) {
            return None;
        }
        // A rule that is written without tests means everything; one that has lost them is worth a word.
        if clauses.is_empty() && value.as_object().is_none_or(|fields| fields.values().any(|part| !part.is_null())) {
            let at = self.at;
            self.notes.differs(|| format!("{at}: no test is left, so it denies every connection"));
        }
        Some(clauses)
    }

    /// One clause of the rule, which holds if one of the list's items does. `None`: it always holds.
    fn clause(
        &mut self,
        rule: &Value,
        name: &'static str,
        one: impl Fn(&mut Self, &Value) -> Tested,
    ) -> Option<Clause> {
        let items = self.items(rule, name)?;
        let mut clause = Clause::new();
        let mut always = false;
        for (index, item) in items.iter().enumerate() {
            self.at.part = Some((name, index));
            match one(self, item) {
                Tested::Never => {}
                Tested::Always => always = true,
                Tested::If(m) => clause.push(*m),
            }
        }
        if always {
            return None;
        }
        self.never |= clause.is_empty();
        Some(clause)
    }

    /// The clauses of `when`: each condition is one.
    fn conditions(&mut self, rule: &Value) -> Vec<Clause> {
        let mut clauses = Vec::new();
        for (index, item) in self.items(rule, "when").into_iter().flatten().enumerate() {
            self.at.part = Some(("when", index));
            match self.condition(item) {
                Tested::Never => self.never = true,
                Tested::Always => {}
                Tested::If(m) => clauses.push(vec![*m]),
            }
        }
        clauses
    }

    /// The items of one of the rule's lists. An empty list is not a list that is absent: who wrote it may have meant
    /// nothing or everything.
    fn items<'v>(&mut self, rule: &'v Value, name: &'static str) -> Option<&'v [Value]> {
        self.at.part = None;
        let list = present(rule, name)?;
        let items = list.as_array().filter(|items| !items.is_empty());
        if items.is_none() {
            self.unreadable(name, "is not a list with items");
            self.never |= self.action == Action::Allow;
        }
        items.map(Vec::as_slice)
    }

    /// An item whose only field is an object with the tests.
    fn one_field(
        &mut self,
        item: &Value,
        name: &'static str,
        read: impl Fn(&mut Self, &Value) -> Option<Match>,
    ) -> Tested {
        match present(item, name) {
            Some(fields) if fields.is_object() => {
                self.fields(item, &[name]);
                let read = read(self, fields);
                self.tested(read)
            }
            _ => {
                self.unreadable(name, "is not there, or not an object");
                self.unknown()
            }
        }
    }

    /// `None` here and below: no connection passes.
    fn operation(&mut self, fields: &Value) -> Option<Match> {
        self.fields(fields, &OPERATION);
        let destination_ports = self.attribute(fields, ["ports", "notPorts"], values::port)?;
        Some(Match { destination_ports, ..Match::default() })
    }

    fn source(&mut self, fields: &Value) -> Option<Match> {
        self.fields(fields, &SOURCE);
        let own = self.namespace;
        Some(Match {
            namespaces: self.attribute(fields, ["namespaces", "notNamespaces"], values::namespace)?,
            principals: self.attribute(fields, ["principals", "notPrincipals"], values::principal)?,
            service_accounts: self.attribute(fields, ["serviceAccounts", "notServiceAccounts"], |text| {
                values::service_account(text, own)
            })?,
            source_ips: self.attribute(fields, ["ipBlocks", "notIpBlocks"], values::addresses)?,
            ..Match::default()
        })
    }

    fn condition(&mut self, item: &Value) -> Tested {
        let Some(key) = present(item, "key").and_then(Value::as_str) else {
            self.unreadable("key", "is not there, or not a text");
            return self.unknown();
        };
        self.fields(item, &CONDITION);
        const LISTS: [&str; 2] = ["values", "notValues"];
        let rest = Match::default();
        let read = match key {
            "source.ip" => {
                self.attribute(item, LISTS, values::addresses).map(|source_ips| Match { source_ips, ..rest })
            }
            "source.namespace" => {
                self.attribute(item, LISTS, values::namespace).map(|namespaces| Match { namespaces, ..rest })
            }
            "source.principal" => {
                self.attribute(item, LISTS, values::principal).map(|principals| Match { principals, ..rest })
            }
            "destination.ip" => {
                self.attribute(item, LISTS, values::addresses).map(|destination_ips| Match { destination_ips, ..rest })
            }
            "destination.port" => {
                self.attribute(item, LISTS, values::port).map(|destination_ports| Match { destination_ports, ..rest })
            }
            other => {
                self.foreign(&format!("key {}", quoted(other)), "is not seen here");
                return self.unknown();
            }
        };
        self.tested(read)
    }

    /// The tests on one attribute: the values of which one must hit, and those of which none may.
    fn attribute<T>(
        &mut self,
        fields: &Value,
        [any_of, none_of]: [&'static str; 2],
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Attribute<T>> {
        let (any_of, any_unread) = self.list(fields, any_of, &read);
        let (none_of, none_unread) = self.list(fields, none_of, &read);
        match self.action {
            Action::Allow if none_unread || (any_unread && any_of.is_empty()) => None,
            Action::Deny if any_unread => Some(Attribute { any_of: Vec::new(), none_of }),
            Action::Allow | Action::Deny => Some(Attribute { any_of, none_of }),
        }
    }

    /// The values of a list that can be read, and whether there are others.
    fn list<T>(
        &mut self,
        fields: &Value,
        name: &'static str,
        read: &impl Fn(&str) -> Result<T, String>,
    ) -> (Vec<T>, bool) {
        let Some(list) = present(fields, name) else { return (Vec::new(), false) };
        let Some(items) = list.as_array() else {
            self.unreadable(name, "is not a list");
            return (Vec::new(), true);
        };
        let mut values = Vec::new();
        for item in items {
            match item.as_str().ok_or_else(|| "a value is not a text".to_owned()).and_then(read) {
                Ok(value) => values.push(value),
                Err(fault) => self.unreadable(name, &fault),
            }
        }
        let unread = values.len() < items.len();
        (values, unread)
    }

    fn tested(&mut self, read: Option<Match>) -> Tested {
        let Some(m) = read else { return Tested::Never };
        if m.is_empty() {
            if !self.foreign {
                self.unreadable("", "it tests nothing");
            }
            return self.unknown();
        }
        let at = self.at;
        for impossible in m.impossible() {
            self.notes.impossible(|| format!("{at}: {impossible}"));
        }
        Tested::If(Box::new(m))
    }

    /// What tests come to that may pass or not.
    fn unknown(&self) -> Tested {
        match self.action {
            Action::Allow => Tested::Never,
            Action::Deny => Tested::Always,
        }
    }

    /// Finds fields that are not tested here.
    fn fields(&mut self, object: &Value, known: &[&str]) {
        let says_something = |value: &Value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
        for (name, value) in object.as_object().into_iter().flatten() {
            if says_something(value) && !known.contains(&name.as_str()) {
                let http = HTTP.contains(&name.as_str());
                self.foreign(
                    &brief(name),
                    if http { "needs HTTP, which is not seen here" } else { "is not known here" },
                );
            }
        }
    }

    fn foreign(&mut self, what: &str, why: &str) {
        let (at, first) = (self.at, !self.foreign);
        self.foreign = true;
        match self.action {
            Action::Allow if !first => {}
            Action::Allow => self.notes.differs(|| format!("{at}: {what} {why}: the rule allows nothing")),
            Action::Deny => self.notes.differs(|| format!("{at}: {what} {why}: the rule denies without regard to it")),
        }
    }

    fn unreadable(&mut self, what: &str, fault: &str) {
        let (at, dot) = (self.at, if what.is_empty() { "" } else { "." });
        let effect = match self.action {
            Action::Allow => "it allows nothing",
            Action::Deny => "it denies whatever it may mean",
        };
        self.notes.differs(|| format!("{at}{dot}{what}: {fault}: {effect}"));
    }
}
