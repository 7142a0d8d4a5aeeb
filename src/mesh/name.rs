//! Names of the mesh: SPIFFE names of workloads, and namespace and host name of services.
//!
//! The only SPIFFE form accepted is `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` (source: Istio's
//! workload identities). Every identity in the program is made here, so a text that is refused here never becomes an
//! identity.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// A shared, immutable string. Names are cloned for every connection, so clones must be cheap.
pub type Text = Arc<str>;

/// The identity of a workload: the SPIFFE name that its certificate contains. Clones share its parts, because every open
/// connection keeps several.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeName(Arc<SpiffeParts>);

/// The parts of a [`SpiffeName`].
#[derive(PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeParts {
    /// Trust domain, e.g. `cluster.local`; always lower case.
    pub trust_domain: Text,
    /// Kubernetes namespace.
    pub namespace: Text,
    /// Kubernetes service account.
    pub service_account: Text,
}

/// Why a text is neither the SPIFFE name of a workload nor the key of a service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It does not begin with `spiffe://`.
    #[error("{0:?} does not begin with spiffe://")]
    Scheme(String),
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// A part is empty, too long, or contains a character that is not allowed.
    #[error("{0:?} has an empty part, or one with a character outside [a-z0-9.-_]")]
    Character(String),
    /// A `namespace/hostname` key without exactly one slash.
    #[error("{0:?} is not of the form namespace/hostname")]
    Key(String),
}

impl Deref for SpiffeName {
    type Target = SpiffeParts;

    fn deref(&self) -> &SpiffeParts {
        &self.0
    }
}

impl SpiffeName {
    /// Builds a name from its three parts, with the same checks as [`SpiffeName::parse`].
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, NameError> {
        let whole = || format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}");
        if ![trust_domain, namespace, service_account].into_iter().all(Self::is_part) {
            return Err(NameError::Character(whole()));
        }
        Ok(Self(Arc::new(SpiffeParts {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })))
    }

    /// Whether a text can be a trust domain, namespace or service account of a name.
    pub fn is_part(text: &str) -> bool {
        let fine = |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        !text.is_empty() && text.len() <= 253 && text.bytes().all(fine)
    }

    /// Parses `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`; anything else is an error.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| NameError::Scheme(text.to_owned()))?;
        let mut parts = rest.split('/');
        let (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NameError::Form(text.to_owned()));
        };
        Self::new(domain, namespace, account)
    }

    /// The name without `spiffe://`, which policies' principals are compared with.
    pub fn principal(&self) -> String {
        self.principal_in(&self.trust_domain)
    }

    /// The principal that the same account has in another trust domain.
    pub fn principal_in(&self, trust_domain: &str) -> String {
        format!("{trust_domain}/ns/{}/sa/{}", self.namespace, self.service_account)
    }
}

impl fmt::Display for SpiffeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Debug for SpiffeParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The key of a service, displayed as `namespace/hostname`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Kubernetes namespace of the service.
    pub namespace: Text,
    /// Fully qualified host name of the service.
    pub hostname: Text,
}

impl ServiceKey {
    /// Parses `namespace/hostname`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self { namespace: namespace.into(), hostname: hostname.into() })
            }
            _ => Err(NameError::Key(text.to_owned())),
        }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_names_are_parsed_exactly() {
        let good = "spiffe://cluster.local/ns/retail/sa/shop";
        assert_eq!(SpiffeName::parse(good).unwrap().to_string(), good);
        assert_eq!(SpiffeName::parse(good).unwrap().principal(), "cluster.local/ns/retail/sa/shop");
        for bad in [
            "",
            "cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a/sa/b\0",
            "spiffe://cluster.local/ns/a/sa/b%2e",
            "spiffe://cluster.local/ns/a/sa/*",
            "spiffe://cluster.local/ns/a/sa/b ",
        ] {
            assert!(SpiffeName::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn an_identity_is_one_pointer() {
        assert_eq!(size_of::<Option<SpiffeName>>(), size_of::<usize>());
    }

    #[test]
    fn service_keys_have_one_slash() {
        assert_eq!(ServiceKey::parse("a/b.c").unwrap().to_string(), "a/b.c");
        for bad in ["", "a", "/b", "a/", "a/b/c"] {
            assert!(ServiceKey::parse(bad).is_err(), "{bad:?}");
        }
    }
}
