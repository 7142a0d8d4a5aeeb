//! Choosing the endpoint of a service: by port, network, health and preference, and then of two drawn at random,
//! weighted by capacity, the one with fewer connections.

use super::endpoints::{Candidate, Candidates, Eligible, EndpointLists, Pick};
use super::metrics::Metrics;
use super::standing::Witness;
use super::{Chance, Known, NoWay, ResolvedNames, RouteError};
use crate::mesh::service::{LoadBalancingMode, RoutingScope};
use crate::mesh::snapshot::Endpoint;
use crate::mesh::workload::{Protocol, Workload};
use crate::mesh::{FactKey, GatewayRef, Service, Snapshot, Text};
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

/// A chosen workload and the port to use on it.
#[derive(Clone, Debug)]
pub struct ChosenEndpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Port on the workload.
    pub port: u16,
    /// How it was chosen; `None` if there was nothing to choose from.
    pub pick: Option<Pick>,
}

/// Chooses an endpoint of `service` for a connection from `source` to its `port`.
pub fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Arc<Service>,
    port: u16,
    names: &ResolvedNames,
    chance: &mut Chance<'_>,
) -> Result<ChosenEndpoint, RouteError> {
    let none;
    let Known { endpoints, pod, now, left } = match chance.known {
        Some(known) => known,
        None => {
            none = EndpointLists::new(0, Metrics::default());
            Known { endpoints: &none, pod: Witness(0), now: 0, left: &[] }
        }
    };
    let find = |names: &ResolvedNames| eligible(snapshot, source, service, (port, names), |_| true);
    let version = snapshot.endpoints_version(&service.key);
    let (list, mut candidates) = endpoints.list(source, service, port, version, || find(&ResolvedNames::new()));
    if candidates.has_hosts && !names.is_empty() {
        candidates = Arc::new(Candidates::new(find(names), &candidates));
    }
    if candidates.is_empty() {
        return Err(no_endpoint(snapshot, source, service, port));
    }
    let is_left = |standing: &_| left.iter().any(|pick| Arc::ptr_eq(&pick.standing, standing));
    // Gateways come and go without a change of the service's endpoints, so the list does not know of them. It is also
    // that of other pods, which have other addresses.
    let has_way = |workload: &Workload| has_way(snapshot, source, workload);
    let may = |one: &Candidate| !is_left(&one.standing) && has_way(&one.workload);
    let reachable;
    let mut chosen = candidates.choose(chance.random, (pod, now), may);
    if chosen.is_none() {
        // Those that are preferred may all be behind gateways that are not known.
        let found = eligible(snapshot, source, service, (port, names), has_way);
        reachable = Candidates::new(found, &candidates);
        chosen = reachable.choose(chance.random, (pod, now), may);
    }
    let chosen = chosen.ok_or_else(|| no_endpoint(snapshot, source, service, port))?;
    let pick = Pick { list, standing: chosen.standing.clone(), is_waypoint: false };
    Ok(ChosenEndpoint { workload: chosen.workload.clone(), port: chosen.port, pick: Some(pick) })
}

/// The endpoints that a connection from `source` to a port of a service may use, if they pass `has_way`, ordered by uid.
fn eligible(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Service,
    (port, names): (u16, &ResolvedNames),
    has_way: impl Fn(&Workload) -> bool,
) -> Vec<Eligible> {
    let usable = snapshot.endpoints(&service.key).filter_map(|one| usable(source, service, &one, (port, names)).ok());
    let mut usable: Vec<Eligible> = usable.filter(|one| has_way(&one.workload)).collect();
    // An earlier round chose an endpoint and asked for its name to be resolved. Stay with it, so that the choice does
    // not lead to one more name each time.
    let drawn = |chosen: &Eligible| chosen.workload.ips.is_empty() && names.contains_key(&chosen.workload.hostname);
    if usable.iter().any(drawn) {
        usable.retain(drawn);
    }
    preferred(source, service, usable)
}

