//! Facts and policies in, permit or refusal out. Pure: no clock, no I/O, no waiting.
//!
//! Order (source: the reference's L4 authorization): dry-run policies are only noted; a matching DENY refuses; with no
//! ALLOW policy all is allowed; else one ALLOW must match. A policy that the workload names and nobody knows is never
//! skipped: the answer is then [`Verdict::Unknown`].

use super::matcher;
use crate::mesh::policy::Action;
use crate::mesh::{Policy, Snapshot, SpiffeName, Text, Workload};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is asked: may `peer` (nobody: plaintext) reach `destination` from `source`?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Identity that TLS proved.
    pub peer: Option<SpiffeName>,
    /// Address the connection comes from.
    pub source: IpAddr,
    /// The application's address and port.
    pub destination: SocketAddr,
}

/// A rule that decided: its policy, and which rule of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleName {
    /// `namespace/name` of the policy.
    pub policy: Text,
    /// Index of the rule within the policy, from 0.
    pub index: usize,
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule[{}]", self.policy, self.index)
    }
}

/// Leave to connect to a pod. Only [`decide`] makes one, and dialling the pod needs one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    rule: Option<RuleName>,
}

impl fmt::Display for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) => write!(f, "allowed by {rule}"),
            None => f.write_str("allowed: no ALLOW policy applies"),
        }
    }
}

/// Why there is no permit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A DENY rule matched.
    #[error("explicitly denied by: {0}")]
    Denied(RuleName),
    /// There are ALLOW policies, and none matched.
    #[error("allow policies exist, but none allowed (applied: {0})")]
    NotAllowed(String),
    /// A policy that the workload names has not become known in time.
    #[error("policy {0} is attached to the workload but not known")]
    PolicyUnknown(Text),
    /// The destination is no workload that we know.
    #[error("workload not found")]
    WorkloadUnknown,
}

/// What the policies say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed.
    Allow(Permit),
    /// Refused.
    Refuse(Refusal),
    /// Cannot be said until this policy is known.
    Unknown(Text),
}

/// A verdict, and what dry-run policies would have said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The verdict that is enforced.
    pub verdict: Verdict,
    /// Notes about dry-run policies, for the log.
    pub dry_run: Vec<String>,
}

/// Decides for one destination workload.
pub fn decide(snapshot: &Snapshot, workload: &Workload, subject: &Subject) -> Decision {
    let mut policies: Vec<&Arc<Policy>> = snapshot.policies_for_namespace(&workload.namespace).collect();
    let mut missing = None;
    for key in &workload.policies {
        match snapshot.policy(key) {
            Some(policy) => policies.push(policy),
            None => missing = missing.or(Some(key.clone())),
        }
    }
    // The same answer, with the same rule named, whatever order the facts came in.
    policies.sort_by(|a, b| a.key.cmp(&b.key));
    policies.dedup_by(|a, b| a.key == b.key);
    Decision { verdict: enforce(&policies, subject, missing), dry_run: notes(&policies, subject) }
}

fn enforce(policies: &[&Arc<Policy>], subject: &Subject, missing: Option<Text>) -> Verdict {
    let of = |action| policies.iter().filter(move |p| p.action == action && !p.dry_run);
    if let Some(rule) = of(Action::Deny).find_map(|policy| matching_rule(policy, subject)) {
        return Verdict::Refuse(Refusal::Denied(rule));
    }
    if let Some(missing) = missing {
        return Verdict::Unknown(missing);
    }
    if of(Action::Allow).next().is_none() {
        return Verdict::Allow(Permit { rule: None });
    }
    match of(Action::Allow).find_map(|policy| matching_rule(policy, subject)) {
        Some(rule) => Verdict::Allow(Permit { rule: Some(rule) }),
        None => {
            let names: Vec<&str> = of(Action::Allow).map(|policy| &*policy.key).collect();
            Verdict::Refuse(Refusal::NotAllowed(names.join(", ")))
        }
    }
}

fn notes(policies: &[&Arc<Policy>], subject: &Subject) -> Vec<String> {
    let dry = policies.iter().filter(|policy| policy.dry_run);
    dry.filter_map(|policy| {
        let rule = matching_rule(policy, subject)?;
        Some(match policy.action {
            Action::Deny => format!("{rule} would have denied this"),
            Action::Allow => format!("{rule} would have allowed this"),
        })
    })
    .collect()
}

