//! Decodes workloads and services into mesh facts. Pure; accepts any bytes.
//!
//! A value that is not understood, such as an address of three bytes or a gateway of a newer kind, is reported and left
//! out, and the rest is used: connections to a workload that is not known at all would be sent as plaintext. A gateway
//! that is not understood is kept as one that cannot be found. An unknown value of an enumeration is not a fault.
//!
//! Defaults of the protocol (source: istiod and ztunnel): trust domain `cluster.local`, service account `default`,
//! cluster `Kubernetes`, capacity 1.

use crate::mesh::address::{NetworkAddress, NetworkCidr};
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::workload::{ApplicationTunnel, Delivery, Health, Locality, NetworkMode, Ports, WorkloadType};
use crate::mesh::{GatewayRef, GatewayTarget, Protocol, Service, ServiceKey, Text, Workload};
use crate::proto::istio::workload as wire;
use ipnet::IpNet;
use prost::Message;
use std::collections::HashSet;
use std::net::IpAddr;

/// How many names are remembered for sharing. When there are more, all are forgotten and sharing starts again.
const NAMES_MAX: usize = 200_000;
/// Longest text that is shared, in bytes.
const SHARED_MAX: usize = 256;

/// Shared texts, so that fifty thousand workloads in ten namespaces need ten namespace names.
#[derive(Debug, Default)]
pub struct Names(HashSet<Text>);

impl Names {
    /// The shared copy of a text.
    pub fn text(&mut self, text: &str) -> Text {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        if text.len() > SHARED_MAX {
            return text.into();
        }
        if self.0.len() >= NAMES_MAX {
            self.0.clear();
        }
        let new = Text::from(text);
        self.0.insert(new.clone());
        new
    }

    fn or(&mut self, text: &str, default: &str) -> Text {
        self.text(if text.is_empty() { default } else { text })
    }
}

/// A decoded resource of type `Address`.
#[derive(Debug)]
pub enum Address {
    /// A workload.
    Workload(Box<Workload>),
    /// A service.
    Service(Box<Service>),
}

/// A decoded resource, and what was not understood in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Decoded<T> {
    /// The resource. Parts that were not understood are left out or replaced by safe ones.
    pub value: T,
    /// What was not understood.
    pub faults: Vec<String>,
    /// Values that are valid and used, but may not do what their author believes.
    pub notes: Vec<String>,
}

/// Decodes the resource named `name`. The content must have that name too.
pub fn address(name: &str, bytes: &[u8], names: &mut Names) -> Result<Decoded<Address>, String> {
    let resource = wire::Address::decode(bytes).map_err(|error| format!("cannot be decoded: {error}"))?;
    let mut faults = Vec::new();
    let (address, key) = match resource.r#type {
        Some(wire::address::Type::Workload(w)) => {
            let workload = workload(w, names, &mut faults)?;
            let key = workload.uid.to_string();
            (Address::Workload(Box::new(workload)), key)
        }
        Some(wire::address::Type::Service(s)) => {
            let service = service(s, names, &mut faults)?;
            let key = service.key.to_string();
            (Address::Service(Box::new(service)), key)
        }
        None => return Err("is neither a workload nor a service".into()),
    };
    if key != name {
        return Err(format!("contains a resource of another name: {key}"));
    }
    Ok(Decoded { value: address, faults, notes: Vec::new() })
}

/// The value; an error is added to the faults.
fn keep<T>(result: Result<T, String>, faults: &mut Vec<String>) -> Option<T> {
    result.map_err(|fault| faults.push(fault)).ok()
}