/// Why an endpoint cannot be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Neither it nor its service maps the port.
    #[error("has no such port")]
    NoPort,
    /// It is in another network, to which there is no way.
    #[error("is in another network: {0}")]
    OtherNetwork(NoWay),
    /// The control plane says so.
    #[error("is not healthy")]
    Unhealthy,
    /// It has no address, and no host name that leads to one.
    #[error("has no address")]
    NoAddress,
    /// The address is the client's own now. What is known about the endpoint is old.
    #[error("has an address that is the pod's own now")]
    OwnAddress,
    /// Its capacity is 0.
    #[error("has no capacity")]
    NoCapacity,
    /// Others are preferred.
    #[error("is not preferred by the traffic distribution")]
    NotPreferred,
}

/// An endpoint, and whether it may be chosen.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Port on it, if it has one for the service's.
    pub port: Option<u16>,
    /// Why it cannot be chosen; `None` if it may be.
    pub unusable: Option<Unusable>,
}

/// All endpoints of a service, and whether a connection from `source` to a port may be led to them, by the facts.
pub fn judge(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Service,
    port: u16,
    names: &ResolvedNames,
) -> Vec<Judged> {
    let has_way = |workload: &Workload| has_way(snapshot, source, workload);
    let mut chosen = eligible(snapshot, source, service, (port, names), |_| true);
    if !chosen.iter().any(|one| has_way(&one.workload)) {
        chosen = eligible(snapshot, source, service, (port, names), has_way);
    }
    let chosen: HashSet<&Text> = chosen.iter().map(|eligible| &eligible.workload.uid).collect();
    let one = |endpoint: Endpoint<'_>| {
        let workload = endpoint.workload.clone();
        let unusable = match usable(source, service, &endpoint, (port, names)) {
            Err(why) => Some(why),
            Ok(_) if workload.capacity == 0 => Some(Unusable::NoCapacity),
            Ok(_) => match is_reachable(snapshot, source, &workload) {
                Err(why) => Some(Unusable::OtherNetwork(why)),
                Ok(()) if returns_to(source, &workload) => Some(Unusable::OwnAddress),
                Ok(()) => (!chosen.contains(&workload.uid)).then_some(Unusable::NotPreferred),
            },
        };
        Judged { port: target_port(service, &endpoint, port), workload, unusable }
    };
    snapshot.endpoints(&service.key).map(one).collect()
}

/// Whether an endpoint may be used, before preferences.
fn usable(
    source: &Workload,
    service: &Service,
    endpoint: &Endpoint<'_>,
    (port, names): (u16, &ResolvedNames),
) -> Result<Eligible, Unusable> {
    let workload = endpoint.workload;
    if workload.network != source.network {
        return abroad(service, endpoint, port);
    }
    let port = target_port(service, endpoint, port).ok_or(Unusable::NoPort)?;
    if !service.may_use(workload) {
        return Err(Unusable::Unhealthy);
    }
    let host = &workload.hostname;
    // An endpoint without an address is usable unless its host name turned out not to resolve.
    if workload.ips.is_empty() && (host.is_empty() || names.get(host).is_some_and(Vec::is_empty)) {
        return Err(Unusable::NoAddress);
    }
    Ok(Eligible { workload: workload.clone(), port })
}

/// Why a service has no endpoint for a connection from `source` to its `port`.
fn no_endpoint(snapshot: &Snapshot, source: &Workload, service: &Service, port: u16) -> RouteError {
    let elsewhere = snapshot.endpoints(&service.key).find_map(|one| {
        match usable(source, service, &one, (port, &ResolvedNames::new())) {
            Err(Unusable::OtherNetwork(why)) => Some(RouteError::OtherNetwork(one.workload.uid.clone(), why)),
            Ok(eligible) => {
                let why = is_reachable(snapshot, source, &eligible.workload).err()?;
                Some(RouteError::OtherNetwork(eligible.workload.uid.clone(), why))
            }
            Err(_) => None,
        }
    });
    let name = service.key.hostname.clone();
    elsewhere.unwrap_or_else(|| match service.ports.contains_key(&port) {
        true => RouteError::NoEndpoint(name),
        false => RouteError::NoPort(name, port),
    })
}

