//! Encodes mesh facts as the resources that `decode` and `policy` read: the inverse of both. Pure.
//!
//! Equal facts have equal bytes, in every replica and every version. What the protocol has no field for, the names of
//! ports, is left out. A value that this version does not know is sent as one that no version knows, so that whoever
//! receives it refuses what this version would refuse.

use crate::mesh::address::{NetworkAddress, NetworkCidr};
use crate::mesh::policy::{Action, Attribute, Match, PolicyScope, ServiceAccountMatch, StringMatch};
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::workload::{ApplicationTunnel, Delivery, Health, NetworkMode, Ports, WorkloadType};
use crate::mesh::{GatewayRef, GatewayTarget, Policy, Protocol, Service, Text, Workload};
use crate::proto::istio::{security, workload as wire};
use bytes::Bytes;
use ipnet::IpNet;
use prost::Message;
use std::net::IpAddr;

/// A value that no enumeration of the protocol has.
const UNKNOWN: i32 = i32::MAX;

/// The trust domain that is not written, because it is the protocol's default.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// The resource of a workload, of type `Address`.
pub fn workload(w: &Workload) -> Bytes {
    address(wire::address::Type::Workload(wire_workload(w)))
}

/// The resource of a service, of type `Address`.
pub fn service(s: &Service) -> Bytes {
    address(wire::address::Type::Service(wire_service(s)))
}

/// The resource of a policy, of type `Authorization`.
pub fn policy(p: &Policy) -> Bytes {
    let one_rule = |rule: &Vec<Vec<Match>>| {
        let clause = |clause: &Vec<Match>| security::Clause { matches: clause.iter().map(one_match).collect() };
        security::Rule { clauses: rule.iter().map(clause).collect() }
    };
    let authorization = security::Authorization {
        name: p.name.to_string(),
        namespace: p.namespace.to_string(),
        scope: match p.scope {
            PolicyScope::Global => security::Scope::Global,
            PolicyScope::Namespace => security::Scope::Namespace,
            PolicyScope::WorkloadSelector => security::Scope::WorkloadSelector,
        }
        .into(),
        action: match p.action {
            Action::Allow => security::Action::Allow,
            Action::Deny => security::Action::Deny,
        }
        .into(),
        rules: p.rules.iter().map(one_rule).collect(),
        dry_run: p.dry_run,
        extensions: Vec::new(),
    };
    authorization.encode_to_vec().into()
}

