//! A test: connections are decided as the Kubernetes objects say, evaluated as plainly as possible.
//!
//! The twin reads the objects themselves, one connection at a time, with three answers: yes, no, and maybe for what a
//! node cannot judge. An ALLOW rule needs a yes, a DENY rule anything but a no.

use crate::connection::authorize::Subject;
use crate::connection::authorize::decide::{Applicable, Verdict};
use crate::control_plane::Cluster;
use crate::control_plane::policies::{Index, Kind, Object};
use crate::mesh::snapshot::tests::workload;
use crate::mesh::{Facts, Snapshot, SpiffeName, Text};
use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

const ROOT: &str = "istio-system";

type Labels = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Says {
    No,
    Maybe,
    Yes,
}

fn yes_if(condition: bool) -> Says {
    if condition { Says::Yes } else { Says::No }
}

fn not(says: Says) -> Says {
    match says {
        Says::No => Says::Yes,
        Says::Maybe => Says::Maybe,
        Says::Yes => Says::No,
    }
}

/// A text of a policy against a value.
fn glob(text: &str, value: &str) -> bool {
    if text == "*" {
        !value.is_empty()
    } else if let Some(end) = text.strip_prefix('*') {
        value.ends_with(end)
    } else if let Some(start) = text.strip_suffix('*') {
        value.starts_with(start)
    } else {
        text == value
    }
}

/// What one value of a list says of a connection. `what` is the attribute.
fn value_says(what: &str, value: &Value, namespace: &str, subject: &Subject) -> Says {
    let Some(text) = value.as_str() else { return Says::Maybe };
    let net = |address: IpAddr| match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
        (Ok(net), _) => yes_if(net.contains(&address)),
        (_, Ok(ip)) => yes_if(ip == address),
        _ => Says::Maybe,
    };
    let peer = subject.peer.as_ref();
    match what {
        "source.ip" => net(subject.source),
        "destination.ip" => net(subject.destination.ip()),
        "destination.port" => match text.parse::<u32>() {
            Ok(port @ 1..=65535) => yes_if(port == u32::from(subject.destination.port())),
            _ => Says::Maybe,
        },
        _ if text.is_empty() => Says::Maybe,
        "source.namespace" => yes_if(glob(text, peer.map_or("", |peer| &peer.namespace))),
        "source.principal" => {
            let text = text.strip_prefix("spiffe://").unwrap_or(text);
            yes_if(peer.is_some_and(|peer| glob(text, &peer.principal())))
        }
        "source.account" => {
            let parts: Vec<&str> = text.split('/').collect();
            let (ns, account) = match parts.as_slice() {
                [account] => (namespace, *account),
                [ns, account] => (*ns, *account),
                _ => return Says::Maybe,
            };
            match SpiffeName::new("td", ns, account) {
                Ok(_) => yes_if(peer.is_some_and(|peer| *peer.namespace == *ns && *peer.service_account == *account)),
                Err(_) => Says::Maybe,
            }
        }
        _ => unreachable!("{what}"),
    }
}

/// Fields by their attribute, and whether they are negative.
fn attribute(field: &str) -> Option<(&'static str, bool)> {
    Some(match field {
        "namespaces" => ("source.namespace", false),
        "notNamespaces" => ("source.namespace", true),
        "principals" => ("source.principal", false),
        "notPrincipals" => ("source.principal", true),
        "serviceAccounts" => ("source.account", false),
        "notServiceAccounts" => ("source.account", true),
        "ipBlocks" => ("source.ip", false),
        "notIpBlocks" => ("source.ip", true),
        "ports" => ("destination.port", false),
        "notPorts" => ("destination.port", true),
        _ => return None,
    })
}

/// What a list of values says, and whether it says anything.
fn list_says(what: &str, negative: bool, list: &Value, namespace: &str, subject: &Subject) -> Option<Says> {
    if list.is_null() || *list == json!([]) {
        return None;
    }
    let Some(list) = list.as_array() else { return Some(Says::Maybe) };
    let any = list.iter().map(|value| value_says(what, value, namespace, subject)).max().unwrap();
    Some(if negative { not(any) } else { any })
}

/// What the fields of a source or operation say.
fn fields_say(fields: &Value, namespace: &str, subject: &Subject) -> Says {
    let Some(fields) = fields.as_object() else { return Says::Maybe };
    let one = |(name, list): (&String, &Value)| match attribute(name) {
        Some((what, negative)) => list_says(what, negative, list, namespace, subject),
        None if list.is_null() || *list == json!([]) => None,
        None => Some(Says::Maybe),
    };
    fields.iter().filter_map(one).min().unwrap_or(Says::Maybe)
}

