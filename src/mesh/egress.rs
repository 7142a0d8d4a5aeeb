//! Egress policies: which destinations outside the mesh the pods of a namespace may connect to.
//!
//! This file does not evaluate policies; `connection::authorize::egress` does.

use super::name::Text;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The namespace of the policy for all namespaces that have none of their own.
pub const EVERY_NAMESPACE: &str = "*";

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressAction {
    /// It is carried.
    Allow,
    /// It is carried, and the log says so.
    Log,
    /// It is refused.
    Deny,
}

/// A test on the DNS name of a destination, in lower case and without a final dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMatch {
    /// This name.
    Exact(Text),
    /// Every name below this domain, which begins with a dot.
    Below(Text),
}

impl HostMatch {
    /// Parses `host.example` or `*.example`. `None` if the text is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches('.').to_ascii_lowercase();
        let (domain, below) = text.strip_prefix("*.").map_or((&*text, false), |domain| (domain, true));
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let is_name = domain.len() <= 253 && domain.split('.').all(is_label);
        is_name.then(|| if below { Self::Below(format!(".{domain}").into()) } else { Self::Exact(domain.into()) })
    }

    /// The text that [`HostMatch::parse`] takes.
    pub fn text(&self) -> String {
        match self {
            Self::Exact(text) => text.to_string(),
            Self::Below(text) => format!("*{text}"),
        }
    }

    /// Whether a name, in lower case and without a final dot, passes.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(text) => **text == *name,
            Self::Below(text) => name.len() > text.len() && name.ends_with(&**text),
        }
    }
}

/// A rule. A list that is empty tests nothing; of each other list, one entry must match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressRule {
    /// What happens to connections that match.
    pub action: EgressAction,
    /// Ranges of addresses.
    pub cidrs: Vec<IpNet>,
    /// First and last port of each range.
    pub ports: Vec<(u16, u16)>,
    /// DNS names that led the pod to the address.
    pub hosts: Vec<HostMatch>,
}

/// The egress policy of a namespace. The first rule that matches decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPolicy {
    /// The namespace, or [`EVERY_NAMESPACE`].
    pub namespace: Text,
    /// Whether it is only noted in the log what the policy would refuse.
    pub dry_run: bool,
    /// In their order.
    pub rules: Vec<EgressRule>,
    /// What happens to connections that no rule matches.
    pub otherwise: EgressAction,
}

/// All egress policies. Without any, every destination is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressPolicies {
    by_namespace: BTreeMap<Text, Arc<EgressPolicy>>,
    has_hosts: bool,
}

impl EgressPolicies {
    /// The policy for pods of a namespace.
    pub fn of(&self, namespace: &str) -> Option<&Arc<EgressPolicy>> {
        self.by_namespace.get(namespace).or_else(|| self.by_namespace.get(EVERY_NAMESPACE))
    }

    /// All policies, by namespace.
    pub fn all(&self) -> impl Iterator<Item = &EgressPolicy> {
        self.by_namespace.values().map(|policy| &**policy)
    }

    /// Whether any policy asks for DNS names.
    pub fn has_hosts(&self) -> bool {
        self.has_hosts
    }
}

impl FromIterator<EgressPolicy> for EgressPolicies {
    fn from_iter<I: IntoIterator<Item = EgressPolicy>>(policies: I) -> Self {
        let by_namespace: BTreeMap<_, _> =
            policies.into_iter().map(|policy| (policy.namespace.clone(), Arc::new(policy))).collect();
        let mut rules = by_namespace.values().flat_map(|policy| &policy.rules);
        let has_hosts = rules.any(|rule| !rule.hosts.is_empty());
        Self { by_namespace, has_hosts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_exact_or_below_a_domain() {
        let matches = |pattern: &str, name: &str| HostMatch::parse(pattern).unwrap().matches(name);
        assert!(matches("API.example.", "api.example") && !matches("api.example", "x.api.example"));
        assert!(matches("*.example", "a.b.example") && !matches("*.example", "example"));
        assert!(!matches("*.example", "badexample") && !matches("*.example", ".example"));
        for bad in ["", "*", "*.", "a..b", "a b", "*.*.example", "a.*.example", "."] {
            assert_eq!(HostMatch::parse(bad), None, "{bad}");
        }
    }
}
