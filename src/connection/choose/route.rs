//! The route of an outbound connection. Pure: a source workload and a destination address in, a route or a named error
//! out.
//!
//! The address may belong to a service, to a workload, to a range of addresses or to nothing in the mesh. A service
//! leads to its waypoint or to one of its endpoints, a workload to its waypoint or to itself; everything else is
//! reached directly. A waypoint or endpoint in another network is reached through a gateway.

use super::destination::{self, ChosenEndpoint};
use super::error::NoWay;
use super::{Chance, Pick, ResolvedNames, RouteError, gateway, waypoint};
use crate::hbone::Authority;
use crate::mesh::address::NetworkAddress;
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{FactKey, Protocol, Service, Snapshot, SpiffeName, Text, Workload};
use crate::ports::HBONE;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What the daemon connects to for a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// Plain TCP.
    Direct {
        /// Address and port to connect to.
        to: SocketAddr,
    },
    /// Through a tunnel.
    Tunnel(TunnelHop),
    /// To another network, through a tunnel inside the tunnel to a gateway.
    Gateway(GatewayHop),
}

impl NextHop {
    /// The address that the daemon connects to.
    pub fn to(&self) -> SocketAddr {
        match self {
            Self::Direct { to } => *to,
            Self::Tunnel(hop) => hop.to,
            Self::Gateway(hop) => hop.outer.to,
        }
    }

    /// The tunnel that begins at this node.
    pub fn tunnel(&self) -> Option<&TunnelHop> {
        match self {
            Self::Direct { .. } => None,
            Self::Tunnel(hop) => Some(hop),
            Self::Gateway(hop) => Some(&hop.outer),
        }
    }
}

/// The far end of a tunnel, and what to ask it for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelHop {
    /// Address and HBONE port of the far end.
    pub to: SocketAddr,
    /// The CONNECT authority.
    pub authority: Authority,
    /// Identities that the far end may prove; one of them is required.
    pub expected: Vec<SpiffeName>,
    /// Uid of the workload at the far end. If the address later belongs to another workload, the tunnel is not used for
    /// it.
    pub uid: Text,
}

/// A gateway to another network, and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayHop {
    /// The tunnel to the gateway. The far end of the inner tunnel is asked for the same authority.
    pub outer: TunnelHop,
    /// Identities that the far end of the inner tunnel may prove; one of them is required.
    pub expected: Vec<SpiffeName>,
    /// How many endpoints the gateway chooses from.
    pub endpoints: u32,
}

/// A route, with the facts by which it was chosen.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the daemon connects to.
    pub next_hop: NextHop,
    /// The workload at the far end of the daemon's leg, if it is known: a waypoint, or the destination itself. In another
    /// network it may stand for all endpoints there.
    pub workload: Option<Arc<Workload>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// How the workload was chosen among others; `None` if there was no choice.
    pub pick: Option<Pick>,
}

/// Finds the route from `source` to `target`, the original destination. `names` are the host names that have been
/// resolved so far. A connection to `own_ports` of the source itself is refused.
pub fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    target: SocketAddr,
    own_ports: &[u16],
    names: &ResolvedNames,
    chance: &mut Chance<'_>,
) -> Result<Route, RouteError> {
    RouteChoice { snapshot, source, target, own_ports, names }.route(chance)
}

/// The arguments of [`choose`], except for chance.
#[derive(Clone, Copy)]
struct RouteChoice<'a> {
    snapshot: &'a Snapshot,
    source: &'a Workload,
    target: SocketAddr,
    own_ports: &'a [u16],
    names: &'a ResolvedNames,
}

