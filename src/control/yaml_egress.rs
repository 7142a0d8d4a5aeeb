//! Egress policies in the mesh file, or in a file of their own: their YAML form, and the conversion into mesh facts. Pure.

use super::yaml_policies::FileNet;
use crate::mesh::SpiffeName;
use crate::mesh::egress::{EVERY_NAMESPACE, EgressAction, EgressPolicy, EgressRule, HostMatch};
use serde::Deserialize;

#[derive(Clone, Copy, Deserialize)]
enum FileAction {
    Allow,
    Log,
    Deny,
}

impl From<FileAction> for EgressAction {
    fn from(action: FileAction) -> Self {
        match action {
            FileAction::Allow => Self::Allow,
            FileAction::Log => Self::Log,
            FileAction::Deny => Self::Deny,
        }
    }
}

/// A port, or the first and the last one of a range as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum FilePorts {
    One(u16),
    Range(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileRule {
    action: FileAction,
    #[serde(default)]
    cidrs: Vec<FileNet>,
    #[serde(default)]
    ports: Vec<FilePorts>,
    #[serde(default)]
    hosts: Vec<String>,
}

/// The egress policy of a namespace.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FileEgress {
    namespace: String,
    dry_run: bool,
    #[serde(default)]
    rules: Vec<FileRule>,
    default: FileAction,
}

impl FileEgress {
    /// Converts the policy. The error names it.
    pub(super) fn check(self) -> Result<EgressPolicy, String> {
        let about = |fault: String| format!("egress of namespace {}: {fault}", self.namespace);
        if self.namespace != EVERY_NAMESPACE && !SpiffeName::is_part(&self.namespace) {
            return Err(about(format!("the namespace is neither a name nor {EVERY_NAMESPACE:?}")));
        }
        let one =
            |(index, rule): (usize, FileRule)| rule.check().map_err(|fault| about(format!("rule[{index}]: {fault}")));
        let rules = self.rules.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
        let (namespace, otherwise) = (self.namespace.as_str().into(), self.default.into());
        Ok(EgressPolicy { namespace, dry_run: self.dry_run, rules, otherwise })
    }
}

impl FileRule {
    fn check(self) -> Result<EgressRule, String> {
        let ports = |ports: &FilePorts| {
            let (first, last) = match ports {
                FilePorts::One(port) => (*port, *port),
                FilePorts::Range(text) => text
                    .split_once('-')
                    .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
                    .ok_or_else(|| format!("{text:?} is not a range of ports, such as 8000-8080"))?,
            };
            if first == 0 || first > last { Err(format!("no port is in {first}-{last}")) } else { Ok((first, last)) }
        };
        let host = |text: &String| {
            HostMatch::parse(text).ok_or_else(|| format!("{text:?} is neither a host name nor *. and a domain"))
        };
        Ok(EgressRule {
            action: self.action.into(),
            cidrs: self.cidrs.into_iter().map(Into::into).collect(),
            ports: self.ports.iter().map(ports).collect::<Result<_, _>>()?,
            hosts: self.hosts.iter().map(host).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::control::yaml::{egress, facts};
    use crate::mesh::egress::EgressAction;

    const POLICY: &str = "egress:\n- namespace: shop\n  dryRun: false\n  default: Deny\n  rules:\n  - {action: Allow, \
                          cidrs: [192.0.2.0/24, \"2001:db8::1\"], ports: [443, 8000-8080], hosts: [\"*.example.com\"]}\n";

    #[test]
    fn policies_are_read() {
        let policy = facts(POLICY).unwrap().egress.remove(0);
        assert_eq!((policy.otherwise, policy.rules.len()), (EgressAction::Deny, 1));
        assert_eq!(policy.rules[0].ports, [(443, 443), (8000, 8080)]);
        assert_eq!(policy.rules[0].cidrs[1].to_string(), "2001:db8::1/128");
    }

    #[test]
    fn faults_are_named() {
        for (from, to, expected) in [
            ("namespace: shop", "namespace: Shop/x", "egress of namespace Shop/x: the namespace is neither"),
            ("192.0.2.0/24", "192.0.2.0/33", "192.0.2.0/33"),
            ("8000-8080", "8080-8000", "rule[0]: no port is in 8080-8000"),
            ("8000-8080", "http", "rule[0]: \"http\" is not a range of ports"),
            ("*.example.com", "*", "rule[0]: \"*\" is neither a host name"),
            ("action: Allow", "action: Permit", "Permit"),
            ("  default: Deny\n", "", "default"),
            ("  dryRun: false\n", "", "dryRun"),
        ] {
            let text = POLICY.replacen(from, to, 1);
            assert_ne!(text, POLICY);
            let error = facts(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{from} -> {to}: {error}");
        }
        let twice = POLICY.to_owned() + "- {namespace: shop, dryRun: true, default: Log}\n";
        assert!(facts(&twice).unwrap_err().to_string().contains("egress of namespace shop occurs twice"));
    }

    #[test]
    fn an_egress_file_has_the_same_section_and_nothing_else() {
        assert_eq!(egress(POLICY).unwrap(), facts(POLICY).unwrap().egress);
        assert_eq!(egress("egress: []").unwrap(), []);
        for (text, expected) in [
            ("".to_owned(), "the file is empty"),
            ("{}".to_owned(), "missing field `egress`"),
            ("egres: []".to_owned(), "egres"),
            (POLICY.to_owned() + "policies: []\n", "policies"),
            (POLICY.to_owned() + "- {namespace: shop, dryRun: true, default: Log}\n", "shop occurs twice"),
            (POLICY.replace("443", "0"), "egress of namespace shop: rule[0]: no port is in 0-0"),
        ] {
            let error = egress(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
