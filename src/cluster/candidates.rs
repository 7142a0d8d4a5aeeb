//! Which of the pods that have the label of the daemons is the daemon of a node. Anyone who may create pods can give one
//! the label and the name of a node, so a pod is not taken for a daemon where another one may be meant.

use super::question::Daemon;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use std::collections::{BTreeMap, BTreeSet};

/// Label of the daemons' pods. It is ztunnel's, which istioctl finds the daemon by.
pub(super) const LABEL: &str = "app=ztunnel";

/// Most pods that are named in one text.
const NAMED: usize = 5;

/// One daemon for each node that has a pod with the label, sorted by node.
pub(super) fn daemons(mut pods: Vec<Pod>) -> Vec<Daemon> {
    pods.retain(|pod| !is_done(pod));
    let any_of_set = pods.iter().any(is_of_set);
    let mut nodes: BTreeMap<String, Vec<Pod>> = BTreeMap::new();
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        nodes.entry(node).or_default().push(pod);
    }
    nodes.into_iter().filter_map(|(node, pods)| of_node(node, pods, any_of_set)).collect()
}

/// The daemon of one node. Pods that no DaemonSet controls do not count if there are daemons of a DaemonSet.
fn of_node(node: String, pods: Vec<Pod>, any_of_set: bool) -> Option<Daemon> {
    let (counted, others): (Vec<Pod>, Vec<Pod>) = pods.into_iter().partition(|pod| !any_of_set || is_of_set(pod));
    let strange = (!others.is_empty()).then(|| {
        let names = names(others.iter().map(full_name));
        format!("with the label {LABEL}, but not controlled by a DaemonSet: {names}")
    });
    let origins: BTreeSet<Origin> = counted.iter().map(Origin::of).collect();
    if origins.len() > 1 {
        let is_one_namespace = origins.iter().map(|origin| &origin.namespace).collect::<BTreeSet<_>>().len() == 1;
        let names = names(counted.iter().map(|pod| format!("{} ({})", full_name(pod), Origin::of(pod).owner())));
        let next = if is_one_namespace { "remove what is no daemon" } else { "use --namespace" };
        let down = Some(format!("more than one pod may be its daemon, so none is asked: {names}; {next}"));
        return Some(Daemon { node, namespace: String::new(), pod: String::new(), down, note: strange });
    }
    let best = counted.into_iter().reduce(|best, pod| if rank(&pod) > rank(&best) { pod } else { best });
    match (best, strange) {
        (Some(pod), strange) => Some(Daemon { note: strange, ..daemon(node, &pod) }),
        // A pod that has no node yet is nobody's daemon.
        (None, Some(strange)) if !node.is_empty() => {
            let down = Some(format!("no daemon runs on this node; {strange}; use --namespace"));
            Some(Daemon { node, namespace: String::new(), pod: String::new(), down, note: None })
        }
        (None, _) => None,
    }
}

/// Where a pod comes from: its namespace, and what controls it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Origin {
    namespace: String,
    /// Kind and name.
    controller: Option<(String, String)>,
}

impl Origin {
    fn of(pod: &Pod) -> Self {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let owners = pod.metadata.owner_references.iter().flatten();
        let mut controllers = owners.filter(|owner| owner.controller == Some(true));
        Self { namespace, controller: controllers.next().map(|owner| (owner.kind.clone(), owner.name.clone())) }
    }

    fn owner(&self) -> String {
        self.controller.as_ref().map_or("no controller".to_owned(), |(kind, name)| format!("{kind} {name}"))
    }
}

fn is_of_set(pod: &Pod) -> bool {
    Origin::of(pod).controller.is_some_and(|(kind, _)| kind == "DaemonSet")
}

fn full_name(pod: &Pod) -> String {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", part(&pod.metadata.namespace), part(&pod.metadata.name))
}

/// Some names, and how many more there are.
fn names(all: impl Iterator<Item = String>) -> String {
    let all: BTreeSet<String> = all.collect();
    let more = all.len().saturating_sub(NAMED);
    let text = all.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{text} and {more} more") } else { text }
}

fn daemon(node: String, pod: &Pod) -> Daemon {
    let (name, namespace) = (pod.metadata.name.clone(), pod.metadata.namespace.clone());
    let (name, namespace) = (name.unwrap_or_default(), namespace.unwrap_or_default());
    let down = (!is_running(pod)).then(|| format!("its daemon {namespace}/{name} is not running: {}", state(pod)));
    let node = if node.is_empty() { format!("(no node: {name})") } else { node };
    Daemon { node, namespace, pod: name, down, note: None }
}

/// Which of two daemons of a node is asked, during an upgrade: one that stays, one that runs, the younger one.
fn rank(pod: &Pod) -> impl PartialOrd + use<> {
    let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    (pod.metadata.deletion_timestamp.is_none(), is_running(pod), created)
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("unknown")
}

