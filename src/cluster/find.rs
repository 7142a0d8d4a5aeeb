//! Finds the daemons: the pods with the label that istioctl and enrolment know too, one for each node.

use super::question::{Cluster, ClusterError, Daemon};
use crate::telemetry::log::with_causes;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::collections::BTreeMap;
use std::time::Duration;

/// Label of the daemons' pods. It is ztunnel's, which istioctl finds the daemon by.
const LABEL: &str = "app=ztunnel";

/// Pods in one answer of the API.
const PAGE: u32 = 500;

/// How long the API may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Makes the client of the API: with the kubeconfig that was named, or with the one that kubectl would use, or with the
/// account of this pod.
pub(super) async fn client(cluster: &Cluster) -> Result<kube::Client, ClusterError> {
    let options = KubeConfigOptions { context: cluster.context.clone(), ..KubeConfigOptions::default() };
    let settings = match &cluster.kubeconfig {
        Some(path) => {
            let named = |error: &dyn std::error::Error| format!("kubeconfig {}: {error}", path.display());
            let file = Kubeconfig::read_from(path).map_err(|error| ClusterError::Credentials(named(&error)))?;
            let made = kube::Config::from_custom_kubeconfig(file, &options).await;
            made.map_err(|error| ClusterError::Credentials(named(&error)))?
        }
        None => match kube::Config::from_kubeconfig(&options).await {
            Ok(settings) => settings,
            Err(outside) => kube::Config::incluster().map_err(|_| {
                let why = with_causes(&outside);
                ClusterError::Credentials(format!(
                    "no kubeconfig can be used ({why}), and this is no pod of a cluster; use --kubeconfig FILE, or --admin \
                     ADDRESS for the daemon of this machine"
                ))
            })?,
        },
    };
    let mut settings = settings;
    settings.connect_timeout = Some(CONNECT);
    // A log that is followed may be silent; questions have deadlines of their own.
    settings.read_timeout = None;
    kube::Client::try_from(settings).map_err(|error| ClusterError::Credentials(with_causes(&error)))
}

/// The daemons that were asked for, one for each node, sorted by node.
pub(super) async fn daemons(client: &kube::Client, cluster: &Cluster) -> Result<Vec<Daemon>, ClusterError> {
    let pods: Api<Pod> = match &cluster.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let mut found: BTreeMap<String, Pod> = BTreeMap::new();
    let mut parameters = ListParams::default().labels(LABEL).limit(PAGE);
    loop {
        let page = pods.list(&parameters).await.map_err(|error| refused(&error, cluster))?;
        for pod in page.items {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            let better = found.get(&node).is_none_or(|other| rank(&pod) > rank(other));
            if better && !is_done(&pod) {
                found.insert(node, pod);
            }
        }
        match page.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => parameters = parameters.continue_token(&more),
            None => break,
        }
    }
    if found.is_empty() {
        let place = cluster.namespace.as_deref().map_or("in no namespace".to_owned(), |name| format!("not in {name}"));
        return Err(ClusterError::NotFound(format!("there are no daemons: {place} is a pod with the label {LABEL}")));
    }
    let mut all: Vec<Daemon> = found.into_iter().map(|(node, pod)| daemon(node, &pod)).collect();
    if !cluster.nodes.is_empty() {
        let missing = |name: &&String| !all.iter().any(|daemon| daemon.node == **name);
        let missing: Vec<Daemon> = cluster.nodes.iter().filter(missing).map(|node| without(node)).collect();
        all.retain(|daemon| cluster.nodes.contains(&daemon.node));
        all.extend(missing);
        all.sort_by(|a, b| a.node.cmp(&b.node));
    }
    Ok(all)
}

/// A pod, and where it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlace {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name of its node; empty if only its name is known.
    pub node: String,
    /// Its addresses.
    pub ips: Vec<String>,
}

impl PodPlace {
    /// The one of these daemons that is on the pod's node.
    pub fn daemon(&self, all: &[Daemon]) -> Result<Daemon, ClusterError> {
        let Self { namespace, name, node, .. } = self;
        all.iter().find(|daemon| daemon.node == *node).cloned().ok_or_else(|| {
            let why = format!("{namespace}/{name} runs on node {node}, which has no daemon, or was not asked for");
            ClusterError::NotFound(why)
        })
    }

    /// A pod that the daemon of this machine is asked about, which says itself what is wrong with a name.
    pub(super) fn here(pod: &str) -> Self {
        let (namespace, name) = pod.split_once('/').unwrap_or(("", pod));
        Self { namespace: namespace.to_owned(), name: name.to_owned(), node: String::new(), ips: Vec::new() }
    }

    /// A pod of which only `NAMESPACE/NAME` is known.
    fn named(pod: &str) -> Result<Self, ClusterError> {
        let Some((namespace, name)) = pod.split_once('/').filter(|(a, b)| !a.is_empty() && !b.is_empty()) else {
            return Err(ClusterError::NotFound(format!("{pod:?} is not NAMESPACE/NAME of a pod")));
        };
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned(), node: String::new(), ips: Vec::new() })
    }
}

/// Asks the API where a pod, `NAMESPACE/NAME`, runs.
pub(super) async fn place_of(client: &kube::Client, pod: &str) -> Result<PodPlace, ClusterError> {
    let place = PodPlace::named(pod)?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &place.namespace);
    let found = pods.get_opt(&place.name).await.map_err(|error| ClusterError::Api(with_causes(&error)))?;
    let found = found.ok_or_else(|| ClusterError::NotFound(format!("there is no pod {pod}")))?;
    let node = found.spec.and_then(|spec| spec.node_name).filter(|node| !node.is_empty());
    let node = node.ok_or_else(|| ClusterError::NotFound(format!("the pod {pod} is not scheduled to a node yet")))?;
    let ips = found.status.and_then(|status| status.pod_ips).into_iter().flatten().map(|ip| ip.ip).collect();
    Ok(PodPlace { node, ips, ..place })
}

/// Why the API did not list the daemons, and what to do.
fn refused(error: &kube::Error, cluster: &Cluster) -> ClusterError {
    let text = with_causes(error);
    let forbidden = matches!(error, kube::Error::Api(status) if status.code == 403);
    ClusterError::Api(match (forbidden, &cluster.namespace) {
        (true, None) => {
            format!("{text}; if your account may list pods only in the namespace of the daemons, use --namespace")
        }
        _ => text,
    })
}

fn daemon(node: String, pod: &Pod) -> Daemon {
    let (name, namespace) = (pod.metadata.name.clone(), pod.metadata.namespace.clone());
    let (name, namespace) = (name.unwrap_or_default(), namespace.unwrap_or_default());
    let down = (!is_running(pod)).then(|| format!("its daemon {namespace}/{name} is not running: {}", state(pod)));
    let node = if node.is_empty() { format!("(no node: {name})") } else { node };
    Daemon { node, namespace, pod: name, down }
}

/// A node that was asked for and has no daemon.
fn without(node: &str) -> Daemon {
    let down = Some("no daemon runs on this node, or there is no such node".to_owned());
    Daemon { node: node.to_owned(), namespace: String::new(), pod: String::new(), down }
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
    let runs = |all: &Vec<k8s_openapi::api::core::v1::ContainerStatus>| {
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
}
