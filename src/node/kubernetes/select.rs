//! Which pods are in: Istio ambient's rules, as a pure function of a pod, the labels of its namespace, and the settings.

use crate::mesh::Text;
use crate::node::pods::{Powers, Settings};
use crate::node::redirect::{INTERFACES_MAX, Interface};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodSpec, SecurityContext};
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
/// Init container of a sidecar that istio-cni is to redirect (in the place of istio-init): it fails where nobody has.
const VALIDATION: &str = "istio-validation";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// The uid that a static pod's processes run under, where the API shows its mirror.
const STATIC_UID: &str = "kubernetes.io/config.hash";
/// Marks such a mirror, and says where the kubelet has the pod from.
const MIRROR: &str = "kubernetes.io/config.mirror";
const SOURCE: &str = "kubernetes.io/config.source";
/// Sources of static pods (source: the kubelet's `types.FileSource` and `HTTPSource`).
const STATIC_SOURCES: [&str; 2] = ["file", "http"];

/// Labels by which node tunnels are known.
const NAMES: [&str; 2] = ["app", "app.kubernetes.io/name"];
/// Letters of a value that are named where it is not understood.
const NAMED_MAX: usize = 100;
/// Names that are named.
const NAMES_MAX: usize = 4;

/// An annotation that is not understood, and what of it is not.
pub type Fault = (&'static str, String);

/// What is looked at of a pod. What its owner writes is kept only as far as it means something.
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
    /// What its status annotation says.
    pub said: Option<Text>,
    /// Whether it has a sidecar.
    pub has_sidecar: bool,
    /// Whether its sidecar counts on an istio-cni that has not redirected it: the container that looks for that has failed.
    pub is_not_redirected: bool,
    /// Its own settings.
    pub settings: Settings,
    /// What of its annotations is not understood, and counts as absent: at most one for each.
    pub faults: Vec<Fault>,
    /// What its containers may do to its own network.
    pub powers: Powers,
    /// Whether it is in the host's network namespace.
    pub host_network: bool,
    /// Whether its containers have ended for good.
    pub ended: bool,
    /// Whether it takes part in services.
    pub ready: bool,
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
        let validation = status.init_container_statuses.iter().flatten().find(|status| status.name == VALIDATION);
        let is_not_redirected = validation.is_some_and(has_failed);
        let all = [status.container_statuses, status.init_container_statuses, status.ephemeral_container_statuses];
        let ready = status.conditions.iter().flatten().any(|told| told.type_ == "Ready" && told.status == "True");
        let ids = all.into_iter().flatten().flatten().filter_map(|container| container.container_id);
        let annotations = metadata.annotations.unwrap_or_default();
        let (settings, faults) = settings(&annotations);
        let powers = powers(&spec);
        let said = annotations.get(STATUS).map(|said| abbreviated(said).as_str().into());
        let account = spec.service_account_name.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".into());
        Some(Self {
            uid: text(metadata.uid)?,
            static_uid: static_uid(&annotations),
            name: text(metadata.name)?,
            namespace: text(metadata.namespace)?,
            service_account: account.as_str().into(),
            labels: metadata.labels.unwrap_or_default(),
            said,
            is_not_redirected: is_not_redirected && annotations.contains_key(SIDECAR),
            has_sidecar: annotations.contains_key(SIDECAR),
            settings,
            faults,
            powers,
            host_network: spec.host_network.unwrap_or(false),
            ended: status.phase.is_some_and(|phase| phase == "Succeeded" || phase == "Failed"),
            ready,
            ips: ips.into_iter().collect(),
            containers: ids.map(|id| id.split_once("://").map_or(id.as_str(), |(_, id)| id).into()).collect(),
        })
    }

    /// What its status annotation says.
    pub fn said(&self) -> Option<&str> {
        self.said.as_deref()
    }
}

/// Whether a container has ended without success, and has not succeeded since.
fn has_failed(container: &ContainerStatus) -> bool {
    let ended = |state: &Option<ContainerState>| Some(state.as_ref()?.terminated.as_ref()?.exit_code);
    match ended(&container.state) {
        Some(code) => code != 0,
        None => ended(&container.last_state).is_some_and(|code| code != 0),
    }
}

/// The uid of a static pod, of which the API shows the mirror. Only the kubelet makes mirrors; on any other pod it is the
/// owner's own word.
fn static_uid(annotations: &Labels) -> Option<Text> {
    let is_static = annotations.get(SOURCE).is_some_and(|source| STATIC_SOURCES.contains(&source.as_str()));
    let uid = annotations.get(STATIC_UID).filter(|_| is_static && annotations.contains_key(MIRROR))?;
    Some(uid.as_str().into())
}

