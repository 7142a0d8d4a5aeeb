//! Authorization policies as plain facts. What they mean is said in `connection::authorize::matcher`.

use super::name::Text;
use ipnet::IpNet;

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyScope {
    /// Every workload.
    Global,
    /// Workloads of the policy's namespace.
    Namespace,
    /// Workloads that name the policy.
    WorkloadSelector,
}

/// What a match of the policy means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let in; and once there is any ALLOW policy, nothing else is let in.
    Allow,
    /// Refuse.
    Deny,
}

/// A test on a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal, byte for byte.
    Exact(Text),
    /// Begins with.
    Prefix(Text),
    /// Ends with.
    Suffix(Text),
    /// Is not empty.
    Presence,
}

/// A service account of any trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// Namespace, compared exactly.
    pub namespace: Text,
    /// Service account, compared exactly.
    pub service_account: Text,
}

/// Positive and negative tests on one attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute<T> {
    /// One of these must hit, where there are any.
    pub any_of: Vec<T>,
    /// None of these may hit.
    pub none_of: Vec<T>,
}

impl<T> Default for Attribute<T> {
    fn default() -> Self {
        Self { any_of: Vec::new(), none_of: Vec::new() }
    }
}

impl<T> Attribute<T> {
    /// Whether nothing is asked of this attribute.
    pub fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

/// One match: every attribute must pass; with no attribute at all it never matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Peer namespace; empty without identity.
    pub namespaces: Attribute<StringMatch>,
    /// Peer identity without `spiffe://`.
    pub principals: Attribute<StringMatch>,
    /// Peer namespace and service account, whatever the trust domain.
    pub service_accounts: Attribute<ServiceAccountMatch>,
    /// Source address.
    pub source_ips: Attribute<IpNet>,
    /// Destination address (the pod's own).
    pub destination_ips: Attribute<IpNet>,
    /// Destination port (the application's, not 15008).
    pub destination_ports: Attribute<u16>,
}

/// Matches of which one must hold; no match at all holds too.
pub type Clause = Vec<Match>;

/// Clauses that must all hold; no clause at all holds too.
pub type Rule = Vec<Clause>;

/// One authorization policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Name within its namespace.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// `namespace/name`.
    pub key: Text,
    /// Which workloads it applies to.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// Whether it is only evaluated and logged, never enforced.
    pub dry_run: bool,
    /// Rules of which one must hold; a policy without rules never matches.
    pub rules: Vec<Rule>,
}
