//! Converts an AuthorizationPolicy into a policy of the mesh. Pure; accepts any JSON.

use super::notes::Notes;
use super::object::{Labels, Object, brief, present, quoted, selector};
use super::rules::rules;
use super::status::{Condition, Reason};
use crate::control::xds::encode;
use crate::mesh::Policy;
use crate::mesh::policy::{Action, PolicyScope, Rule};
use serde_json::Value;

/// Annotation by which a policy is only evaluated and logged.
pub const DRY_RUN: &str = "istio.io/dry-run";

/// Fields of the spec.
pub(super) const FIELDS: [&str; 6] = ["action", "provider", "rules", "selector", "targetRef", "targetRefs"];

/// Largest policy, in the form in which nodes get it. All policies together are one answer, which has a limit too.
const BYTES_MAX: usize = 256 << 10;

/// What an AuthorizationPolicy comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// The policy, unless it is not for nodes.
    pub policy: Option<Policy>,
    /// The labels of the workloads that it applies to; `None` if it applies to all of its scope, or there is no policy.
    pub selector: Option<Labels>,
    /// What is said of it.
    pub condition: Condition,
}

/// Converts a policy. `root` is the namespace whose policies apply to the whole mesh.
pub fn convert(object: &Object, root: &str) -> Converted {
    if let Some(why) = not_for_nodes(&object.spec) {
        return Converted { policy: None, selector: None, condition: Condition::new(Reason::NotEnforced, why) };
    }
    let mut notes = Notes::default();
    let dry_run = dry_run(object, &mut notes);
    let read = read(object, &mut notes);
    let (selector, action, rules) = match read {
        Ok(read) => read,
        Err(fault) => return refuse_all(object, root, dry_run, &fault),
    };
    let (otherwise, message) = match dry_run {
        true => (Reason::DryRun, "evaluated and logged, not enforced"),
        false => (Reason::Accepted, ""),
    };
    let policy = policy(object, scope(object, selector.as_ref(), root), action, dry_run, rules);
    let size = encode::policy(&policy).len();
    if size > BYTES_MAX {
        return refuse_all(object, root, dry_run, &format!("it has {size} bytes for nodes, {BYTES_MAX} at most"));
    }
    Converted { policy: Some(policy), selector, condition: Condition::of_notes(&notes, otherwise, message) }
}

/// A policy that takes the place of one that cannot be used, and refuses every connection that it may be about.
fn refuse_all(object: &Object, root: &str, dry_run: bool, fault: &str) -> Converted {
    let where_to = if *object.namespace == *root { "the mesh" } else { "the namespace" };
    let effect = match dry_run {
        true => format!("it logs that it would refuse every connection to workloads of {where_to}"),
        false => format!("every connection to workloads of {where_to} is refused"),
    };
    let policy = policy(object, scope(object, None, root), Action::Deny, dry_run, vec![Vec::new()]);
    let condition = Condition::new(Reason::Unreadable, format!("{fault}: until it is mended, {effect}"));
    Converted { policy: Some(policy), selector: None, condition }
}

/// Why a policy is not sent to nodes; `None` if it is.
fn not_for_nodes(spec: &Value) -> Option<String> {
    let refers = |field: &str| match present(spec, field) {
        Some(Value::Object(_)) => true,
        Some(Value::Array(list)) => !list.is_empty(),
        _ => false,
    };
    if refers("targetRef") || refers("targetRefs") {
        return Some("it is attached to a waypoint, gateway or service, whose proxy has to enforce it".into());
    }
    match present(spec, "action").and_then(Value::as_str) {
        Some(action @ ("AUDIT" | "CUSTOM")) => Some(format!("action {action} needs a proxy with an extension")),
        _ => None,
    }
}

type Read = (Option<Labels>, Action, Vec<Rule>);

