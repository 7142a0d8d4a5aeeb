//! Facts and policies in, permit or refusal out. Pure: no clock, no I/O, no waiting.
//!
//! The order is that of ztunnel's L4 authorization. Dry-run policies are only noted. A DENY policy that matches
//! refuses. If no ALLOW policy applies, everything is allowed; otherwise one of them must match. A policy that the
//! workload names but that is not known is never skipped: the answer is then [`Verdict::Unknown`].

use super::egress::EgressDecision;
use super::matcher::{self, MatchInput, Subject};
use crate::mesh::policy::Action;
use crate::mesh::{Policy, Snapshot, Text, Workload};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, LazyLock};

/// The rule that decided, for logs.
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

/// The authorization of one connection. Only this module can make one, and dialling the pod's application requires one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    rule: Option<RuleName>,
}

impl Permit {
    /// The ALLOW rule that matched; `None` if no ALLOW policy applies to the workload.
    pub fn rule(&self) -> Option<&RuleName> {
        self.rule.as_ref()
    }

    /// What it says, for those who look at the connection. Without a rule, all connections share the text.
    pub fn text(&self) -> Text {
        static WITHOUT_RULE: LazyLock<Text> = LazyLock::new(|| Permit { rule: None }.to_string().into());
        if self.rule.is_some() { self.to_string().into() } else { WITHOUT_RULE.clone() }
    }
}

impl fmt::Display for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) => write!(f, "allowed by {rule}"),
            None => f.write_str("allowed: no ALLOW policy applies"),
        }
    }
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A DENY rule matched.
    #[error("explicitly denied by: {0}")]
    Denied(RuleName),
    /// ALLOW policies apply, and none of them matched.
    #[error("allow policies exist, but none allowed (applied: {0})")]
    NotAllowed(String),
    /// The workload names a policy that did not become known in time.
    #[error("policy {0} is attached to the workload but not known")]
    PolicyUnknown(Text),
    /// The destination workload is not known.
    #[error("workload not found")]
    WorkloadUnknown,
    /// An egress policy denies a destination outside the mesh.
    #[error("denied by {0}")]
    Egress(Box<EgressDecision>),
}

/// The decision of the policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed.
    Allow(Permit),
    /// Refused.
    Refuse(Refusal),
    /// Cannot be decided until this policy is known.
    Unknown(Text),
}

/// A verdict, with the notes of dry-run policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The verdict that is enforced.
    pub verdict: Verdict,
    /// What each matching dry-run policy would have done, for the log.
    pub dry_run: Vec<String>,
}

/// Everything that decides about connections to one workload, except the connection itself: the policies that apply to
/// the workload, and the trust domains that count as the same. All connections to the workload share one value, for as
/// long as none of these facts changes.
#[derive(Debug, PartialEq, Eq)]
pub struct Applicable {
    /// Policies by action, each list ordered by key, so that the verdict and the rule that it names do not depend on
    /// the order in which facts arrived.
    deny: Vec<Arc<Policy>>,
    allow: Vec<Arc<Policy>>,
    dry_run: Vec<Arc<Policy>>,
    /// The first policy that the workload names and that is not known.
    missing: Option<Text>,
    /// The workload's own trust domain, and its aliases.
    domains: Vec<Text>,
}

impl Applicable {
    /// Collects what applies to a workload.
    pub fn for_workload(snapshot: &Snapshot, workload: &Workload) -> Self {
        let mut policies: Vec<&Arc<Policy>> = snapshot.policies_for_namespace(&workload.namespace).collect();
        let mut missing = None;
        for key in &workload.policies {
            match snapshot.policy(key) {
                Some(policy) => policies.push(policy),
                None => missing = missing.or(Some(key.clone())),
            }
        }
        policies.sort_by(|a, b| a.key.cmp(&b.key));
        policies.dedup_by(|a, b| a.key == b.key);
        let of = |dry_run: bool, action: Option<Action>| {
            let wanted = |p: &&&Arc<Policy>| p.dry_run == dry_run && action.is_none_or(|action| p.action == action);
            policies.iter().filter(wanted).map(|policy| (*policy).clone()).collect()
        };
        let aliases = snapshot.trust_domain_aliases.iter().filter(|alias| **alias != workload.trust_domain);
        Self {
            deny: of(false, Some(Action::Deny)),
            allow: of(false, Some(Action::Allow)),
            dry_run: of(true, None),
            missing,
            domains: std::iter::once(&workload.trust_domain).chain(aliases).cloned().collect(),
        }
    }

