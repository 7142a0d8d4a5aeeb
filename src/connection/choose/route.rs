//! The route of an outbound connection. Pure: a source workload and a destination address in, a route or a named error
//! out.
//!
//! The address may belong to a service, to a workload, to a range of addresses or to nothing in the mesh. A service
//! leads to its waypoint or to one of its endpoints, a workload to its waypoint or to itself; everything else is
//! reached directly.

use super::destination::{self, ChosenEndpoint};
use super::{Chance, Pick, ResolvedNames, RouteError, waypoint};
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
}

/// The far end of a tunnel, and what to ask it for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelHop {
    /// Address and HBONE port of the far end.
    pub to: SocketAddr,
    /// The CONNECT authority.
    pub authority: SocketAddr,
    /// Identities that the far end may prove; one of them is required.
    pub expected: Vec<SpiffeName>,
    /// Uid of the workload at the far end. If the address later belongs to another workload, the tunnel is not used for
    /// it.
    pub uid: Text,
}

/// A route, with the facts by which it was chosen.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the daemon connects to.
    pub next_hop: NextHop,
    /// The workload at the far end of the daemon's leg, if it is known: a waypoint, or the destination itself.
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
        let Self { snapshot, source, target, own_ports, .. } = self;
        let own = target.ip().is_loopback() || source.ips.contains(&target.ip());
        if own && own_ports.contains(&target.port()) {
            return Err(RouteError::Loop(target));
        }
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
            && !waypoint::is_behind(snapshot, wanted, source)
        {
            let found = waypoint::resolve(snapshot, source, wanted, &workload.uid, chance)?;
            return self.to_waypoint(found, None);
        }
        let chosen = ChosenEndpoint { workload: workload.clone(), port: target.port(), pick: None };
        self.to_workload(chosen, None, chance)
    }

    fn to_service(self, service: &Arc<Service>, chance: &mut Chance<'_>) -> Result<Route, RouteError> {
        let Self { snapshot, source, target, .. } = self;
        if let Some(wanted) = waypoint::draw(service, chance)
            && !waypoint::is_behind(snapshot, wanted, source)
        {
            let found = waypoint::resolve(snapshot, source, wanted, &service.key.hostname, chance)?;
            return self.to_waypoint(found, Some(service));
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
            return Err(RouteError::OtherNetwork(workload.uid.clone()));
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
            Protocol::Tcp => NextHop::Direct { to },
            Protocol::Unsupported => return Err(RouteError::Protocol(workload.uid.clone())),
            Protocol::Hbone => NextHop::Tunnel(TunnelHop {
                to: SocketAddr::new(ip, HBONE),
                authority: to,
                expected: expected(&workload, service.map(|s| &**s))?,
                uid: workload.uid.clone(),
            }),
        };
        Ok(Route { next_hop, workload: Some(workload), service: service.cloned(), pick })
    }

    /// Whether an address belongs to the service that led to it, as a host's address may be in the range of its own
    /// ServiceEntry. Looking it up again would lead to the same service for ever.
    fn leads_back(self, ip: IpAddr, service: Option<&Arc<Service>>) -> bool {
        let found = self.snapshot.at(&self.source.network, ip, &self.source.namespace);
        matches!((found, service), (Some(ServiceOrWorkload::Service(found)), Some(service)) if found.key == service.key)
    }

    fn to_waypoint(self, found: waypoint::Waypoint, service: Option<&Arc<Service>>) -> Result<Route, RouteError> {
        let ChosenEndpoint { workload, port, pick } = found.chosen;
        if workload.network != self.source.network {
            return Err(RouteError::OtherNetwork(workload.uid.clone()));
        }
        let asked = self.target.ip();
        let ip = destination::address(&workload, found.service.as_deref(), asked, self.names)?;
        let next_hop = NextHop::Tunnel(TunnelHop {
            to: SocketAddr::new(ip, port),
            authority: self.target,
            expected: expected(&workload, found.service.as_deref())?,
            uid: workload.uid.clone(),
        });
        Ok(Route { next_hop, workload: Some(workload), service: service.cloned(), pick })
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
    use crate::mesh::service::{HealthPolicy, LoadBalancer, LoadBalancingMode};
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

        fn route(&self, from: &str, to: &str) -> String {
            let snapshot = Snapshot::build(1, self.0.clone());
            let source = snapshot.workload_of_pod("a", from).unwrap();
            match choose(
                &snapshot,
                source,
                to.parse().unwrap(),
                in_pod(true),
                &ResolvedNames::new(),
                &mut Chance::of(&mut |_| 0),
            ) {
                Ok(Route { next_hop: NextHop::Direct { to }, .. }) => format!("direct {to}"),
                Ok(Route { next_hop: NextHop::Tunnel(hop), .. }) => {
                    let names: Vec<String> = hop.expected.iter().map(|n| n.service_account.to_string()).collect();
                    format!("hbone {} for {} as {}", hop.to, hop.authority, names.join("+"))
                }
                Err(error) => error.to_string(),
            }
        }
    }

    fn waypoint_at(target: &str) -> Option<GatewayRef> {
        Some(GatewayRef { target: GatewayTarget::parse(target).unwrap(), hbone_port: 15008 })
    }

    #[test]
    fn ways_without_waypoint() {
        let world = World::new();
        for (to, expected) in [
            ("10.0.0.2:80", "hbone 10.0.0.2:15008 for 10.0.0.2:80 as server"),
            ("10.0.0.3:80", "direct 10.0.0.3:80"),
            ("192.0.2.1:443", "direct 192.0.2.1:443"),
            ("10.96.0.1:80", "hbone 10.0.0.2:15008 for 10.0.0.2:8081 as server"),
            ("10.96.0.1:81", "no healthy upstream: service web.a.svc.cluster.local has no port 81"),
            ("127.0.0.1:15001", "attempted recursive call to ourselves (127.0.0.1:15001)"),
            ("10.0.0.1:15006", "attempted recursive call to ourselves (10.0.0.1:15006)"),
        ] {
            assert_eq!(world.route("client", to), expected, "{to}");
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

    #[test]
    fn unhealthy_and_absent_endpoints_are_never_chosen() {
        let world = World::new().with(|f| f.workloads[1].health = Health::Unhealthy);
        assert_eq!(world.route("client", "10.96.0.1:80"), "no healthy upstream: web.a.svc.cluster.local");
        let world = World::new().with(|f| f.workloads[1].capacity = 0);
        assert_eq!(world.route("client", "10.96.0.1:80"), "no healthy upstream: web.a.svc.cluster.local");
        let world = World::new().with(|f| f.workloads[1].network = "far".into());
        assert!(world.route("client", "10.96.0.1:80").contains("is in another network"));
    }

    #[test]
    fn waypoints_by_address_and_name_are_used_and_never_bypassed() {
        let by_name = || World::new().with(|f| f.services[0].waypoint = waypoint_at("a/way.a.svc.cluster.local"));
        let through = "hbone 10.0.0.4:15009 for 10.96.0.1:80 as waypoint";
        assert_eq!(by_name().route("client", "10.96.0.1:80"), through);
        assert_eq!(
            by_name().route("waypoint", "10.96.0.1:80"),
            "hbone 10.0.0.2:15008 for 10.0.0.2:8081 as server",
            "its own traffic is not sent back to it"
        );
        let by_vip = World::new().with(|f| f.services[0].waypoint = waypoint_at("/10.96.0.2"));
        assert_eq!(by_vip.route("client", "10.96.0.1:80"), through);
        let of_workload = World::new().with(|f| f.workloads[1].waypoint = waypoint_at("/10.0.0.4"));
        assert_eq!(of_workload.route("client", "10.0.0.2:80"), "hbone 10.0.0.4:15008 for 10.0.0.2:80 as waypoint");
        assert_eq!(
            of_workload.route("client", "10.96.0.1:80"),
            "hbone 10.0.0.2:15008 for 10.0.0.2:8081 as server",
            "a service-addressed connection ignores the waypoint of the workload"
        );
        for missing in ["/10.96.0.99", "a/none.a.svc.cluster.local"] {
            let world = World::new().with(|f| f.services[0].waypoint = waypoint_at(missing));
            assert!(world.route("client", "10.96.0.1:80").starts_with("unknown waypoint"), "{missing}");
        }
        let empty = by_name().with(|f| f.workloads[3].services.clear());
        assert!(empty.route("client", "10.96.0.1:80").starts_with("unknown waypoint"));
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
