//! Which pods are in: Istio ambient's rules, as a pure function of a pod, the labels of its namespace, and the settings.

use crate::mesh::Text;
use crate::node::pods::Settings;
use crate::node::redirect::Interface;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// Label by which a namespace or a pod says whether it is in.
const MODE: &str = "istio.io/dataplane-mode";
/// Status annotation of a pod that is in.
pub const STATUS: &str = "ambient.istio.io/redirection";
/// Annotation of a pod with a sidecar.
const SIDECAR: &str = "sidecar.istio.io/status";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// The uid that a static pod's processes run under, where the API shows its mirror.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// What is looked at of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Uid.
    pub uid: Text,
    /// Uid that its processes' cgroups name, where that is another one.
    pub static_uid: Option<Text>,
    /// Name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Service account.
    pub service_account: Text,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// Whether it is in the host's network namespace.
    pub host_network: bool,
    /// Whether its containers have ended for good.
    pub ended: bool,
    /// Its addresses, where it has them yet.
    pub ips: Vec<IpAddr>,
    /// Ids of its containers.
    pub containers: Vec<Text>,
}

impl PodFacts {
    /// What is looked at of a pod of the API; `None` for one without uid or name, which the API never sends.
    pub fn of(pod: Pod) -> Option<Self> {
        let text = |text: Option<String>| text.map(|text| Text::from(text.as_str()));
        let (metadata, spec, status) = (pod.metadata, pod.spec.unwrap_or_default(), pod.status.unwrap_or_default());
        let one = status.pod_ip.into_iter();
        let ips: BTreeSet<IpAddr> =
            one.chain(status.pod_ips.into_iter().flatten().map(|ip| ip.ip)).filter_map(|ip| ip.parse().ok()).collect();
        let all = [status.container_statuses, status.init_container_statuses, status.ephemeral_container_statuses];
        let ids = all.into_iter().flatten().flatten().filter_map(|container| container.container_id);
        let annotations = metadata.annotations.unwrap_or_default();
        let account = spec.service_account_name.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".into());
        Some(Self {
            uid: text(metadata.uid)?,
            static_uid: annotations.get(STATIC_UID).map(|uid| uid.as_str().into()),
            name: text(metadata.name)?,
            namespace: text(metadata.namespace)?,
            service_account: account.as_str().into(),
            labels: metadata.labels.unwrap_or_default(),
            annotations,
            host_network: spec.host_network.unwrap_or(false),
            ended: status.phase.is_some_and(|phase| phase == "Succeeded" || phase == "Failed"),
            ips: ips.into_iter().collect(),
            containers: ids.map(|id| id.split_once("://").map_or(id.as_str(), |(_, id)| id).into()).collect(),
        })
    }

    /// Its own settings. What is not understood is named by `complain` and counts as absent.
    pub fn settings(&self, mut complain: impl FnMut(&str, &str)) -> Settings {
        let mut boolean = |name: &str| {
            let said = self.annotations.get(name)?;
            let read = go_bool(said);
            if read.is_none() {
                complain(name, said);
            }
            read
        };
        let (dns, bypass_inbound) = (boolean(DNS_CAPTURE), boolean(BYPASS_INBOUND).unwrap_or(false));
        let mut virtual_interfaces = Vec::new();
        let names = self.annotations.get(VIRTUAL_INTERFACES).map(String::as_str).unwrap_or_default();
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match Interface::new(name) {
                Some(interface) => virtual_interfaces.push(interface),
                None => complain(VIRTUAL_INTERFACES, name),
            }
        }
        Settings { dns, bypass_inbound, virtual_interfaces }
    }

    /// What its status annotation says.
    pub fn said(&self) -> Option<&str> {
        self.annotations.get(STATUS).map(String::as_str)
    }
}

/// As Go's `strconv.ParseBool`, which Istio reads its annotations with.
fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Who is in.
#[derive(Clone, Debug)]
pub struct Enablement {
    /// Any of these lets a pod in.
    pub selectors: Vec<Selector>,
    /// Namespaces of which no pod is in.
    pub excluded: BTreeSet<String>,
    /// Namespace of the daemon itself.
    pub own_namespace: String,
}