/// Whether a pod has ended for good, as evicted ones have.
fn is_done(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether a container of the pod runs, so that its ports can be asked. It need not be ready.
fn is_running(pod: &Pod) -> bool {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let runs = |all: &Vec<ContainerStatus>| {
        all.iter().any(|one| one.state.as_ref().is_some_and(|state| state.running.is_some()))
    };
    phase(pod) == "Running" && containers.is_none_or(runs)
}

/// Phase of a pod that does not run, and why its container waits.
fn state(pod: &Pod) -> String {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let reasons = statuses.into_iter().flatten().filter_map(|one| {
        let state = one.state.as_ref()?;
        let waiting = state.waiting.as_ref().and_then(|waiting| waiting.reason.clone());
        waiting.or_else(|| state.terminated.as_ref().and_then(|ended| ended.reason.clone()))
    });
    let reasons: Vec<String> = reasons.collect();
    if reasons.is_empty() { phase(pod).to_owned() } else { format!("{} ({})", phase(pod), reasons.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: serde_json::Value, metadata: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": metadata, "status": status})).unwrap()
    }

    #[test]
    fn a_daemon_that_does_not_run_is_named_with_the_reason() {
        let named = json!({"name": "ztunnel-1", "namespace": "istio-system"});
        let running = pod(json!({"phase": "Running"}), named.clone());
        assert_eq!(daemon("n1".into(), &running).down, None);
        let waiting = json!({"phase": "Pending", "containerStatuses": [{"name": "istio-proxy", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]});
        let why = daemon("n1".into(), &pod(waiting, named.clone())).down.unwrap();
        assert_eq!(why, "its daemon istio-system/ztunnel-1 is not running: Pending (ImagePullBackOff)");
        let crashed = json!({"phase": "Running", "containerStatuses": [{"name": "istio-proxy", "image": "", "imageID": "", "ready": false,
            "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
        assert!(daemon("n1".into(), &pod(crashed, named)).down.unwrap().ends_with("Running (CrashLoopBackOff)"));
    }

    #[test]
    fn during_an_upgrade_the_daemon_that_stays_is_asked() {
        let old = pod(
            json!({"phase": "Running"}),
            json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "creationTimestamp": "2025-01-01T00:00:00Z"}),
        );
        let new = pod(json!({"phase": "Running"}), json!({"creationTimestamp": "2026-01-01T00:00:00Z"}));
        let coming = pod(json!({"phase": "Pending"}), json!({"creationTimestamp": "2026-01-02T00:00:00Z"}));
        assert!(rank(&new) > rank(&old));
        assert!(rank(&new) > rank(&coming));
    }

    /// A pod that runs on n1, controlled by something of this kind and name.
    fn candidate(name: &str, controller: Option<(&str, &str)>) -> Pod {
        let (namespace, name) = name.split_once('/').unwrap();
        let owners: Vec<_> = controller
            .map(|(kind, name)| json!({"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": name, "controller": true}))
            .into_iter()
            .collect();
        let mut pod = pod(
            json!({"phase": "Running"}),
            json!({"name": name, "namespace": namespace, "ownerReferences": owners,
                "creationTimestamp": format!("2026-01-01T00:00:{:02}Z", name.len())}),
        );
        pod.spec = serde_json::from_value(json!({"nodeName": "n1", "containers": []})).unwrap();
        pod
    }

    const SET: Option<(&str, &str)> = Some(("DaemonSet", "ztunnel"));

    #[test]
    fn a_pod_that_no_daemon_set_controls_is_named_and_never_asked() {
        let ours = candidate("istio-system/ztunnel-1", SET);
        let younger = candidate("evil/a-name-that-is-longer", None);
        for pods in [vec![ours.clone(), younger.clone()], vec![younger.clone(), ours.clone()]] {
            let found = daemons(pods);
            let [one] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!((one.namespace.as_str(), one.pod.as_str(), &one.down), ("istio-system", "ztunnel-1", &None));
            let note = one.note.as_ref().unwrap();
            assert!(note.contains("evil/a-name-that-is-longer") && note.contains("app=ztunnel"), "{note}");
        }
        // Nor on a node that has no daemon.
        let mut alone = younger.clone();
        alone.spec.as_mut().unwrap().node_name = Some("n2".into());
        let found = daemons(vec![ours, alone]);
        let down = found[1].down.as_ref().unwrap();
        assert!(found[1].pod.is_empty() && down.contains("evil/") && down.contains("--namespace"), "{down}");
        // Where nothing is of a DaemonSet, pods of one namespace may be daemons.
        assert_eq!(daemons(vec![younger])[0].down, None);
    }

    #[test]
    fn a_node_with_pods_of_several_namespaces_or_sets_is_not_asked() {
        let ours = candidate("istio-system/ztunnel-1", SET);
        for (other, next) in [
            (candidate("evil/ztunnel-1", SET), "use --namespace"),
            (candidate("istio-system/other-1", Some(("DaemonSet", "other"))), "remove"),
        ] {
            let found = daemons(vec![ours.clone(), other.clone()]);
            let [one] = found.as_slice() else { panic!("{found:?}") };
            let down = one.down.as_ref().unwrap();
            for part in ["istio-system/ztunnel-1 (DaemonSet ztunnel)", &full_name(&other), next] {
                assert!(down.contains(part), "{part} is not in {down}");
            }
            assert!(one.pod.is_empty());
        }
        let pods = [candidate("a/b", None), candidate("c/d", None)];
        assert!(daemons(pods.to_vec())[0].down.as_ref().unwrap().contains("c/d (no controller)"));
        let next = candidate("istio-system/ztunnel-younger", SET);
        let found = daemons(vec![ours, next]);
        assert_eq!((found[0].pod.as_str(), &found[0].down), ("ztunnel-younger", &None));
    }
}