fn condition_says(condition: &Value, namespace: &str, subject: &Subject) -> Says {
    let key = condition["key"].as_str().unwrap_or_default();
    let known = ["source.ip", "source.namespace", "source.principal", "destination.ip", "destination.port"];
    if !known.contains(&key) {
        return Says::Maybe;
    }
    let lists = [("values", false), ("notValues", true)];
    let says = lists.map(|(field, negative)| list_says(key, negative, &condition[field], namespace, subject));
    says.into_iter().flatten().min().unwrap_or(Says::Maybe)
}

fn rule_says(rule: &Value, namespace: &str, subject: &Subject) -> Says {
    let mut says = Says::Yes;
    for (list, field) in [("from", "source"), ("to", "operation")] {
        says = says.min(match &rule[list] {
            Value::Null => Says::Yes,
            Value::Array(items) => {
                let each = items.iter().map(|item| fields_say(&item[field], namespace, subject));
                each.max().unwrap_or(Says::Maybe)
            }
            _ => Says::Maybe,
        });
    }
    match &rule["when"] {
        Value::Null => says,
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(|item| condition_says(item, namespace, subject)).min().unwrap().min(says)
        }
        _ => says.min(Says::Maybe),
    }
}

/// Whether a rule has anything that needs HTTP.
fn needs_http(rule: &Value) -> bool {
    let says = |fields: &Value| {
        fields.as_object().is_some_and(|fields| {
            fields.iter().any(|(name, list)| attribute(name).is_none() && !list.is_null() && *list != json!([]))
        })
    };
    let items = |list: &str| rule[list].as_array().cloned().unwrap_or_default();
    items("from").iter().any(|item| says(&item["source"]))
        || items("to").iter().any(|item| says(&item["operation"]))
        || items("when").iter().any(|item| item["key"].as_str().is_some_and(|key| key.starts_with("request.")))
}

fn selects(spec: &Value, labels: &Labels) -> bool {
    let wanted = spec["selector"]["matchLabels"].as_object().cloned().unwrap_or_default();
    wanted.iter().all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str())
}

/// What the AuthorizationPolicies say.
fn authorized(objects: &[Object], namespace: &str, labels: &Labels, subject: &Subject) -> bool {
    let applies = |object: &&Object| {
        let spec = &object.spec;
        [namespace, ROOT].contains(&&*object.namespace)
            && selects(spec, labels)
            && spec["targetRefs"].is_null()
            && !object.annotations.contains_key("istio.io/dry-run")
    };
    let of = |action: &str| {
        let wanted = move |object: &&Object| object.spec["action"].as_str().unwrap_or("ALLOW") == action;
        objects.iter().filter(applies).filter(wanted).collect::<Vec<&Object>>()
    };
    let rules = |object: &Object| object.spec["rules"].as_array().cloned().unwrap_or_default();
    let says = |object: &Object, rule: &Value| rule_says(rule, &object.namespace, subject);
    if of("DENY").iter().any(|object| rules(object).iter().any(|rule| says(object, rule) != Says::No)) {
        return false;
    }
    let allow = of("ALLOW");
    let admits = |object: &Object, rule: &Value| !needs_http(rule) && says(object, rule) == Says::Yes;
    allow.is_empty() || allow.iter().any(|object| rules(object).iter().any(|rule| admits(object, rule)))
}

/// Whether the PeerAuthentications let a peer without identity in.
fn may_be_plain(objects: &[Object], namespace: &str, labels: &Labels, port: u16) -> bool {
    let whole = |object: &&Object| object.spec["selector"]["matchLabels"].as_object().is_none_or(|l| l.is_empty());
    let oldest = |wanted: &dyn Fn(&&Object) -> bool| {
        objects.iter().filter(wanted).min_by_key(|object| (object.created, object.name.clone())).cloned()
    };
    let workload =
        oldest(&|o| *o.namespace == *namespace && namespace != ROOT && !whole(o) && selects(&o.spec, labels));
    let levels = [
        workload.as_ref().map(|object| object.spec["portLevelMtls"][port.to_string()]["mode"].clone()),
        workload.as_ref().map(|object| object.spec["mtls"]["mode"].clone()),
        oldest(&|o| *o.namespace == *namespace && whole(o)).map(|object| object.spec["mtls"]["mode"].clone()),
        oldest(&|o| *o.namespace == *ROOT && whole(o)).map(|object| object.spec["mtls"]["mode"].clone()),
    ];
    let modes = levels.into_iter().flatten();
    let first = modes.filter_map(|mode| mode.as_str().map(str::to_owned)).find(|mode| mode != "UNSET");
    first.is_none_or(|mode| mode != "STRICT")
}

