//! The rules of an earlier istio-cni in a pod: found, and removed in the very transaction that writes ours, so that the pod
//! is captured once at any moment. What cannot be removed is refused by name.

use serde_json::Value;
use std::collections::BTreeSet;

/// Beginning of the names of istio-cni's iptables chains.
pub const CHAINS: &str = "ISTIO_";
/// Beginning of the names of its nftables tables.
const TABLES: &str = "istio-ambient-";

/// What is not ours in a pod and captures it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// Names, for the log.
    pub names: BTreeSet<String>,
    /// nft commands that remove it.
    pub removal: String,
    /// A name that no agent gives, and that the pod itself may have chosen: it is not written into any script.
    pub odd: Option<String>,
}

/// Looks through what `nft -j list ruleset` has printed.
pub fn find(listing: &Value) -> Foreign {
    let plain = |name: &str| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.bytes().all(fine)
    };
    let objects = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |object: &Value, key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let mut found = Foreign::default();
    let (mut rules, mut flushes, mut chains) = (String::new(), String::new(), String::new());
    for object in objects {
        let table = &object["table"];
        let (chain, rule) = (&object["chain"], &object["rule"]);
        let concerns = text(table, "name").starts_with(TABLES)
            || text(chain, "name").starts_with(CHAINS)
            || (!text(rule, "chain").starts_with(CHAINS) && jumps(&rule["expr"]));
        let names =
            [text(table, "name"), text(chain, "table"), text(chain, "name"), text(rule, "table"), text(rule, "chain")];
        if let Some(odd) = names.iter().find(|name| concerns && !name.is_empty() && !plain(name)) {
            found.odd = Some(odd.clone());
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
            // Chains may jump to each other: all are emptied before the first one goes.
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

/// Whether a rule leads into one of the chains.
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
    fn what_is_istios_is_found_and_nothing_else() {
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
            assert_eq!((found.removal.as_str(), found.odd.as_deref()), ("", Some(evil)));
        }
        for nothing in [json!({}), json!({"nftables": []}), json!({"nftables": [{"rule": 7}, 5, null]})] {
            assert_eq!(find(&nothing), Foreign::default());
        }
    }
}