/// Reads what a policy says. The error is about parts without which nothing is known of it.
fn read(object: &Object, notes: &mut Notes) -> Result<Read, String> {
    let spec = &object.spec;
    if !spec.is_object() && !spec.is_null() {
        return Err("spec is not an object".into());
    }
    for field in ["targetRef", "targetRefs"] {
        if present(spec, field).is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty())) {
            return Err(format!("spec.{field} cannot be read"));
        }
    }
    let action = match present(spec, "action").map(Value::as_str) {
        None | Some(Some("ALLOW")) => Action::Allow,
        Some(Some("DENY")) => Action::Deny,
        Some(Some(other)) => return Err(format!("spec.action {} is not known", quoted(other))),
        Some(None) => return Err("spec.action is not a text".into()),
    };
    let selector = selector(spec)?;
    let list = match present(spec, "rules") {
        None => &[][..],
        Some(list) => list.as_array().ok_or("spec.rules is not a list")?,
    };
    let foreign = |(name, value): &(&String, &Value)| !value.is_null() && !FIELDS.contains(&name.as_str());
    let foreign = spec.as_object().into_iter().flatten().find(foreign);
    let rules = match (foreign, action) {
        (Some((name, _)), Action::Allow) => {
            notes.differs(|| format!("spec.{} is not known here: the policy allows nothing", brief(name)));
            Vec::new()
        }
        (Some((name, _)), Action::Deny) => {
            notes.differs(|| format!("spec.{} is not known here: the policy denies without regard to it", brief(name)));
            rules(list, action, &object.namespace, notes)
        }
        (None, _) => rules(list, action, &object.namespace, notes),
    };
    Ok((selector, action, rules))
}

/// Reads the annotation as Istio does. A value that cannot be read does not switch enforcement off.
fn dry_run(object: &Object, notes: &mut Notes) -> bool {
    match object.annotations.get(DRY_RUN).map(String::as_str) {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
        Some(other) => {
            notes.differs(|| format!("annotation {DRY_RUN}: {} is neither true nor false: enforced", quoted(other)));
            false
        }
    }
}

fn scope(object: &Object, selector: Option<&Labels>, root: &str) -> PolicyScope {
    match selector {
        Some(_) => PolicyScope::WorkloadSelector,
        None if *object.namespace == *root => PolicyScope::Global,
        None => PolicyScope::Namespace,
    }
}

