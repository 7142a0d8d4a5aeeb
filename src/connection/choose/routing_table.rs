//! Reads `routing_table.txt`, which says where connections go, and asks the functions that decide.

use super::error::NoWay;
use super::local::{self, LocalError};
use super::route::{self, NextHop, Route};
use super::{Chance, ResolvedNames, RouteError, waypoint};
use crate::hbone::Authority;
use crate::mesh::address::{parse_network_address, parse_network_cidr};
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::snapshot::tests::{service, workload};
use crate::mesh::workload::{ApplicationTunnel, Delivery, Health, NetworkMode, Ports};
use crate::mesh::{
    Facts, GatewayRef, GatewayTarget, Protocol, Service, ServiceKey, Snapshot, SpiffeName, Text, Workload,
};
use crate::ports::in_pod;
use std::collections::BTreeMap;

const TABLE: &str = include_str!("routing_table.txt");

/// The parts of a list; `-` is the empty list.
fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').filter(|part| *part != "-")
}

fn host(name: &str) -> Text {
    if name.contains('.') { name.into() } else { format!("{name}.a.svc.cluster.local").into() }
}

fn reference(value: &str) -> Option<GatewayRef> {
    let (target, port) = value.split_once('@').unwrap_or((value, "15008"));
    let by_name = |(namespace, name): (&str, &str)| {
        GatewayTarget::Hostname(ServiceKey { namespace: namespace.into(), hostname: host(name) })
    };
    let by_address = parse_network_address(target).map(GatewayTarget::Address);
    let target = by_address.or_else(|| target.split_once('/').map(by_name))?;
    Some(GatewayRef { target, hbone_port: port.parse().unwrap() })
}

fn ports<'a>(pairs: impl Iterator<Item = &'a str>) -> Ports {
    let pair = |pair: &str| pair.split_once(':').map(|(from, to)| (from.parse().unwrap(), to.parse().unwrap()));
    pairs.filter_map(pair).collect()
}

