//! Finds the daemons: the pods with the label that istioctl and enrolment know too, one for each node.

use super::candidates::{self, LABEL};
use super::question::{Cluster, ClusterError, Daemon};
use crate::telemetry::log::with_causes;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::time::Duration;

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
        Some(namespace) if !is_label(namespace) => {
            return Err(ClusterError::NotFound(format!("{namespace:?} is not the name of a namespace")));
        }
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let mut found = Vec::new();
    let mut parameters = ListParams::default().labels(LABEL).limit(PAGE);
    loop {
        let page = pods.list(&parameters).await.map_err(|error| refused(&error, cluster))?;
        found.extend(page.items);
        match page.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => parameters = parameters.continue_token(&more),
            None => break,
        }
    }
    let mut all = candidates::daemons(found);
    if all.is_empty() {
        let place = cluster.namespace.as_deref().map_or("in no namespace".to_owned(), |name| format!("not in {name}"));
        return Err(ClusterError::NotFound(format!("there are no daemons: {place} is a pod with the label {LABEL}")));
    }
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
        let names = pod.split_once('/').filter(|(namespace, name)| is_label(namespace) && is_subdomain(name));
        let Some((namespace, name)) = names else {
            return Err(ClusterError::NotFound(format!("{pod:?} is not NAMESPACE/NAME of a pod")));
        };
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned(), node: String::new(), ips: Vec::new() })
    }
}

/// Whether a text is a DNS label, as names of namespaces are. Names go into the paths of requests as they are.
pub(super) fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_part(text)
}

/// Whether a text is a DNS subdomain, as names of pods are.
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_part)
}

fn is_part(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
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

/// A node that was asked for and has no daemon.
fn without(node: &str) -> Daemon {
    let down = Some("no daemon runs on this node, or there is no such node".to_owned());
    Daemon { node: node.to_owned(), namespace: String::new(), pod: String::new(), down, note: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_pods_can_have_go_into_paths() {
        for pod in ["shop/web-0", "a/b.c-1"] {
            assert!(PodPlace::named(pod).is_ok(), "{pod}");
        }
        for pod in [
            "web", "/", "a/", "/b", "a/b/c", "a/..", "../b", "a/b?c=d", "a/b%2f", "a/B", "a/b#", "a b/c", "a.b/c",
            "a/-b",
        ] {
            let error = PodPlace::named(pod).unwrap_err().to_string();
            assert!(error.contains("is not NAMESPACE/NAME"), "{pod}: {error}");
        }
        assert!(!is_label(&"a".repeat(64)) && is_label(&"a".repeat(63)));
    }
}