/// Lets in what both sides select.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Of pods.
    #[serde(default)]
    pub pod_selector: LabelSelector,
    /// Of their namespaces.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
}

/// A selector of Kubernetes; an empty one selects all.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    #[serde(default)]
    match_labels: Labels,
    #[serde(default)]
    match_expressions: Vec<Expression>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expression {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    fn selects(&self, labels: &Labels) -> bool {
        let equal = self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value));
        equal && self.match_expressions.iter().all(|expression| expression.holds(labels))
    }

    fn check(&self) -> Result<(), String> {
        for Expression { key, operator, values } in &self.match_expressions {
            let needs_values = matches!(operator, Operator::In | Operator::NotIn);
            if needs_values == values.is_empty() {
                let what = if needs_values { "needs values" } else { "takes no values" };
                return Err(format!("{operator:?} on {key:?} {what}"));
            }
        }
        Ok(())
    }
}

impl Expression {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            // As in Kubernetes, this holds for what has no such label.
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// Istio's own rules: a pod that says ambient; a pod of a namespace that says ambient, unless the pod says none.
pub fn default_selectors() -> Vec<Selector> {
    let says = |value: &str| LabelSelector {
        match_labels: [(MODE.to_owned(), value.to_owned())].into(),
        match_expressions: Vec::new(),
    };
    let expression = Expression { key: MODE.into(), operator: Operator::NotIn, values: vec!["none".into()] };
    let not_none = LabelSelector { match_labels: Labels::new(), match_expressions: vec![expression] };
    vec![
        Selector { pod_selector: says("ambient"), namespace_selector: LabelSelector::default() },
        Selector { pod_selector: not_none, namespace_selector: says("ambient") },
    ]
}

/// Reads a list of selectors.
pub fn read_selectors(text: &str) -> Result<Vec<Selector>, String> {
    let selectors: Vec<Selector> = crate::task::files::from_yaml(text)?;
    for selector in &selectors {
        selector.pod_selector.check()?;
        selector.namespace_selector.check()?;
    }
    Ok(selectors)
}

impl Enablement {
    /// Whether a pod is to be captured; otherwise why not.
    pub fn is_in(&self, pod: &PodFacts, namespace: &Labels) -> Result<(), &'static str> {
        if pod.ended {
            return Err("its containers have ended");
        }
        if pod.host_network {
            return Err("it is in the host's network namespace");
        }
        if pod.annotations.contains_key(SIDECAR) {
            return Err("it has a sidecar");
        }
        if self.excluded.contains(&*pod.namespace) {
            return Err("its namespace is excluded");
        }
        if self.is_node_tunnel(pod) {
            return Err("it is a node tunnel itself");
        }
        let selects = |s: &Selector| s.pod_selector.selects(&pod.labels) && s.namespace_selector.selects(namespace);
        if self.selectors.iter().any(selects) { Ok(()) } else { Err("no selector takes it") }
    }

