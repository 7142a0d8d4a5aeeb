//! A service: a name and addresses that stand for a set of workloads, and the rules for choosing among them.

use super::address::{GatewayRef, NetworkAddress, NetworkCidr};
use super::name::{ServiceKey, Text};
use super::workload::{Health, Ports, Workload};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What an endpoint must have in common with the client to be preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingScope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
    /// A value of a newer protocol version. No endpoint has it in common with a client.
    Unknown,
}

/// How strictly [`LoadBalancer::preferences`] are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancingMode {
    /// All endpoints are equal.
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// The endpoints that match the largest number of leading preferences.
    Failover,
    /// No endpoint is chosen: connections go to their original destination.
    Passthrough,
}

/// Which endpoints may be chosen, by their health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthPolicy {
    /// Only healthy ones.
    OnlyHealthy,
    /// All of them.
    AllowAll,
}

/// Rules for choosing an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    /// Preferences, the most important first.
    pub preferences: Vec<RoutingScope>,
    /// How strictly they are taken.
    pub mode: LoadBalancingMode,
    /// Which endpoints may be chosen, by their health.
    pub health_policy: HealthPolicy,
}

/// The IP families of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

/// Which clients may use a service by its name and addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Visibility {
    /// All clients.
    #[default]
    Public,
    /// Only clients of the service's namespace.
    Namespace,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and host name.
    pub key: ServiceKey,
    /// Short name.
    pub name: Text,
    /// Its virtual addresses.
    pub vips: Vec<NetworkAddress>,
    /// Its virtual address ranges.
    pub cidrs: Vec<NetworkCidr>,
    /// Maps service ports to target ports. Target 0 means that each endpoint defines its own.
    pub ports: Ports,
    /// Its named TCP ports, as far as the source of the facts knows their names.
    pub port_names: BTreeMap<Text, u16>,
    /// Further SPIFFE names that endpoints may present.
    pub subject_alt_names: Vec<Text>,
    /// The waypoint of the service.
    pub waypoint: Option<GatewayRef>,
    /// Waypoints with their weights; one is drawn for each connection. If no weight is positive, `waypoint` is used.
    pub weighted_waypoints: Vec<(GatewayRef, u32)>,
    /// Rules for choosing an endpoint; `None` for the default, any healthy endpoint.
    pub load_balancer: Option<LoadBalancer>,
    /// The IP families of the service; `None` if unrestricted.
    pub ip_families: Option<IpFamilies>,
    /// Whether it is preferred to other services with the same name or address.
    pub canonical: bool,
    /// Which clients may use it.
    pub visibility: Visibility,
}

impl Service {
    /// Whether clients of `namespace` may use this service.
    pub fn visible_to(&self, namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => &*self.key.namespace == namespace,
        }
    }

    /// Whether the host name is the one that a Kubernetes service of this namespace would have, `name.namespace.svc…`. A
    /// service of another namespace that claims the same name or address is not preferred to it.
    pub fn is_named_after_its_namespace(&self) -> bool {
        let mut labels = self.key.hostname.splitn(4, '.');
        let (name, namespace, svc) = (labels.next(), labels.next(), labels.next());
        name.is_some_and(|name| !name.is_empty()) && namespace == Some(&*self.key.namespace) && svc == Some("svc")
    }

    /// Whether the health of an endpoint permits using it.
    pub fn may_use(&self, endpoint: &Workload) -> bool {
        let any = self.load_balancer.as_ref().is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
        any || endpoint.health == Health::Healthy
    }

    /// Whether the service has the IP family of `ip`.
    pub fn is_offered_in(&self, ip: IpAddr) -> bool {
        match self.ip_families {
            None | Some(IpFamilies::Dual) => true,
            Some(IpFamilies::V4) => ip.is_ipv4(),
            Some(IpFamilies::V6) => ip.is_ipv6(),
        }
    }

    /// The target port of a service port at an endpoint. The endpoint's own port map comes first, then the service's.
    pub fn target_port(&self, own: Option<&Ports>, port: u16) -> Option<u16> {
        let mapped = |ports: &Ports| ports.get(&port).copied().filter(|target| *target != 0);
        own.and_then(mapped).or_else(|| mapped(&self.ports))
    }

    /// Whether connections to this service go to their original destination instead of a chosen endpoint.
    pub fn is_passthrough(&self) -> bool {
        self.load_balancer.as_ref().is_some_and(|lb| lb.mode == LoadBalancingMode::Passthrough)
    }
}
