//! What the API says about a pod, reduced to what its enrolment and capture depend on. Pure.

use crate::mesh::Text;
use crate::node::selectors::Labels;
use crate::node::spec::{INTERFACES_MAX, Interface, Powers, Settings};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodSpec, SecurityContext};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Status annotation of a captured pod.
pub const STATUS: &str = "ambient.istio.io/redirection";
/// Annotation of a pod with a sidecar.
const SIDECAR: &str = "sidecar.istio.io/status";
/// Init container of a sidecar that istio-cni redirects (instead of istio-init). It fails if the pod is not redirected.
const VALIDATION: &str = "istio-validation";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// Annotation with the uid that a static pod's processes run under; the API shows a mirror pod for it.
const STATIC_UID: &str = "kubernetes.io/config.hash";
/// Annotations of a mirror pod: the mark, and where the kubelet got the pod from.
const MIRROR: &str = "kubernetes.io/config.mirror";
const SOURCE: &str = "kubernetes.io/config.source";
/// Sources of static pods (source: the kubelet's `types.FileSource` and `HTTPSource`).
const STATIC_SOURCES: [&str; 2] = ["file", "http"];

/// Longest part of an invalid value that is shown.
const NAMED_MAX: usize = 100;
/// Most invalid interface names that are shown.
const NAMES_MAX: usize = 4;

/// An annotation with an invalid value, and the invalid part of it.
pub type AnnotationFault = (&'static str, String);

/// What is known of a pod. Values that its owner writes are kept only as far as they have a meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its uid.
    pub uid: Text,
    /// The uid that the cgroups of its processes name, if it differs.
    pub static_uid: Option<Text>,
    /// Its name.
    pub name: Text,
    /// Its namespace.
    pub namespace: Text,
    /// Its service account.
    pub service_account: Text,
    /// Its labels.
    pub labels: Labels,
    /// Its status annotation.
    pub status_annotation: Option<Text>,
    /// Whether it has a sidecar.
    pub has_sidecar: bool,
    /// Whether it has a sidecar that depends on istio-cni and was not redirected: its validation container has failed.
    pub is_not_redirected: bool,
    /// Its own settings.
    pub settings: Settings,
    /// Invalid annotations, which are ignored; at most one fault for each annotation.
    pub faults: Vec<AnnotationFault>,
    /// Capabilities of its containers over its own network.
    pub powers: Powers,
    /// Whether it uses the host's network namespace.
    pub host_network: bool,
    /// Whether its containers have ended for good.
    pub ended: bool,
    /// Whether it is Ready.
    pub ready: bool,
    /// Its addresses; none before it has any.
    pub ips: Vec<IpAddr>,
    /// Ids of its containers.
    pub containers: Vec<Text>,
}

impl PodFacts {
    /// Reads a pod of the API; `None` for one without uid or name, which the API never sends.
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
        let status_annotation = annotations.get(STATUS).map(|said| abbreviated(said).as_str().into());
        let account = spec.service_account_name.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".into());
        Some(Self {
            uid: text(metadata.uid)?,
            static_uid: static_uid(&annotations),
            name: text(metadata.name)?,
            namespace: text(metadata.namespace)?,
            service_account: account.as_str().into(),
            labels: metadata.labels.unwrap_or_default(),
            status_annotation,
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

    /// Its status annotation.
    pub fn annotation(&self) -> Option<&str> {
        self.status_annotation.as_deref()
    }
}

/// Whether a container has failed, and has not succeeded since.
fn has_failed(container: &ContainerStatus) -> bool {
    let ended = |state: &Option<ContainerState>| Some(state.as_ref()?.terminated.as_ref()?.exit_code);
    match ended(&container.state) {
        Some(code) => code != 0,
        None => ended(&container.last_state).is_some_and(|code| code != 0),
    }
}

/// The uid of a static pod, whose mirror the API shows. Only the kubelet creates mirrors; on any other pod the
/// annotation is the owner's own claim.
fn static_uid(annotations: &Labels) -> Option<Text> {
    let is_static = annotations.get(SOURCE).is_some_and(|source| STATIC_SOURCES.contains(&source.as_str()));
    let uid = annotations.get(STATIC_UID).filter(|_| is_static && annotations.contains_key(MIRROR))?;
    Some(uid.as_str().into())
}

/// Reads a pod's own settings, and returns the invalid annotations.
fn settings(annotations: &Labels) -> (Settings, Vec<AnnotationFault>) {
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

/// Capabilities of a pod's containers, by its specification. Most runtimes grant NET_RAW unless it is dropped.
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

/// Parses as Go's `strconv.ParseBool`, with which Istio reads its annotations.
fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_sidecar_that_depends_on_istio_cni_is_recognized_by_its_failed_validation() {
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
        assert!(!pod(SIDECAR, VALIDATION, ended(0)), "it is redirected");
        assert!(
            !pod(SIDECAR, VALIDATION, serde_json::json!({"state": {"running": {}}})),
            "validation is still running"
        );
        assert!(!pod(SIDECAR, "istio-init", ended(1)) && !pod("other", VALIDATION, waits));
    }

    #[test]
    fn annotations_are_parsed_as_go_parses_them() {
        let pairs =
            [(DNS_CAPTURE, "F"), (BYPASS_INBOUND, "yes"), (VIRTUAL_INTERFACES, "br0, \"; flush ruleset,tun-1,br0")];
        let (settings, faults) = settings(&labels(&pairs));
        assert_eq!(settings.dns, Some(false));
        assert!(!settings.bypass_inbound);
        assert_eq!(settings.virtual_interfaces, [Interface::new("br0").unwrap(), Interface::new("tun-1").unwrap()]);
        assert_eq!(faults, [(BYPASS_INBOUND, "yes".into()), (VIRTUAL_INTERFACES, r#""\"; flush ruleset""#.into())]);
    }

    #[test]
    fn however_much_an_owner_writes_little_of_it_is_kept() {
        let many: Vec<String> = (0..20_000).map(|n| format!("if{n}")).collect();
        let odd: Vec<String> = (0..50_000).map(|n| format!("{n}!{}", "x".repeat(n % 300))).collect();
        for (names, taken) in [(many.join(","), INTERFACES_MAX), (odd.join(","), 0), (["eth0"; 60_000].join(","), 1)] {
            let said = [(VIRTUAL_INTERFACES, names.as_str()), (DNS_CAPTURE, names.as_str()), (STATUS, names.as_str())];
            let (settings, faults) = settings(&labels(&said));
            assert_eq!(settings.virtual_interfaces.len(), taken);
            assert!(faults.len() <= 2 && faults.iter().all(|(_, text)| text.len() < 1000), "{faults:?}");
        }
    }

    #[test]
    fn a_static_uid_counts_only_on_mirror_pods() {
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
    fn capabilities_are_read_from_all_containers() {
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
