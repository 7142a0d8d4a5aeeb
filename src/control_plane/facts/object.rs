//! Kubernetes objects, reduced to what mesh facts depend on.

use crate::mesh::workload::{ApplicationTunnel, Locality};
use crate::mesh::{ServiceKey, Text};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

pub use super::selector::Selector;

/// Namespace and name of an object.
pub type Key = (Text, Text);

/// Labels, shared by all objects that have the same ones.
pub type Labels = Arc<BTreeMap<String, String>>;

/// How a pod accepts traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tunnel {
    /// As plain TCP.
    #[default]
    None,
    /// By HBONE: the daemon of its node has captured it.
    Captured,
    /// By HBONE, which it speaks itself.
    Native,
}

/// A waypoint that an object asks for by its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    /// It says nothing.
    #[default]
    Nothing,
    /// It wants none.
    None,
    /// The Gateway with this namespace and name.
    Gateway(Key),
}

/// Ports by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedPorts(Box<[(Text, u16)]>);

impl NamedPorts {
    /// These ports.
    pub fn of(ports: BTreeMap<Text, u16>) -> Self {
        Self(ports.into_iter().collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The port with a name.
    pub fn get(&self, name: &str) -> Option<u16> {
        let at = self.0.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        self.0.get(at).map(|(_, number)| *number)
    }
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// Uid.
    pub uid: Text,
    /// Service account, empty if none is said.
    pub service_account: Text,
    /// Node, empty before it has one.
    pub node: Text,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Labels.
    pub labels: Labels,
    /// Name of the workload that it belongs to.
    pub workload_name: Text,
    /// How it accepts traffic.
    pub tunnel: Tunnel,
    /// Named TCP ports of its containers.
    pub ports: NamedPorts,
    /// Whether it uses its node's network.
    pub host_network: bool,
    /// Whether it is ready and not being deleted.
    pub healthy: bool,
    /// Whether its phase says that it runs, or will.
    pub running: bool,
    /// Whether its containers have ended for good.
    pub ended: bool,
    /// The waypoint that it asks for.
    pub asked: Asked,
    /// The Gateway of its namespace whose proxy it is.
    pub gateway: Option<Text>,
}

/// Which endpoints of a service are preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// None, or in a way that is not known.
    Any,
    /// Those in the client's zone.
    SameZone,
    /// Those on the client's node.
    SameNode,
}

/// The port of the pods that a service port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A number.
    Number(u16),
    /// The name of a container port.
    Name(Text),
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Number.
    pub number: u16,
    /// Name, which slices repeat.
    pub name: Text,
    /// Where it leads.
    pub target: Target,
    /// Whether its transport is TCP.
    pub tcp: bool,
}

/// A service that has, or may have, endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name.
    pub name: Text,
    /// Namespace and host name.
    pub key: ServiceKey,
    /// The key as a text, the name of its resource.
    pub resource: Text,
    /// Labels of its pods; if empty, its endpoints are those of slices that others write.
    pub selector: BTreeMap<String, String>,
    /// Virtual addresses; a headless service has none.
    pub vips: Vec<IpAddr>,
    /// Whether it has the IP families 4 and 6, as far as it says.
    pub families: (bool, bool),
    /// Ports, each number once.
    pub ports: Vec<ServicePort>,
    /// Whether only endpoints of the client's node are used.
    pub local: bool,
    /// Which endpoints are preferred, if it says so.
    pub distribution: Option<Distribution>,
    /// Whether endpoints count before they are ready.
    pub publish_not_ready: bool,
    /// The waypoint that it asks for.
    pub asked: Asked,
    /// Whether it is the service of a waypoint or gateway, which never has a waypoint.
    pub is_gateway: bool,
}

/// The pod that an endpoint stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    /// Name, in the namespace of the slice.
    pub name: Text,
    /// Uid, if it is said.
    pub uid: Option<Text>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A pod.
    Pod(PodRef),
    /// Something else, at an address.
    Address {
        /// The address.
        ip: IpAddr,
        /// Whether it is ready.
        ready: bool,
    },
}

/// A part of the endpoints of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// Name of the service.
    pub service: Text,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
    /// TCP ports by the name of the service port.
    pub ports: NamedPorts,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: Text,
    /// Where it is.
    pub locality: Locality,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Name.
    pub name: Text,
    /// Labels.
    pub labels: Labels,
    /// The waypoint that it asks for, for its services and pods.
    pub asked: Asked,
    /// Which endpoints its services prefer, unless they say something else.
    pub distribution: Option<Distribution>,
    /// The network that it names, which counts in the namespace of the control plane.
    pub network: Text,
}

/// Which traffic a waypoint takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    /// Traffic to services.
    pub services: bool,
    /// Traffic to the addresses of pods.
    pub workloads: bool,
}

/// Which namespaces may use a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Its own.
    Same,
    /// All.
    All,
    /// Those with these labels.
    Selected(Selector),
}

/// Where a waypoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayAddress {
    /// At the host name of a service of the Gateway's namespace.
    Hostname(Text),
    /// At an address.
    Ip(IpAddr),
}

/// A Gateway that has an address, so that it can be a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// Which traffic it takes.
    pub takes: Takes,
    /// Where it is.
    pub address: GatewayAddress,
    /// Which namespaces may use it.
    pub allowed: Allowed,
    /// The listener of its proxies that receives their inbound streams.
    pub binding: Option<ApplicationTunnel>,
}