impl RouteChoice<'_> {
    fn route(self, chance: &mut Chance<'_>) -> Result<Route, RouteError> {
        let Self { snapshot, source, target, .. } = self;
        self.check_listener(target)?;
        if let Some(service) = snapshot.service_at(&source.network, target.ip(), &source.namespace) {
            return self.to_service(service, chance);
        }
        let Some(workload) = snapshot.workload_at(&source.network, target.ip()) else {
            let wanted = NetworkAddress { network: source.network.clone(), ip: target.ip() };
            let unasked = snapshot.unasked(FactKey::Address(wanted.clone())).is_some();
            // The address may be in a range that has not been asked for. Its waypoint must not be bypassed, so ask
            // first.
            if unasked || !snapshot.unasked_around(&wanted).is_empty() {
                return Err(RouteError::Unasked(FactKey::Address(wanted)));
            }
            if let Some(service) = snapshot.service_around(&source.network, target.ip(), &source.namespace) {
                return self.to_service(service, chance);
            }
            return Ok(Route { next_hop: NextHop::Direct { to: target }, workload: None, service: None, pick: None });
        };
        if let Some(wanted) = &workload.waypoint
            && waypoint::unused(snapshot, source, wanted, &ServiceOrWorkload::Workload(workload.clone())).is_none()
        {
            let found = waypoint::resolve(snapshot, source, wanted, &workload.uid, chance)?;
            return self.to_waypoint(found, None, chance);
        }
        let chosen = ChosenEndpoint { workload: workload.clone(), port: target.port(), pick: None };
        self.to_workload(chosen, None, chance)
    }

    /// Refuses an address at which the daemon itself listens in the pod.
    fn check_listener(self, to: SocketAddr) -> Result<(), RouteError> {
        let own = to.ip().is_loopback() || self.source.ips.contains(&to.ip());
        if own && self.own_ports.contains(&to.port()) { Err(RouteError::Loop(to)) } else { Ok(()) }
    }

    /// Refuses a tunnel to another workload at an address that the pod has now: the facts about the other one are old,
    /// and the tunnel would lead back to the pod.
    fn check_far_end(self, workload: &Workload, to: SocketAddr) -> Result<(), RouteError> {
        if destination::has_address_of(workload, self.source) { Err(RouteError::Loop(to)) } else { Ok(()) }
    }

    fn to_service(self, service: &Arc<Service>, chance: &mut Chance<'_>) -> Result<Route, RouteError> {
        let Self { snapshot, source, target, .. } = self;
        if let Some(wanted) = waypoint::draw(service, chance)
            && waypoint::unused(snapshot, source, wanted, &ServiceOrWorkload::Service(service.clone())).is_none()
        {
            let found = waypoint::resolve(snapshot, source, wanted, &service.key.hostname, chance)?;
            return self.to_waypoint(found, Some(service), chance);
        }
        if service.is_passthrough() {
            // A connection to a port that the service does not have is not counted as the service's.
            let service = service.ports.contains_key(&target.port()).then(|| service.clone());
            return Ok(Route { next_hop: NextHop::Direct { to: target }, workload: None, service, pick: None });
        }
        let chosen = destination::choose(snapshot, source, service, target.port(), self.names, chance)?;
        self.to_workload(chosen, Some(service), chance)
    }

    fn to_workload(
        self,
        chosen: ChosenEndpoint,
        service: Option<&Arc<Service>>,
        chance: &mut Chance<'_>,
    ) -> Result<Route, RouteError> {
        let ChosenEndpoint { workload, port, pick } = chosen;
        let Self { snapshot, source, target, own_ports, names } = self;
        if workload.network != source.network {
            return self.to_other_network((workload, pick), service.map(|s| &**s), service, chance);
        }
        let ip = destination::address(&workload, service.map(|s| &**s), target.ip(), names)?;
        let to = SocketAddr::new(ip, port);
        let next_hop = match workload.protocol {
            Protocol::Tcp if workload.ips.is_empty() && !self.leads_back(ip, service) => {
                // The host name may lead to an address of the mesh. Then the mesh's route applies, not plaintext.
                let names = ResolvedNames::new();
                match (RouteChoice { snapshot, source, target: to, own_ports, names: &names }).route(chance) {
                    Ok(Route { next_hop: NextHop::Direct { to }, workload: None, service: None, .. }) => {
                        NextHop::Direct { to }
                    }
                    // A name that leads to another name is refused, because the chain might not end.
                    Err(RouteError::Unresolved(_)) => return Err(RouteError::NoAddress(workload.uid.clone())),
                    onward => return onward,
                }
            }
            Protocol::Tcp => {
                self.check_listener(to)?;
                NextHop::Direct { to }
            }
            Protocol::Unsupported => return Err(RouteError::Protocol(workload.uid.clone())),
            Protocol::Hbone => {
                self.check_far_end(&workload, to)?;
                NextHop::Tunnel(TunnelHop {
                    to: SocketAddr::new(ip, HBONE),
                    authority: Authority::Address(to),
                    expected: expected(&workload, service.map(|s| &**s))?,
                    uid: workload.uid.clone(),
                })
            }
        };
        Ok(Route { next_hop, workload: Some(workload), service: service.cloned(), pick })
    }

    /// Whether an address belongs to the service that led to it, as a host's address may be in the range of its own
    /// ServiceEntry. Looking it up again would lead to the same service for ever.
    fn leads_back(self, ip: IpAddr, service: Option<&Arc<Service>>) -> bool {
        let found = self.snapshot.at(&self.source.network, ip, &self.source.namespace);
        matches!((found, service), (Some(ServiceOrWorkload::Service(found)), Some(service)) if found.key == service.key)
    }

    fn to_waypoint(
        self,
        found: waypoint::Waypoint,
        service: Option<&Arc<Service>>,
        chance: &mut Chance<'_>,
    ) -> Result<Route, RouteError> {
        let ChosenEndpoint { workload, port, pick } = found.chosen;
        if workload.network != self.source.network {
            return self.to_other_network((workload, pick), found.service.as_deref(), service, chance);
        }
        let asked = found.named.unwrap_or_else(|| self.target.ip());
        let to = SocketAddr::new(destination::address(&workload, found.service.as_deref(), asked, self.names)?, port);
        self.check_far_end(&workload, to)?;
        let next_hop = NextHop::Tunnel(TunnelHop {
            to,
            authority: Authority::Address(self.target),
            expected: expected(&workload, found.service.as_deref())?,
            uid: workload.uid.clone(),
        });
        Ok(Route { next_hop, workload: Some(workload), service: service.cloned(), pick })
    }

    /// To an endpoint or waypoint in another network, which was chosen among the workloads of `through`. `service` was
    /// dialled.
    fn to_other_network(
        self,
        (workload, pick): (Arc<Workload>, Option<Pick>),
        through: Option<&Service>,
        service: Option<&Arc<Service>>,
        chance: &mut Chance<'_>,
    ) -> Result<Route, RouteError> {
        let Self { snapshot, source, target, names, .. } = self;
        let dialled = service.ok_or_else(|| RouteError::OtherNetwork(workload.uid.clone(), NoWay::NotService))?;
        let gateway = gateway::resolve(snapshot, source, &workload, target.ip(), names, chance)?;
        self.check_far_end(&gateway.workload, gateway.to)?;
        let behind = gateway::expected_behind(&workload, through)?;
        let outer = TunnelHop {
            to: gateway.to,
            // The address has a meaning in this network only, so the gateway and the far end get the name.
            authority: Authority::Host(dialled.key.hostname.to_string(), target.port()),
            expected: expected(&gateway.workload, gateway.service.as_deref())?,
            uid: gateway.workload.uid.clone(),
        };
        let next_hop = NextHop::Gateway(GatewayHop { outer, expected: behind, endpoints: workload.capacity });
        Ok(Route { next_hop, workload: Some(workload), service: Some(dialled.clone()), pick })
    }
}