/// `MODE:SCOPE,SCOPE`, or `standard:all` for endpoints of any health.
fn load_balancer(value: &str) -> LoadBalancer {
    let (mode, scopes) = value.split_once(':').unwrap_or((value, "-"));
    let mode = match mode {
        "standard" => LoadBalancingMode::Standard,
        "strict" => LoadBalancingMode::Strict,
        "failover" => LoadBalancingMode::Failover,
        "passthrough" => LoadBalancingMode::Passthrough,
        other => panic!("mode {other}"),
    };
    let scope = |scope: &str| match scope {
        "region" => RoutingScope::Region,
        "zone" => RoutingScope::Zone,
        "subzone" => RoutingScope::Subzone,
        "node" => RoutingScope::Node,
        "cluster" => RoutingScope::Cluster,
        "network" => RoutingScope::Network,
        "unknown" => RoutingScope::Unknown,
        other => panic!("scope {other}"),
    };
    let preferences = list(scopes).filter(|scope| *scope != "all").map(scope).collect();
    let health_policy = if scopes == "all" { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    LoadBalancer { preferences, mode, health_policy }
}

/// Facts and resolved names.
#[derive(Clone, Default)]
struct World {
    facts: Facts,
    names: ResolvedNames,
}

impl World {
    /// The world at the beginning of the table.
    fn base() -> Self {
        let mut world = Self::default();
        for line in TABLE.lines().filter_map(|line| line.strip_prefix("world ")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, facts) = match words[..] {
                ["workload", name, ref facts @ ..] => {
                    world.facts.workloads.push(workload("a", name, "10.255.255.255"));
                    (name, facts)
                }
                ["service", name, ref facts @ ..] => {
                    let mut made = service("a", name, "10.255.255.255", &[]);
                    made.vips.clear();
                    world.facts.services.push(made);
                    (name, facts)
                }
                _ => {
                    words.iter().for_each(|change| world.change(change));
                    continue;
                }
            };
            facts.iter().for_each(|fact| world.change(&format!("{name}.{fact}")));
        }
        world
    }

    fn with(mut self, changes: &str) -> Self {
        changes.split_whitespace().for_each(|change| self.change(change));
        self
    }

    fn change(&mut self, change: &str) {
        let Facts { workloads, services, .. } = &mut self.facts;
        if let Some(gone) = change.strip_prefix('-') {
            let before = workloads.len() + services.len();
            workloads.retain(|one| &*one.name != gone);
            services.retain(|one| &*one.name != gone);
            assert_eq!(workloads.len() + services.len() + 1, before, "{change}");
            return;
        }
        let (what, value) = change.split_once('=').unwrap_or_else(|| panic!("{change}"));
        if let Some(name) = what.strip_prefix("resolved:") {
            self.names.insert(name.into(), list(value).map(|ip| ip.parse().unwrap()).collect());
            return;
        }
        match what.split_once('.') {
            None => self.copy(what, value),
            Some((name, fact)) => match services.iter().position(|one| &*one.name == name) {
                Some(at) => set_service(&mut services[at], fact, value),
                None => {
                    let keys: BTreeMap<Text, ServiceKey> =
                        services.iter().map(|one| (one.name.clone(), one.key.clone())).collect();
                    let found = workloads.iter_mut().find(|one| &*one.name == name);
                    set_workload(found.unwrap_or_else(|| panic!("{change}")), fact, value, &keys);
                }
            },
        }
    }

    fn copy(&mut self, new: &str, old: &str) {
        if let Some(mut made) = self.facts.services.iter().find(|one| &*one.name == old).cloned() {
            (made.name, made.key.hostname) = (new.into(), host(new));
            self.facts.services.push(made);
            return;
        }
        let mut made = self.facts.workloads.iter().find(|one| &*one.name == old).cloned().unwrap();
        (made.name, made.uid) = (new.into(), format!("c1//Pod/a/{new}").into());
        self.facts.workloads.push(made);
    }

    fn pod(&self, name: &str) -> Option<&Workload> {
        self.facts.workloads.iter().find(|one| &*one.name == name)
    }

    /// What becomes of a connection.
    fn answer(&self, connection: &str) -> String {
        let snapshot = Snapshot::build(1, self.facts.clone());
        if let Some((pod, peer)) = connection.strip_prefix("at ").and_then(|at| at.split_once(" from ")) {
            let Some(pod) = self.pod(pod) else { return "no such pod".into() };
            let peer = self.pod(peer).map(|peer| peer.identity().unwrap());
            return match waypoint::bypassed(&snapshot, pod, peer.as_ref()) {
                Some(bypassed) => format!("bypassed {}", short(&bypassed.target.to_string())),
                None => "came as it should".into(),
            };
        }
        if let Some((pod, authority)) = connection.strip_prefix("at ").and_then(|at| at.split_once(": ")) {
            let (pod, own) = pod.split_once(" on ").map_or((pod, None), |(pod, own)| (pod, Some(own)));
            let Some(pod) = self.pod(pod) else { return "no such pod".into() };
            let own = own.map_or(pod.ips[0], |own| own.parse().unwrap());
            let authority = match Authority::parse(authority).unwrap() {
                Authority::Host(name, port) => Authority::Host(host(&name).to_string(), port),
                address @ Authority::Address(_) => address,
            };
            return arrived(local::choose(&snapshot, pod, own, in_pod(true), &authority));
        }
        let (pod, target) = connection.split_once(" > ").unwrap_or(("client", connection));
        let Some(source) = self.pod(pod) else { return "no such pod".into() };
        let mut found: Vec<String> = Vec::new();
        for at in 0..24 {
            let mut random = |below: u64| at % below;
            let mut chance = Chance::of(&mut random);
            let target = target.parse().unwrap();
            let route = route::choose(&snapshot, source, target, in_pod(true), &self.names, &mut chance);
            let route = route.map_or_else(|why| format!("refused: {}", refusal(&why)), |route| sentence(&route));
            if !found.contains(&route) {
                found.push(route);
            }
        }
        found.sort();
        found.join(" / ")
    }
}