fn matching_rule(policy: &Policy, subject: &Subject) -> Option<RuleName> {
    let index = policy.rules.iter().position(|rule| matcher::rule(rule, subject))?;
    Some(RuleName { policy: policy.key.clone(), index })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Facts;
    use crate::mesh::policy::{Match, PolicyScope, StringMatch};
    use crate::mesh::snapshot::tests::workload;

    fn policy(name: &str, scope: PolicyScope, action: Action, who: Option<&str>) -> Policy {
        let mut test = Match::default();
        test.principals.any_of = who.map(|w| StringMatch::Exact(w.into())).into_iter().collect();
        let rules = if who.is_some() { vec![vec![vec![test]]] } else { vec![vec![]] };
        let (namespace, key) = ("a".into(), format!("a/{name}").into());
        Policy { name: name.into(), namespace, key, scope, action, dry_run: false, rules }
    }

    fn ask(policies: Vec<Policy>, attached: &[&str]) -> Verdict {
        let mut server = workload("a", "server", "10.0.0.2");
        server.policies = attached.iter().map(|key| (*key).into()).collect();
        let snapshot = Snapshot::build(1, Facts { policies, ..Facts::default() });
        let subject = Subject {
            peer: Some(SpiffeName::new("cluster.local", "a", "client").unwrap()),
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        };
        decide(&snapshot, &server, &subject).verdict
    }

    fn word(verdict: &Verdict) -> String {
        match verdict {
            Verdict::Allow(permit) => permit.to_string(),
            Verdict::Refuse(refusal) => refusal.to_string(),
            Verdict::Unknown(policy) => format!("unknown {policy}"),
        }
    }

    #[test]
    fn the_order_of_policies() {
        use Action::{Allow, Deny};
        use PolicyScope::{Global, Namespace, WorkloadSelector};
        let me = Some("cluster.local/ns/a/sa/client");
        let other = Some("cluster.local/ns/a/sa/other");
        let mut elsewhere = policy("x", Namespace, Deny, None);
        elsewhere.namespace = "b".into();
        let mut dry = policy("dry", Global, Deny, None);
        dry.dry_run = true;
        let mut dry_allow = policy("dry", Global, Allow, other);
        dry_allow.dry_run = true;
        let mut empty = policy("empty", Global, Allow, None);
        empty.rules.clear();
        for (policies, attached, expected) in [
            (vec![], vec![], "allowed: no ALLOW policy applies"),
            (vec![policy("d", Global, Deny, me)], vec![], "explicitly denied by: a/d rule[0]"),
            (vec![policy("d", Global, Deny, other)], vec![], "allowed: no ALLOW policy applies"),
            (vec![policy("y", Namespace, Allow, me)], vec![], "allowed by a/y rule[0]"),
            (
                vec![policy("y", Namespace, Allow, other)],
                vec![],
                "allow policies exist, but none allowed (applied: a/y)",
            ),
            (
                vec![policy("y", Global, Allow, me), policy("d", Namespace, Deny, me)],
                vec![],
                "explicitly denied by: a/d rule[0]",
            ),
            (vec![policy("s", WorkloadSelector, Deny, me)], vec![], "allowed: no ALLOW policy applies"),
            (vec![policy("s", WorkloadSelector, Deny, me)], vec!["a/s"], "explicitly denied by: a/s rule[0]"),
            (vec![], vec!["a/missing"], "unknown a/missing"),
            (vec![policy("d", Global, Deny, me)], vec!["a/missing"], "explicitly denied by: a/d rule[0]"),
            (vec![elsewhere], vec![], "allowed: no ALLOW policy applies"),
            (vec![dry], vec![], "allowed: no ALLOW policy applies"),
            (vec![dry_allow], vec![], "allowed: no ALLOW policy applies"),
            (vec![empty], vec![], "allow policies exist, but none allowed (applied: a/empty)"),
        ] {
            assert_eq!(word(&ask(policies.clone(), &attached)), expected, "{policies:?}");
        }
    }
}