fn some_of(all: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let one = prop::sample::select(all).prop_map(Value::from);
    prop_oneof![
        8 => prop::collection::vec(one, 1..3).prop_map(Value::from),
        1 => Just(json!([])),
        1 => Just(Value::Null),
    ]
}

const NAMESPACES: &[&str] = &["a", "b", "*", "a*", "*b", ""];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/a/sa/x",
    "spiffe://cluster.local/ns/a/sa/x",
    "cluster.local/ns/b/*",
    "*/sa/x",
    "*",
    "cluster.local/ns/*/sa/x",
    "",
];
const ACCOUNTS: &[&str] = &["x", "a/x", "b/y", "a/b/c", "*"];
const ADDRESSES: &[&str] = &["10.0.0.1", "10.0.0.0/24", "::/0", "0.0.0.0/0", "10.0.0.0/33", "x"];
const PORTS: &[&str] = &["80", "81", "0", "65617", "http"];
const HTTP: &[&str] = &["x"];

fn object_of(fields: &'static [(&'static str, &'static [&'static str])]) -> impl Strategy<Value = Value> {
    let field = prop::sample::select(fields).prop_flat_map(|(name, values)| (Just(name), some_of(values)));
    let http_is_rare =
        |list: &Vec<(&str, Value)>| list.iter().filter(|(name, _)| attribute(name).is_none()).count() < 2;
    prop::collection::vec(field, 0..4)
        .prop_filter("one is enough", http_is_rare)
        .prop_map(|list| Value::Object(list.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()))
}

fn sources() -> impl Strategy<Value = Value> {
    object_of(&[
        ("namespaces", NAMESPACES),
        ("notNamespaces", NAMESPACES),
        ("principals", PRINCIPALS),
        ("notPrincipals", PRINCIPALS),
        ("serviceAccounts", ACCOUNTS),
        ("notServiceAccounts", ACCOUNTS),
        ("ipBlocks", ADDRESSES),
        ("notIpBlocks", ADDRESSES),
        ("requestPrincipals", HTTP),
    ])
}

fn operations() -> impl Strategy<Value = Value> {
    object_of(&[("ports", PORTS), ("notPorts", PORTS), ("ports", PORTS), ("notPorts", PORTS), ("paths", HTTP)])
}

fn conditions() -> impl Strategy<Value = Value> {
    let keys: &[(&'static str, &'static [&'static str])] = &[
        ("source.ip", ADDRESSES),
        ("source.namespace", NAMESPACES),
        ("source.principal", PRINCIPALS),
        ("destination.ip", ADDRESSES),
        ("destination.port", PORTS),
        ("request.headers[x]", HTTP),
    ];
    prop::sample::select(keys).prop_flat_map(|(key, values)| {
        (some_of(values), some_of(values)).prop_map(move |(any, none)| match none {
            // Mostly one list alone.
            Value::Array(list) if list.len() > 1 => json!({"key": key, "values": any, "notValues": list}),
            none if any == Value::Null => json!({"key": key, "notValues": none}),
            _ => json!({"key": key, "values": any}),
        })
    })
}

fn rules() -> impl Strategy<Value = Value> {
    let list = |items: BoxedStrategy<Value>| prop_oneof![4 => Just(Value::Null), 1 => Just(json!([])), 5 => prop::collection::vec(items, 1..3).prop_map(Value::from)];
    let from = list(sources().prop_map(|source| json!({"source": source})).boxed());
    let to = list(operations().prop_map(|operation| json!({"operation": operation})).boxed());
    (from, to, list(conditions().boxed())).prop_map(|(from, to, when)| json!({"from": from, "to": to, "when": when}))
}

fn selectors() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({"matchLabels": {"app": "x"}})),
        Just(json!({"matchLabels": {"app": "x", "tier": "1"}})),
        Just(json!({"matchLabels": {"app": "y"}})),
    ]
}

fn authorizations() -> impl Strategy<Value = (Value, bool)> {
    let action = prop_oneof![3 => Just("ALLOW"), 3 => Just("DENY"), 1 => Just("AUDIT"), 1 => Just("CUSTOM")];
    let parts = (
        selectors(),
        action,
        prop::collection::vec(rules(), 0..3),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.1),
    );
    parts.prop_map(|(selector, action, rules, target, dry_run)| {
        let targets = target.then(|| json!([{"kind": "Service", "name": "x"}]));
        let spec = json!({"selector": selector, "action": action, "rules": rules, "targetRefs": targets});
        (spec, dry_run)
    })
}

