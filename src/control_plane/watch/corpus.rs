//! The corpus: what is served for a cluster, compared with what a real istiod has served for the same objects. Only for
//! tests: `#[cfg(test)]`.
//!
//! `tests/corpus/README.md` says what is in the files. Differences are listed in `tests/corpus/differences.txt`, with the
//! reason for each; one that is not listed is a fault, and so is one that is listed and is none.

use super::fold::Fold;
use super::object::{Event, Item, Kind};
use crate::control_plane::catalog::{self, Catalog};
use crate::control_plane::{Cluster, RunningPods, policies};
use crate::mesh::Text;
use crate::proto::istio::security::Authorization;
use crate::proto::istio::workload::{Address, Port, address};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

/// The states, in their order: name, and lines.
fn states() -> Vec<(String, Vec<Value>)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "jsonl"));
    files.sort();
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), lines)
    };
    files.iter().map(read).collect()
}

fn kind_of(name: &str) -> Option<Kind> {
    Some(match name {
        "Pod" => Kind::Pods,
        "Service" => Kind::Services,
        "EndpointSlice" => Kind::EndpointSlices,
        "Node" => Kind::Nodes,
        "Namespace" => Kind::Namespaces,
        "Gateway" => Kind::Gateways,
        "AuthorizationPolicy" => Kind::AuthorizationPolicies,
        "PeerAuthentication" => Kind::PeerAuthentications,
        "GatewayClass" => return None,
        other => panic!("{other} is not expected"),
    })
}

fn read<T: serde::de::DeserializeOwned>(object: &Value) -> Box<T> {
    Box::new(serde_json::from_value(object.clone()).unwrap())
}

fn read_policy(object: &Value) -> Box<policies::Object> {
    Box::new((*read::<policies::Written>(object)).into())
}

fn item(kind: Kind, object: &Value) -> Item {
    match kind {
        Kind::Pods => Item::Pod(read(object)),
        Kind::Services => Item::Service(read(object)),
        Kind::EndpointSlices => Item::Slice(read(object)),
        Kind::Nodes => Item::Node(read(object)),
        Kind::Namespaces => Item::Namespace(read(object)),
        Kind::Gateways => Item::Gateway(read(object)),
        Kind::AuthorizationPolicies => Item::Authorization(read_policy(object)),
        Kind::PeerAuthentications => Item::Authentication(read_policy(object)),
    }
}

fn text(value: &Value) -> Text {
    value.as_str().unwrap_or_default().into()
}

/// The event that a line about an object stands for.
fn event(line: &Value) -> Option<Event> {
    if let Some(object) = line.get("object") {
        let kind = kind_of(object["kind"].as_str()?)?;
        let key = (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
        return Some(Event::Set(kind, key, item(kind, object)));
    }
    let gone = line.get("gone")?;
    Some(Event::Gone(kind_of(gone["kind"].as_str()?)?, (text(&gone["namespace"]), text(&gone["name"]))))
}

/// What is sent to daemons, by type and name.
type Served = BTreeMap<(String, String), Vec<u8>>;

/// Applies what a line says about a resource of istiod.
fn serve(line: &Value, served: &mut Served) {
    let key = |of: &Value| (of["type"].as_str().unwrap().to_owned(), of["name"].as_str().unwrap().to_owned());
    if let Some(resource) = line.get("resource") {
        served.insert(key(resource), STANDARD.decode(resource["value"].as_str().unwrap()).unwrap());
    }
    if let Some(removed) = line.get("removed") {
        served.remove(&key(removed)).unwrap();
    }
}

/// What is in a catalog.
fn in_catalog(catalog: &Catalog) -> Served {
    let edition = catalog.follow().borrow().clone();
    let types = [("Address", catalog::Kind::Address), ("Authorization", catalog::Kind::Authorization)];
    let of = |(name, kind): (&'static str, catalog::Kind)| {
        let all = edition.of(kind).iter();
        all.map(move |(key, resource)| ((name.to_owned(), key.to_string()), resource.content.to_vec()))
            .collect::<Vec<_>>()
    };
    types.into_iter().flat_map(of).collect()
}

/// The fields of a message with their contents.
type Fields = BTreeMap<String, String>;

/// Takes the fields from the debug form of a message.
fn fields(message: &impl Debug) -> Fields {
    let mut all = Fields::new();
    let mut current = String::new();
    for line in format!("{message:#?}").lines() {
        let field = line.strip_prefix("    ").filter(|rest| !rest.starts_with([' ', '}', ']', ')']));
        if let Some((name, rest)) = field.and_then(|field| field.split_once(": ")) {
            current = name.to_owned();
            all.insert(current.clone(), rest.to_owned());
        } else if let Some(content) = all.get_mut(&current) {
            content.push_str(line.trim());
        }
    }
    all
}

/// Ports in an order in which equal lists are equal, without the application's protocols; and those.
fn ports(ports: &mut [Port]) -> String {
    ports.sort_by_key(|port| (port.service_port, port.target_port));
    let protocols = ports.iter().map(|port| (port.service_port, port.app_protocol().as_str_name()));
    let protocols = format!("{:?}", protocols.filter(|(_, name)| *name != "UNKNOWN").collect::<Vec<_>>());
    ports.iter_mut().for_each(|port| port.app_protocol = 0);
    protocols
}

/// The fields of a resource, in an order in which equal facts are equal.
fn decoded((kind, name): &(String, String), content: &[u8]) -> Fields {
    if kind == "Authorization" {
        return fields(&Authorization::decode(content).unwrap());
    }
    match Address::decode(content).unwrap().r#type {
        Some(address::Type::Workload(mut workload)) => {
            workload.addresses.sort();
            workload.authorization_policies.sort();
            let mut services: BTreeMap<_, _> = std::mem::take(&mut workload.services).into_iter().collect();
            let protocols: Vec<String> = services.values_mut().map(|list| ports(&mut list.ports)).collect();
            let mut all = fields(&workload);
            all.insert("app_protocol".into(), protocols.concat().replace("[]", ""));
            // Each by its own name.
            all.remove("services");
            all.extend(
                services.into_iter().map(|(service, list)| (format!("services[{service}]"), format!("{list:?}"))),
            );
            all
        }
        Some(address::Type::Service(mut service)) => {
            service.addresses.sort_by(|a, b| a.address.cmp(&b.address));
            let protocols = ports(&mut service.ports);
            let mut all = fields(&service);
            all.insert("app_protocol".into(), protocols);
            all
        }
        None => panic!("{name} is empty"),
    }
}

