//! Decodes authorization policies into mesh facts. Pure; accepts any bytes.
//!
//! What cannot be understood never widens access: a match that contains such a value never matches in an ALLOW policy
//! and always matches in a DENY policy, and the policy is reported. Everything else means what it means to ztunnel.
//! That includes values that can never match, such as a principal with `spiffe://`; they are noted in the log.

use super::decode::{Decoded, ip, range};
use crate::mesh::Policy;
use crate::mesh::policy::{Action, Attribute, Match, PolicyScope, ServiceAccountMatch, StringMatch};
use crate::proto::istio::security as wire;
use ipnet::IpNet;
use prost::Message;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Decodes the policy named `name`. Parts that are not understood are replaced by safe ones.
pub fn policy(name: &str, bytes: &[u8]) -> Result<Decoded<Policy>, String> {
    let p = wire::Authorization::decode(bytes).map_err(|error| format!("cannot be decoded: {error}"))?;
    let key = format!("{}/{}", p.namespace, p.name);
    if key != name {
        return Err(format!("contains a resource of another name: {key}"));
    }
    let mut faults = Vec::new();
    let scope = match wire::Scope::try_from(p.scope) {
        Ok(wire::Scope::Global) => PolicyScope::Global,
        Ok(wire::Scope::Namespace) => PolicyScope::Namespace,
        Ok(wire::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
        Err(_) => {
            faults.push(format!(
                "scope {} is unknown: applied to its namespace and to workloads that name the policy",
                p.scope
            ));
            PolicyScope::Namespace
        }
    };
    let action = match wire::Action::try_from(p.action) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Err(_) => {
            faults.push(format!("action {} is unknown: treated as DENY", p.action));
            Action::Deny
        }
    };
    let (mut rules, mut notes) = (Vec::new(), Vec::new());
    for (index, rule) in p.rules.iter().enumerate() {
        let mut impossible = Vec::new();
        let clause = |clause: &wire::Clause| {
            clause.matches.iter().map(|m| one_match(m, action, &mut faults, &mut impossible)).collect::<Vec<Match>>()
        };
        rules.push(rule.clauses.iter().map(clause).collect());
        notes.extend(impossible.into_iter().map(|note| format!("rule[{index}]: {note}")));
    }
    let policy = Policy {
        key: key.into(),
        name: p.name.into(),
        namespace: p.namespace.into(),
        scope,
        action,
        dry_run: p.dry_run,
        rules,
    };
    Ok(Decoded { value: policy, faults, notes })
}

fn one_match(m: &wire::Match, action: Action, faults: &mut Vec<String>, notes: &mut Vec<String>) -> Match {
    let decoded = decode_match(m);
    match (decoded, action) {
        (Ok(m), _) if m.is_empty() => {
            notes.push(
                "a match has no condition that can be checked below HTTP, so it never matches: it needs a waypoint"
                    .into(),
            );
            m
        }
        (Ok(m), _) => {
            notes.extend(m.impossible());
            m
        }
        // A match without conditions never matches.
        (Err(fault), Action::Allow) => {
            faults.push(format!("{fault}: this match never allows"));
            Match::default()
        }
        (Err(fault), Action::Deny) => {
            faults.push(format!("{fault}: this match always denies"));
            match_all()
        }
    }
}

/// A match that every connection meets.
fn match_all() -> Match {
    let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let any_of = all.into_iter().filter_map(|ip| IpNet::new(ip, 0).ok()).collect();
    Match { source_ips: Attribute { any_of, none_of: Vec::new() }, ..Match::default() }
}

fn decode_match(m: &wire::Match) -> Result<Match, String> {
    if let Some(extension) = m.extensions.first() {
        return Err(format!("extension {:?} is unknown", extension.name));
    }
    Ok(Match {
        namespaces: attribute(&m.namespaces, &m.not_namespaces, string)?,
        principals: attribute(&m.principals, &m.not_principals, string)?,
        service_accounts: attribute(&m.service_accounts, &m.not_service_accounts, account)?,
        source_ips: attribute(&m.source_ips, &m.not_source_ips, net)?,
        destination_ips: attribute(&m.destination_ips, &m.not_destination_ips, net)?,
        destination_ports: attribute(&m.destination_ports, &m.not_destination_ports, port)?,
    })
}

fn attribute<W, T>(any_of: &[W], none_of: &[W], one: impl Fn(&W) -> Result<T, String>) -> Result<Attribute<T>, String> {
    let list = |wire: &[W]| wire.iter().map(&one).collect::<Result<Vec<T>, String>>();
    Ok(Attribute { any_of: list(any_of)?, none_of: list(none_of)? })
}