    /// Most policies that a full verdict evaluates. It is the unit in which `revoke` measures work.
    pub fn cost(&self) -> usize {
        self.deny.len() + self.allow.len()
    }

    /// The verdict on one connection.
    pub fn verdict(&self, subject: &Subject) -> Verdict {
        self.enforce(&self.deny, &MatchInput::new(subject, &self.domains))
    }

    /// The verdict on one connection, with the notes of dry-run policies.
    pub fn decide(&self, subject: &Subject) -> Decision {
        let input = MatchInput::new(subject, &self.domains);
        Decision { verdict: self.enforce(&self.deny, &input), dry_run: notes(&self.dry_run, &input) }
    }

    /// The verdict, evaluating only these DENY policies.
    fn enforce(&self, deny: &[Arc<Policy>], input: &MatchInput<'_>) -> Verdict {
        if let Some(rule) = deny.iter().find_map(|policy| matching_rule(policy, input)) {
            return Verdict::Refuse(Refusal::Denied(rule));
        }
        if let Some(missing) = &self.missing {
            return Verdict::Unknown(missing.clone());
        }
        if self.allow.is_empty() {
            return Verdict::Allow(Permit { rule: None });
        }
        match self.allow.iter().find_map(|policy| matching_rule(policy, input)) {
            Some(rule) => Verdict::Allow(Permit { rule: Some(rule) }),
            None => {
                let names: Vec<&str> = self.allow.iter().map(|policy| &*policy.key).collect();
                Verdict::Refuse(Refusal::NotAllowed(names.join(", ")))
            }
        }
    }
}

/// The difference between two [`Applicable`] values of one workload. It allows a live connection to be re-evaluated by
/// evaluating only the policies that changed.
#[derive(Debug)]
pub struct PolicyChanges {
    now: Arc<Applicable>,
    /// DENY policies that are new or changed.
    deny: Vec<Arc<Policy>>,
    /// Keys of ALLOW policies that are gone or changed.
    allow: HashSet<Text>,
    /// Whether earlier verdicts are no longer valid at all, because the trust domains changed.
    all: bool,
}

impl PolicyChanges {
    /// The changes from `before` to `now`.
    pub fn between(before: &Applicable, now: &Arc<Applicable>) -> Self {
        let held: HashMap<&Text, &Arc<Policy>> = now.allow.iter().map(|policy| (&policy.key, policy)).collect();
        let is_other = |policy: &&Arc<Policy>| held.get(&policy.key) != Some(policy);
        let allow = before.allow.iter().filter(is_other).map(|policy| policy.key.clone()).collect();
        let held: HashMap<&Text, &Arc<Policy>> = before.deny.iter().map(|policy| (&policy.key, policy)).collect();
        let is_new = |policy: &&Arc<Policy>| held.get(&policy.key) != Some(policy);
        let deny = now.deny.iter().filter(is_new).cloned().collect();
        Self { now: now.clone(), deny, allow, all: before.domains != now.domains }
    }

    /// Most policies that [`PolicyChanges::verdict`] evaluates for a connection that was allowed `by` this rule.
    pub fn cost(&self, by: Option<&RuleName>) -> usize {
        match (self.all, self.is_still_allowed(by)) {
            (true, _) => self.now.cost(),
            (false, true) => self.deny.len(),
            (false, false) => self.deny.len() + self.now.allow.len(),
        }
    }

    /// The current verdict on a connection that was allowed before, `by` this rule. No DENY policy matched it then, so
    /// only changed ones can match now; and the rule that allowed it still does, unless it has changed.
    pub fn verdict(&self, subject: &Subject, by: Option<&RuleName>) -> Verdict {
        if self.all {
            return self.now.verdict(subject);
        }
        let still_allowed = self.is_still_allowed(by) && self.now.missing.is_none();
        if still_allowed && self.deny.is_empty() {
            return Verdict::Allow(Permit { rule: by.cloned() });
        }
        let input = MatchInput::new(subject, &self.now.domains);
        if !still_allowed {
            return self.now.enforce(&self.deny, &input);
        }
        match self.deny.iter().find_map(|policy| matching_rule(policy, &input)) {
            Some(rule) => Verdict::Refuse(Refusal::Denied(rule)),
            None => Verdict::Allow(Permit { rule: by.cloned() }),
        }
    }

