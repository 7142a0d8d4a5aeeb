//! Authorization policies as plain facts, and the tests in them that can never match.
//!
//! This file does not evaluate policies; `connection::authorize::matcher` does.

use super::name::{SpiffeName, Text};
use ipnet::IpNet;

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyScope {
    /// Every workload.
    Global,
    /// Workloads of the policy's namespace.
    Namespace,
    /// Workloads whose facts name the policy.
    WorkloadSelector,
}

/// The effect of a policy that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Permits the connection. Once any ALLOW policy applies, connections that none of them matches are refused.
    Allow,
    /// Refuses the connection.
    Deny,
}

/// A test on a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Is equal, byte for byte.
    Exact(Text),
    /// Begins with.
    Prefix(Text),
    /// Ends with.
    Suffix(Text),
    /// Is not empty.
    Presence,
}

impl StringMatch {
    /// Removes `spiffe://` from a test on a principal. Policies write principals without it, but certificates and logs
    /// show it, so users write it too.
    pub fn without_scheme(self) -> Self {
        const SCHEME: &str = "spiffe://";
        match self {
            Self::Exact(text) => Self::Exact(text.strip_prefix(SCHEME).map_or(text.clone(), Text::from)),
            Self::Prefix(text) => match text.strip_prefix(SCHEME) {
                Some(rest) => Self::Prefix(rest.into()),
                // Trust domains contain no colon, so this is the beginning of the scheme, which every identity has.
                None if text.contains(':') && SCHEME.starts_with(&*text) => Self::Prefix("".into()),
                None => Self::Prefix(text),
            },
            // Nothing precedes the scheme, so a suffix that contains it is the whole name.
            Self::Suffix(text) => match text.strip_prefix(SCHEME) {
                Some(rest) => Self::Exact(rest.into()),
                None => Self::Suffix(text),
            },
            Self::Presence => Self::Presence,
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text) => text,
            Self::Presence => "",
        }
    }

    /// Whether the principal of some identity can pass this test.
    fn fits_a_principal(&self) -> bool {
        match self {
            Self::Exact(text) => SpiffeName::parse(&format!("spiffe://{text}")).is_ok(),
            Self::Prefix(text) => fits(text.split('/'), &PRINCIPAL, |word, cut| word.starts_with(cut)),
            Self::Suffix(text) => {
                let mut reversed = PRINCIPAL;
                reversed.reverse();
                fits(text.rsplit('/'), &reversed, |word, cut| word.ends_with(cut))
            }
            Self::Presence => true,
        }
    }

    /// Whether some namespace can pass this test. The namespace of a peer without identity is empty.
    fn fits_a_namespace(&self) -> bool {
        self.text().is_empty() || SpiffeName::is_part(self.text())
    }
}

/// The parts of a principal between the slashes: a fixed word, or `None` for a name.
const PRINCIPAL: [Option<&str>; 5] = [None, Some("ns"), None, Some("sa"), None];

/// Whether `texts` can be the first of `parts`. The last text may be only a piece of its part, which `is_cut_from`
/// checks.
fn fits<'a>(
    texts: impl Iterator<Item = &'a str>,
    parts: &[Option<&str>],
    is_cut_from: impl Fn(&str, &str) -> bool,
) -> bool {
    let texts: Vec<&str> = texts.collect();
    let whole = texts.len().saturating_sub(1);
    let one = |(at, (text, part)): (usize, (&&str, &Option<&str>))| match part {
        Some(word) if at < whole => text == word,
        Some(word) => is_cut_from(word, text),
        None => SpiffeName::is_part(text) || (at == whole && text.is_empty()),
    };
    texts.len() <= parts.len() && texts.iter().zip(parts).enumerate().all(one)
}

/// A test on the service account, whatever the trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// Namespace, compared exactly.
    pub namespace: Text,
    /// Service account, compared exactly.
    pub service_account: Text,
}

/// The tests on one attribute of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute<T> {
    /// One of these must match, if there are any.
    pub any_of: Vec<T>,
    /// None of these may match.
    pub none_of: Vec<T>,
}