/// The identities that the far end may prove: the workload's own, and those that the service names in addition.
fn expected(workload: &Workload, service: Option<&Service>) -> Result<Vec<SpiffeName>, RouteError> {
    let own = workload.identity().map_err(|e| RouteError::Identity(workload.uid.clone(), e.to_string()))?;
    let mut names = vec![own];
    // No certificate can prove a name that is not a SPIFFE name, so leaving it out admits no further peer.
    let others = service.into_iter().flat_map(|s| &s.subject_alt_names);
    names.extend(others.filter_map(|name| SpiffeName::parse(name).ok()));
    names.sort();
    names.dedup();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::service::{HealthPolicy, LoadBalancer, LoadBalancingMode, RoutingScope};
    use crate::mesh::snapshot::tests::{service, workload};
    use crate::mesh::workload::Health;
    use crate::mesh::{Facts, GatewayRef, GatewayTarget};
    use crate::ports::in_pod;

    struct World(Facts);

    impl World {
        fn new() -> Self {
            let mut facts = Facts::default();
            for (name, ip) in
                [("client", "10.0.0.1"), ("server", "10.0.0.2"), ("plain", "10.0.0.3"), ("waypoint", "10.0.0.4")]
            {
                facts.workloads.push(workload("a", name, ip));
            }
            facts.workloads[2].protocol = Protocol::Tcp;
            facts.services.push(service("a", "web", "10.96.0.1", &[(80, 8080)]));
            facts.services.push(service("a", "way", "10.96.0.2", &[(15008, 15009)]));
            let (web, way) = (facts.services[0].key.clone(), facts.services[1].key.clone());
            facts.workloads[1].services.insert(web, [(80, 8081)].into());
            facts.workloads[3].services.insert(way, [].into());
            Self(facts)
        }

        fn with(mut self, change: impl FnOnce(&mut Facts)) -> Self {
            change(&mut self.0);
            self
        }
    }

    #[test]
    fn a_service_without_endpoints_of_its_own_counts_for_the_ports_that_it_has() {
        let world = World::new().with(|f| {
            f.services[0].load_balancer = Some(LoadBalancer {
                preferences: Vec::new(),
                mode: LoadBalancingMode::Passthrough,
                health_policy: HealthPolicy::OnlyHealthy,
            });
        });
        let snapshot = Snapshot::build(1, world.0);
        let source = snapshot.workload_of_pod("a", "client").unwrap();
        for (to, counts) in [("10.96.0.1:80", true), ("10.96.0.1:81", false)] {
            let to: SocketAddr = to.parse().unwrap();
            let route = choose(&snapshot, source, to, in_pod(true), &ResolvedNames::new(), &mut Chance::of(&mut |_| 0))
                .unwrap();
            assert_eq!((route.next_hop, route.service.is_some()), (NextHop::Direct { to }, counts), "{to}");
        }
    }

    /// Clients and servers of two networks, and the gateway between them, as istiod announces them to the first one.
    fn two_networks() -> World {
        World::new().with(|f| {
            for workload in &mut f.workloads {
                workload.network = "here".into();
            }
            for service in &mut f.services {
                for vip in &mut service.vips {
                    vip.network = "here".into();
                }
            }
            f.services[0].vips.push(NetworkAddress { network: "here".into(), ip: "fd96::1".parse().unwrap() });
            f.services[0].subject_alt_names = vec!["spiffe://td/ns/a/sa/far".into()];
            f.services[1].subject_alt_names = vec!["spiffe://td/ns/a/sa/far-way".into()];
            f.workloads[1].services.clear();
            f.workloads[3].services.clear();
            let mut gateway = workload("a", "gateway", "203.0.113.7");
            gateway.ips.push("2001:db8::7".parse().unwrap());
            (gateway.protocol, gateway.network) = (Protocol::Tcp, "there".into());
            let mut folded = workload("a", "folded", "10.0.0.9");
            folded.ips.clear();
            (folded.network, folded.capacity) = ("there".into(), 3);
            folded.network_gateway = gateway_at("there/203.0.113.7", 15443);
            folded.services.insert(f.services[0].key.clone(), [(80, 0)].into());
            let mut entry = service("a", "entry", "203.0.113.100", &[(15008, 15010)]);
            entry.vips[0].network = "there".into();
            gateway.services.insert(entry.key.clone(), [].into());
            f.services.push(entry);
            f.workloads.extend([gateway, folded]);
        })
    }

    fn gateway_at(target: &str, hbone_port: u16) -> Option<GatewayRef> {
        Some(GatewayRef { target: GatewayTarget::parse(target).unwrap(), hbone_port })
    }

    fn of<'a>(facts: &'a mut Facts, name: &str) -> &'a mut Workload {
        facts.workloads.iter_mut().find(|workload| &*workload.name == name).unwrap()
    }

    /// A server in the own network becomes an endpoint of `web` again.
    fn near_server(f: &mut Facts) {
        let web = f.services[0].key.clone();
        of(f, "server").services.insert(web, [(80, 8081)].into());
    }

    /// One waypoint in the other network, which stands for all of its service there.
    const FOLDED: &str = "c1//Pod/a/folded";

    #[test]
    fn on_demand_a_gateway_is_asked_for_before_its_network_is_given_up() {
        let facts = two_networks().with(|f| f.workloads.retain(|workload| &*workload.name != "gateway")).0;
        let source = facts.workloads[0].clone();
        let mut snapshot = Snapshot::empty("".into(), "".into(), true);
        snapshot.apply(1, facts.into());
        let to = "10.96.0.1:80".parse().unwrap();
        let route = |snapshot: &Snapshot| {
            choose(snapshot, &source, to, in_pod(true), &ResolvedNames::new(), &mut Chance::of(&mut |_| 0)).map(|_| ())
        };
        let key = FactKey::Address(NetworkAddress { network: "there".into(), ip: "203.0.113.7".parse().unwrap() });
        assert_eq!(route(&snapshot), Err(RouteError::Unasked(key.clone())));
        snapshot.apply(2, crate::mesh::Update { absent: vec![key], ..Default::default() });
        let unknown = NoWay::UnknownGateway("there/203.0.113.7".into());
        assert_eq!(route(&snapshot), Err(RouteError::OtherNetwork(FOLDED.into(), unknown)));
    }

    #[test]
    fn another_network_is_the_last_resort_if_the_own_one_is_preferred_and_a_share_by_weight_if_not() {
        let drawn = |world: World, from: u64| {
            let snapshot = Snapshot::build(1, world.0);
            let source = snapshot.workload_of_pod("a", "client").unwrap();
            let (to, names) = ("10.96.0.1:80".parse().unwrap(), ResolvedNames::new());
            let route = choose(&snapshot, source, to, in_pod(true), &names, &mut Chance::of(&mut |_| from)).unwrap();
            match route.next_hop {
                NextHop::Gateway(hop) => format!("there, one of {}", hop.endpoints),
                NextHop::Tunnel(_) => "here".into(),
                NextHop::Direct { to } => to.to_string(),
            }
        };
        // Of four, the three there come first.
        let both = || two_networks().with(near_server);
        let all: Vec<String> = (0..4).map(|from| drawn(both(), from)).collect();
        assert_eq!(all.iter().filter(|one| *one == "there, one of 3").count(), 3, "{all:?}");
        assert_eq!(all.iter().filter(|one| *one == "here").count(), 1, "{all:?}");
        let prefer = |preferences: &[RoutingScope]| {
            let (preferences, mode) = (preferences.to_vec(), LoadBalancingMode::Failover);
            Some(LoadBalancer { preferences, mode, health_policy: HealthPolicy::OnlyHealthy })
        };
        let by_region = || {
            both().with(|f| {
                f.services[0].load_balancer = prefer(&[RoutingScope::Network, RoutingScope::Region]);
                // Further away than the ones there, but in the own network.
                of(f, "client").locality.region = "r1".into();
                of(f, "folded").locality.region = "r1".into();
                of(f, "server").locality.region = "r2".into();
            })
        };
        assert_eq!(drawn(by_region(), 0), "here");
        let failed = || by_region().with(|f| of(f, "server").health = Health::Unhealthy);
        assert_eq!(drawn(failed(), 0), "there, one of 3");
        // Of two networks, the one in the same region.
        let two = failed().with(|f| {
            let mut third = of(f, "folded").clone();
            (third.uid, third.name, third.capacity) = ("a-third".into(), "third".into(), 9);
            third.locality.region = "r3".into();
            f.workloads.push(third);
        });
        assert_eq!(drawn(two, 0), "there, one of 3");
    }

    #[test]
    fn on_demand_an_address_goes_nowhere_before_the_ranges_around_it_are_known() {
        let mut snapshot = Snapshot::empty("".into(), "".into(), true);
        let facts = World::new().0;
        let source = facts.workloads[0].clone();
        snapshot.apply(1, facts.into());
        let at = NetworkAddress { network: source.network.clone(), ip: "10.0.0.9".parse().unwrap() };
        let tell = |snapshot: &mut Snapshot, absent| {
            snapshot.apply(2, crate::mesh::Update { absent, ..Default::default() });
            choose(
                snapshot,
                &source,
                "10.0.0.9:80".parse().unwrap(),
                in_pod(true),
                &ResolvedNames::new(),
                &mut Chance::of(&mut |_| 0),
            )
        };
        let unasked = tell(&mut snapshot, vec![FactKey::Address(at.clone())]);
        assert!(matches!(unasked, Err(RouteError::Unasked(FactKey::Address(wanted))) if wanted == at));
        let around = snapshot.unasked_around(&at);
        assert!(around.contains(&FactKey::Range(NetworkAddress { ip: "10.0.0.8".parse().unwrap(), ..at })));
        let direct = tell(&mut snapshot, around).unwrap().next_hop;
        assert_eq!(direct, NextHop::Direct { to: "10.0.0.9:80".parse().unwrap() });
    }
}
