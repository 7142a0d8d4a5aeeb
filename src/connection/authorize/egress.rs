//! May this pod connect to a destination outside the mesh? Answers from the egress policies alone. Pure, except for the
//! log line of [`authorize`].

use crate::mesh::egress::{EVERY_NAMESPACE, EgressAction, EgressPolicies, EgressPolicy, EgressRule};
use crate::mesh::{Text, Workload};
use crate::telemetry::limit::LogLimit;
use std::fmt;
use std::net::SocketAddr;

/// The rule of an egress policy that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressDecision {
    /// What it says.
    pub action: EgressAction,
    /// Whether it is only noted.
    pub dry_run: bool,
    namespace: Text,
    /// Index of the rule; `None` if none matched.
    index: Option<usize>,
    to: SocketAddr,
    /// Names that led the pod to the address.
    names: Vec<Text>,
}

impl EgressDecision {
    /// Whether the connection is refused.
    pub fn refuses(&self) -> bool {
        self.action == EgressAction::Deny && !self.dry_run
    }
}

impl fmt::Display for EgressDecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            EVERY_NAMESPACE => f.write_str("egress policy of all namespaces")?,
            namespace => write!(f, "egress policy of namespace {namespace}")?,
        }
        match self.index {
            Some(index) => write!(f, " rule[{index}]")?,
            None => f.write_str(" default")?,
        }
        write!(f, " for {}", self.to)?;
        match &self.names[..] {
            [] => f.write_str(" (no DNS name known)"),
            names => write!(f, " ({})", names.join(", ")),
        }
    }
}

/// What the policies say about a connection of a pod to an address outside the mesh, to which `names` have led the pod.
/// `None` if no policy applies.
pub fn decide(policies: &EgressPolicies, namespace: &str, to: SocketAddr, names: &[Text]) -> Option<EgressDecision> {
    let policy: &EgressPolicy = policies.of(namespace)?;
    let found = policy.rules.iter().enumerate().find(|(_, rule)| matches(rule, to, names));
    Some(EgressDecision {
        action: found.map_or(policy.otherwise, |(_, rule)| rule.action),
        dry_run: policy.dry_run,
        namespace: policy.namespace.clone(),
        index: found.map(|(index, _)| index),
        to,
        names: names.to_vec(),
    })
}

fn matches(rule: &EgressRule, to: SocketAddr, names: &[Text]) -> bool {
    let ip = to.ip().to_canonical();
    (rule.cidrs.is_empty() || rule.cidrs.iter().any(|range| range.contains(&ip)))
        && (rule.ports.is_empty() || rule.ports.iter().any(|(first, last)| (*first..=*last).contains(&to.port())))
        && (rule.hosts.is_empty() || rule.hosts.iter().any(|host| names.iter().any(|name| host.matches(name))))
}

