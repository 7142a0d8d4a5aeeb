//! Authorization policies as plain facts. What they mean is said in `connection::authorize::matcher`.

use super::name::{SpiffeName, Text};
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

impl StringMatch {
    /// A test on a principal that may be written as in certificates and logs, as it is written in policies: without `spiffe://`.
    pub fn without_scheme(self) -> Self {
        const SCHEME: &str = "spiffe://";
        match self {
            Self::Exact(text) => Self::Exact(text.strip_prefix(SCHEME).map_or(text.clone(), Text::from)),
            Self::Prefix(text) => match text.strip_prefix(SCHEME) {
                Some(rest) => Self::Prefix(rest.into()),
                // No trust domain has a colon: this can only be the beginning of the scheme, which every identity has.
                None if text.contains(':') && SCHEME.starts_with(&*text) => Self::Prefix("".into()),
                None => Self::Prefix(text),
            },
            // Nothing stands before the scheme.
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

    /// Whether some identity fulfils this test on its principal.
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

    /// Whether some namespace, or that of a peer without identity, which is empty, fulfils this test.
    fn fits_a_namespace(&self) -> bool {
        self.text().is_empty() || SpiffeName::is_part(self.text())
    }
}

/// What stands between the slashes of a principal; `None` is a name.
const PRINCIPAL: [Option<&str>; 5] = [None, Some("ns"), None, Some("sa"), None];

/// Whether `texts`, the last of which may have been cut off, can stand where `places` are.
fn fits<'a>(
    texts: impl Iterator<Item = &'a str>,
    places: &[Option<&str>],
    is_cut_from: impl Fn(&str, &str) -> bool,
) -> bool {
    let texts: Vec<&str> = texts.collect();
    let whole = texts.len().saturating_sub(1);
    let one = |(at, (text, place)): (usize, (&&str, &Option<&str>))| match place {
        Some(word) if at < whole => text == word,
        Some(word) => is_cut_from(word, text),
        None => SpiffeName::is_part(text) || (at == whole && text.is_empty()),
    };
    texts.len() <= places.len() && texts.iter().zip(places).enumerate().all(one)
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

impl Match {
    /// Whether nothing is asked: such a match never matches.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.principals.is_empty()
            && self.service_accounts.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }

    /// What in this match no connection can ever fulfil, each with the reason: a DENY that hangs on it lets in whom it should
    /// keep out, and an ALLOW lets nobody in.
    pub fn impossible(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.is_empty() {
            found.push("a match that asks nothing never matches".to_owned());
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
            found.push("destination port 0 never matches: no connection has it".to_owned());
        }
        found
    }
}

fn both<T>(attribute: &Attribute<T>) -> impl Iterator<Item = &T> {
    attribute.any_of.iter().chain(&attribute.none_of)
}

fn why_no_principal(text: &str) -> &'static str {
    if text.contains("://") {
        return "a principal is written without spiffe://";
    }
    match why_no_part(text) {
        CHARACTERS => "a principal has the form <trust domain>/ns/<namespace>/sa/<service account>",
        why => why,
    }
}

/// What names are made of.
const CHARACTERS: &str = "names have a-z, 0-9, '.', '-' and '_', and no more than 253 of them";

fn why_no_part(text: &str) -> &'static str {
    if text.contains('*') {
        return "'*' is a character here; any value is Presence, a beginning {Prefix: text}, an end {Suffix: text}";
    }
    if text.chars().any(char::is_uppercase) {
        return "identities are in lower case, and compared exactly";
    }
    CHARACTERS
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn principal(test: StringMatch) -> Vec<String> {
        let principals = Attribute { any_of: vec![test], none_of: Vec::new() };
        Match { principals, ..Match::default() }.impossible()
    }

    #[test]
    fn what_can_never_match_is_named_with_the_reason() {
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
        assert!(of(&|_| {}).contains("asks nothing"));
        assert!(of(&|m| m.namespaces.none_of = vec![Exact("Shop".into())]).contains("\"Shop\" never matches"));
        assert!(of(&|m| m.namespaces.any_of = vec![Exact("".into())]).is_empty(), "whoever has no identity");
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
        /// Whatever an identity fulfils is never said to be impossible.
        #[test]
        fn what_some_identity_fulfils_is_possible(
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