fn string(m: &wire::StringMatch) -> Result<StringMatch, String> {
    use wire::string_match::MatchType;
    match &m.match_type {
        Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
        Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
        Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.as_str().into())),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err("a string match is of an unknown type".into()),
    }
}

fn account(m: &wire::ServiceAccountMatch) -> Result<ServiceAccountMatch, String> {
    let (namespace, service_account) = (m.namespace.as_str().into(), m.service_account.as_str().into());
    Ok(ServiceAccountMatch { namespace, service_account })
}

fn net(address: &wire::Address) -> Result<IpNet, String> {
    range(ip(&address.address)?, address.length)
}

fn port(number: &u32) -> Result<u16, String> {
    u16::try_from(*number).map_err(|_| format!("{number} is not a port"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::Rule;
    use proptest::prelude::*;

    fn decode(m: wire::Match, action: wire::Action) -> Decoded<Policy> {
        let rules = vec![wire::Rule { clauses: vec![wire::Clause { matches: vec![m] }] }];
        let authorization = wire::Authorization {
            name: "p".into(),
            namespace: "a".into(),
            action: action.into(),
            rules,
            ..Default::default()
        };
        policy("a/p", &authorization.encode_to_vec()).unwrap()
    }

    #[test]
    fn what_is_not_understood_never_widens_access() {
        let bad_net = || vec![wire::Address { address: vec![1].into(), length: 8 }];
        let long = || vec![wire::Address { address: vec![10, 0, 0, 0].into(), length: 33 }];
        let no_type = || vec![wire::StringMatch { match_type: None }];
        let extension = || vec![crate::proto::istio::workload::Extension { name: "new".into(), config: None }];
        for m in [
            wire::Match { source_ips: bad_net(), ..Default::default() },
            wire::Match { not_source_ips: bad_net(), destination_ports: vec![80], ..Default::default() },
            wire::Match { destination_ips: long(), ..Default::default() },
            wire::Match { principals: no_type(), ..Default::default() },
            wire::Match { not_namespaces: no_type(), ..Default::default() },
            wire::Match { destination_ports: vec![65_616], ..Default::default() },
            wire::Match { extensions: extension(), destination_ports: vec![80], ..Default::default() },
        ] {
            let only = |rules: &[Rule]| rules[0][0][0].clone();
            let allow = decode(m.clone(), wire::Action::Allow);
            assert_eq!(only(&allow.value.rules), Match::default(), "never: {m:?}");
            let deny = decode(m.clone(), wire::Action::Deny);
            assert_eq!(only(&deny.value.rules), match_all(), "always: {m:?}");
            assert_eq!((allow.faults.len(), deny.faults.len()), (1, 1));
        }
    }

    #[test]
    fn values_that_can_never_match_are_accepted_and_noted() {
        let exact =
            |text: &str| wire::StringMatch { match_type: Some(wire::string_match::MatchType::Exact(text.to_owned())) };
        let written = "spiffe://cluster.local/ns/a/sa/b";
        let decoded =
            decode(wire::Match { principals: vec![exact(written)], ..Default::default() }, wire::Action::Deny);
        assert_eq!(decoded.value.rules[0][0][0].principals.any_of, [StringMatch::Exact(written.into())]);
        assert!(decoded.faults.is_empty());
        assert!(matches!(decoded.notes.as_slice(), [one] if one.starts_with("rule[0]: ") && one.contains(written)));
        let nothing = decode(wire::Match::default(), wire::Action::Deny);
        assert!(matches!(nothing.notes.as_slice(), [one] if one.contains("needs a waypoint")));
        let fine = wire::Match { principals: vec![exact("cluster.local/ns/a/sa/b")], ..Default::default() };
        assert!(decode(fine, wire::Action::Deny).notes.is_empty());
    }

    #[test]
    fn an_unknown_action_denies_and_an_unknown_scope_applies() {
        let wire =
            wire::Authorization { name: "p".into(), namespace: "a".into(), scope: 9, action: 9, ..Default::default() };
        let decoded = policy("a/p", &wire.encode_to_vec()).unwrap();
        assert_eq!((decoded.value.action, decoded.value.scope), (Action::Deny, PolicyScope::Namespace));
        assert_eq!(decoded.faults.len(), 2);
        assert!(policy("a/q", &wire.encode_to_vec()).is_err());
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes: Vec<u8>) {
            drop(policy("x", &bytes));
        }
    }
}
