//! Policies in the mesh file: their YAML form, and the conversion into mesh facts. Pure. A policy with a value that can
//! never match is refused by name.

use crate::mesh::Policy;
use crate::mesh::policy::{self, Action, Attribute, Match, PolicyScope, Rule, ServiceAccountMatch};
use ipnet::IpNet;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::net::IpAddr;

#[derive(Deserialize)]
enum FilePolicyScope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum FileAction {
    Allow,
    Deny,
}

#[derive(Deserialize)]
enum FileString {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(IgnoredAny),
}

/// A string match. Presence may be written as a bare word or, as in ztunnel's dump, as `{Presence: []}`.
struct FileMatchText(FileString);

impl<'de> Deserialize<'de> for FileMatchText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FileMatchText;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("{Exact: text}, {Prefix: text}, {Suffix: text} or Presence")
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Self::Value, E> {
                match word {
                    "Presence" => Ok(FileMatchText(FileString::Presence(IgnoredAny))),
                    _ => Err(E::unknown_variant(word, &["Presence"])),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                FileString::deserialize(MapAccessDeserializer::new(map)).map(FileMatchText)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl From<FileMatchText> for policy::StringMatch {
    fn from(text: FileMatchText) -> Self {
        match text.0 {
            FileString::Exact(t) => Self::Exact(t.into()),
            FileString::Prefix(t) => Self::Prefix(t.into()),
            FileString::Suffix(t) => Self::Suffix(t.into()),
            FileString::Presence(_) => Self::Presence,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileAccount {
    namespace: String,
    service_account: String,
}

impl From<FileAccount> for ServiceAccountMatch {
    fn from(account: FileAccount) -> Self {
        Self { namespace: account.namespace.into(), service_account: account.service_account.into() }
    }
}

/// A CIDR, or a single address.
#[derive(Deserialize)]
#[serde(try_from = "String")]
pub(super) struct FileNet(IpNet);

impl TryFrom<String> for FileNet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        net.map(unmapped).map(Self).ok_or_else(|| format!("{text:?} is neither a CIDR nor an IP address"))
    }
}

/// Converts a range of IPv4-mapped IPv6 addresses into the IPv4 range, because connections have IPv4 addresses.
fn unmapped(net: IpNet) -> IpNet {
    let IpNet::V6(v6) = net else { return net };
    let (v4, length) = (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96));
    v4.zip(length).and_then(|(v4, length)| IpNet::new(v4.into(), length).ok()).unwrap_or(net)
}

impl From<FileNet> for IpNet {
    fn from(net: FileNet) -> Self {
        net.0
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FileMatch {
    namespaces: Vec<FileMatchText>,
    not_namespaces: Vec<FileMatchText>,
    principals: Vec<FileMatchText>,
    not_principals: Vec<FileMatchText>,
    service_accounts: Vec<FileAccount>,
    not_service_accounts: Vec<FileAccount>,
    source_ips: Vec<FileNet>,
    not_source_ips: Vec<FileNet>,
    destination_ips: Vec<FileNet>,
    not_destination_ips: Vec<FileNet>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

fn attribute<F, T: From<F>>(any_of: Vec<F>, none_of: Vec<F>) -> Attribute<T> {
    let all = |list: Vec<F>| list.into_iter().map(T::from).collect();
    Attribute { any_of: all(any_of), none_of: all(none_of) }
}

/// Principals may be written as in policies, or with `spiffe://`, as certificates and logs show them.
fn principals(any_of: Vec<FileMatchText>, none_of: Vec<FileMatchText>) -> Attribute<policy::StringMatch> {
    let all = |list: Vec<FileMatchText>| {
        list.into_iter().map(|text| policy::StringMatch::from(text).without_scheme()).collect()
    };
    Attribute { any_of: all(any_of), none_of: all(none_of) }
}

impl From<FileMatch> for Match {
    fn from(m: FileMatch) -> Self {
        Self {
            namespaces: attribute(m.namespaces, m.not_namespaces),
            principals: principals(m.principals, m.not_principals),
            service_accounts: attribute(m.service_accounts, m.not_service_accounts),
            source_ips: attribute(m.source_ips, m.not_source_ips),
            destination_ips: attribute(m.destination_ips, m.not_destination_ips),
            destination_ports: attribute(m.destination_ports, m.not_destination_ports),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FilePolicy {
    name: String,
    namespace: String,
    scope: FilePolicyScope,
    action: FileAction,
    dry_run: bool,
    rules: Vec<Vec<Vec<FileMatch>>>,
}

impl FilePolicy {
    pub(super) fn check(self) -> Result<Policy, String> {
        if self.name.is_empty() || self.namespace.is_empty() || self.name.contains('/') {
            return Err(format!(
                "policy {}/{}: name and namespace are required, and the name must not contain a slash",
                self.namespace, self.name
            ));
        }
        let clause = |matches: Vec<FileMatch>| matches.into_iter().map(Match::from).collect();
        let rule = |clauses: Vec<Vec<FileMatch>>| clauses.into_iter().map(clause).collect();
        let key = format!("{}/{}", self.namespace, self.name);
        let rules: Vec<Rule> = self.rules.into_iter().map(rule).collect();
        let mut impossible = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            let faults = rule.iter().flatten().flat_map(Match::impossible);
            impossible.extend(faults.map(|fault| format!("rule[{index}]: {fault}")));
        }
        if !impossible.is_empty() {
            return Err(format!("policy {key}: {}", impossible.join("; ")));
        }
        Ok(Policy {
            key: key.into(),
            name: self.name.into(),
            namespace: self.namespace.into(),
            scope: match self.scope {
                FilePolicyScope::Global => PolicyScope::Global,
                FilePolicyScope::Namespace => PolicyScope::Namespace,
                FilePolicyScope::WorkloadSelector => PolicyScope::WorkloadSelector,
            },
            action: match self.action {
                FileAction::Allow => Action::Allow,
                FileAction::Deny => Action::Deny,
            },
            dry_run: self.dry_run,
            rules,
        })
    }
}
