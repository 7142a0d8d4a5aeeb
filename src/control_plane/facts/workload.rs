//! The mesh facts of pods, and of endpoints that are no pods.

use super::object::{Pod, Service, Slice, Tunnel};
use super::service::{ports_at, ports_in};
use crate::control_plane::Cluster;
use crate::mesh::workload::{ApplicationTunnel, Health, Locality, NetworkMode, WorkloadType, pod_uid};
use crate::mesh::{GatewayRef, Protocol, Text, Workload};
use std::net::IpAddr;

/// The service account of a pod that names none (source: Istio).
const DEFAULT_ACCOUNT: &str = "default";

/// What a pod's fact depends on besides the pod.
#[derive(Debug)]
pub struct Around<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The network of the cluster.
    pub network: &'a Text,
    /// Where its node is.
    pub locality: Locality,
    /// The services of which it is an endpoint.
    pub services: Vec<&'a Service>,
    /// Its waypoint.
    pub waypoint: Option<GatewayRef>,
    /// The listener of the pod of a waypoint.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Keys of the policies that select it.
    pub policies: Vec<Text>,
}

/// A locality of which nothing is known.
pub fn nowhere() -> Locality {
    Locality { region: "".into(), zone: "".into(), subzone: "".into() }
}

/// The fact of a pod.
pub fn of_pod(pod: &Pod, around: Around<'_>) -> Workload {
    // One that is there counts, even if it is empty.
    let label = |keys: [&str; 3]| keys.into_iter().find_map(|key| pod.labels.get(key));
    let names = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    let revisions = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    let service_account =
        if pod.service_account.is_empty() { DEFAULT_ACCOUNT.into() } else { pod.service_account.clone() };
    Workload {
        uid: pod_uid(&around.cluster.id, &pod.namespace, &pod.name),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        trust_domain: around.cluster.trust_domain.clone(),
        service_account,
        ips: pod.ips.clone(),
        network: around.network.clone(),
        protocol: if pod.tunnel == Tunnel::None { Protocol::Tcp } else { Protocol::Hbone },
        network_mode: if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard },
        waypoint: around.waypoint,
        network_gateway: None,
        canonical_name: label(names).map_or(pod.workload_name.clone(), |text| text.as_str().into()),
        canonical_revision: label(revisions).map_or("latest", String::as_str).into(),
        workload_name: pod.workload_name.clone(),
        workload_type: WorkloadType::Pod,
        hostname: "".into(),
        node: pod.node.clone(),
        native_tunnel: pod.tunnel == Tunnel::Native,
        application_tunnel: around.application_tunnel,
        policies: around.policies,
        health: health(pod.healthy),
        cluster_id: around.cluster.id.clone(),
        locality: around.locality,
        services: around.services.iter().map(|service| (service.key.clone(), ports_at(service, pod))).collect(),
        capacity: 1,
        known: Default::default(),
    }
}

/// The fact of an endpoint of a slice that is no pod. Its address may be that of a host, so it is never looked up by it.
pub fn of_endpoint(
    slice: &Slice,
    service: &Service,
    (ip, ready): (IpAddr, bool),
    cluster: &Cluster,
    network: &Text,
) -> Workload {
    let uid = format!("{}/discovery.k8s.io/EndpointSlice/{}/{}/{ip}", cluster.id, slice.namespace, slice.name);
    Workload {
        uid: uid.as_str().into(),
        name: slice.name.clone(),
        namespace: slice.namespace.clone(),
        trust_domain: cluster.trust_domain.clone(),
        // Nothing is known of it; it accepts no tunnels, so no identity is ever expected.
        service_account: DEFAULT_ACCOUNT.into(),
        ips: vec![ip],
        network: network.clone(),
        protocol: Protocol::Tcp,
        network_mode: NetworkMode::HostNetwork,
        waypoint: None,
        network_gateway: None,
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_name: "".into(),
        workload_type: WorkloadType::Deployment,
        hostname: "".into(),
        node: "".into(),
        native_tunnel: false,
        application_tunnel: None,
        policies: Vec::new(),
        health: health(ready),
        cluster_id: cluster.id.clone(),
        locality: nowhere(),
        services: [(service.key.clone(), ports_in(service, slice))].into(),
        capacity: 1,
        known: Default::default(),
    }
}

fn health(healthy: bool) -> Health {
    if healthy { Health::Healthy } else { Health::Unhealthy }
}