/// A pod's own settings, and what of them is not understood.
fn settings(annotations: &Labels) -> (Settings, Vec<Fault>) {
    let mut faults = Vec::new();
    let mut boolean = |name: &'static str| {
        let said = annotations.get(name)?;
        let read = go_bool(said);
        if read.is_none() {
            faults.push((name, abbreviated(said)));
        }
        read
    };
    let (dns, bypass_inbound) = (boolean(DNS_CAPTURE), boolean(BYPASS_INBOUND).unwrap_or(false));
    let names = annotations.get(VIRTUAL_INTERFACES).map(String::as_str).unwrap_or_default();
    let (mut seen, mut virtual_interfaces) = (BTreeSet::new(), Vec::new());
    let (mut odd, mut more) = (Vec::new(), 0_usize);
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match Interface::new(name) {
            Some(interface) if seen.contains(name) => drop(interface),
            Some(interface) if virtual_interfaces.len() < INTERFACES_MAX => {
                seen.insert(name);
                virtual_interfaces.push(interface);
            }
            None if odd.len() < NAMES_MAX => odd.push(format!("{:?}", abbreviated(name))),
            _ => more += 1,
        }
    }
    if more > 0 {
        odd.push(format!("{more} more (at most {INTERFACES_MAX} are taken)"));
    }
    if !odd.is_empty() {
        faults.push((VIRTUAL_INTERFACES, odd.join(", ")));
    }
    (Settings { dns, bypass_inbound, virtual_interfaces }, faults)
}

fn abbreviated(text: &str) -> String {
    match text.char_indices().nth(NAMED_MAX) {
        Some((end, _)) => format!("{}… ({} bytes)", text.get(..end).unwrap_or_default(), text.len()),
        None => text.to_owned(),
    }
}

/// What the containers of a pod may do, as far as its object says. Most runtimes give NET_RAW to whom it is not taken from.
fn powers(spec: &PodSpec) -> Powers {
    let init = spec.init_containers.iter().flatten();
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|container| container.security_context.as_ref());
    let contexts = spec.containers.iter().chain(init).map(|container| container.security_context.as_ref());
    let mut powers = Powers::default();
    for context in contexts.chain(ephemeral) {
        let holds = |name: &str, by_default: bool| holds(context, name, by_default);
        powers.net_admin |= holds("NET_ADMIN", false);
        powers.net_raw |= holds("NET_RAW", true);
    }
    powers
}