fn workload(w: wire::Workload, names: &mut Names, faults: &mut Vec<String>) -> Result<Workload, String> {
    if w.uid.is_empty() {
        return Err("has no uid".into());
    }
    let ips = w.addresses.iter().filter_map(|bytes| keep(ip(bytes), faults)).collect();
    let mut services = std::collections::BTreeMap::new();
    for (key, list) in &w.services {
        let key = ServiceKey::parse(key).map_err(|error| format!("service: {error}"));
        let Some(key) = keep(key, faults) else { continue };
        let key = ServiceKey { namespace: names.text(&key.namespace), hostname: names.text(&key.hostname) };
        services.insert(key, ports(&list.ports, faults));
    }
    let locality = w.locality.unwrap_or_default();
    Ok(Workload {
        ips,
        services,
        waypoint: w.waypoint.map(|g| gateway(&g, names, faults)),
        network_gateway: w.network_gateway.map(|g| gateway(&g, names, faults)),
        application_tunnel: w.application_tunnel.map(|tunnel| application_tunnel(&tunnel, faults)),
        protocol: match wire::TunnelProtocol::try_from(w.tunnel_protocol) {
            // A sidecar terminates its own TLS. What we send it is plaintext, as ztunnel does.
            Ok(wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls) => Protocol::Tcp,
            Ok(wire::TunnelProtocol::Hbone) => Protocol::Hbone,
            Err(_) => Protocol::Unsupported,
        },
        network_mode: match wire::NetworkMode::try_from(w.network_mode) {
            Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
            Ok(wire::NetworkMode::Standard) | Err(_) => NetworkMode::Standard,
        },
        workload_type: match wire::WorkloadType::try_from(w.workload_type) {
            Ok(wire::WorkloadType::Deployment) => WorkloadType::Deployment,
            Ok(wire::WorkloadType::Cronjob) => WorkloadType::CronJob,
            Ok(wire::WorkloadType::Job) => WorkloadType::Job,
            Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
        },
        // A workload in an unknown state receives no traffic.
        health: match wire::WorkloadStatus::try_from(w.status) {
            Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
            Ok(wire::WorkloadStatus::Unhealthy) | Err(_) => Health::Unhealthy,
        },
        uid: w.uid.into(),
        name: w.name.into(),
        namespace: names.text(&w.namespace),
        trust_domain: names.or(&w.trust_domain, "cluster.local"),
        service_account: names.or(&w.service_account, "default"),
        network: names.text(&w.network),
        canonical_name: names.text(&w.canonical_name),
        canonical_revision: names.text(&w.canonical_revision),
        workload_name: names.text(&w.workload_name),
        hostname: names.text(&w.hostname),
        node: names.text(&w.node),
        native_tunnel: w.native_tunnel,
        policies: w.authorization_policies.iter().map(|key| names.text(key)).collect(),
        cluster_id: names.or(&w.cluster_id, "Kubernetes"),
        locality: Locality {
            region: names.text(&locality.region),
            zone: names.text(&locality.zone),
            subzone: names.text(&locality.subzone),
        },
        capacity: w.capacity.unwrap_or(1),
        known: Default::default(),
    })
}

fn application_tunnel(tunnel: &wire::ApplicationTunnel, faults: &mut Vec<String>) -> ApplicationTunnel {
    let port = keep(port(tunnel.port), faults);
    let delivery = match (wire::application_tunnel::Protocol::try_from(tunnel.protocol), port) {
        (Ok(wire::application_tunnel::Protocol::None), Some(_)) => Delivery::Plain,
        (Ok(wire::application_tunnel::Protocol::Proxy), Some(_)) => Delivery::Proxy,
        (Err(_), _) | (_, None) => Delivery::Unsupported,
    };
    ApplicationTunnel { delivery, port: port.filter(|port| *port != 0) }
}

fn service(s: wire::Service, names: &mut Names, faults: &mut Vec<String>) -> Result<Service, String> {
    let key = format!("{}/{}", s.namespace, s.hostname);
    let key = ServiceKey::parse(&key).map_err(|error| error.to_string())?;
    let (mut vips, mut cidrs) = (Vec::new(), Vec::new());
    for address in &s.addresses {
        let network = names.text(&address.network);
        let Some(ip) = keep(ip(&address.address), faults) else { continue };
        let whole = if ip.is_ipv4() { 32 } else { 128 };
        match address.length.filter(|length| *length != whole) {
            None => vips.push(NetworkAddress { network, ip }),
            Some(length) => {
                let range = keep(range(ip, length), faults);
                cidrs.extend(range.map(|range| NetworkCidr { network, range }));
            }
        }
    }
    let mut weighted_waypoints = Vec::new();
    for weighted in &s.weighted_waypoints {
        let destination = weighted.destination.clone().unwrap_or_default();
        weighted_waypoints.push((gateway(&destination, names, faults), weighted.weight));
    }
    Ok(Service {
        key: ServiceKey { namespace: names.text(&key.namespace), hostname: names.text(&key.hostname) },
        vips,
        cidrs,
        ports: ports(&s.ports, faults),
        // The protocol does not carry port names.
        port_names: Default::default(),
        waypoint: s.waypoint.map(|g| gateway(&g, names, faults)),
        weighted_waypoints,
        name: s.name.into(),
        subject_alt_names: s.subject_alt_names.iter().map(|name| names.text(name)).collect(),
        load_balancer: s.load_balancing.map(|lb| load_balancer(&lb)),
        ip_families: match wire::IpFamilies::try_from(s.ip_families) {
            Ok(wire::IpFamilies::Automatic) | Err(_) => None,
            Ok(wire::IpFamilies::Ipv4Only) => Some(IpFamilies::V4),
            Ok(wire::IpFamilies::Ipv6Only) => Some(IpFamilies::V6),
            Ok(wire::IpFamilies::Dual) => Some(IpFamilies::Dual),
        },
        canonical: s.canonical,
        visibility: match wire::service::Visibility::try_from(s.visibility) {
            Ok(wire::service::Visibility::Namespace) => Visibility::Namespace,
            Ok(wire::service::Visibility::Public) | Err(_) => Visibility::Public,
        },
    })
}