    fn is_still_allowed(&self, by: Option<&RuleName>) -> bool {
        match by {
            Some(rule) => !self.allow.contains(&rule.policy),
            None => self.now.allow.is_empty(),
        }
    }
}

fn notes(policies: &[Arc<Policy>], input: &MatchInput<'_>) -> Vec<String> {
    let note = |policy: &Arc<Policy>| {
        let rule = matching_rule(policy, input)?;
        Some(match policy.action {
            Action::Deny => format!("{rule} would have denied this"),
            Action::Allow => format!("{rule} would have allowed this"),
        })
    };
    policies.iter().filter_map(note).collect()
}

fn matching_rule(policy: &Policy, input: &MatchInput<'_>) -> Option<RuleName> {
    let index = policy.rules.iter().position(|rule| matcher::rule_matches(rule, input))?;
    Some(RuleName { policy: policy.key.clone(), index })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::{Match, PolicyScope, StringMatch};
    use crate::mesh::snapshot::tests::workload;
    use crate::mesh::{Facts, SpiffeName};
    use proptest::prelude::*;

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
        Applicable::for_workload(&snapshot, &server).verdict(&subject)
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

    const PEERS: [&str; 3] =
        ["cluster.local/ns/a/sa/client", "old.local/ns/a/sa/client", "cluster.local/ns/a/sa/other"];

    /// A state of the facts: policies (with few names, so that they replace each other), the policies that the workload
    /// names, and whether the trust domain has an alias.
    fn states() -> impl Strategy<Value = (Vec<Policy>, Vec<Text>, bool)> {
        let one = (0..5usize, 0..3usize, any::<bool>(), prop::option::of(0..3usize), prop::bool::weighted(0.2));
        let one = one.prop_map(|(name, scope, deny, who, dry_run)| {
            let scope = [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector][scope];
            let action = if deny { Action::Deny } else { Action::Allow };
            let mut policy = policy(&format!("p{name}"), scope, action, who.map(|who| PEERS[who]));
            policy.dry_run = dry_run;
            policy
        });
        let names = prop::collection::vec((0..5usize).prop_map(|n| Text::from(format!("a/p{n}"))), 0..3);
        (prop::collection::vec(one, 0..6), names, any::<bool>()).prop_map(|(mut policies, names, alias)| {
            policies.sort_by(|a, b| a.key.cmp(&b.key));
            policies.dedup_by(|a, b| a.key == b.key);
            (policies, names, alias)
        })
    }

    fn state((policies, names, alias): (Vec<Policy>, Vec<Text>, bool)) -> Arc<Applicable> {
        let mut server = workload("a", "server", "10.0.0.2");
        server.policies = names;
        let mut snapshot = Snapshot::build(1, Facts { policies, ..Facts::default() });
        snapshot.trust_domain_aliases = if alias { vec!["old.local".into()].into() } else { Arc::default() };
        Arc::new(Applicable::for_workload(&snapshot, &server))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn judging_by_what_has_changed_is_judging_by_everything(
            mut all in prop::collection::vec(states(), 2..6), same in prop::collection::vec(any::<bool>(), 6),
        ) {
            // Often only the aliases change.
            for at in (1..all.len()).filter(|at| same[*at]) {
                let (policies, names, _) = all[at - 1].clone();
                all[at] = (policies, names, all[at].2);
            }
            for peer in PEERS {
                let peer = SpiffeName::parse(&format!("spiffe://{peer}")).unwrap();
                let (source, destination) = ("10.0.0.1".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
                let subject = Subject { peer: Some(peer), source, destination };
                // What the connection was allowed by, while it is allowed.
                let mut standing: Option<(Arc<Applicable>, Permit)> = None;
                for facts in all.clone() {
                    let now = state(facts);
                    let full = now.verdict(&subject);
                    let verdict = match &standing {
                        None => full.clone(),
                        Some((before, permit)) => PolicyChanges::between(before, &now).verdict(&subject, permit.rule()),
                    };
                    match (&verdict, &full) {
                        // More than one rule may allow it; which one is named does not matter.
                        (Verdict::Allow(_), Verdict::Allow(_)) => {}
                        _ => prop_assert_eq!(&verdict, &full),
                    }
                    standing = match verdict {
                        Verdict::Allow(permit) => Some((now, permit)),
                        _ => None,
                    };
                }
            }
        }
    }
}