impl<T> Default for Attribute<T> {
    fn default() -> Self {
        Self { any_of: Vec::new(), none_of: Vec::new() }
    }
}

impl<T> Attribute<T> {
    /// Whether this attribute is not tested.
    pub fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

/// Tests on a connection: every attribute must pass. A match that tests no attribute never matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Namespace of the peer's identity; empty for a peer without identity.
    pub namespaces: Attribute<StringMatch>,
    /// Identity of the peer, without `spiffe://`.
    pub principals: Attribute<StringMatch>,
    /// Namespace and service account of the peer's identity, whatever the trust domain.
    pub service_accounts: Attribute<ServiceAccountMatch>,
    /// Source address.
    pub source_ips: Attribute<IpNet>,
    /// Destination address: the pod's own.
    pub destination_ips: Attribute<IpNet>,
    /// Destination port: the application's, never 15008.
    pub destination_ports: Attribute<u16>,
}

impl Match {
    /// Whether no attribute is tested; such a match never matches.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.principals.is_empty()
            && self.service_accounts.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }

    /// The tests in this match that no connection can ever pass, each with the reason. A DENY policy with such a test
    /// lets in the connections it should refuse, and an ALLOW policy lets in none.
    pub fn impossible(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.is_empty() {
            found.push("a match without any test never matches".to_owned());
        }
        for principal in both(&self.principals).filter(|principal| !principal.fits_a_principal()) {
            let text = principal.text();
            found.push(format!("principal {text:?} never matches: {}", why_no_principal(text)));
        }
        for namespace in both(&self.namespaces).filter(|namespace| !namespace.fits_a_namespace()) {
            let text = namespace.text();
            found.push(format!("namespace {text:?} never matches: {}", why_no_part(text)));
        }
        for account in both(&self.service_accounts) {
            for (what, text) in [("namespace", &account.namespace), ("service account", &account.service_account)] {
                if !SpiffeName::is_part(text) {
                    found.push(format!("{what} {text:?} of a service account never matches: {}", why_no_part(text)));
                }
            }
        }
        if both(&self.destination_ports).any(|port| *port == 0) {
            found.push("destination port 0 never matches: no connection has port 0".to_owned());
        }
        found
    }
}

fn both<T>(attribute: &Attribute<T>) -> impl Iterator<Item = &T> {
    attribute.any_of.iter().chain(&attribute.none_of)
}

fn why_no_principal(text: &str) -> &'static str {
    if text.contains("://") {
        return "principals are written without spiffe://";
    }
    match why_no_part(text) {
        CHARACTERS => "a principal has the form <trust domain>/ns/<namespace>/sa/<service account>",
        why => why,
    }
}

/// The characters that names consist of.
const CHARACTERS: &str = "names consist of a-z, 0-9, '.', '-' and '_', at most 253 characters";

fn why_no_part(text: &str) -> &'static str {
    if text.contains('*') {
        return "'*' is not a wildcard here; write Presence for any value, {Prefix: text} or {Suffix: text}";
    }
    if text.chars().any(char::is_uppercase) {
        return "identities are in lower case and compared exactly";
    }
    CHARACTERS
}

/// Matches of which at least one must hold. An empty clause holds.
pub type Clause = Vec<Match>;