fn load_balancer(lb: &wire::LoadBalancing) -> LoadBalancer {
    use wire::load_balancing::{HealthPolicy as WirePolicy, Mode as WireMode, Scope as WireScope};
    let scope = |scope: &i32| match WireScope::try_from(*scope) {
        Ok(WireScope::Region) => RoutingScope::Region,
        Ok(WireScope::Zone) => RoutingScope::Zone,
        Ok(WireScope::Subzone) => RoutingScope::Subzone,
        Ok(WireScope::Node) => RoutingScope::Node,
        Ok(WireScope::Cluster) => RoutingScope::Cluster,
        Ok(WireScope::Network) => RoutingScope::Network,
        // Unknown scopes are kept: without them a strict load balancer would use endpoints that it must not use.
        Ok(WireScope::UnspecifiedScope) | Err(_) => RoutingScope::Unknown,
    };
    LoadBalancer {
        preferences: lb.routing_preference.iter().map(scope).collect(),
        mode: match WireMode::try_from(lb.mode) {
            Ok(WireMode::UnspecifiedMode) | Err(_) => LoadBalancingMode::Standard,
            Ok(WireMode::Strict) => LoadBalancingMode::Strict,
            Ok(WireMode::Failover) => LoadBalancingMode::Failover,
            Ok(WireMode::Passthrough) => LoadBalancingMode::Passthrough,
        },
        health_policy: match WirePolicy::try_from(lb.health_policy) {
            Ok(WirePolicy::AllowAll) => HealthPolicy::AllowAll,
            Ok(WirePolicy::OnlyHealthy) | Err(_) => HealthPolicy::OnlyHealthy,
        },
    }
}

/// Decodes a gateway. One that is not understood becomes one that cannot be found, rather than none.
fn gateway(gateway: &wire::GatewayAddress, names: &mut Names, faults: &mut Vec<String>) -> GatewayRef {
    let understood = (|| Ok((gateway_target(gateway, names)?, port(gateway.hbone_mtls_port)?)))();
    let unknown = || {
        let (namespace, hostname) = ("".into(), "(not understood)".into());
        (GatewayTarget::Hostname(ServiceKey { namespace, hostname }), 0)
    };
    let (target, hbone_port) = keep(understood, faults).unwrap_or_else(unknown);
    GatewayRef { target, hbone_port }
}

fn gateway_target(gateway: &wire::GatewayAddress, names: &mut Names) -> Result<GatewayTarget, String> {
    use wire::gateway_address::Destination;
    match &gateway.destination {
        Some(Destination::Hostname(host)) => {
            let key = ServiceKey::parse(&format!("{}/{}", host.namespace, host.hostname));
            Ok(GatewayTarget::Hostname(key.map_err(|error| format!("gateway: {error}"))?))
        }
        Some(Destination::Address(address)) => {
            let (network, ip) = (names.text(&address.network), ip(&address.address)?);
            Ok(GatewayTarget::Address(NetworkAddress { network, ip }))
        }
        None => Err("a gateway has no destination".into()),
    }
}

/// The ports of a service or endpoint. A number may occur twice, such as 53 for UDP and TCP; a target other than 0
/// wins.
fn ports(list: &[wire::Port], faults: &mut Vec<String>) -> Ports {
    let mut ports = Ports::new();
    for entry in list {
        let both = port(entry.service_port).and_then(|from| Ok((from, port(entry.target_port)?)));
        let Some((from, to)) = keep(both, faults) else { continue };
        let known = ports.entry(from).or_insert(to);
        if *known == 0 {
            *known = to;
        }
    }
    ports
}

