//! Evaluates one policy rule for one connection. Pure, case-sensitive, without regular expressions.
//!
//! A rule matches if all its clauses do. A clause matches if any of its matches does, or if it has none. A match holds
//! if all its attributes do, and it must have at least one. An attribute holds if any of its positive values hits (or
//! there are none) and no negative value does.
//!
//! A connection without an identity has an empty namespace, and no principal or service account hits it. A principal
//! hits in each of the trust domains that count as the same (source: trust domain aliases of Istio's sidecars; ztunnel
//! has none).

use crate::mesh::policy::{Attribute, Match, Rule, ServiceAccountMatch, StringMatch};
use crate::mesh::{SpiffeName, Text};
use std::net::{IpAddr, SocketAddr};

/// The connection that is evaluated: may `peer` reach `destination` from `source`?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Identity that TLS proved; `None` for plaintext.
    pub peer: Option<SpiffeName>,
    /// Address that the connection comes from.
    pub source: IpAddr,
    /// Address and port of the application.
    pub destination: SocketAddr,
}

/// A connection, prepared for matching.
#[derive(Debug)]
pub struct MatchInput<'a> {
    subject: &'a Subject,
    /// The peer's principal, written in each trust domain that counts as the peer's own. A rule about one of them
    /// applies to all.
    principals: Vec<String>,
}

impl<'a> MatchInput<'a> {
    /// Prepares a connection; `domains` are the trust domains that count as the same.
    pub fn new(subject: &'a Subject, domains: &[Text]) -> Self {
        let mut principals = Vec::new();
        if let Some(peer) = &subject.peer {
            principals.push(peer.principal());
            let same = domains.contains(&peer.trust_domain);
            let others = domains.iter().filter(|domain| same && **domain != peer.trust_domain);
            principals.extend(others.map(|domain| peer.principal_in(domain)));
        }
        Self { subject, principals }
    }
}

/// Whether a rule matches a connection.
pub fn rule_matches(rule: &Rule, input: &MatchInput<'_>) -> bool {
    rule.iter().all(|clause| clause.is_empty() || clause.iter().any(|m| match_holds(m, input)))
}

fn match_holds(test: &Match, input: &MatchInput<'_>) -> bool {
    let subject = input.subject;
    let namespace = subject.peer.as_ref().map_or("", |peer| &*peer.namespace);
    !test.is_empty()
        && passes(&test.namespaces, |m| text(m, namespace))
        && passes(&test.principals, |m| input.principals.iter().any(|principal| text(m, principal)))
        && passes(&test.service_accounts, |m| account(m, subject))
        && passes(&test.source_ips, |range| range.contains(&subject.source))
        && passes(&test.destination_ips, |range| range.contains(&subject.destination.ip()))
        && passes(&test.destination_ports, |port| *port == subject.destination.port())
}

fn passes<T>(attribute: &Attribute<T>, hits: impl Fn(&T) -> bool) -> bool {
    (attribute.any_of.is_empty() || attribute.any_of.iter().any(&hits)) && !attribute.none_of.iter().any(hits)
}

fn text(test: &StringMatch, value: &str) -> bool {
    match test {
        StringMatch::Exact(exact) => **exact == *value,
        StringMatch::Prefix(prefix) => value.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => value.ends_with(&**suffix),
        StringMatch::Presence => !value.is_empty(),
    }
}