/// Clauses that must all hold. An empty rule holds.
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
    /// What the policy does with connections that it matches.
    pub action: Action,
    /// Whether the policy is only evaluated and logged, not enforced.
    pub dry_run: bool,
    /// Rules of which at least one must hold. A policy without rules never matches.
    pub rules: Vec<Rule>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn principal(test: StringMatch) -> Vec<String> {
        let principals = Attribute { any_of: vec![test], none_of: Vec::new() };
        Match { principals, ..Match::default() }.impossible()
    }

    #[test]
    fn tests_that_can_never_match_are_named_with_the_reason() {
        use StringMatch::{Exact, Prefix, Suffix};
        let good = [
            Exact("td/ns/a/sa/b".into()),
            Prefix("".into()),
            Prefix("td".into()),
            Prefix("td/".into()),
            Prefix("td/n".into()),
            Prefix("td/ns/a/sa/".into()),
            Suffix("".into()),
            Suffix("b".into()),
            Suffix("/sa/b".into()),
            Suffix("s/a/sa/b".into()),
            Suffix("main.td/ns/a/sa/b".into()),
            StringMatch::Presence,
        ];
        for test in good {
            assert_eq!(principal(test.clone()), Vec::<String>::new(), "{test:?}");
        }
        let form = "has the form";
        for (test, why) in [
            (Exact("spiffe://td/ns/a/sa/b".into()), "without spiffe://"),
            (Exact("td/ns/a/sa/b/".into()), form),
            (Exact("td//ns/a/sa/b".into()), form),
            (Exact("/ns/a/sa/b".into()), form),
            (Exact("td/ns/A/sa/b".into()), "lower case"),
            (Exact("td/ns/a/sa/*".into()), "Presence"),
            (Exact("td/sa/a/ns/b".into()), form),
            (Exact("".into()), form),
            (Prefix("/".into()), form),
            (Prefix("td/ns//".into()), form),
            (Prefix("td/x".into()), form),
            (Prefix("td/ns/a/sa/b/".into()), form),
            (Suffix("/".into()), form),
            (Suffix("x/sa//b".into()), form),
            (Suffix("/xs/a/sa/b".into()), form),
            (Suffix("/td/ns/a/sa/b".into()), form),
        ] {
            let said = principal(test.clone());
            assert!(matches!(said.as_slice(), [one] if one.contains(why)), "{test:?}: {said:?}");
        }
        let of = |change: &dyn Fn(&mut Match)| {
            let mut m = Match::default();
            change(&mut m);
            m.impossible().join("; ")
        };
        assert!(of(&|_| {}).contains("without any test"));
        assert!(of(&|m| m.namespaces.none_of = vec![Exact("Shop".into())]).contains("\"Shop\" never matches"));
        assert!(of(&|m| m.namespaces.any_of = vec![Exact("".into())]).is_empty(), "peers without identity");
        assert!(of(&|m| m.destination_ports.any_of = vec![0, 80]).contains("port 0"));
        let account = ServiceAccountMatch { namespace: "a".into(), service_account: "".into() };
        assert!(of(&|m| m.service_accounts.any_of = vec![account.clone()]).contains("service account \"\""));
    }

    #[test]
    fn a_principal_may_be_written_with_its_scheme() {
        use StringMatch::{Exact, Prefix, Suffix};
        for (written, meant) in [
            (Exact("spiffe://td/ns/a/sa/b".into()), Exact("td/ns/a/sa/b".into())),
            (Exact("td/ns/a/sa/b".into()), Exact("td/ns/a/sa/b".into())),
            (Prefix("spiffe://td/".into()), Prefix("td/".into())),
            (Prefix("spiffe:/".into()), Prefix("".into())),
            (Prefix("spiffe".into()), Prefix("spiffe".into())),
            (Suffix("spiffe://td/ns/a/sa/b".into()), Exact("td/ns/a/sa/b".into())),
            (Suffix("/sa/b".into()), Suffix("/sa/b".into())),
            (StringMatch::Presence, StringMatch::Presence),
        ] {
            assert_eq!(written.clone().without_scheme(), meant, "{written:?}");
        }
    }

    proptest! {
        /// A test that some identity passes is never reported as impossible.
        #[test]
        fn a_test_that_some_identity_passes_is_possible(
            td in "[a-z.]{1,3}", ns in "[a-z]{1,2}", sa in "[a-z-]{1,2}", from in 0usize..20, to in 0usize..20,
        ) {
            let whole = format!("{td}/ns/{ns}/sa/{sa}");
            let (from, to) = (from.min(whole.len()), to.min(whole.len()));
            for test in [
                StringMatch::Exact(whole.as_str().into()),
                StringMatch::Prefix(whole[..to].into()),
                StringMatch::Suffix(whole[from..].into()),
            ] {
                prop_assert_eq!(principal(test), Vec::<String>::new());
            }
        }
    }
}