    fn is_node_tunnel(&self, pod: &PodFacts) -> bool {
        let label = |key: &str| pod.labels.get(key).map(String::as_str);
        let named = label("app") == Some("ztunnel") || label("app.kubernetes.io/name") == Some("culvert");
        *pod.namespace == *self.own_namespace && named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn enablement(selectors: Vec<Selector>) -> Enablement {
        let excluded = ["kube-system".to_owned()].into();
        Enablement { selectors, excluded, own_namespace: "istio-system".into() }
    }

    #[test]
    fn istios_rules_as_a_table() {
        let rules = enablement(default_selectors());
        type Pairs = &'static [(&'static str, &'static str)];
        let cases: [(Pairs, Pairs, bool); 9] = [
            (&[], &[], false),
            (&[(MODE, "ambient")], &[], true),
            (&[], &[(MODE, "ambient")], true),
            (&[(MODE, "none")], &[(MODE, "ambient")], false),
            (&[(MODE, "ambient")], &[(MODE, "none")], true),
            (&[(MODE, "other")], &[(MODE, "ambient")], true),
            (&[(MODE, "")], &[(MODE, "ambient")], true),
            (&[(MODE, "Ambient")], &[], false),
            (&[("istio-injection", "enabled")], &[(MODE, "ambient")], true),
        ];
        for (pod, namespace, expected) in cases {
            let facts = PodFacts { labels: labels(pod), namespace: "a".into(), ..PodFacts::default() };
            assert_eq!(rules.is_in(&facts, &labels(namespace)).is_ok(), expected, "{pod:?} in {namespace:?}");
        }
    }

    #[test]
    fn what_is_excluded_stays_out_whatever_its_labels() {
        let rules = enablement(vec![Selector::default()]);
        let base = || PodFacts { namespace: "a".into(), ..PodFacts::default() };
        assert_eq!(rules.is_in(&base(), &Labels::new()), Ok(()), "empty selectors take everything");
        for (pod, word) in [
            (PodFacts { host_network: true, ..base() }, "host"),
            (PodFacts { ended: true, ..base() }, "ended"),
            (PodFacts { annotations: labels(&[(SIDECAR, "")]), ..base() }, "sidecar"),
            (PodFacts { namespace: "kube-system".into(), ..base() }, "excluded"),
            (
                PodFacts { namespace: "istio-system".into(), labels: labels(&[("app", "ztunnel")]), ..base() },
                "node tunnel",
            ),
        ] {
            assert!(rules.is_in(&pod, &Labels::new()).is_err_and(|why| why.contains(word)), "{word}");
        }
        let elsewhere = PodFacts { labels: labels(&[("app", "ztunnel")]), ..base() };
        assert_eq!(rules.is_in(&elsewhere, &Labels::new()), Ok(()), "the label alone is nobody's privilege");
    }

    #[test]
    fn selectors_are_kubernetes_own() {
        let text = "[{podSelector: {matchExpressions: [{key: a, operator: In, values: [x, y]}, {key: b, operator: DoesNotExist}]},\
                     namespaceSelector: {matchLabels: {c: d}}}]";
        let rules = enablement(read_selectors(text).unwrap());
        for (pod, expected) in
            [(&[("a", "x")][..], true), (&[("a", "z")], false), (&[("a", "y"), ("b", "")], false), (&[], false)]
        {
            let facts = PodFacts { labels: labels(pod), namespace: "n".into(), ..PodFacts::default() };
            assert_eq!(rules.is_in(&facts, &labels(&[("c", "d")])).is_ok(), expected, "{pod:?}");
            assert!(rules.is_in(&facts, &Labels::new()).is_err());
        }
        for (bad, word) in [
            ("[{podSelector: {matchExpressions: [{key: a, operator: Gt, values: [x]}]}}]", "Gt"),
            ("[{podSelector: {matchExpressions: [{key: a, operator: In}]}}]", "needs values"),
            ("[{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [x]}]}}]", "takes no values"),
            ("[{podSelecter: {}}]", "podSelecter"),
        ] {
            let error = read_selectors(bad).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn own_settings_are_read_as_go_reads_them() {
        let pod = |pairs: &[(&str, &str)]| PodFacts { annotations: labels(pairs), ..PodFacts::default() };
        let mut said = Vec::new();
        let settings =
            pod(&[(DNS_CAPTURE, "F"), (BYPASS_INBOUND, "yes"), (VIRTUAL_INTERFACES, "br0, \"; flush ruleset,tun-1")])
                .settings(|name, value| said.push(format!("{name}={value}")));
        assert_eq!(settings.dns, Some(false));
        assert!(!settings.bypass_inbound);
        assert_eq!(settings.virtual_interfaces, [Interface::new("br0").unwrap(), Interface::new("tun-1").unwrap()]);
        assert_eq!(said, [format!("{BYPASS_INBOUND}=yes"), format!("{VIRTUAL_INTERFACES}=\"; flush ruleset")]);
    }
}
