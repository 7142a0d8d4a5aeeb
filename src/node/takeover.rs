//! Takeover: finds the rules that istio-cni has left in a pod. They are removed in the same transaction that writes
//! ours, so that exactly one redirection is in force at any moment. A rule that cannot be removed is refused, with its
//! name. Pure.

use serde_json::Value;
use std::collections::BTreeSet;

/// Prefix of istio-cni's iptables chains.
pub const CHAINS: &str = "ISTIO_";
/// Prefix of istio-cni's nftables tables.
const TABLES: &str = "istio-ambient-";

/// Rules of istio-cni that capture a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IstioRules {
    /// Their names, for the log.
    pub names: BTreeSet<String>,
    /// nft commands that remove them.
    pub removal: String,
    /// A name that no agent chooses, so the pod itself may have chosen it. It is never written into a script.
    pub unsafe_name: Option<String>,
}

/// Finds istio-cni's rules in the output of `nft -j list ruleset`.
pub fn find(listing: &Value) -> IstioRules {
    let plain = |name: &str| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.bytes().all(fine)
    };
    let objects = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |object: &Value, key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let mut found = IstioRules::default();
    let (mut rules, mut flushes, mut chains) = (String::new(), String::new(), String::new());
    for object in objects {
        let table = &object["table"];
        let (chain, rule) = (&object["chain"], &object["rule"]);
        let concerns = text(table, "name").starts_with(TABLES)
            || text(chain, "name").starts_with(CHAINS)
            || (!text(rule, "chain").starts_with(CHAINS) && jumps(&rule["expr"]));
        let names =
            [text(table, "name"), text(chain, "table"), text(chain, "name"), text(rule, "table"), text(rule, "chain")];
        if let Some(name) = names.iter().find(|name| concerns && !name.is_empty() && !plain(name)) {
            found.unsafe_name = Some(name.clone());
            continue;
        }
        if text(table, "name").starts_with(TABLES) {
            let name = format!("{} {}", text(table, "family"), text(table, "name"));
            found.removal += &format!("delete table {name}\n");
            found.names.insert(format!("nftables table {name}"));
        }
        if text(chain, "name").starts_with(CHAINS) && !text(chain, "table").starts_with(TABLES) {
            let table = format!("{} {}", text(chain, "family"), text(chain, "table"));
            let name = text(chain, "name");
            // Chains may jump to each other, so all are emptied before the first one is deleted.
            flushes += &format!("flush chain {table} {name}\n");
            chains += &format!("delete chain {table} {name}\n");
            found.names.insert(format!("iptables chain {name} in {table}"));
        }
        let outside = !text(rule, "chain").starts_with(CHAINS) && !text(rule, "table").starts_with(TABLES);
        if outside && jumps(&rule["expr"]) {
            let (family, table, chain) = (text(rule, "family"), text(rule, "table"), text(rule, "chain"));
            rules += &format!("delete rule {family} {table} {chain} handle {}\n", rule["handle"]);
        }
    }
    found.removal += &(rules + &flushes + &chains);
    found
}

/// Most chains and rules of other programs that are named for one pod.
const HOOKS_MAX: usize = 8;
/// Longest part of a name that is shown; a pod chooses its own names.
const NAME_MAX: usize = 40;
/// Filter chains up to this priority see packets before connections are tracked, or change packets before they are
/// translated (linux/netfilter_ipv4.h: mangle is -150, nat -100).
const BEFORE_TRANSLATION: i64 = -150;

/// Names what may take the pod's traffic before our tables `own` of family inet, or beside them: chains of other
/// programs for translation, routing or early filtering, and rules that switch off connection tracking.
pub fn hooks(listing: &Value, own: &[&str]) -> Vec<String> {
    let objects = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |value: &Value| {
        let name: String = value.as_str().unwrap_or_default().chars().take(NAME_MAX).collect();
        name.escape_debug().to_string()
    };
    let mut found = BTreeSet::new();
    for object in objects {
        let (chain, rule) = (&object["chain"], &object["rule"]);
        let of = if chain.is_object() { chain } else { rule };
        if of["family"] == "inet" && own.iter().any(|own| of["table"] == *own) {
            continue;
        }
        let place = || format!("table {} {}", name(&of["family"]), name(&of["table"]));
        let (hook, kind, priority) = (&chain["hook"], &chain["type"], chain["prio"].as_i64().unwrap_or(0));
        let early = kind == "nat" || kind == "route" || priority <= BEFORE_TRANSLATION;
        if hook.is_string() && (early || matches!(hook.as_str(), Some("ingress" | "egress"))) {
            found.insert(format!(
                "{} chain {} of {} at hook {}, priority {priority}",
                name(kind),
                name(&chain["name"]),
                place(),
                name(hook)
            ));
        }
        let untracks = |expression: &Value| expression.get("notrack").is_some();
        if rule["expr"].as_array().is_some_and(|all| all.iter().any(untracks)) {
            found.insert(format!("notrack in chain {} of {}", name(&rule["chain"]), place()));
        }
    }
    let more = found.len().saturating_sub(HOOKS_MAX);
    let mut named: Vec<String> = found.into_iter().take(HOOKS_MAX).collect();
    if more > 0 {
        named.push(format!("and {more} more"));
    }
    named
}