fn set_service(service: &mut Service, fact: &str, value: &str) {
    match fact {
        "vips" => service.vips = list(value).map(|vip| parse_network_address(vip).unwrap()).collect(),
        "cidrs" => service.cidrs = list(value).map(|range| parse_network_cidr(range).unwrap()).collect(),
        "ports" => service.ports = ports(list(value)),
        "waypoint" => service.waypoint = reference(value),
        "weighted" => {
            let one = |(way, weight): (&str, &str)| (reference(way).unwrap(), weight.parse().unwrap());
            service.weighted_waypoints = list(value).map(|part| one(part.split_once('*').unwrap())).collect();
        }
        "lb" => service.load_balancer = Some(load_balancer(value)),
        "families" => {
            service.ip_families = Some(match value {
                "v4" => IpFamilies::V4,
                "v6" => IpFamilies::V6,
                _ => IpFamilies::Dual,
            });
        }
        "canonical" => service.canonical = value == "yes",
        "visible" => {
            service.visibility = if value == "namespace" { Visibility::Namespace } else { Visibility::Public };
        }
        "sans" => {
            let one = |name: &str| match name.contains(['.', '*']) {
                true => name.into(),
                false => format!("spiffe://cluster.local/ns/a/sa/{name}").into(),
            };
            service.subject_alt_names = list(value).map(one).collect();
        }
        "ns" => service.key.namespace = value.into(),
        "host" => service.key.hostname = value.into(),
        other => panic!("a service has no {other}"),
    }
}

fn set_workload(workload: &mut Workload, fact: &str, value: &str, keys: &BTreeMap<Text, ServiceKey>) {
    let text: Text = if value == "-" { "".into() } else { value.into() };
    match fact {
        "ips" => workload.ips = list(value).map(|ip| ip.parse().unwrap()).collect(),
        "net" => workload.network = text,
        "proto" => {
            workload.protocol = match value {
                "tcp" => Protocol::Tcp,
                "hbone" => Protocol::Hbone,
                _ => Protocol::Unsupported,
            };
        }
        "health" => workload.health = if value == "bad" { Health::Unhealthy } else { Health::Healthy },
        "capacity" => workload.capacity = value.parse().unwrap(),
        "node" => workload.node = text,
        "region" => workload.locality.region = text,
        "zone" => workload.locality.zone = text,
        "subzone" => workload.locality.subzone = text,
        "cluster" => workload.cluster_id = text,
        "native" => workload.native_tunnel = true,
        "waypoint" => workload.waypoint = reference(value),
        "gateway" => workload.network_gateway = reference(value),
        "host" => workload.hostname = text,
        "tunnel" => {
            let (how, port) = value.split_once(':').map_or((value, None), |(how, port)| (how, Some(port)));
            let delivery = match how {
                "plain" => Delivery::Plain,
                "proxy" => Delivery::Proxy,
                _ => Delivery::Unsupported,
            };
            let port = port.map(|port| port.parse().unwrap());
            workload.application_tunnel = Some(ApplicationTunnel { delivery, port });
        }
        "sa" => workload.service_account = text,
        "ns" => workload.namespace = text,
        "uid" => workload.uid = text,
        "mode" => workload.network_mode = NetworkMode::HostNetwork,
        "serves" => {
            let one = |served: &str| {
                let (name, own) = served.split_once(':').unwrap_or((served, ""));
                (keys.get(name).unwrap_or_else(|| panic!("no service {name}")).clone(), ports([own].into_iter()))
            };
            workload.services = list(value).map(one).collect();
        }
        other => panic!("a workload has no {other}"),
    }
}

/// Names as the table writes them.
fn short(text: &str) -> String {
    text.replace(".a.svc.cluster.local", "").replace("c1//Pod/a/", "")
}

fn names(of: &[SpiffeName]) -> String {
    of.iter().map(|name| name.service_account.to_string()).collect::<Vec<_>>().join("+")
}

fn sentence(route: &Route) -> String {
    match &route.next_hop {
        NextHop::Direct { to } => format!("tcp {to}"),
        NextHop::Tunnel(hop) => {
            format!("hbone {} for {} as {}", hop.to, short(&hop.authority.to_string()), names(&hop.expected))
        }
        NextHop::Gateway(hop) => {
            let (outer, authority) = (&hop.outer, short(&hop.outer.authority.to_string()));
            format!("through {} as {} for {authority} as {}", outer.to, names(&outer.expected), names(&hop.expected))
        }
    }
}