/// The port on an endpoint: from the endpoint's own port map, else the service's target port. An endpoint
/// whose application tunnel has its own port takes any port.
fn target_port(service: &Service, endpoint: &Endpoint<'_>, port: u16) -> Option<u16> {
    let tunnel = endpoint.workload.application_tunnel.and_then(|t| t.port).map(|_| port);
    service.target_port(Some(endpoint.ports), port).or(tunnel)
}

/// An endpoint in another network: one, whatever number of workloads it stands for. The far side knows the target port.
fn abroad(service: &Service, endpoint: &Endpoint<'_>, port: u16) -> Result<Eligible, Unusable> {
    if !service.ports.contains_key(&port) && !endpoint.ports.contains_key(&port) {
        return Err(Unusable::NoPort);
    }
    if !service.may_use(endpoint.workload) {
        return Err(Unusable::Unhealthy);
    }
    reference_to(endpoint.workload).map_err(Unusable::OtherNetwork)?;
    Ok(Eligible { workload: endpoint.workload.clone(), port })
}

/// The reference to the gateway of a workload in another network.
fn reference_to(workload: &Workload) -> Result<&GatewayRef, NoWay> {
    if workload.protocol != Protocol::Hbone {
        return Err(NoWay::Plaintext);
    }
    workload.network_gateway.as_ref().ok_or(NoWay::NoGateway)
}

/// Whether a workload is in the client's own network, or in another one to which there is a way.
fn is_reachable(snapshot: &Snapshot, source: &Workload, workload: &Workload) -> Result<(), NoWay> {
    if workload.network == source.network { Ok(()) } else { way_to(snapshot, source, workload).map(drop) }
}

/// Whether a tunnel to this endpoint would lead back to the client.
fn returns_to(source: &Workload, workload: &Workload) -> bool {
    workload.network == source.network && workload.protocol == Protocol::Hbone && has_address_of(workload, source)
}

/// Whether the facts give a workload an address of `owner`, which is another one. Then they are old: the address has been
/// used again.
pub fn has_address_of(workload: &Workload, owner: &Workload) -> bool {
    let is_one_identity = workload.service_account == owner.service_account
        && workload.namespace == owner.namespace
        && workload.trust_domain == owner.trust_domain;
    workload.uid != owner.uid && !is_one_identity && workload.ips.iter().any(|ip| owner.ips.contains(ip))
}

fn has_way(snapshot: &Snapshot, source: &Workload, workload: &Workload) -> bool {
    is_reachable(snapshot, source, workload).is_ok() && !returns_to(source, workload)
}

/// The gateway to a workload in another network than the client's. It is known, or has to be asked for.
pub fn way_to<'a>(snapshot: &Snapshot, source: &Workload, workload: &'a Workload) -> Result<&'a GatewayRef, NoWay> {
    let way = reference_to(workload)?;
    let is_known = snapshot.gateway(way, &source.namespace).is_some();
    if is_known || snapshot.unasked(FactKey::of_gateway(way)).is_some() {
        Ok(way)
    } else {
        Err(NoWay::UnknownGateway(way.target.to_string()))
    }
}

/// The endpoints that the service's traffic distribution allows.
fn preferred(source: &Workload, service: &Service, all: Vec<Eligible>) -> Vec<Eligible> {
    let Some(lb) = service.load_balancer.as_ref() else { return all };
    let rank = |chosen: &Eligible| {
        let matching = |scope: &&RoutingScope| same_locality(**scope, source, &chosen.workload);
        // In failover mode, an unknown scope is left out: it only orders endpoints. In strict mode it excludes all of
        // them.
        let counts = |scope: &&RoutingScope| lb.mode == LoadBalancingMode::Strict || **scope != RoutingScope::Unknown;
        // Preferring the own network first means: leave it only if nothing in it is left, and then go by the rest.
        let (network_first, here) =
            (lb.preferences.first() == Some(&RoutingScope::Network), source.network == chosen.workload.network);
        let (skipped, bonus) = match (lb.mode, network_first, here) {
            (LoadBalancingMode::Failover, true, false) => (1, 0),
            (LoadBalancingMode::Failover, true, true) => (0, lb.preferences.len()),
            _ => (0, 0),
        };
        lb.preferences.iter().filter(counts).skip(skipped).take_while(matching).count() + bonus
    };
    match lb.mode {
        LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => all,
        LoadBalancingMode::Strict => all.into_iter().filter(|c| rank(c) == lb.preferences.len()).collect(),
        LoadBalancingMode::Failover => {
            let best = all.iter().map(rank).max();
            all.into_iter().filter(|c| Some(rank(c)) == best).collect()
        }
    }
}