fn holds(context: Option<&SecurityContext>, capability: &str, by_default: bool) -> bool {
    let Some(context) = context else { return by_default };
    let named = |list: Option<&Vec<String>>| {
        let same = |name: &String| {
            let name = name.strip_prefix("CAP_").unwrap_or(name);
            name.eq_ignore_ascii_case(capability) || name.eq_ignore_ascii_case("ALL")
        };
        list.is_some_and(|names| names.iter().any(same))
    };
    let capabilities = context.capabilities.as_ref();
    let (added, dropped) =
        (named(capabilities.and_then(|c| c.add.as_ref())), named(capabilities.and_then(|c| c.drop.as_ref())));
    context.privileged == Some(true) || added || (by_default && !dropped)
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
        if pod.has_sidecar {
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

    /// Leaves of labels those that decide anything.
    pub fn prune(&self, labels: &mut Labels) {
        let looks_at = |selector: &LabelSelector, key: &String| {
            selector.match_labels.contains_key(key) || selector.match_expressions.iter().any(|e| e.key == *key)
        };
        labels.retain(|key, _| {
            let selects = |s: &Selector| looks_at(&s.pod_selector, key) || looks_at(&s.namespace_selector, key);
            NAMES.contains(&key.as_str()) || self.selectors.iter().any(selects)
        });
    }

    fn is_node_tunnel(&self, pod: &PodFacts) -> bool {
        let label = |key: &str| pod.labels.get(key).map(String::as_str);
        let [app, name] = NAMES;
        let named = label(app) == Some("ztunnel") || label(name) == Some("culvert");
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
            (PodFacts { has_sidecar: true, ..base() }, "sidecar"),
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
    fn a_sidecar_that_counts_on_istio_cni_is_known_by_its_failed_validation() {
        let pod = |annotation: &str, container: &str, state: serde_json::Value| {
            let mut status = state;
            for (key, value) in [("name", container), ("image", "i"), ("imageID", "i")] {
                status[key] = value.into();
            }
            (status["ready"], status["restartCount"]) = (false.into(), 1.into());
            let pod = serde_json::json!({"metadata": {"name": "a", "namespace": "n", "uid": "u", "annotations": {annotation: "{}"}},
                "status": {"initContainerStatuses": [status]}});
            PodFacts::of(serde_json::from_value(pod).unwrap()).unwrap().is_not_redirected
        };
        let ended = |code: i32| serde_json::json!({"state": {"terminated": {"exitCode": code}}});
        let waits = serde_json::json!({"state": {"waiting": {}}, "lastState": {"terminated": {"exitCode": 126}}});
        assert!(pod(SIDECAR, VALIDATION, ended(126)) && pod(SIDECAR, VALIDATION, waits.clone()));
        assert!(!pod(SIDECAR, VALIDATION, ended(0)), "somebody has redirected it");
        assert!(!pod(SIDECAR, VALIDATION, serde_json::json!({"state": {"running": {}}})), "it still looks");
        assert!(!pod(SIDECAR, "istio-init", ended(1)) && !pod("other", VALIDATION, waits));
    }

    #[test]
    fn own_settings_are_read_as_go_reads_them() {
        let pairs =
            [(DNS_CAPTURE, "F"), (BYPASS_INBOUND, "yes"), (VIRTUAL_INTERFACES, "br0, \"; flush ruleset,tun-1,br0")];
        let (settings, faults) = settings(&labels(&pairs));
        assert_eq!(settings.dns, Some(false));
        assert!(!settings.bypass_inbound);
        assert_eq!(settings.virtual_interfaces, [Interface::new("br0").unwrap(), Interface::new("tun-1").unwrap()]);
        assert_eq!(faults, [(BYPASS_INBOUND, "yes".into()), (VIRTUAL_INTERFACES, r#""\"; flush ruleset""#.into())]);
    }

    #[test]
    fn whatever_an_owner_writes_little_is_kept_of_it() {
        let many: Vec<String> = (0..20_000).map(|n| format!("if{n}")).collect();
        let odd: Vec<String> = (0..50_000).map(|n| format!("{n}!{}", "x".repeat(n % 300))).collect();
        for (names, taken) in [(many.join(","), INTERFACES_MAX), (odd.join(","), 0), (["eth0"; 60_000].join(","), 1)] {
            let said = [(VIRTUAL_INTERFACES, names.as_str()), (DNS_CAPTURE, names.as_str()), (STATUS, names.as_str())];
            let (settings, faults) = settings(&labels(&said));
            assert_eq!(settings.virtual_interfaces.len(), taken);
            assert!(faults.len() <= 2 && faults.iter().all(|(_, text)| text.len() < 1000), "{faults:?}");
        }
        let enabled = enablement(default_selectors());
        let mut kept: Labels = (0..1000).map(|n| (format!("l{n}"), String::new())).collect();
        kept.extend(labels(&[(MODE, "ambient"), ("app", "a")]));
        enabled.prune(&mut kept);
        assert_eq!(kept, labels(&[(MODE, "ambient"), ("app", "a")]));
    }

    #[test]
    fn the_uid_of_a_file_counts_on_mirrors_alone() {
        let hash = "0123456789abcdef0123456789abcdef";
        let uid = |pairs: &[(&str, &str)]| {
            static_uid(&labels(&[&[(STATIC_UID, hash)], pairs].concat())).map(|uid| uid.to_string())
        };
        assert_eq!(uid(&[(MIRROR, hash), (SOURCE, "file")]).as_deref(), Some(hash));
        for not in [&[][..], &[(MIRROR, hash)], &[(SOURCE, "file")], &[(MIRROR, hash), (SOURCE, "api")]] {
            assert_eq!(uid(not), None, "{not:?}");
        }
    }

    #[test]
    fn what_a_pod_may_do_to_itself_is_read_from_its_containers() {
        let powers = |contexts: serde_json::Value| {
            let containers: Vec<_> = contexts
                .as_array()
                .unwrap()
                .iter()
                .map(|context| serde_json::json!({"name": "a", "securityContext": context}))
                .collect();
            let powers = powers(&serde_json::from_value(serde_json::json!({"containers": containers})).unwrap());
            (powers.net_admin, powers.net_raw)
        };
        let json = |text: &str| serde_json::from_str(text).unwrap();
        for (contexts, expected) in [
            ("[{}]", (false, true)),
            (r#"[{"capabilities": {"drop": ["ALL"]}}]"#, (false, false)),
            (r#"[{"capabilities": {"drop": ["NET_RAW"]}}]"#, (false, false)),
            (r#"[{"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}]"#, (true, false)),
            (
                r#"[{"capabilities": {"drop": ["ALL"]}}, {"capabilities": {"drop": ["ALL"], "add": ["CAP_NET_RAW"]}}]"#,
                (false, true),
            ),
            (r#"[{"privileged": true, "capabilities": {"drop": ["ALL"]}}]"#, (true, true)),
        ] {
            assert_eq!(powers(json(contexts)), expected, "{contexts}");
        }
    }
}