fn refusal(why: &RouteError) -> String {
    match why {
        RouteError::Loop(_) => "loop".into(),
        RouteError::UnknownWaypoint { waypoint, reason, .. } => {
            let reason = match () {
                () if reason.contains("has no port") => "no port",
                () if reason.starts_with("no healthy upstream") => "no endpoint",
                () if reason.contains("has no network gateway") => "other network: no gateway",
                () => reason,
            };
            format!("waypoint {}: {reason}", short(waypoint))
        }
        RouteError::NoEndpoint(_) => "no endpoint".into(),
        RouteError::NoPort(..) => "no port".into(),
        RouteError::NoAddress(uid) => format!("no address of {}", short(uid)),
        RouteError::OtherNetwork(_, why) => {
            let why = match why {
                NoWay::NoGateway => "no gateway".into(),
                NoWay::Plaintext => "does not accept HBONE".into(),
                NoWay::NotService => "only services".into(),
                NoWay::UnknownGateway(way) => format!("unknown gateway {}", short(way)),
                NoWay::NoGatewayEndpoint(way) => format!("no endpoint of the gateway {}", short(way)),
                NoWay::NoIdentity => "nobody can prove to be there".into(),
            };
            format!("other network: {why}")
        }
        RouteError::Protocol(uid) => format!("unsupported protocol of {}", short(uid)),
        RouteError::Unresolved(name) => format!("{name} is to be resolved"),
        RouteError::Identity(uid, _) => format!("identity of {}", short(uid)),
        RouteError::Unasked(_) | RouteError::Resolve(_) | RouteError::Ask(_) => panic!("{why}"),
    }
}

fn arrived(found: Result<local::LocalTarget, LocalError>) -> String {
    match found {
        Ok(target) => match target.announce {
            None => format!("to {}", target.address),
            Some(dialled) => format!("to {} for {dialled}", target.address),
        },
        Err(why) => {
            let word = match why {
                LocalError::IpMismatch { .. } => "ip mismatch",
                LocalError::UnknownHost(_) => "unknown host",
                LocalError::UnknownPort(..) => "no port",
                LocalError::Loop(_) => "loop",
                LocalError::Delivery => "delivery",
                LocalError::NoVip(_) => "no address",
                LocalError::Bypassed { .. } => "bypassed",
            };
            format!("{} {word}", why.status().as_u16())
        }
    }
}

/// The cases: the difference, the connection and the expected route.
fn cases() -> Vec<[&'static str; 3]> {
    let is_case = |line: &&str| line.contains('|') && !line.starts_with('#');
    let columns = |line: &'static str| {
        let columns: Vec<&str> = line.splitn(3, '|').map(str::trim).collect();
        columns.try_into().unwrap_or_else(|_| panic!("{line}"))
    };
    TABLE.lines().filter(is_case).map(columns).collect()
}

#[test]
fn connections_go_where_the_table_says() {
    let (base, mut wrong) = (World::base(), Vec::new());
    for [changes, connection, expected] in cases() {
        let answer = base.clone().with(changes).answer(connection);
        let expected = expected.trim_start_matches("= ");
        if answer != expected {
            wrong.push(format!("{changes} | {connection}\n  expected {expected}\n  but it is {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn each_case_of_the_table_says_something() {
    let (base, cases, mut seen) = (World::base(), cases(), std::collections::BTreeSet::new());
    assert!(cases.len() >= 120, "{}", cases.len());
    for [changes, connection, expected] in cases {
        assert!(seen.insert((changes, connection)), "twice: {changes} | {connection}");
        let without = base.answer(connection);
        match expected.strip_prefix("= ") {
            Some(same) => assert_eq!(same, without, "it makes a difference: {changes} | {connection}"),
            None => assert!(changes.is_empty() || without != expected, "no difference: {changes} | {connection}"),
        }
    }
}