fn port(number: u32) -> Result<u16, String> {
    u16::try_from(number).map_err(|_| format!("{number} is not a port"))
}

/// An address of 4 or 16 bytes.
pub(super) fn ip(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = <[u8; 16]>::try_from(bytes);
    v6.map(|v6| IpAddr::from(v6).to_canonical()).map_err(|_| format!("an address has {} bytes", bytes.len()))
}

/// An address range; host bits may be set.
pub(super) fn range(ip: IpAddr, length: u32) -> Result<IpNet, String> {
    let net = u8::try_from(length).ok().and_then(|length| IpNet::new(ip, length).ok());
    net.ok_or_else(|| format!("{ip}/{length} is not an address range"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(resource: wire::address::Type, name: &str) -> Result<Address, String> {
        let bytes = wire::Address { r#type: Some(resource) }.encode_to_vec();
        let decoded = address(name, &bytes, &mut Names::default())?;
        if decoded.faults.is_empty() { Ok(decoded.value) } else { Err(decoded.faults.join("; ")) }
    }

    fn pod() -> wire::Workload {
        wire::Workload {
            uid: "c1//Pod/a/w".into(),
            name: "w".into(),
            namespace: "a".into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            ..Default::default()
        }
    }

    #[test]
    fn defaults_of_the_protocol_apply() {
        let Ok(Address::Workload(w)) = decode(wire::address::Type::Workload(pod()), "c1//Pod/a/w") else { panic!() };
        assert_eq!(w.identity().unwrap().to_string(), "spiffe://cluster.local/ns/a/sa/default");
        assert_eq!((&*w.cluster_id, w.capacity, w.protocol), ("Kubernetes", 1, Protocol::Tcp));
    }

    #[test]
    fn newer_values_are_tolerated_and_impossible_ones_named() {
        let newer = wire::Workload {
            tunnel_protocol: 99,
            status: 99,
            network_mode: 99,
            workload_type: 99,
            capacity: Some(0),
            ..pod()
        };
        let Ok(Address::Workload(w)) = decode(wire::address::Type::Workload(newer), "c1//Pod/a/w") else { panic!() };
        assert_eq!((w.protocol, w.health, w.capacity), (Protocol::Unsupported, Health::Unhealthy, 0));
        let lb = wire::LoadBalancing { routing_preference: vec![99, 2], mode: 99, health_policy: 99 };
        let newer = wire::Service {
            namespace: "a".into(),
            hostname: "h".into(),
            load_balancing: Some(lb),
            visibility: 99,
            ip_families: 99,
            ..Default::default()
        };
        let Ok(Address::Service(s)) = decode(wire::address::Type::Service(newer), "a/h") else { panic!() };
        let lb = s.load_balancer.unwrap();
        assert_eq!(
            (lb.mode, lb.preferences, s.visibility),
            (LoadBalancingMode::Standard, vec![RoutingScope::Unknown, RoutingScope::Zone], Visibility::Public)
        );
        for (change, word) in [
            (
                Box::new(|w: &mut wire::Workload| w.addresses = vec![vec![1, 2, 3].into()]) as Box<dyn Fn(&mut _)>,
                "3 bytes",
            ),
            (Box::new(|w: &mut wire::Workload| w.waypoint = Some(Default::default())), "no destination"),
            (Box::new(|w: &mut wire::Workload| drop(w.services.insert("x".into(), Default::default()))), "service"),
            (Box::new(|w: &mut wire::Workload| w.uid = "other".into()), "another name"),
            (Box::new(|w: &mut wire::Workload| w.uid.clear()), "no uid"),
        ] {
            let mut bad = pod();
            change(&mut bad);
            let error = decode(wire::address::Type::Workload(bad), "c1//Pod/a/w").unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_waypoint_that_is_not_understood_is_kept_as_one_that_cannot_be_found() {
        let odd = wire::Workload { waypoint: Some(Default::default()), ..pod() };
        let bytes = wire::Address { r#type: Some(wire::address::Type::Workload(odd)) }.encode_to_vec();
        let decoded = address("c1//Pod/a/w", &bytes, &mut Names::default()).unwrap();
        let Address::Workload(w) = decoded.value else { panic!() };
        assert!(w.waypoint.is_some() && !w.ips.is_empty(), "the workload is known and has a waypoint");
        assert_eq!(decoded.faults.len(), 1);
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes: Vec<u8>) {
            drop(address("x", &bytes, &mut Names::default()));
        }
    }
}