fn account(test: &ServiceAccountMatch, subject: &Subject) -> bool {
    let same = |peer: &SpiffeName| peer.namespace == test.namespace && peer.service_account == test.service_account;
    subject.peer.as_ref().is_some_and(same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::SpiffeName;
    use ipnet::IpNet;
    use proptest::prelude::*;

    fn subject(peer: Option<(&str, &str, &str)>) -> Subject {
        Subject {
            peer: peer.map(|(td, ns, sa)| SpiffeName::new(td, ns, sa).unwrap()),
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.1.0.2:80".parse().unwrap(),
        }
    }

    fn holds(some_rule: &Rule, subject: &Subject) -> bool {
        rule_matches(some_rule, &MatchInput::new(subject, &[]))
    }

    #[test]
    fn a_principal_hits_in_each_trust_domain_that_is_one_with_the_peers() {
        let domains: Vec<Text> = ["main", "old"].map(Text::from).into();
        let of = |domain: &str| subject(Some((domain, "ns", "sa")));
        let with = |positive: bool, text: &str| {
            let (mut m, test) = (Match::default(), StringMatch::Exact(text.into()));
            if positive {
                m.principals.any_of.push(test)
            } else {
                m.principals.none_of.push(test)
            }
            vec![vec![m]]
        };
        for (peer, written, hits) in [
            ("main", "main/ns/ns/sa/sa", true),
            ("old", "main/ns/ns/sa/sa", true),
            ("main", "old/ns/ns/sa/sa", true),
            ("other", "main/ns/ns/sa/sa", false),
            ("main", "other/ns/ns/sa/sa", false),
            ("old", "main/ns/ns/sa/other", false),
        ] {
            let (peer, name) = (of(peer), peer);
            assert_eq!(
                rule_matches(&with(true, written), &MatchInput::new(&peer, &domains)),
                hits,
                "{name} as {written}"
            );
            assert_eq!(
                rule_matches(&with(false, written), &MatchInput::new(&peer, &domains)),
                !hits,
                "{name} not {written}"
            );
        }
    }

    #[test]
    fn each_attribute_positive_and_negative() {
        let tls = subject(Some(("td", "ns", "sa")));
        let plain = subject(None);
        let exact = |t: &str| StringMatch::Exact(t.into());
        let sa = |ns: &str, sa: &str| ServiceAccountMatch { namespace: ns.into(), service_account: sa.into() };
        let net = |t: &str| t.parse::<IpNet>().unwrap();
        let with = |f: &dyn Fn(&mut Match)| {
            let mut m = Match::default();
            f(&mut m);
            m
        };
        for (m, on_tls, on_plain) in [
            (Match::default(), false, false),
            (with(&|m| m.namespaces.any_of = vec![exact("ns")]), true, false),
            (with(&|m| m.namespaces.any_of = vec![exact("n")]), false, false),
            (with(&|m| m.namespaces.any_of = vec![StringMatch::Prefix("".into())]), true, true),
            (with(&|m| m.namespaces.none_of = vec![exact("ns")]), false, true),
            (with(&|m| m.namespaces.any_of = vec![StringMatch::Presence]), true, false),
            (with(&|m| m.principals.any_of = vec![exact("td/ns/ns/sa/sa")]), true, false),
            (with(&|m| m.principals.any_of = vec![exact("TD/ns/ns/sa/sa")]), false, false),
            (with(&|m| m.principals.any_of = vec![StringMatch::Prefix("td/".into())]), true, false),
            (with(&|m| m.principals.any_of = vec![StringMatch::Suffix("/sa/sa".into())]), true, false),
            (with(&|m| m.principals.any_of = vec![StringMatch::Suffix("".into())]), true, false),
            (with(&|m| m.principals.none_of = vec![StringMatch::Presence]), false, true),
            (with(&|m| m.service_accounts.any_of = vec![sa("ns", "sa")]), true, false),
            (with(&|m| m.service_accounts.any_of = vec![sa("ns", "s.")]), false, false),
            (with(&|m| m.service_accounts.none_of = vec![sa("ns", "sa")]), false, true),
            (with(&|m| m.source_ips.any_of = vec![net("10.0.0.0/24")]), true, true),
            (with(&|m| m.source_ips.any_of = vec![net("::/0")]), false, false),
            (with(&|m| m.source_ips.none_of = vec![net("10.0.0.1/32")]), false, false),
            (with(&|m| m.destination_ips.any_of = vec![net("10.1.0.2/32")]), true, true),
            (with(&|m| m.destination_ips.none_of = vec![net("10.0.0.0/8")]), false, false),
            (with(&|m| m.destination_ports.any_of = vec![80, 81]), true, true),
            (with(&|m| m.destination_ports.none_of = vec![80]), false, false),
        ] {
            let rule_of = vec![vec![m.clone()]];
            assert_eq!(holds(&rule_of, &tls), on_tls, "TLS: {m:?}");
            assert_eq!(holds(&rule_of, &plain), on_plain, "plaintext: {m:?}");
        }
        assert!(holds(&vec![], &plain), "no clause: everything");
        assert!(holds(&vec![vec![]], &plain), "a clause without matches: everything");
    }

    /// The same semantics, written as plainly as possible and without regard to speed.
    fn slow_twin(rule: &Rule, s: &Subject) -> bool {
        let name = |m: &StringMatch, v: &Option<String>| match (m, v) {
            (_, None) => false,
            (StringMatch::Exact(e), Some(v)) => v.as_str() == &**e,
            (StringMatch::Prefix(p), Some(v)) => v.get(..p.len()) == Some(&**p),
            (StringMatch::Suffix(p), Some(v)) => v.len() >= p.len() && v.get(v.len() - p.len()..) == Some(&**p),
            (StringMatch::Presence, Some(v)) => !v.is_empty(),
        };
        let namespace = Some(s.peer.as_ref().map_or(String::new(), |p| p.namespace.to_string()));
        let principal =
            s.peer.as_ref().map(|p| format!("{}/ns/{}/sa/{}", p.trust_domain, p.namespace, p.service_account));
        for clause in rule {
            let mut clause_holds = clause.is_empty();
            for m in clause {
                let mut asked = 0;
                let mut failed = 0;
                let mut attribute = |positives: Vec<bool>, negatives: Vec<bool>| {
                    asked += positives.len() + negatives.len();
                    if !positives.is_empty() && !positives.contains(&true) {
                        failed += 1;
                    }
                    if negatives.contains(&true) {
                        failed += 1;
                    }
                };
                let names = |list: &[StringMatch], v: &Option<String>| list.iter().map(|x| name(x, v)).collect();
                attribute(names(&m.namespaces.any_of, &namespace), names(&m.namespaces.none_of, &namespace));
                attribute(names(&m.principals.any_of, &principal), names(&m.principals.none_of, &principal));
                let accounts = |list: &[ServiceAccountMatch]| {
                    let hit = |x: &ServiceAccountMatch| match &s.peer {
                        Some(p) => p.namespace == x.namespace && p.service_account == x.service_account,
                        None => false,
                    };
                    list.iter().map(hit).collect()
                };
                attribute(accounts(&m.service_accounts.any_of), accounts(&m.service_accounts.none_of));
                let nets = |list: &[IpNet], ip: std::net::IpAddr| list.iter().map(|n| n.contains(&ip)).collect();
                attribute(nets(&m.source_ips.any_of, s.source), nets(&m.source_ips.none_of, s.source));
                let to = s.destination.ip();
                attribute(nets(&m.destination_ips.any_of, to), nets(&m.destination_ips.none_of, to));
                let ports = |list: &[u16]| list.iter().map(|p| *p == s.destination.port()).collect();
                attribute(ports(&m.destination_ports.any_of), ports(&m.destination_ports.none_of));
                if asked > 0 && failed == 0 {
                    clause_holds = true;
                }
            }
            if !clause_holds {
                return false;
            }
        }
        true
    }

    fn texts() -> impl Strategy<Value = StringMatch> {
        let word = prop_oneof![Just("a"), Just("b"), Just("td/ns/a/sa/b"), Just("td/"), Just("sa/b"), Just("")];
        (0..4u8, word).prop_map(|(kind, word)| match kind {
            0 => StringMatch::Exact(word.into()),
            1 => StringMatch::Prefix(word.into()),
            2 => StringMatch::Suffix(word.into()),
            _ => StringMatch::Presence,
        })
    }

    fn attribute<T: std::fmt::Debug + Clone>(
        one: impl Strategy<Value = T> + Clone,
    ) -> impl Strategy<Value = Attribute<T>> {
        let some = prop::collection::vec(one, 0..2);
        (some.clone(), some).prop_map(|(any_of, none_of)| Attribute { any_of, none_of })
    }

    fn matches() -> impl Strategy<Value = Match> {
        let letter = prop_oneof![Just("a"), Just("b")];
        let account = (letter.clone(), letter)
            .prop_map(|(n, s)| ServiceAccountMatch { namespace: n.into(), service_account: s.into() });
        let net = prop_oneof![Just("10.0.0.0/8"), Just("10.0.0.1/32"), Just("fd00::/8"), Just("0.0.0.0/0")]
            .prop_map(|n| n.parse::<IpNet>().unwrap());
        let text = texts().boxed();
        let parts = (
            attribute(text.clone()),
            attribute(text),
            attribute(account.boxed()),
            attribute(net.clone().boxed()),
            attribute(net.boxed()),
            attribute(prop_oneof![Just(80u16), Just(443)].boxed()),
        );
        parts.prop_map(|(namespaces, principals, service_accounts, source_ips, destination_ips, destination_ports)| {
            Match { namespaces, principals, service_accounts, source_ips, destination_ips, destination_ports }
        })
    }

    fn subjects() -> impl Strategy<Value = Subject> {
        let letter = prop_oneof![Just("a"), Just("b")];
        let ip = prop_oneof![Just("10.0.0.1"), Just("10.9.9.9"), Just("fd00::1"), Just("192.0.2.1")];
        (prop::option::of((letter.clone(), letter)), ip.clone(), ip, prop_oneof![Just(80u16), Just(81)]).prop_map(
            |(peer, from, to, port)| Subject {
                peer: peer.map(|(ns, sa)| SpiffeName::new("td", ns, sa).unwrap()),
                source: from.parse().unwrap(),
                destination: std::net::SocketAddr::new(to.parse().unwrap(), port),
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_matcher_means_what_the_slow_twin_says(
            some_rule in prop::collection::vec(prop::collection::vec(matches(), 0..3), 0..3),
            subject in subjects(),
        ) {
            prop_assert_eq!(holds(&some_rule, &subject), slow_twin(&some_rule, &subject));
        }
    }
}