fn same_locality(scope: RoutingScope, a: &Workload, b: &Workload) -> bool {
    match scope {
        RoutingScope::Region => a.locality.region == b.locality.region,
        RoutingScope::Zone => a.locality.zone == b.locality.zone,
        RoutingScope::Subzone => a.locality.subzone == b.locality.subzone,
        RoutingScope::Node => a.node == b.node,
        RoutingScope::Cluster => a.cluster_id == b.cluster_id,
        RoutingScope::Network => a.network == b.network,
        RoutingScope::Unknown => false,
    }
}

/// The address to use for a workload: `asked` if it is one of the workload's; otherwise its first address of a family
/// that the service offers, preferably of the family of `asked`. A workload without addresses has those of its host
/// name.
pub fn address(
    workload: &Workload,
    service: Option<&Service>,
    asked: IpAddr,
    names: &ResolvedNames,
) -> Result<IpAddr, RouteError> {
    if workload.ips.contains(&asked) {
        return Ok(asked);
    }
    if workload.ips.is_empty() && !workload.hostname.is_empty() {
        let resolved = names.get(&workload.hostname);
        let resolved = resolved.ok_or_else(|| RouteError::Unresolved(workload.hostname.clone()))?;
        return resolved.first().copied().ok_or_else(|| RouteError::NoAddress(workload.uid.clone()));
    }
    let allowed = |ip: &&IpAddr| service.is_none_or(|service| service.is_offered_in(**ip));
    let same_family = workload.ips.iter().filter(allowed).find(|ip| ip.is_ipv4() == asked.is_ipv4());
    let any = || workload.ips.iter().find(allowed);
    same_family.or_else(any).copied().ok_or_else(|| RouteError::NoAddress(workload.uid.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::choose::{Evidence, InFlight};
    use crate::mesh::address::parse_network_cidr;
    use crate::mesh::service::{HealthPolicy, LoadBalancer};
    use crate::mesh::snapshot::tests::{service, workload};
    use crate::mesh::workload::Health;
    use crate::mesh::{Store, Update, Workload};
    use proptest::prelude::*;

    fn lb(mode: LoadBalancingMode, preferences: &[RoutingScope], health_policy: HealthPolicy) -> Option<LoadBalancer> {
        Some(LoadBalancer { mode, preferences: preferences.to_vec(), health_policy })
    }

    fn endpoint(name: &str, ip: &str, of: &Service) -> Workload {
        let mut made = workload("a", name, ip);
        made.services.insert(of.key.clone(), [(80, 8080)].into());
        made
    }

    /// Names of all endpoints that chance may choose.
    fn choices(store: &Store, of: &Service) -> Vec<String> {
        let (snapshot, source) = (store.load(), workload("a", "client", "10.0.0.99"));
        let Some(service) = snapshot.services().find(|s| s.key == of.key) else { return Vec::new() };
        let mut names: Vec<String> = (0..8)
            .filter_map(|at| {
                let mut random = |below: u64| at.min(below - 1);
                let mut chance = Chance::of(&mut random);
                choose(&snapshot, &source, service, 80, &ResolvedNames::new(), &mut chance).ok()
            })
            .map(|chosen| format!("{}:{}", chosen.workload.name, chosen.port))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    #[test]
    fn endpoints_come_and_go_whatever_comes_first() {
        let (store, mut web) = (Store::default(), service("a", "web", "10.96.0.1", &[(80, 0)]));
        let update = |workloads: Vec<Workload>, services: Vec<Service>| {
            store.update(Update { workloads, services, ..Update::default() });
        };
        // The endpoint is announced before its service.
        let mut one = endpoint("one", "10.0.0.1", &web);
        update(vec![one.clone()], vec![]);
        assert!(choices(&store, &web).is_empty());
        assert_eq!(store.load().staged().count(), 1);
        update(vec![], vec![web.clone()]);
        assert_eq!(choices(&store, &web), ["one:8080"]);
        // Unhealthy endpoints are kept, so that a change of the service's health policy suffices.
        one.health = Health::Unhealthy;
        update(vec![one.clone()], vec![]);
        assert!(choices(&store, &web).is_empty());
        web.load_balancer = lb(LoadBalancingMode::Standard, &[], HealthPolicy::AllowAll);
        update(vec![], vec![web.clone()]);
        assert_eq!(choices(&store, &web), ["one:8080"]);
        web.load_balancer = None;
        update(vec![], vec![web.clone()]);
        assert!(choices(&store, &web).is_empty());
        // The service goes and comes back, while its endpoints stay.
        one.health = Health::Healthy;
        update(vec![one.clone()], vec![]);
        store.update(Update { gone_services: vec![web.key.clone()], ..Update::default() });
        assert!(choices(&store, &web).is_empty());
        update(vec![], vec![web.clone()]);
        assert_eq!(choices(&store, &web), ["one:8080"]);
        // A service for a range of addresses gets endpoints that come later, like any other.
        web.cidrs = vec![parse_network_cidr("/10.97.0.0/16").unwrap()];
        update(vec![], vec![web.clone()]);
        update(vec![endpoint("two", "10.0.0.2", &web)], vec![]);
        assert_eq!(choices(&store, &web), ["one:8080", "two:8080"]);
        let around = store.load().service_around(&"".into(), "10.97.3.4".parse().unwrap(), "a").cloned().unwrap();
        assert_eq!(store.load().endpoints(&around.key).count(), 2);
        store.update(Update { gone_workloads: vec![one.uid.clone()], ..Update::default() });
        assert_eq!(choices(&store, &web), ["two:8080"]);
    }

    #[test]
    fn failures_never_widen_the_choice() {
        let (store, mut web) = (Store::default(), service("a", "web", "10.96.0.1", &[(80, 80)]));
        let near = ["one", "two"].map(|name| endpoint(name, "10.0.0.1", &web));
        let mut far = endpoint("far", "10.0.0.3", &web);
        far.node = "node-2".into();
        web.load_balancer = lb(LoadBalancingMode::Strict, &[RoutingScope::Node], HealthPolicy::OnlyHealthy);
        let workloads = near.into_iter().chain([far]).collect();
        store.update(Update { workloads, services: vec![web], ..Update::default() });
        let (snapshot, source) = (store.load(), workload("a", "client", "10.0.0.99"));
        let service = snapshot.services().next().unwrap();
        let endpoints = Arc::new(EndpointLists::new(50, Metrics::default()));
        let (pod, mut left) = (Witness(1), Vec::new());
        let choose = |left: &[Pick]| {
            let known = Known { endpoints: &endpoints, pod, now: endpoints.now(), left };
            let mut chance = Chance { random: &mut |_| 0, known: Some(known) };
            super::choose(&snapshot, &source, service, 80, &ResolvedNames::new(), &mut chance)
        };
        for expected in ["one", "two"] {
            let chosen = choose(&left).unwrap();
            assert_eq!(&*chosen.workload.name, expected);
            let pick = chosen.pick.unwrap();
            assert_eq!(pick.has_other(&left), expected == "one");
            InFlight::begin(&endpoints, pick.clone(), pod).failed(Evidence::Refused);
            left.push(pick);
        }
        assert!(matches!(choose(&left), Err(RouteError::NoEndpoint(_))), "both have been tried");
        assert_eq!(&*choose(&[]).unwrap().workload.name, "two", "one is set aside, but not both");
    }

    #[test]
    fn preferences_health_and_networks() {
        let (store, mut web) = (Store::default(), service("a", "web", "10.96.0.1", &[(80, 80)]));
        let mut near = endpoint("near", "10.0.0.1", &web);
        let mut far = endpoint("far", "10.0.0.2", &web);
        let mut abroad = endpoint("abroad", "10.0.0.3", &web);
        far.node = "node-2".into();
        abroad.network = "other".into();
        let set = |near: &Workload, far: &Workload, abroad: &Workload, web: &Service| {
            let workloads = vec![near.clone(), far.clone(), abroad.clone()];
            store.update(Update { workloads, services: vec![web.clone()], ..Update::default() });
            choices(&store, web)
        };
        assert_eq!(set(&near, &far, &abroad, &web), ["far:8080", "near:8080"], "not the one abroad");
        web.load_balancer =
            lb(LoadBalancingMode::Failover, &[RoutingScope::Network, RoutingScope::Node], HealthPolicy::OnlyHealthy);
        assert_eq!(set(&near, &far, &abroad, &web), ["near:8080"]);
        near.health = Health::Unhealthy;
        assert_eq!(set(&near, &far, &abroad, &web), ["far:8080"]);
        web.load_balancer = lb(LoadBalancingMode::Strict, &[RoutingScope::Node], HealthPolicy::OnlyHealthy);
        assert!(set(&near, &far, &abroad, &web).is_empty());
        near.health = Health::Healthy;
        web.load_balancer =
            lb(LoadBalancingMode::Failover, &[RoutingScope::Unknown, RoutingScope::Node], HealthPolicy::OnlyHealthy);
        assert_eq!(set(&near, &far, &abroad, &web), ["near:8080"], "an unknown scope does not hide the known ones");
        web.load_balancer =
            lb(LoadBalancingMode::Strict, &[RoutingScope::Node, RoutingScope::Unknown], HealthPolicy::OnlyHealthy);
        assert!(set(&near, &far, &abroad, &web).is_empty(), "STRICT is never less strict for want of a word");
        web.load_balancer = lb(LoadBalancingMode::Strict, &[RoutingScope::Unknown], HealthPolicy::OnlyHealthy);
        assert!(set(&near, &far, &abroad, &web).is_empty(), "nor does it fall back to all");
        near.health = Health::Unhealthy;
        far.capacity = 0;
        web.load_balancer = None;
        assert!(set(&near, &far, &abroad, &web).is_empty(), "no weight, no traffic");
        (near.network, far.network) = ("other".into(), "other".into());
        set(&near, &far, &abroad, &web);
        let (snapshot, source) = (store.load(), workload("a", "client", "10.0.0.99"));
        let service = snapshot.services().next().unwrap();
        let error = choose(&snapshot, &source, service, 80, &ResolvedNames::new(), &mut Chance::of(&mut |_| 0));
        let error = error.unwrap_err();
        assert!(matches!(error, RouteError::OtherNetwork(_, NoWay::NoGateway)), "{error}");
    }

    #[test]
    fn a_gateway_that_becomes_known_or_goes_counts_at_once() {
        let (store, web) = (Store::default(), service("a", "web", "10.96.0.1", &[(80, 8080)]));
        let mut abroad = endpoint("abroad", "10.0.0.3", &web);
        abroad.network = "other".into();
        let way = crate::mesh::GatewayTarget::parse("/10.0.0.50").unwrap();
        abroad.network_gateway = Some(GatewayRef { target: way, hbone_port: 15008 });
        store.update(Update { workloads: vec![abroad], services: vec![web.clone()], ..Update::default() });
        let lists = EndpointLists::new(50, Metrics::default());
        let found = || {
            let (snapshot, source) = (store.load(), workload("a", "client", "10.0.0.99"));
            let service = snapshot.services().next().unwrap();
            let known = Known { endpoints: &lists, pod: Witness(1), now: 1, left: &[] };
            let mut chance = Chance { random: &mut |_| 0, known: Some(known) };
            choose(&snapshot, &source, service, 80, &ResolvedNames::new(), &mut chance)
                .map(|one| one.workload.name.clone())
        };
        assert!(matches!(found(), Err(RouteError::OtherNetwork(_, NoWay::UnknownGateway(_)))), "{:?}", found());
        // Preferred, it does not keep connections from one that can be reached.
        let mut near = endpoint("near", "10.0.0.1", &web);
        near.locality.region = "far".into();
        let mut preferring = web.clone();
        preferring.load_balancer = lb(LoadBalancingMode::Failover, &[RoutingScope::Region], HealthPolicy::OnlyHealthy);
        store.update(Update { workloads: vec![near.clone()], services: vec![preferring], ..Update::default() });
        assert_eq!(found(), Ok("near".into()));
        store.update(Update { gone_workloads: vec![near.uid], ..Update::default() });
        assert!(found().is_err());
        let gateway = workload("istio-system", "gateway", "10.0.0.50");
        store.update(Update { workloads: vec![gateway.clone()], ..Update::default() });
        assert_eq!(found(), Ok("abroad".into()));
        store.update(Update { gone_workloads: vec![gateway.uid], ..Update::default() });
        assert!(matches!(found(), Err(RouteError::OtherNetwork(_, NoWay::UnknownGateway(_)))), "{:?}", found());
    }

    #[derive(Clone, Debug)]
    struct Shape {
        healthy: bool,
        here: bool,
        has_port: bool,
        capacity: u32,
        address: bool,
        node: u8,
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let (usually, capacity) = (|| prop::bool::weighted(0.8), prop_oneof![Just(0), 1..4u32]);
        (usually(), usually(), usually(), capacity, usually(), 1..3u8).prop_map(
            |(healthy, here, has_port, capacity, address, node)| Shape {
                healthy,
                here,
                has_port,
                capacity,
                address,
                node,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_judged_usable_is_what_can_be_chosen(
            shapes in prop::collection::vec(shape(), 0..7),
            mode in prop_oneof![
                Just(LoadBalancingMode::Standard), Just(LoadBalancingMode::Strict), Just(LoadBalancingMode::Failover),
            ],
            scopes in prop::collection::vec(
                prop_oneof![Just(RoutingScope::Node), Just(RoutingScope::Network), Just(RoutingScope::Unknown)], 0..3,
            ),
        ) {
            let mut web = service("a", "web", "10.96.0.1", &[]);
            web.load_balancer = lb(mode, &scopes, HealthPolicy::OnlyHealthy);
            let workloads = shapes.iter().enumerate().map(|(n, shape)| {
                let mut one = workload("a", &format!("w{n}"), &format!("10.0.0.{}", n + 1));
                one.services.insert(web.key.clone(), if shape.has_port { [(80, 8080)].into() } else { [].into() });
                one.capacity = shape.capacity;
                one.node = format!("node-{}", shape.node).into();
                if !shape.healthy {
                    one.health = Health::Unhealthy;
                }
                if !shape.here {
                    one.network = "other".into();
                }
                if !shape.address {
                    one.ips.clear();
                }
                one
            });
            let store = Store::default();
            store.update(Update { workloads: workloads.collect(), services: vec![web.clone()], ..Update::default() });
            let (snapshot, source) = (store.load(), workload("a", "client", "10.0.0.99"));
            let web = Arc::new(web);
            let judged = judge(&snapshot, &source, &web, 80, &ResolvedNames::new());
            prop_assert_eq!(judged.len(), shapes.len());
            let usable: std::collections::BTreeSet<String> =
                judged.iter().filter(|one| one.unusable.is_none()).map(|one| one.workload.name.to_string()).collect();
            let mut chosen = std::collections::BTreeSet::new();
            for at in 0..64 {
                let mut random = |below: u64| at % below;
                let names = ResolvedNames::new();
                let found = choose(&snapshot, &source, &web, 80, &names, &mut Chance::of(&mut random));
                chosen.extend(found.ok().map(|chosen| chosen.workload.name.to_string()));
            }
            prop_assert_eq!(usable, chosen);
        }
    }
}