fn address(resource: wire::address::Type) -> Bytes {
    wire::Address { r#type: Some(resource) }.encode_to_vec().into()
}

fn wire_workload(w: &Workload) -> wire::Workload {
    let trust_domain = if &*w.trust_domain == DEFAULT_TRUST_DOMAIN { "" } else { &w.trust_domain };
    let known = |text: &Text| !text.is_empty();
    let locality = &w.locality;
    let has_locality = known(&locality.region) || known(&locality.zone) || known(&locality.subzone);
    wire::Workload {
        uid: w.uid.to_string(),
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        addresses: w.ips.iter().map(|ip| octets(*ip)).collect(),
        hostname: w.hostname.to_string(),
        network: w.network.to_string(),
        tunnel_protocol: match w.protocol {
            Protocol::Tcp => wire::TunnelProtocol::None.into(),
            Protocol::Hbone => wire::TunnelProtocol::Hbone.into(),
            Protocol::Unsupported => UNKNOWN,
        },
        trust_domain: trust_domain.into(),
        service_account: w.service_account.to_string(),
        waypoint: w.waypoint.as_ref().map(gateway),
        network_gateway: w.network_gateway.as_ref().map(gateway),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: match w.workload_type {
            WorkloadType::Deployment => wire::WorkloadType::Deployment,
            WorkloadType::CronJob => wire::WorkloadType::Cronjob,
            WorkloadType::Pod => wire::WorkloadType::Pod,
            WorkloadType::Job => wire::WorkloadType::Job,
        }
        .into(),
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        status: match w.health {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: w.cluster_id.to_string(),
        services: w.services.iter().map(|(key, map)| (key.to_string(), wire::PortList { ports: ports(map) })).collect(),
        application_tunnel: w.application_tunnel.as_ref().map(application_tunnel),
        locality: has_locality.then(|| wire::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            subzone: locality.subzone.to_string(),
        }),
        network_mode: match w.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
        capacity: (w.capacity != 1).then_some(w.capacity),
    }
}

fn application_tunnel(tunnel: &ApplicationTunnel) -> wire::ApplicationTunnel {
    let protocol = match tunnel.delivery {
        Delivery::Plain => wire::application_tunnel::Protocol::None.into(),
        Delivery::Proxy => wire::application_tunnel::Protocol::Proxy.into(),
        Delivery::Unsupported => UNKNOWN,
    };
    wire::ApplicationTunnel { protocol, port: tunnel.port.unwrap_or(0).into() }
}

fn wire_service(s: &Service) -> wire::Service {
    let weighted = |(destination, weight): &(GatewayRef, u32)| wire::WeightedWaypoint {
        destination: Some(gateway(destination)),
        weight: *weight,
    };
    wire::Service {
        name: s.name.to_string(),
        namespace: s.key.namespace.to_string(),
        hostname: s.key.hostname.to_string(),
        addresses: s.vips.iter().map(network_address).chain(s.cidrs.iter().map(network_range)).collect(),
        ports: ports(&s.ports),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(gateway),
        load_balancing: s.load_balancer.as_ref().map(load_balancing),
        ip_families: match s.ip_families {
            None => wire::IpFamilies::Automatic,
            Some(IpFamilies::V4) => wire::IpFamilies::Ipv4Only,
            Some(IpFamilies::V6) => wire::IpFamilies::Ipv6Only,
            Some(IpFamilies::Dual) => wire::IpFamilies::Dual,
        }
        .into(),
        extensions: Vec::new(),
        canonical: s.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: s.weighted_waypoints.iter().map(weighted).collect(),
        visibility: match s.visibility {
            Visibility::Public => wire::service::Visibility::Public,
            Visibility::Namespace => wire::service::Visibility::Namespace,
        }
        .into(),
    }
}

fn load_balancing(lb: &LoadBalancer) -> wire::LoadBalancing {
    use wire::load_balancing::{HealthPolicy as WirePolicy, Mode as WireMode, Scope as WireScope};
    let scope = |scope: &RoutingScope| match scope {
        RoutingScope::Region => WireScope::Region.into(),
        RoutingScope::Zone => WireScope::Zone.into(),
        RoutingScope::Subzone => WireScope::Subzone.into(),
        RoutingScope::Node => WireScope::Node.into(),
        RoutingScope::Cluster => WireScope::Cluster.into(),
        RoutingScope::Network => WireScope::Network.into(),
        RoutingScope::Unknown => UNKNOWN,
    };
    wire::LoadBalancing {
        routing_preference: lb.preferences.iter().map(scope).collect(),
        mode: match lb.mode {
            LoadBalancingMode::Standard => WireMode::UnspecifiedMode,
            LoadBalancingMode::Strict => WireMode::Strict,
            LoadBalancingMode::Failover => WireMode::Failover,
            LoadBalancingMode::Passthrough => WireMode::Passthrough,
        }
        .into(),
        health_policy: match lb.health_policy {
            HealthPolicy::OnlyHealthy => WirePolicy::OnlyHealthy,
            HealthPolicy::AllowAll => WirePolicy::AllowAll,
        }
        .into(),
    }
}

fn gateway(gateway: &GatewayRef) -> wire::GatewayAddress {
    use wire::gateway_address::Destination;
    let destination = match &gateway.target {
        GatewayTarget::Hostname(key) => Destination::Hostname(wire::NamespacedHostname {
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
        }),
        GatewayTarget::Address(address) => Destination::Address(network_address(address)),
    };
    wire::GatewayAddress { hbone_mtls_port: gateway.hbone_port.into(), destination: Some(destination) }
}

fn network_address(address: &NetworkAddress) -> wire::NetworkAddress {
    wire::NetworkAddress { network: address.network.to_string(), address: octets(address.ip), length: None }
}

fn network_range(cidr: &NetworkCidr) -> wire::NetworkAddress {
    let length = Some(cidr.range.prefix_len().into());
    wire::NetworkAddress { network: cidr.network.to_string(), address: octets(cidr.range.addr()), length }
}

fn ports(ports: &Ports) -> Vec<wire::Port> {
    let app_protocol = wire::AppProtocol::Unknown.into();
    let port =
        |(from, to): (&u16, &u16)| wire::Port { service_port: (*from).into(), target_port: (*to).into(), app_protocol };
    ports.iter().map(port).collect()
}

fn octets(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

fn one_match(m: &Match) -> security::Match {
    let (namespaces, not_namespaces) = attribute(&m.namespaces, string);
    let (principals, not_principals) = attribute(&m.principals, string);
    let (service_accounts, not_service_accounts) = attribute(&m.service_accounts, account);
    let (source_ips, not_source_ips) = attribute(&m.source_ips, net);
    let (destination_ips, not_destination_ips) = attribute(&m.destination_ips, net);
    let (destination_ports, not_destination_ports) = attribute(&m.destination_ports, |port| u32::from(*port));
    security::Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts,
        not_service_accounts,
        extensions: Vec::new(),
    }
}

fn attribute<T, W>(attribute: &Attribute<T>, one: impl Fn(&T) -> W) -> (Vec<W>, Vec<W>) {
    (attribute.any_of.iter().map(&one).collect(), attribute.none_of.iter().map(&one).collect())
}

fn string(m: &StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    let match_type = Some(match m {
        StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        StringMatch::Presence => MatchType::Presence(()),
    });
    security::StringMatch { match_type }
}

fn account(m: &ServiceAccountMatch) -> security::ServiceAccountMatch {
    let (namespace, service_account) = (m.namespace.to_string(), m.service_account.to_string());
    security::ServiceAccountMatch { namespace, service_account }
}

fn net(net: &IpNet) -> security::Address {
    security::Address { address: octets(net.addr()), length: net.prefix_len().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::xds::decode::{self, Names};
    use crate::control::xds::policy as decode_policy;
    use crate::mesh::ServiceKey;
    use crate::mesh::workload::Locality;
    use proptest::collection::{btree_map, vec};
    use proptest::option;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn name() -> impl Strategy<Value = Text> {
        "[a-z][a-z0-9.-]{0,8}".prop_map(|text| text.as_str().into())
    }

    fn maybe() -> impl Strategy<Value = Text> {
        prop_oneof![Just(Text::from("")), name()]
    }

    fn ip_address() -> impl Strategy<Value = IpAddr> {
        let v6 = any::<Ipv6Addr>().prop_filter("it is not IPv4", |ip| ip.to_ipv4_mapped().is_none());
        prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), v6.prop_map(IpAddr::V6)]
    }

    fn ip_net(whole: bool) -> impl Strategy<Value = IpNet> {
        (ip_address(), 0u8..=128).prop_map(move |(ip, length)| {
            let bits = if ip.is_ipv4() { 32 } else { 128 };
            IpNet::new(ip, length % (bits + u8::from(whole))).unwrap()
        })
    }

    fn key() -> impl Strategy<Value = ServiceKey> {
        (name(), name()).prop_map(|(namespace, hostname)| ServiceKey { namespace, hostname })
    }

    fn network() -> impl Strategy<Value = NetworkAddress> {
        (maybe(), ip_address()).prop_map(|(network, ip)| NetworkAddress { network, ip })
    }

    fn gateways() -> impl Strategy<Value = GatewayRef> {
        let target = prop_oneof![key().prop_map(GatewayTarget::Hostname), network().prop_map(GatewayTarget::Address)];
        (target, any::<u16>()).prop_map(|(target, hbone_port)| GatewayRef { target, hbone_port })
    }

    fn port_maps() -> impl Strategy<Value = Ports> {
        btree_map(any::<u16>(), any::<u16>(), 0..4)
    }

    fn tunnels() -> impl Strategy<Value = ApplicationTunnel> {
        let delivery = prop_oneof![Just(Delivery::Plain), Just(Delivery::Proxy), Just(Delivery::Unsupported)];
        (delivery, option::of(1..=u16::MAX)).prop_map(|(delivery, port)| ApplicationTunnel { delivery, port })
    }

    prop_compose! {
        fn kinds()(
            protocol in prop_oneof![Just(Protocol::Tcp), Just(Protocol::Hbone), Just(Protocol::Unsupported)],
            network_mode in prop_oneof![Just(NetworkMode::Standard), Just(NetworkMode::HostNetwork)],
            workload_type in prop_oneof![
                Just(WorkloadType::Deployment), Just(WorkloadType::CronJob), Just(WorkloadType::Pod), Just(WorkloadType::Job)
            ],
            health in prop_oneof![Just(Health::Healthy), Just(Health::Unhealthy)],
        ) -> (Protocol, NetworkMode, WorkloadType, Health) {
            (protocol, network_mode, workload_type, health)
        }
    }

    prop_compose! {
        fn workloads()(
            (uid, name, namespace, trust_domain, service_account) in (name(), maybe(), maybe(), name(), name()),
            (network, canonical_name, canonical_revision) in (maybe(), maybe(), maybe()),
            (workload_name, hostname, node, cluster_id) in (maybe(), maybe(), maybe(), name()),
            (region, zone, subzone) in (maybe(), maybe(), maybe()),
            default_domain in any::<bool>(),
            (protocol, network_mode, workload_type, health) in kinds(),
            (waypoint, network_gateway) in (option::of(gateways()), option::of(gateways())),
            application_tunnel in option::of(tunnels()),
            (ips, policies) in (vec(ip_address(), 0..3), vec(maybe(), 0..3)),
            services in btree_map(key(), port_maps(), 0..3),
            (native_tunnel, capacity) in (any::<bool>(), prop_oneof![Just(1), any::<u32>()]),
        ) -> Workload {
            let trust_domain = if default_domain { "cluster.local".into() } else { trust_domain };
            Workload {
                uid, name, namespace, trust_domain, service_account, ips, network, protocol, network_mode, waypoint,
                network_gateway, canonical_name, canonical_revision, workload_name, workload_type, hostname, node,
                native_tunnel, application_tunnel, policies, health, cluster_id, services, capacity, known: Default::default(),
                locality: Locality { region, zone, subzone },
            }
        }
    }

    fn load_balancers() -> impl Strategy<Value = LoadBalancer> {
        use RoutingScope::{Cluster, Network, Node, Region, Subzone, Unknown, Zone};
        let scope = proptest::sample::select(vec![Region, Zone, Subzone, Node, Cluster, Network, Unknown]);
        let mode = proptest::sample::select(vec![
            LoadBalancingMode::Standard,
            LoadBalancingMode::Strict,
            LoadBalancingMode::Failover,
            LoadBalancingMode::Passthrough,
        ]);
        let health = prop_oneof![Just(HealthPolicy::OnlyHealthy), Just(HealthPolicy::AllowAll)];
        (vec(scope, 0..4), mode, health).prop_map(|(preferences, mode, health_policy)| LoadBalancer {
            preferences,
            mode,
            health_policy,
        })
    }

    prop_compose! {
        fn services()(
            (key, name) in (key(), maybe()),
            vips in vec(network(), 0..3),
            cidrs in vec((maybe(), ip_net(false)).prop_map(|(network, range)| NetworkCidr { network, range }), 0..3),
            ports in port_maps(),
            subject_alt_names in vec(maybe(), 0..3),
            waypoint in option::of(gateways()),
            weighted_waypoints in vec((gateways(), any::<u32>()), 0..3),
            load_balancer in option::of(load_balancers()),
            ip_families in option::of(prop_oneof![Just(IpFamilies::V4), Just(IpFamilies::V6), Just(IpFamilies::Dual)]),
            canonical in any::<bool>(),
            visibility in prop_oneof![Just(Visibility::Public), Just(Visibility::Namespace)],
        ) -> Service {
            Service {
                key, name, vips, cidrs, ports, port_names: Default::default(), waypoint, weighted_waypoints,
                subject_alt_names, load_balancer, ip_families, canonical, visibility,
            }
        }
    }

    fn attributes<T: std::fmt::Debug>(one: impl Strategy<Value = T> + Clone) -> impl Strategy<Value = Attribute<T>> {
        (vec(one.clone(), 0..2), vec(one, 0..2)).prop_map(|(any_of, none_of)| Attribute { any_of, none_of })
    }

    fn matches() -> impl Strategy<Value = Match> {
        let string = || {
            prop_oneof![
                maybe().prop_map(StringMatch::Exact),
                maybe().prop_map(StringMatch::Prefix),
                maybe().prop_map(StringMatch::Suffix),
                Just(StringMatch::Presence),
            ]
            .boxed()
        };
        let account = (maybe(), maybe())
            .prop_map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account })
            .boxed();
        let nets = || ip_net(true).boxed();
        let names = (attributes(string()), attributes(string()), attributes(account));
        let numbers = (attributes(nets()), attributes(nets()), attributes(any::<u16>()));
        (names, numbers).prop_map(
            |((namespaces, principals, service_accounts), (source_ips, destination_ips, destination_ports))| Match {
                namespaces,
                principals,
                service_accounts,
                source_ips,
                destination_ips,
                destination_ports,
            },
        )
    }

    prop_compose! {
        fn policies()(
            (name, namespace) in (name(), maybe()),
            scope in prop_oneof![
                Just(PolicyScope::Global), Just(PolicyScope::Namespace), Just(PolicyScope::WorkloadSelector)
            ],
            action in prop_oneof![Just(Action::Allow), Just(Action::Deny)],
            dry_run in any::<bool>(),
            rules in vec(vec(vec(matches(), 0..3), 0..3), 0..3),
        ) -> Policy {
            let key = format!("{namespace}/{name}").as_str().into();
            Policy { name, namespace, key, scope, action, dry_run, rules }
        }
    }

    fn decoded(name: &str, bytes: &[u8]) -> decode::Decoded<decode::Address> {
        decode::address(name, bytes, &mut Names::default()).unwrap()
    }

    /// The bytes of what was decoded.
    fn again(address: &decode::Address) -> Bytes {
        match address {
            decode::Address::Workload(w) => workload(w),
            decode::Address::Service(s) => service(s),
        }
    }

    /// Values of all kinds, known and unknown.
    fn odd() -> impl Strategy<Value = i32> {
        prop_oneof![-1..9i32, Just(i32::MAX)]
    }

    fn odd_address() -> impl Strategy<Value = wire::NetworkAddress> {
        let address = prop_oneof![
            vec(any::<u8>(), 0..20),
            vec(any::<u8>(), 4),
            vec(any::<u8>(), 16),
            Just(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets().to_vec()),
        ];
        (maybe(), address, option::of(0u32..140)).prop_map(|(network, address, length)| wire::NetworkAddress {
            network: network.to_string(),
            address: address.into(),
            length,
        })
    }

    fn odd_gateway() -> impl Strategy<Value = wire::GatewayAddress> {
        use wire::gateway_address::Destination;
        let host = (maybe(), maybe()).prop_map(|(namespace, hostname)| {
            let (namespace, hostname) = (namespace.to_string(), hostname.to_string());
            Destination::Hostname(wire::NamespacedHostname { namespace, hostname })
        });
        let destination = option::of(prop_oneof![host, odd_address().prop_map(Destination::Address)]);
        (destination, 0u32..70_000)
            .prop_map(|(destination, hbone_mtls_port)| wire::GatewayAddress { hbone_mtls_port, destination })
    }

    fn odd_ports() -> impl Strategy<Value = Vec<wire::Port>> {
        vec((0u32..70_000, 0u32..70_000, odd()), 0..4).prop_map(|ports| {
            let port =
                |(service_port, target_port, app_protocol)| wire::Port { service_port, target_port, app_protocol };
            ports.into_iter().map(port).collect()
        })
    }

    prop_compose! {
        fn odd_workloads()(
            (trust_domain, service_account, cluster_id, node) in (maybe(), maybe(), maybe(), maybe()),
            addresses in vec(odd_address(), 0..3),
            (tunnel_protocol, workload_type, status, network_mode, tunnel) in (odd(), odd(), odd(), odd(), odd()),
            (waypoint, network_gateway) in (option::of(odd_gateway()), option::of(odd_gateway())),
            tunnel_port in 0u32..70_000,
            services in btree_map("[a-z/]{0,4}", odd_ports().prop_map(|ports| wire::PortList { ports }), 0..3),
            capacity in option::of(0u32..3),
        ) -> wire::Workload {
            wire::Workload {
                uid: "c1//Pod/a/w".into(),
                trust_domain: trust_domain.to_string(),
                service_account: service_account.to_string(),
                cluster_id: cluster_id.to_string(),
                node: node.to_string(),
                addresses: addresses.into_iter().map(|address| address.address).collect(),
                tunnel_protocol, workload_type, status, network_mode, waypoint, network_gateway, services, capacity,
                application_tunnel: Some(wire::ApplicationTunnel { protocol: tunnel, port: tunnel_port }),
                ..Default::default()
            }
        }
    }

    prop_compose! {
        fn odd_services()(
            addresses in vec(odd_address(), 0..3),
            ports in odd_ports(),
            (ip_families, visibility, mode, health_policy) in (odd(), odd(), odd(), odd()),
            routing_preference in vec(odd(), 0..3),
            waypoint in option::of(odd_gateway()),
            weighted in vec((option::of(odd_gateway()), any::<u32>()), 0..3),
        ) -> wire::Service {
            wire::Service {
                name: "s".into(),
                namespace: "a".into(),
                hostname: "s.a".into(),
                addresses, ports, ip_families, visibility, waypoint,
                load_balancing: Some(wire::LoadBalancing { routing_preference, mode, health_policy }),
                weighted_waypoints: weighted
                    .into_iter()
                    .map(|(destination, weight)| wire::WeightedWaypoint { destination, weight })
                    .collect(),
                ..Default::default()
            }
        }
    }

    prop_compose! {
        fn odd_policies()(
            (scope, action) in (odd(), odd()),
            addresses in vec(odd_address(), 0..2),
            destination_ports in vec(0u32..70_000, 0..2),
            kind in 0u8..3,
        ) -> security::Authorization {
            let net = |a: wire::NetworkAddress| security::Address { address: a.address, length: a.length.unwrap_or(0) };
            let strange = security::StringMatch { match_type: None };
            let m = security::Match {
                source_ips: addresses.into_iter().map(net).collect(),
                destination_ports,
                principals: if kind == 0 { vec![strange] } else { Vec::new() },
                ..Default::default()
            };
            let rules = vec![security::Rule { clauses: vec![security::Clause { matches: vec![m] }] }];
            security::Authorization {
                name: "p".into(), namespace: "a".into(), scope, action, rules, ..Default::default()
            }
        }
    }

    proptest! {
        #[test]
        fn a_workload_is_decoded_as_it_was_encoded(w in workloads()) {
            let decoded = decoded(&w.uid, &workload(&w));
            prop_assert_eq!(decoded.faults, Vec::<String>::new());
            let decode::Address::Workload(read) = decoded.value else { panic!("a workload") };
            prop_assert_eq!(*read, w);
        }

        #[test]
        fn a_service_is_decoded_as_it_was_encoded(s in services()) {
            let decoded = decoded(&s.key.to_string(), &service(&s));
            prop_assert_eq!(decoded.faults, Vec::<String>::new());
            let decode::Address::Service(read) = decoded.value else { panic!("a service") };
            prop_assert_eq!(*read, s);
        }

        #[test]
        fn a_policy_is_decoded_as_it_was_encoded(p in policies()) {
            let decoded = decode_policy::policy(&p.key, &policy(&p)).unwrap();
            prop_assert_eq!(decoded.faults, Vec::<String>::new());
            prop_assert_eq!(decoded.value, p);
        }

        #[test]
        fn what_was_decoded_from_anything_is_encoded_as_something_that_decodes_equally(
            w in odd_workloads(), s in odd_services(), p in odd_policies()
        ) {
            for (name, resource) in
                [("c1//Pod/a/w", wire::address::Type::Workload(w)), ("a/s.a", wire::address::Type::Service(s))]
            {
                let first = decoded(name, &address(resource)).value;
                let second = decoded(name, &again(&first)).value;
                prop_assert_eq!(format!("{first:?}"), format!("{second:?}"));
                prop_assert_eq!(again(&first), again(&second));
            }
            let first = decode_policy::policy("a/p", &p.encode_to_vec()).unwrap().value;
            let second = decode_policy::policy("a/p", &policy(&first)).unwrap();
            prop_assert_eq!((first, Vec::new()), (second.value, second.faults));
        }
    }
}
