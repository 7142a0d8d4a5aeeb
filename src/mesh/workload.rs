//! A workload: one pod (or virtual machine, or external endpoint) as the control plane describes it.

use super::address::GatewayRef;
use super::name::{NameError, ServiceKey, SpiffeName, Text};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// How a workload takes traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Plain TCP to its port.
    Tcp,
    /// HBONE on its port 15008.
    Hbone,
    /// In a way that we do not speak; connections to it are refused by name.
    Unsupported,
}

/// Whether a workload's IP is its own or that of its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The IP belongs to the workload.
    #[default]
    Standard,
    /// The workload shares its node's IP, which therefore names no workload.
    HostNetwork,
}

/// Health as the control plane sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// Ready for traffic.
    #[default]
    Healthy,
    /// Not ready.
    Unhealthy,
}

/// What kind of object stands behind a workload; a label for telemetry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadType {
    /// A Deployment (the default of the protocol).
    #[default]
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadType {
    /// The lower-case word used in baggage and dumps.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Region, zone and subzone; empty where unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locality {
    /// Region.
    pub region: Text,
    /// Zone within the region.
    pub zone: Text,
    /// Subzone within the zone.
    pub subzone: Text,
}

/// How streams are handed to an application tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// As they are.
    Plain,
    /// With a PROXY protocol header in front.
    Proxy,
    /// In a way that we do not know; streams are refused.
    Unsupported,
}

/// A listener inside the workload to which its inbound streams are to be delivered instead of the original port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// How streams are handed over.
    pub delivery: Delivery,
    /// The port, where it replaces the stream's own.
    pub port: Option<u16>,
}

/// Port map of a service at one endpoint: service port to target port.
pub type Ports = BTreeMap<u16, u16>;

/// The unique id that the control plane gives a pod (source: istiod's ambient index).
pub fn pod_uid(cluster: &str, namespace: &str, name: &str) -> Text {
    format!("{cluster}//Pod/{namespace}/{name}").into()
}

/// One workload of the mesh, or one known to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique id, e.g. `cluster1//Pod/retail/shop-0`.
    pub uid: Text,
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Trust domain of its identity.
    pub trust_domain: Text,
    /// Service account of its identity.
    pub service_account: Text,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The network its addresses belong to.
    pub network: Text,
    /// How it takes traffic.
    pub protocol: Protocol,
    /// Whether its addresses are its own.
    pub network_mode: NetworkMode,
    /// Waypoint asked for by the workload itself.
    pub waypoint: Option<GatewayRef>,
    /// Gateway by which other networks reach it.
    pub network_gateway: Option<GatewayRef>,
    /// Canonical name, for telemetry.
    pub canonical_name: Text,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Text,
    /// Name of the owning object, for telemetry.
    pub workload_name: Text,
    /// Kind of the owning object.
    pub workload_type: WorkloadType,
    /// Host name to be resolved where it has no address.
    pub hostname: Text,
    /// Node on which it runs.
    pub node: Text,
    /// Whether it terminates HBONE itself.
    pub native_tunnel: bool,
    /// Where its inbound streams go instead of the addressed port.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Keys of the policies that select this workload.
    pub policies: Vec<Text>,
    /// Its health.
    pub health: Health,
    /// Cluster id.
    pub cluster_id: Text,
    /// Where it runs.
    pub locality: Locality,
    /// Services it is an endpoint of, with its port map for each.
    pub services: BTreeMap<ServiceKey, Ports>,
    /// Relative weight among the endpoints of a service.
    pub capacity: u32,
}

impl Workload {
    /// The identity that this workload must prove.
    pub fn identity(&self) -> Result<SpiffeName, NameError> {
        SpiffeName::new(&self.trust_domain, &self.namespace, &self.service_account)
    }

    /// Whether this is the identity that it must prove.
    pub fn has_identity(&self, identity: &SpiffeName) -> bool {
        self.service_account == identity.service_account
            && self.namespace == identity.namespace
            && self.trust_domain == identity.trust_domain
    }
}