/// Whether a rule jumps to a chain of istio-cni.
fn jumps(expressions: &Value) -> bool {
    let leads = |expression: &Value| {
        let target =
            |verb: &str| expression.get(verb)?.get("target")?.as_str().map(|target| target.starts_with(CHAINS));
        target("jump").or_else(|| target("goto")).unwrap_or(false)
    };
    expressions.as_array().is_some_and(|all| all.iter().any(leads))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_rules_of_istio_cni_are_found() {
        let listing = json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "inet", "name": "istio-ambient-nat", "handle": 1}},
            {"chain": {"family": "inet", "table": "istio-ambient-nat", "name": "istio-output", "handle": 2}},
            {"table": {"family": "ip", "name": "nat", "handle": 2}},
            {"chain": {"family": "ip", "table": "nat", "name": "OUTPUT", "handle": 1}},
            {"chain": {"family": "ip", "table": "nat", "name": "ISTIO_OUTPUT", "handle": 3}},
            {"rule": {"family": "ip", "table": "nat", "chain": "OUTPUT", "handle": 7,
                "expr": [{"counter": {}}, {"jump": {"target": "ISTIO_OUTPUT"}}]}},
            {"rule": {"family": "ip", "table": "nat", "chain": "OUTPUT", "handle": 8,
                "expr": [{"jump": {"target": "DOCKER"}}]}},
            {"rule": {"family": "ip", "table": "nat", "chain": "ISTIO_OUTPUT", "handle": 9, "expr": [{"accept": null}]}},
            {"table": {"family": "inet", "name": "culvert", "handle": 9}},
        ]});
        let found = find(&listing);
        let commands: Vec<&str> = found.removal.lines().collect();
        assert_eq!(
            commands,
            [
                "delete table inet istio-ambient-nat",
                "delete rule ip nat OUTPUT handle 7",
                "flush chain ip nat ISTIO_OUTPUT",
                "delete chain ip nat ISTIO_OUTPUT",
            ]
        );
        assert_eq!(found.names.len(), 2);
        for evil in ["istio-ambient-x\ninclude \"/etc/shadow\"", "istio-ambient-; flush ruleset"] {
            let found = find(&json!({"nftables": [{"table": {"family": "inet", "name": evil}}]}));
            assert_eq!((found.removal.as_str(), found.unsafe_name.as_deref()), ("", Some(evil)));
        }
        for nothing in [json!({}), json!({"nftables": []}), json!({"nftables": [{"rule": 7}, 5, null]})] {
            assert_eq!(find(&nothing), IstioRules::default());
        }
    }

    #[test]
    fn rules_that_may_precede_ours_are_named_in_a_short_list() {
        let chain = |table: &str, name: &str, kind: &str, hook: &str, prio: i64| json!({"chain": {"family": "inet", "table": table, "name": name, "type": kind, "hook": hook, "prio": prio}});
        let listing = json!({"nftables": [
            chain("culvert", "pre_nat", "nat", "prerouting", -100),
            chain("mine", "n", "nat", "output", -200),
            chain("mine", "late", "filter", "input", 0),
            chain("mine", "raw", "filter", "prerouting", -300),
            {"chain": {"family": "inet", "table": "mine", "name": "not a base chain"}},
            {"rule": {"family": "ip", "table": "odd\u{1b}[31m", "chain": "c", "expr": [{"notrack": null}]}},
        ]});
        assert_eq!(
            hooks(&listing, &["culvert"]),
            [
                "filter chain raw of table inet mine at hook prerouting, priority -300",
                "nat chain n of table inet mine at hook output, priority -200",
                "notrack in chain c of table ip odd\\u{1b}[31m",
            ]
        );
        let many: Vec<Value> =
            (0..1000).map(|n| chain(&format!("t{n}"), &"x".repeat(200), "nat", "output", 0)).collect();
        let named = hooks(&json!({"nftables": many}), &["culvert"]);
        assert_eq!((named.len(), named.last().map(String::as_str)), (9, Some("and 992 more")));
        assert!(named.iter().all(|name| name.len() < 200));
    }
}