/// The fields by which two resources differ.
fn differing(key: &(String, String), istiod: Option<&Vec<u8>>, ours: Option<&Vec<u8>>) -> BTreeMap<String, String> {
    match (istiod, ours) {
        (Some(istiod), Some(ours)) => {
            let (istiod, ours) = (decoded(key, istiod), decoded(key, ours));
            let names: BTreeSet<&String> = istiod.keys().chain(ours.keys()).collect();
            let differs = names.into_iter().filter(|name| istiod.get(*name) != ours.get(*name));
            let said = |name: &String| {
                let of = |fields: &Fields| fields.get(name).cloned().unwrap_or_default();
                (name.clone(), format!("istiod: {}\n    ours:   {}", of(&istiod), of(&ours)))
            };
            differs.map(said).collect()
        }
        (Some(_), None) => [("only istiod".to_owned(), String::new())].into(),
        (None, Some(_)) => [("only ours".to_owned(), String::new())].into(),
        (None, None) => BTreeMap::new(),
    }
}

/// A listed difference: a resource and a field of it, in one state or in all. A star stands for any text.
struct Listed {
    state: Option<String>,
    resource: String,
    field: String,
    seen: bool,
}

impl Listed {
    fn is(&self, state: &str, resource: &str, field: &str) -> bool {
        self.state.as_ref().is_none_or(|own| own == state) && matches(&self.resource, resource) && self.field == field
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => text.strip_prefix(head).is_some_and(|rest| {
            let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            ends.into_iter().any(|at| matches(tail, &rest[at..]))
        }),
    }
}

/// The listed differences, one a line: `Type name: field, field`. The comment above says why.
fn listed() -> Vec<Listed> {
    let text = std::fs::read_to_string(folder().join("differences.txt")).unwrap();
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let each = |line: &str| {
        let limited = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
        let (state, line) = limited.map_or((None, line), |(state, rest)| (Some(state.to_owned()), rest));
        let (resource, fields) = line.split_once(": ").unwrap_or_else(|| panic!("{line}"));
        let one =
            |field: &str| Listed { state: state.clone(), resource: resource.into(), field: field.into(), seen: false };
        fields.split(", ").map(one).collect::<Vec<_>>()
    };
    lines.flat_map(each).collect()
}

fn cluster() -> Cluster {
    Cluster {
        namespace: "istio-system".into(),
        trust_domain: "cluster.local".into(),
        id: "Kubernetes".into(),
        domain: "cluster.local".into(),
    }
}

#[test]
fn istiod_has_served_the_same_for_the_same_objects_but_for_the_differences_that_are_listed() {
    let (mut fold, catalog) = (Fold::new(&cluster(), Arc::new(RunningPods::default())), Catalog::default());
    let (mut istiod, mut listed, mut unlisted) = (Served::new(), listed(), String::new());
    let states = states();
    assert_eq!(states.len(), 5, "the corpus was found");
    for (state, lines) in states {
        for line in &lines {
            event(line).into_iter().for_each(|event| fold.apply(event));
            serve(line, &mut istiod);
        }
        catalog.apply(fold.take_changes());
        let ours = in_catalog(&catalog);
        assert!(istiod.len() > 200 && ours.len() > 200, "{state}: {} and {}", istiod.len(), ours.len());
        let keys: BTreeSet<_> = istiod.keys().chain(ours.keys()).collect();
        for key in keys {
            for (field, said) in differing(key, istiod.get(key), ours.get(key)) {
                let resource = format!("{} {}", key.0, key.1);
                let known =
                    listed.iter_mut().filter(|one| one.is(&state, &resource, &field)).map(|one| one.seen = true);
                if known.count() == 0 {
                    unlisted.push_str(&format!("{state}: {resource}: {field}\n    {said}\n"));
                }
            }
        }
    }
    assert!(unlisted.is_empty(), "differences that are not listed:\n{unlisted}");
    let none = listed.iter().filter(|one| !one.seen).map(|one| format!("{}: {}", one.resource, one.field));
    let none: Vec<String> = none.collect();
    assert!(none.is_empty(), "listed, and no difference: {none:#?}");
}
