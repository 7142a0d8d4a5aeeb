//! The mesh fact of a Kubernetes service.

use super::object::{Distribution, Pod, Service, Slice, Target};
use crate::mesh::address::NetworkAddress;
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::workload::Ports;
use crate::mesh::{self, GatewayRef, Text};

/// The fact of a service. `distribution`: what its namespace says, which counts if the service says nothing.
pub fn fact(
    service: &Service,
    network: &Text,
    distribution: Option<Distribution>,
    waypoint: Option<GatewayRef>,
) -> mesh::Service {
    let target = |target: &Target| match target {
        Target::Number(number) => *number,
        Target::Name(_) => 0,
    };
    mesh::Service {
        key: service.key.clone(),
        name: service.name.clone(),
        vips: service.vips.iter().map(|ip| NetworkAddress { network: network.clone(), ip: *ip }).collect(),
        cidrs: Vec::new(),
        ports: service.ports.iter().map(|port| (port.number, target(&port.target))).collect(),
        port_names: Default::default(),
        subject_alt_names: Vec::new(),
        waypoint,
        weighted_waypoints: Vec::new(),
        load_balancer: load_balancer(service, distribution),
        ip_families: match service.families {
            (false, false) => None,
            (true, false) => Some(IpFamilies::V4),
            (false, true) => Some(IpFamilies::V6),
            (true, true) => Some(IpFamilies::Dual),
        },
        canonical: true,
        visibility: Visibility::Public,
    }
}

fn load_balancer(service: &Service, of_namespace: Option<Distribution>) -> Option<LoadBalancer> {
    use RoutingScope::{Network, Node, Region, Subzone, Zone};
    let (mode, preferences) = if service.local {
        (LoadBalancingMode::Strict, vec![Node])
    } else {
        match service.distribution.or(of_namespace).unwrap_or(Distribution::Any) {
            Distribution::Any => (LoadBalancingMode::Standard, Vec::new()),
            Distribution::SameZone => (LoadBalancingMode::Failover, vec![Network, Region, Zone]),
            Distribution::SameNode => (LoadBalancingMode::Failover, vec![Network, Region, Zone, Subzone, Node]),
        }
    };
    let health_policy = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    let says_nothing = mode == LoadBalancingMode::Standard && health_policy == HealthPolicy::OnlyHealthy;
    (!says_nothing).then_some(LoadBalancer { preferences, mode, health_policy })
}

/// The port map of a service at a pod. A port whose target has a name that no container port has is left out.
pub fn ports_at(service: &Service, pod: &Pod) -> Ports {
    let target = |target: &Target| match target {
        Target::Number(number) => Some(*number),
        Target::Name(name) => pod.ports.get(name),
    };
    service.ports.iter().filter_map(|port| Some((port.number, target(&port.target)?))).collect()
}

/// The port map of a service at the endpoints of a slice that are no pods: its TCP ports, by name.
pub fn ports_in(service: &Service, slice: &Slice) -> Ports {
    let tcp = service.ports.iter().filter(|port| port.tcp);
    tcp.filter_map(|port| Some((port.number, slice.ports.get(&port.name)?))).collect()
}