/// Decides about a connection of the workload `source`, and logs what has to be logged.
pub fn authorize(
    policies: &EgressPolicies,
    source: &Workload,
    to: SocketAddr,
    names: impl FnOnce() -> Vec<Text>,
) -> Result<Option<EgressDecision>, Box<EgressDecision>> {
    if policies.of(&source.namespace).is_none() {
        return Ok(None);
    }
    let Some(decision) = decide(policies, &source.namespace, to, &names()) else { return Ok(None) };
    if decision.refuses() {
        return Err(Box::new(decision));
    }
    let note = match (decision.action, decision.dry_run) {
        (EgressAction::Deny, _) => "dry-run egress policy: would have denied this",
        (EgressAction::Log, _) => "connection to a destination outside the mesh",
        (EgressAction::Allow, _) => return Ok(Some(decision)),
    };
    static LIMIT: std::sync::LazyLock<LogLimit> = std::sync::LazyLock::new(LogLimit::default);
    if let Some(suppressed) = LIMIT.allow() {
        tracing::event!(target: "egress", tracing::Level::INFO, src.workload = &*source.name,
            src.namespace = &*source.namespace, dst.addr = %to, rule = %decision, suppressed, "{note}");
    }
    Ok(Some(decision))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::egress::HostMatch;

    fn policy(namespace: &str, otherwise: EgressAction, rules: Vec<EgressRule>) -> EgressPolicy {
        EgressPolicy { namespace: namespace.into(), dry_run: false, rules, otherwise }
    }

    fn rule(action: EgressAction, cidrs: &[&str], ports: &[(u16, u16)], hosts: &[&str]) -> EgressRule {
        let cidrs = cidrs.iter().map(|range| range.parse().unwrap()).collect();
        let hosts = hosts.iter().map(|host| HostMatch::parse(host).unwrap()).collect();
        EgressRule { action, cidrs, ports: ports.to_vec(), hosts }
    }

    fn said(policies: &EgressPolicies, namespace: &str, to: &str, names: &[&str]) -> String {
        let names: Vec<Text> = names.iter().map(|name| (*name).into()).collect();
        match decide(policies, namespace, to.parse().unwrap(), &names) {
            None => "no policy".into(),
            Some(decision) => format!("{:?} by {decision}", decision.action),
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        use EgressAction::{Allow, Deny, Log};
        let rules = vec![
            rule(Deny, &["10.0.0.0/8", "fd00::/8"], &[(1, 1023)], &[]),
            rule(Allow, &[], &[(443, 443)], &["api.example", "*.good.example"]),
            rule(Log, &["192.0.2.0/24"], &[], &[]),
        ];
        let all: EgressPolicies = [policy("shop", Deny, rules), policy("*", Log, vec![])].into_iter().collect();
        for (namespace, to, names, expected) in [
            ("shop", "10.1.1.1:80", &[][..], "Deny by egress policy of namespace shop rule[0]"),
            ("shop", "[fd00::1]:80", &[], "Deny by egress policy of namespace shop rule[0]"),
            ("shop", "[::ffff:10.1.1.1]:80", &[], "Deny by egress policy of namespace shop rule[0]"),
            ("shop", "10.1.1.1:8080", &[], "Deny by egress policy of namespace shop default"),
            (
                "shop",
                "198.51.100.1:443",
                &["x.example", "api.example"],
                "Allow by egress policy of namespace shop rule[1]",
            ),
            ("shop", "198.51.100.1:443", &["a.good.example"], "Allow by egress policy of namespace shop rule[1]"),
            ("shop", "198.51.100.1:443", &[], "Deny by egress policy of namespace shop default"),
            ("shop", "198.51.100.1:80", &["api.example"], "Deny by egress policy of namespace shop default"),
            ("shop", "192.0.2.9:25", &[], "Log by egress policy of namespace shop rule[2]"),
            ("other", "192.0.2.9:25", &[], "Log by egress policy of all namespaces default"),
        ] {
            let found = said(&all, namespace, to, names);
            assert!(found.starts_with(expected), "{namespace} to {to}: {found}");
        }
        assert!(said(&all, "shop", "1.1.1.1:443", &[]).contains("(no DNS name known)"));
        assert_eq!(said(&EgressPolicies::default(), "shop", "1.1.1.1:1", &[]), "no policy");
    }

    #[test]
    fn a_dry_run_refuses_nothing() {
        let mut dry = policy("shop", EgressAction::Deny, vec![]);
        dry.dry_run = true;
        let source = crate::mesh::snapshot::tests::workload("shop", "front", "10.0.0.1");
        let to: SocketAddr = "192.0.2.1:443".parse().unwrap();
        let decided = |policy: EgressPolicy| {
            let all: EgressPolicies = [policy].into_iter().collect();
            authorize(&all, &source, to, Vec::new).map(|decision| decision.map(|d| (d.action, d.refuses())))
        };
        assert_eq!(decided(dry.clone()), Ok(Some((EgressAction::Deny, false))));
        dry.dry_run = false;
        assert!(decided(dry).is_err_and(|decision| decision.refuses()));
    }
}
