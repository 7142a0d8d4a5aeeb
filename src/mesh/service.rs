//! A service: names and addresses that stand for a set of workloads, and how one of them is chosen.

use super::address::{GatewayRef, NetworkAddress, NetworkCidr};
use super::name::{ServiceKey, Text};
use super::workload::{Health, Ports, Workload};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What two workloads may have in common when endpoints are preferred.
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
    /// Something that we do not know: nothing is known to have it in common.
    Unknown,
}

/// How strictly [`LoadBalancer::preferences`] are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancingMode {
    /// All endpoints alike.
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// Those that match most leading preferences.
    Failover,
    /// None is chosen: the original destination is used.
    Passthrough,
}

/// Which endpoints may be chosen.
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
    /// Which endpoints may be chosen at all.
    pub health_policy: HealthPolicy,
}

/// IP families a service is offered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

/// Who may see a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients of its own namespace.
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
    /// Service port to target port; target 0 means that each endpoint says.
    pub ports: Ports,
    /// Names of its TCP ports, as far as whoever told of it knows them.
    pub port_names: BTreeMap<Text, u16>,
    /// Further SPIFFE names that endpoints may prove.
    pub subject_alt_names: Vec<Text>,
    /// Waypoint asked for by the service.
    pub waypoint: Option<GatewayRef>,
    /// Waypoints of which one is drawn for each connection, with their weights; without weight, `waypoint` counts.
    pub weighted_waypoints: Vec<(GatewayRef, u32)>,
    /// How endpoints are chosen.
    pub load_balancer: Option<LoadBalancer>,
    /// IP families; `None`: whatever there is.
    pub ip_families: Option<IpFamilies>,
    /// Preferred where several services share a name or address.
    pub canonical: bool,
    /// Who may see it.
    pub visibility: Visibility,
}

impl Service {
    /// Whether clients of `namespace` may see this service.
    pub fn visible_to(&self, namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => &*self.key.namespace == namespace,
        }
    }

    /// Whether one of its endpoints may be used, as far as health goes.
    pub fn may_use(&self, endpoint: &Workload) -> bool {
        let any = self.load_balancer.as_ref().is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
        any || endpoint.health == Health::Healthy
    }

    /// Whether it is offered in the family of an address.
    pub fn is_offered_in(&self, ip: IpAddr) -> bool {
        match self.ip_families {
            None | Some(IpFamilies::Dual) => true,
            Some(IpFamilies::V4) => ip.is_ipv4(),
            Some(IpFamilies::V6) => ip.is_ipv6(),
        }
    }

    /// The target of one of its ports at an endpoint with a port map of its own: what that says, else what the service says.
    pub fn target_port(&self, own: Option<&Ports>, port: u16) -> Option<u16> {
        let said = |ports: &Ports| ports.get(&port).copied().filter(|target| *target != 0);
        own.and_then(said).or_else(|| said(&self.ports))
    }

    /// Whether endpoints are not chosen by us for this service.
    pub fn is_passthrough(&self) -> bool {
        self.load_balancer.as_ref().is_some_and(|lb| lb.mode == LoadBalancingMode::Passthrough)
    }
}
