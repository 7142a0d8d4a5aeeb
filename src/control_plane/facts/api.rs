//! Objects of the Kubernetes API, only with the fields that are needed. Everything else is skipped while the JSON is
//! read, which saves most of the time and memory of a list.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::collections::BTreeMap;

/// Labels or annotations.
pub type Map = BTreeMap<String, String>;

/// An object with metadata.
pub trait HasMetadata {
    /// Its metadata.
    fn metadata(&self) -> &Metadata;
}

macro_rules! objects {
    ($($name:ident),*) => {$(
        impl HasMetadata for $name {
            fn metadata(&self) -> &Metadata {
                &self.metadata
            }
        }
    )*};
}

objects!(Pod, Service, EndpointSlice, Node, Namespace, Gateway);

/// Metadata of an object.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Metadata {
    /// Name.
    pub name: Option<String>,
    /// Namespace.
    pub namespace: Option<String>,
    /// Uid.
    pub uid: Option<String>,
    /// Version of the object.
    pub resource_version: Option<String>,
    /// The beginning of a generated name.
    pub generate_name: Option<String>,
    /// Labels.
    pub labels: Option<Map>,
    /// Annotations.
    pub annotations: Option<Map>,
    /// Owners.
    pub owner_references: Option<Vec<Owner>>,
    /// Counts the changes of its spec, of kinds that have one.
    pub generation: Option<i64>,
    /// When it was created.
    pub creation_timestamp: Option<Time>,
    /// Whether it is being deleted.
    pub deletion_timestamp: Option<IgnoredAny>,
}

impl Metadata {
    /// The value of a label, unless it is empty.
    pub fn label(&self, key: &str) -> Option<&str> {
        value(self.labels.as_ref(), key)
    }

    /// The value of an annotation, unless it is empty.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        value(self.annotations.as_ref(), key)
    }
}

fn value<'a>(map: Option<&'a Map>, key: &str) -> Option<&'a str> {
    map?.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

/// An owner of an object.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Owner {
    /// Kind of the owner.
    pub kind: String,
    /// Name of the owner.
    pub name: String,
    /// Whether it is the owner that manages the object.
    pub controller: Option<bool>,
}

/// A pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Metadata.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: Option<PodSpec>,
    /// What is.
    pub status: Option<PodStatus>,
}

/// The specification of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    /// The node to which it is bound.
    pub node_name: Option<String>,
    /// Service account.
    pub service_account_name: Option<String>,
    /// Whether it uses its node's network.
    pub host_network: Option<bool>,
    /// Containers.
    pub containers: Option<Vec<Container>>,
    /// Containers that run first, or beside the others if they are restarted always.
    pub init_containers: Option<Vec<Container>>,
}

/// A container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Container {
    /// `Always` for an init container that runs beside the others.
    pub restart_policy: Option<String>,
    /// Ports that it names.
    pub ports: Option<Vec<ContainerPort>>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerPort {
    /// Name.
    pub name: Option<String>,
    /// Number.
    pub container_port: Option<i64>,
    /// Transport; TCP if absent.
    pub protocol: Option<String>,
}

/// The status of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodStatus {
    /// Phase.
    pub phase: Option<String>,
    /// The first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// All addresses.
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp>>,
    /// Conditions.
    pub conditions: Option<Vec<Condition>>,
}

/// An address of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    pub ip: Option<String>,
}

/// A condition.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// Which.
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// A service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Metadata.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: Option<ServiceSpec>,
}

/// The specification of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `ExternalName` for a name without endpoints.
    pub r#type: Option<String>,
    /// The first address, or `None`.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// All addresses, or `None`.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    /// IP families.
    pub ip_families: Option<Vec<String>>,
    /// Labels of its pods.
    pub selector: Option<Map>,
    /// Ports.
    pub ports: Option<Vec<ServicePort>>,
    /// Whether endpoints count before they are ready.
    pub publish_not_ready_addresses: Option<bool>,
    /// `Local` if only endpoints of the client's own node are used.
    pub internal_traffic_policy: Option<String>,
    /// Which endpoints are preferred.
    pub traffic_distribution: Option<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    /// Name.
    pub name: Option<String>,
    /// Number.
    pub port: Option<i64>,
    /// Transport; TCP if absent.
    pub protocol: Option<String>,
    /// Number or name of the port of the pods; the same number if absent.
    pub target_port: Option<Value>,
}

/// A part of the endpoints of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Metadata.
    pub metadata: Metadata,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: Option<String>,
    /// Endpoints.
    pub endpoints: Option<Vec<Endpoint>>,
    /// Ports of all endpoints.
    pub ports: Option<Vec<EndpointPort>>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    /// Addresses, of which the first counts.
    pub addresses: Option<Vec<String>>,
    /// Conditions.
    pub conditions: Option<EndpointConditions>,
    /// The object that it stands for.
    pub target_ref: Option<TargetRef>,
}

/// Conditions of an endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Whether it is ready; it is if that is not said.
    pub ready: Option<bool>,
}

/// The object that an endpoint stands for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Kind.
    pub kind: Option<String>,
    /// Namespace.
    pub namespace: Option<String>,
    /// Name.
    pub name: Option<String>,
    /// Uid.
    pub uid: Option<String>,
}

/// A port of endpoints.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointPort {
    /// Name of the service's port.
    pub name: Option<String>,
    /// Number at the endpoint.
    pub port: Option<i64>,
    /// Transport; TCP if absent.
    pub protocol: Option<String>,
}

/// A node; only its metadata is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Metadata.
    pub metadata: Metadata,
}

/// A namespace; only its metadata is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Metadata.
    pub metadata: Metadata,
}

/// A Gateway of the Gateway API. Other programs define its schema, so its fields are read one by one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Gateway {
    /// Metadata.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: Value,
    /// What is.
    pub status: Value,
}