fn authentications() -> impl Strategy<Value = (Value, bool)> {
    let mode = || prop::sample::select(&["UNSET", "UNSET", "PERMISSIVE", "DISABLE", "STRICT", "STRICT"][..]);
    (selectors(), prop::option::of(mode()), prop::option::of(mode()), prop::option::of(mode())).prop_map(
        |(selector, all, first, second)| {
            let mut spec = json!({"selector": selector, "mtls": all.map(|mode| json!({"mode": mode}))});
            if !selector.is_null() {
                let of = |mode: Option<&str>| mode.map(|mode| json!({"mode": mode}));
                spec["portLevelMtls"] = json!({"80": of(first), "81": of(second)});
            }
            (spec, false)
        },
    )
}

fn objects(specs: impl Strategy<Value = (Value, bool)>) -> impl Strategy<Value = Vec<Object>> {
    let namespace = prop::sample::select(&["a", "b", ROOT][..]);
    let one = (namespace, 0..3i64, specs);
    prop::collection::vec(one, 0..5).prop_map(|list| {
        let object = |(at, (namespace, created, (spec, dry_run))): (usize, (&str, i64, (Value, bool)))| Object {
            namespace: namespace.into(),
            name: format!("p{at}").into(),
            created: Some(created),
            annotations: dry_run.then(|| ("istio.io/dry-run".to_owned(), "true".to_owned())).into_iter().collect(),
            spec,
            ..Object::default()
        };
        list.into_iter().enumerate().map(object).collect()
    })
}

fn subjects() -> impl Strategy<Value = Subject> {
    let peer = prop::option::of((prop::sample::select(&["a", "b"][..]), prop::sample::select(&["x", "y"][..])));
    let source = prop::sample::select(&["10.0.0.1", "10.0.1.1", "fd00::1"][..]);
    let to = prop::sample::select(&["10.0.0.1", "fd00::2"][..]);
    (peer, source, to, prop::sample::select(&[80u16, 81, 82][..])).prop_map(|(peer, source, to, port)| Subject {
        peer: peer.map(|(ns, sa)| SpiffeName::new("cluster.local", ns, sa).unwrap()),
        source: source.parse().unwrap(),
        destination: SocketAddr::new(to.parse().unwrap(), port),
    })
}

/// The verdict of a node that has the converted policies.
fn decided(objects: &[(Kind, &[Object])], namespace: &str, labels: &Labels, subject: &Subject) -> Verdict {
    let cluster = Cluster {
        namespace: ROOT.into(),
        trust_domain: "cluster.local".into(),
        id: "Kubernetes".into(),
        domain: "cluster.local".into(),
    };
    let mut index = Index::new(&cluster);
    for (kind, list) in objects {
        for object in *list {
            match kind {
                Kind::Authorization => index.set_authorization(object.clone()),
                Kind::Authentication => index.set_authentication(object.clone()),
            }
        }
    }
    let policies =
        index.take_changes().policies.into_iter().filter_map(|(_, policy)| policy.as_deref().cloned()).collect();
    let mut server = workload(namespace, "server", "10.0.0.1");
    server.policies = index.of_workload(namespace, labels);
    let snapshot = Snapshot::build(1, Facts { policies, ..Facts::default() });
    Applicable::for_workload(&snapshot, &server).decide(subject).verdict
}

fn labels() -> impl Strategy<Value = Labels> {
    let of = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Labels>();
    prop::sample::select(vec![of(&[]), of(&[("app", "x")]), of(&[("app", "x"), ("tier", "1")]), of(&[("app", "y")])])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn nodes_decide_as_the_objects_say(
        policies in objects(authorizations()), peers in objects(authentications()), labels in labels(),
        namespace in prop::sample::select(&["a", "b", ROOT][..]), subject in subjects(),
    ) {
        let verdict = decided(
            &[(Kind::Authorization, &policies), (Kind::Authentication, &peers)], namespace, &labels, &subject,
        );
        let plain = subject.peer.is_some() || may_be_plain(&peers, namespace, &labels, subject.destination.port());
        let expected = plain && authorized(&policies, namespace, &labels, &subject);
        match verdict {
            Verdict::Allow(_) => prop_assert!(expected, "allowed"),
            Verdict::Refuse(refusal) => prop_assert!(!expected, "{}", refusal),
            Verdict::Unknown(key) => prop_assert!(false, "{} is listed and not sent", Text::to_string(&key)),
        }
    }
}