fn policy(object: &Object, scope: PolicyScope, action: Action, dry_run: bool, rules: Vec<Rule>) -> Policy {
    let (namespace, name) = (object.namespace.clone(), object.name.clone());
    Policy { name, namespace, key: object.key(), scope, action, dry_run, rules }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::{Attribute, Match, ServiceAccountMatch, StringMatch};
    use serde_json::json;

    fn object(spec: Value) -> Object {
        Object { namespace: "shop".into(), name: "p".into(), spec, ..Object::default() }
    }

    fn of(spec: Value) -> Converted {
        convert(&object(spec), "istio-system")
    }

    /// The rules and the reason. ALLOW and DENY.
    fn both(rule: Value) -> [(Vec<Rule>, Reason, String); 2] {
        ["ALLOW", "DENY"].map(|action| {
            let converted = of(json!({"action": action, "rules": [rule]}));
            (converted.policy.unwrap().rules, converted.condition.reason, converted.condition.message)
        })
    }

    fn any_of<T>(values: Vec<T>) -> Attribute<T> {
        Attribute { any_of: values, none_of: Vec::new() }
    }

    #[test]
    fn policies_for_proxies_are_not_sent_and_their_status_says_so() {
        for (spec, why) in [
            (json!({"targetRef": {"kind": "Gateway", "name": "x"}}), "attached"),
            (json!({"targetRefs": [{"kind": "Service", "name": "x"}]}), "attached"),
            (json!({"action": "AUDIT", "rules": [{}]}), "AUDIT"),
            (json!({"action": "CUSTOM", "rules": [{}], "provider": {"name": "x"}}), "CUSTOM"),
        ] {
            let converted = of(spec.clone());
            assert_eq!((converted.policy, converted.condition.reason), (None, Reason::NotEnforced), "{spec}");
            assert!(converted.condition.message.contains(why), "{spec}: {}", converted.condition.message);
        }
        assert!(of(json!({"targetRefs": []})).policy.is_some(), "an empty list is none");
    }

    #[test]
    fn the_scope_is_that_of_the_selector_or_else_of_the_namespace() {
        use PolicyScope::{Global, Namespace, WorkloadSelector};
        for (namespace, spec, scope, labels) in [
            ("shop", json!({}), Namespace, 0),
            ("shop", json!({"selector": {}}), Namespace, 0),
            ("istio-system", json!({"selector": {"matchLabels": {}}}), Global, 0),
            ("shop", json!({"selector": {"matchLabels": {"a": "b"}}}), WorkloadSelector, 1),
            ("istio-system", json!({"selector": {"matchLabels": {"a": "b"}}}), WorkloadSelector, 1),
        ] {
            let converted = convert(&Object { namespace: namespace.into(), ..object(spec.clone()) }, "istio-system");
            let policy = converted.policy.unwrap();
            assert_eq!((policy.scope, &*policy.key), (scope, &*format!("{namespace}/p")), "{spec}");
            assert_eq!(converted.selector.map_or(0, |labels| labels.len()), labels);
            assert_eq!((policy.action, policy.rules.len(), policy.dry_run), (Action::Allow, 0, false));
        }
    }

    #[test]
    fn dry_run_is_read_as_a_truth_value() {
        for (value, dry_run, reason) in [
            ("true", true, Reason::DryRun),
            ("1", true, Reason::DryRun),
            ("false", false, Reason::Accepted),
            ("yes", false, Reason::PartlyEnforced),
            ("", false, Reason::PartlyEnforced),
        ] {
            let annotations = [(DRY_RUN.to_owned(), value.to_owned())].into();
            let converted = convert(&Object { annotations, ..object(json!({})) }, "istio-system");
            assert_eq!((converted.policy.unwrap().dry_run, converted.condition.reason), (dry_run, reason), "{value}");
        }
    }

    #[test]
    fn all_that_a_node_sees_is_converted() {
        let rule = json!({
            "from": [
                {"source": {"namespaces": ["a", "b*"], "notNamespaces": ["*c"], "principals": ["*"],
                    "notPrincipals": ["spiffe://td/ns/a/sa/x"]}},
                {"source": {"serviceAccounts": ["x", "other/y"], "ipBlocks": ["10.0.0.0/8"], "notIpBlocks": ["10.0.0.1"]}},
            ],
            "to": [{"operation": {"ports": ["80", "443"], "notPorts": ["90"]}}],
            "when": [
                {"key": "source.ip", "values": ["10.0.0.1"]},
                {"key": "source.namespace", "notValues": ["a"]},
                {"key": "source.principal", "values": ["td/*"]},
                {"key": "destination.ip", "values": ["fd00::/8"]},
                {"key": "destination.port", "values": ["80"]},
            ],
        });
        use StringMatch::{Exact, Prefix, Presence, Suffix};
        let account = |namespace: &str, account: &str| ServiceAccountMatch {
            namespace: namespace.into(),
            service_account: account.into(),
        };
        let none_of = |values| Attribute { any_of: Vec::new(), none_of: values };
        let m = Match::default;
        let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap();
        let expected: Rule = vec![
            vec![Match { destination_ports: Attribute { any_of: vec![80, 443], none_of: vec![90] }, ..m() }],
            vec![
                Match {
                    namespaces: Attribute {
                        any_of: vec![Exact("a".into()), Prefix("b".into())],
                        none_of: vec![Suffix("c".into())],
                    },
                    principals: Attribute { any_of: vec![Presence], none_of: vec![Exact("td/ns/a/sa/x".into())] },
                    ..m()
                },
                Match {
                    service_accounts: any_of(vec![account("shop", "x"), account("other", "y")]),
                    source_ips: Attribute { any_of: vec![net("10.0.0.0/8")], none_of: vec![net("10.0.0.1/32")] },
                    ..m()
                },
            ],
            vec![Match { source_ips: any_of(vec![net("10.0.0.1/32")]), ..m() }],
            vec![Match { namespaces: none_of(vec![Exact("a".into())]), ..m() }],
            vec![Match { principals: any_of(vec![Prefix("td/".into())]), ..m() }],
            vec![Match { destination_ips: any_of(vec![net("fd00::/8")]), ..m() }],
            vec![Match { destination_ports: any_of(vec![80]), ..m() }],
        ];
        for (rules, reason, message) in both(rule) {
            assert_eq!(
                (rules, reason, &*message),
                (vec![expected.clone()], Reason::Accepted, "enforced as it is written")
            );
        }
        for (rules, reason, _) in both(json!({})) {
            assert_eq!((rules, reason), (vec![Vec::new()], Reason::Accepted), "a rule without tests: everything");
        }
    }

    #[test]
    fn what_is_not_seen_here_allows_nothing_and_denies_without_regard_to_it() {
        let namespace_a =
            || vec![Match { namespaces: any_of(vec![StringMatch::Exact("a".into())]), ..Match::default() }];
        let port_80 = || vec![Match { destination_ports: any_of(vec![80]), ..Match::default() }];
        let from_a = json!([{"source": {"namespaces": ["a"]}}]);
        for (rule, left) in [
            (json!({"from": from_a, "to": [{"operation": {"paths": ["/x"]}}]}), vec![namespace_a()]),
            (
                json!({"from": from_a, "to": [{"operation": {"paths": ["/x"], "ports": ["80"]}}]}),
                vec![port_80(), namespace_a()],
            ),
            // The other operation alone must not decide.
            (
                json!({"from": from_a, "to": [{"operation": {"ports": ["80"]}}, {"operation": {"methods": ["GET"]}}]}),
                vec![namespace_a()],
            ),
            (json!({"from": [{"source": {"requestPrincipals": ["*"], "namespaces": ["a"]}}]}), vec![namespace_a()]),
            (json!({"from": [{"source": {"remoteIpBlocks": ["10.0.0.0/8"]}}]}), vec![]),
            (json!({"to": [{"operation": {"notHosts": ["x"]}}]}), vec![]),
            (json!({"from": from_a, "when": [{"key": "request.headers[x]", "values": ["y"]}]}), vec![namespace_a()]),
            (json!({"when": [{"key": "request.auth.claims[x]", "notValues": ["y"]}]}), vec![]),
            (json!({"from": from_a, "to": [{"operation": {"sni": ["x"]}}]}), vec![namespace_a()]),
            (json!({"from": from_a, "during": ["the day"]}), vec![namespace_a()]),
        ] {
            let [(allow, reason, message), (deny, deny_reason, deny_message)] = both(rule.clone());
            assert_eq!((allow, reason), (vec![], Reason::PartlyEnforced), "{rule}");
            assert!(message.contains("the rule allows nothing"), "{message}");
            assert_eq!((&deny, deny_reason), (&vec![left.clone()], Reason::PartlyEnforced), "{rule}");
            assert!(deny_message.contains("denies without regard to it"), "{deny_message}");
            assert_eq!(left.is_empty(), deny_message.contains("it denies every connection"), "{deny_message}");
        }
    }

    #[test]
    fn what_cannot_be_read_never_hits_in_allow_and_always_in_deny() {
        let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap();
        let source = |fields: Value| json!({"from": [{"source": fields}]});
        let ips = |any_of: Vec<&str>, none_of: Vec<&str>| Match {
            source_ips: Attribute {
                any_of: any_of.into_iter().map(net).collect(),
                none_of: none_of.into_iter().map(net).collect(),
            },
            ..Match::default()
        };
        for (rule, allow, deny) in [
            (source(json!({"ipBlocks": ["10.0.0.0/33"]})), None, None),
            (source(json!({"ipBlocks": ["x", "10.0.0.1"]})), Some(ips(vec!["10.0.0.1/32"], vec![])), None),
            (source(json!({"notIpBlocks": ["x"]})), None, None),
            (
                source(json!({"ipBlocks": ["10.0.0.0/8"], "notIpBlocks": ["x", "10.0.0.1"]})),
                None,
                Some(ips(vec!["10.0.0.0/8"], vec!["10.0.0.1/32"])),
            ),
            (
                source(json!({"ipBlocks": ["10.0.0.0/33"], "notIpBlocks": ["10.0.0.1"]})),
                None,
                Some(ips(vec![], vec!["10.0.0.1/32"])),
            ),
            (source(json!({"ipBlocks": "10.0.0.1"})), None, None),
            (source(json!({"ipBlocks": [null]})), None, None),
            (source(json!({"namespaces": [""]})), None, None),
            (source(json!({"principals": [""]})), None, None),
            (source(json!({"serviceAccounts": ["a/b/c"]})), None, None),
            (source(json!({})), None, None),
            (source(json!({"ipBlocks": []})), None, None),
            (source(json!("x")), None, None),
            (json!({"from": [{}]}), None, None),
            (json!({"from": [null]}), None, None),
            (json!({"from": []}), None, None),
            (json!({"from": {}}), None, None),
            (json!({"to": []}), None, None),
            (json!({"to": [{"operation": {"ports": ["65536"]}}]}), None, None),
            (json!({"to": [{"operation": {"ports": [80]}}]}), None, None),
            (json!({"when": []}), None, None),
            (json!({"when": [{}]}), None, None),
            (json!({"when": [{"key": "source.ip"}]}), None, None),
            (json!({"when": [{"key": 1, "values": ["x"]}]}), None, None),
            (json!({"when": [{"key": "destination.port", "values": ["http"]}]}), None, None),
            (json!(null), None, None),
            (json!([]), None, None),
        ] {
            let [(allowed, allow_reason, _), (denied, deny_reason, message)] = both(rule.clone());
            let allow: Vec<Rule> = allow.map(|m| vec![vec![m]]).into_iter().collect();
            assert_eq!((allowed, allow_reason), (allow, Reason::PartlyEnforced), "{rule}");
            let deny: Rule = deny.map(|m| vec![m]).into_iter().collect();
            assert_eq!((denied, deny_reason), (vec![deny], Reason::PartlyEnforced), "{rule}: {message}");
        }
    }

    #[test]
    fn a_policy_that_cannot_be_read_refuses_everything_of_its_scope() {
        for spec in [
            json!("x"),
            json!({"action": "allow"}),
            json!({"action": 1}),
            json!({"rules": {}}),
            json!({"selector": []}),
            json!({"targetRef": "x"}),
            json!({"targetRefs": 1}),
        ] {
            let converted = of(spec.clone());
            let policy = converted.policy.unwrap();
            let expected = (Action::Deny, PolicyScope::Namespace, vec![Vec::new()]);
            assert_eq!((policy.action, policy.scope, policy.rules), expected, "{spec}");
            assert_eq!((converted.selector, converted.condition.reason), (None, Reason::Unreadable), "{spec}");
        }
        let new = json!({"fromTheFuture": 1, "rules": [{}]});
        let (allow, deny) = (of(new.clone()), of(json!({"action": "DENY", "fromTheFuture": 1, "rules": [{}]})));
        assert_eq!((allow.policy.unwrap().rules.len(), deny.policy.unwrap().rules.len()), (0, 1));
        assert_eq!(allow.condition.reason, Reason::PartlyEnforced);
    }

    #[test]
    fn what_can_never_match_is_said() {
        let rule = json!({"from": [{"source": {"principals": ["cluster.local/ns/*/sa/x"]}}]});
        for (rules, reason, message) in both(rule) {
            assert_eq!((rules.len(), reason), (1, Reason::NeverMatches));
            assert!(
                message.starts_with("rule[0].from[0]: principal \"cluster.local/ns/*/sa/x\" never matches"),
                "{message}"
            );
        }
    }
}
