//! What would happen to a connection of a pod now, step by step. The steps are those of the journey `outbound`, and they
//! ask the same functions; nothing is dialled.

use super::egress::Outside;
use super::lookup::find_route;
use crate::connection::authorize::Subject;
use crate::connection::authorize::decide::{Applicable, Decision, Verdict};
use crate::connection::choose::destination::{self, Judged};
use crate::connection::choose::outlook::{Outlook, outlook};
use crate::connection::choose::route::Route;
use crate::connection::choose::{Chance, Known, NextHop, ResolvedNames, TunnelHop, Witness};
use crate::connection::pod::Pod;
use crate::connection::report::Failure;
use crate::connection::worker::Shared;
use crate::hbone::Authority;
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{Service, Snapshot, Text, Workload};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// Most endpoints that are listed.
const LISTED_MAX: usize = 100;

/// How often an endpoint is drawn to find the one that is most likely.
const DRAWS: usize = 64;

/// What would happen to a connection now.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The pod, as `namespace/name`.
    pub from: String,
    /// Where it connects to.
    pub to: String,
    /// In their order.
    pub steps: Vec<Step>,
    /// The route; `None` if there is none.
    pub route: Option<ExplainedRoute>,
    /// The reason word with which the connection would fail; `None` if nothing that is known here forbids it.
    pub reason: Option<&'static str>,
    /// The end of the story, as one sentence.
    pub result: String,
}

/// One step.
#[derive(Debug, Serialize)]
pub struct Step {
    /// What it is about.
    pub about: &'static str,
    /// What was found.
    pub text: String,
    /// Items, such as endpoints.
    pub details: Vec<String>,
}

/// The route, for programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedRoute {
    /// `direct`, `tunnel` or `gateway`.
    pub kind: &'static str,
    /// Address that the daemon would connect to.
    pub to: SocketAddr,
    /// The CONNECT authority.
    pub authority: Option<String>,
    /// Identities of which the far end has to prove one.
    pub expected_identities: Vec<String>,
    /// Uid of the workload at the far end.
    pub workload: Option<String>,
    /// Host name of the service that is dialled.
    pub service: Option<String>,
}

/// Explains a connection of `pod` to `target`, to which `name` leads. Nobody is asked who the journey would not ask,
/// and the same limits hold.
pub async fn explain(shared: &Arc<Shared>, pod: &Arc<Pod>, target: SocketAddr, name: Option<Text>) -> Explanation {
    let mut story = Story { steps: Vec::new(), name };
    let told = tell(shared, pod, target, &mut story).await;
    let (route, reason, result) = match told {
        Ok((route, result)) => (Some(route), None, result),
        Err(Ending { route, reason, text }) => (route, Some(reason), text),
    };
    let from = format!("{}/{}", pod.namespace, pod.name);
    Explanation { from, to: target.to_string(), steps: story.steps, route, reason, result }
}

struct Story {
    steps: Vec<Step>,
    /// The name that leads to the address, for egress policies.
    name: Option<Text>,
}

impl Story {
    fn step(&mut self, about: &'static str, text: impl Into<String>) {
        self.with(about, text, Vec::new());
    }

    fn with(&mut self, about: &'static str, text: impl Into<String>, details: Vec<String>) {
        self.steps.push(Step { about, text: text.into(), details });
    }
}

/// Why the connection would fail.
struct Ending {
    route: Option<ExplainedRoute>,
    reason: &'static str,
    text: String,
}

impl<E: Into<Failure>> From<E> for Ending {
    fn from(error: E) -> Self {
        let failure = error.into();
        Self {
            route: None,
            reason: failure.word(),
            text: format!("it would fail: {failure} (reason {})", failure.word()),
        }
    }
}

async fn tell(
    shared: &Arc<Shared>,
    pod: &Arc<Pod>,
    target: SocketAddr,
    story: &mut Story,
) -> Result<(ExplainedRoute, String), Ending> {
    let known = pod.facts_now(&shared.mesh).ok_or_else(|| Failure::LocalWorkload(pod.uid.clone()))?;
    let (snapshot, source) = known;
    let identity = source.identity().map_or_else(|error| format!("no valid identity: {error}"), |own| own.to_string());
    story.step("pod", format!("workload {} as {identity}, by the facts of version {}", source.uid, snapshot.version));
    pod.with_own(&source, |own| own.check_outbound(target))?;
    story.step("address", address(&snapshot, &source, target));
    // First the route, because finding it may bring facts that were not known before.
    let route = find_route(shared, pod, snapshot, &source, target, &[]).await;
    let snapshot = shared.mesh.load();
    candidates(shared, pod, (&snapshot, &source), target, story);
    let route = route?;
    let shown = shown(&route);
    story.with(
        "route",
        sentence(&shown),
        shown.expected_identities.iter().map(|one| format!("expects {one}")).collect(),
    );
    match destination(shared, pod, &snapshot, &source, &route, story) {
        Ok(result) => Ok((shown, result)),
        Err(failure) => Err(Ending { route: Some(shown), ..failure.into() }),
    }
}

/// What an address is.
fn address(snapshot: &Snapshot, source: &Workload, target: SocketAddr) -> String {
    match snapshot.at(&source.network, target.ip(), &source.namespace) {
        Some(ServiceOrWorkload::Service(service)) => format!("{} belongs to the service {}", target.ip(), service.key),
        Some(ServiceOrWorkload::Workload(workload)) => {
            format!("{} is an address of the workload {}", target.ip(), workload.uid)
        }
        None => format!("{} is outside the mesh", target.ip()),
    }
}

/// The waypoint, and the endpoints among which one is chosen.
fn candidates(
    shared: &Shared,
    pod: &Pod,
    (snapshot, source): (&Snapshot, &Workload),
    target: SocketAddr,
    story: &mut Story,
) {
    let Outlook { waypoints, lists } = outlook(snapshot, source, target);
    for (wanted, unused) in &waypoints {
        let text = match unused {
            Some(why) => format!("{} is not used: {why}", wanted.target),
            None => format!("connections go through the waypoint {}", wanted.target),
        };
        story.step("waypoint", text);
    }
    for (service, port) in &lists {
        list(shared, pod, (snapshot, source), (service, *port), story);
    }
}

fn list(
    shared: &Shared,
    pod: &Pod,
    (snapshot, source): (&Snapshot, &Workload),
    (service, port): (&Arc<Service>, u16),
    story: &mut Story,
) {
    let aside = shared.endpoints.set_aside();
    let aside = |workload: &Workload| {
        let mut of = aside.iter().filter(|one| one.service == service.key && one.service_port == port);
        let one = of.find(|one| one.workload.uid == workload.uid)?;
        let seconds = one.left.div_ceil(1000);
        Some(format!("set aside for {seconds} s more: {}", one.failures.last.word()))
    };
    let all = destination::judge(snapshot, source, service, port, &ResolvedNames::new());
    let eligible = all.iter().filter(|one| one.unusable.is_none()).count();
    let drawn = draws(shared, pod, (snapshot, source), (service, port));
    let may = |workload: &Workload| {
        let found = drawn.get(&workload.uid);
        let connections = |drawn: &Drawn| format!("may be chosen, {}", connections(drawn.in_flight));
        aside(workload).or_else(|| found.map(connections)).unwrap_or_else(|| "may be chosen".into())
    };
    let line = |Judged { workload, port, unusable }: &Judged| {
        let at = workload.ips.first().map_or_else(|| workload.hostname.to_string(), ToString::to_string);
        let at = port.map_or_else(|| at.clone(), |port| format!("{at} port {port}"));
        match unusable {
            None => format!("{} at {at}: {}", workload.uid, may(workload)),
            Some(why) => format!("{} at {at}: {why}", workload.uid),
        }
    };
    let mut details: Vec<String> = all.iter().take(LISTED_MAX).map(line).collect();
    if all.len() > LISTED_MAX {
        details.push(format!("and {} more", all.len() - LISTED_MAX));
    }
    let mut text = format!("{eligible} of {} of {} port {port} may be chosen", all.len(), service.key);
    if let Some((uid, most)) = drawn.iter().filter(|_| eligible > 1).max_by_key(|(_, drawn)| drawn.times) {
        let connections = connections(most.in_flight);
        text += &format!("; one of {eligible} by two random choices, now most likely {uid} ({connections})");
    }
    story.with("endpoints", text, details);
}

fn connections(number: u32) -> String {
    if number == 1 { "1 connection".into() } else { format!("{number} connections") }
}

/// How often an endpoint was chosen in some draws, and the connections that it has.
struct Drawn {
    times: usize,
    in_flight: u32,
}

/// What the data path would choose now, many times over, by uid. Nothing is begun.
fn draws(
    shared: &Shared,
    pod: &Pod,
    (snapshot, source): (&Snapshot, &Workload),
    (service, port): (&Arc<Service>, u16),
) -> BTreeMap<Text, Drawn> {
    let (endpoints, names) = (&*shared.endpoints, ResolvedNames::new());
    let known = Known { endpoints, pod: Witness(pod.capture), now: endpoints.now(), left: &[] };
    let mut random = |below| rand::random_range(0..below);
    let mut drawn = BTreeMap::<Text, Drawn>::new();
    for _ in 0..DRAWS {
        let mut chance = Chance { random: &mut random, known: Some(known) };
        let Ok(chosen) = destination::choose(snapshot, source, service, port, &names, &mut chance) else { break };
        let in_flight = chosen.pick.as_ref().map_or(0, |pick| pick.standing.in_flight());
        drawn.entry(chosen.workload.uid.clone()).or_insert(Drawn { times: 0, in_flight }).times += 1;
    }
    drawn
}

fn shown(route: &Route) -> ExplainedRoute {
    let tunnel = |kind, hop: &TunnelHop, expected: &[crate::mesh::SpiffeName]| ExplainedRoute {
        kind,
        to: hop.to,
        authority: Some(hop.authority.to_string()),
        expected_identities: expected.iter().map(ToString::to_string).collect(),
        workload: route.workload.as_ref().map(|workload| workload.uid.to_string()),
        service: route.service.as_ref().map(|service| service.key.hostname.to_string()),
    };
    match &route.next_hop {
        NextHop::Direct { to } => ExplainedRoute {
            kind: "direct",
            to: *to,
            authority: None,
            expected_identities: Vec::new(),
            workload: route.workload.as_ref().map(|workload| workload.uid.to_string()),
            service: route.service.as_ref().map(|service| service.key.hostname.to_string()),
        },
        NextHop::Tunnel(hop) => tunnel("tunnel", hop, &hop.expected),
        NextHop::Gateway(hop) => tunnel("gateway", &hop.outer, &hop.expected),
    }
}

fn sentence(route: &ExplainedRoute) -> String {
    let ExplainedRoute { kind, to, authority, .. } = route;
    match authority {
        None => format!("plain TCP to {to}, not encrypted"),
        Some(authority) if *kind == "gateway" => {
            format!(
                "through the gateway at {to} to another network, asked for {authority}; the identities below are those behind it"
            )
        }
        Some(authority) => format!("{kind} to {to}, asked for {authority}"),
    }
}

/// What the destination's node would decide, as far as it is known here, or an egress policy.
fn destination(
    shared: &Arc<Shared>,
    pod: &Arc<Pod>,
    snapshot: &Snapshot,
    source: &Arc<Workload>,
    route: &Route,
    story: &mut Story,
) -> Result<String, Failure> {
    let Some(workload) = &route.workload else {
        let (NextHop::Direct { to }, None) = (&route.next_hop, &route.service) else {
            return Ok("it would be carried in plaintext".into());
        };
        let decided = Outside::new(shared, pod, source, *to).led_by(story.name.as_ref()).decide();
        return match decided {
            None => {
                story.step("egress", "no egress policy applies");
                Ok("it would be carried in plaintext, to a destination outside the mesh".into())
            }
            Some(decision) => {
                let what = if decision.dry_run { " (dry run)" } else { "" };
                story.step("egress", format!("{:?}{what} by the {decision}", decision.action));
                match decision.refuses() {
                    true => Err(crate::connection::authorize::Refusal::Egress(Box::new(decision)).into()),
                    false => Ok("it would be carried in plaintext, to a destination outside the mesh".into()),
                }
            }
        };
    };
    let (to, peer) = match &route.next_hop {
        NextHop::Direct { to } => (*to, None),
        NextHop::Gateway(_) => {
            story.step("policies", "the far end decides; what it knows is not known here");
            return Ok(
                "it would be carried to another network in a tunnel inside the gateway's, and the far end would decide"
                    .into(),
            );
        }
        NextHop::Tunnel(hop) => match &hop.authority {
            Authority::Address(to) if workload.ips.contains(&to.ip()) => (*to, source.identity().ok()),
            _ => {
                story.step("policies", "the waypoint decides; what it knows is not known here");
                return Ok("the waypoint would decide".into());
            }
        },
    };
    let ip = source.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).or(source.ips.first());
    let subject = Subject { peer, source: ip.copied().unwrap_or_else(|| to.ip()), destination: to };
    let how = if subject.peer.is_some() { "in a tunnel with mutual TLS" } else { "in plaintext" };
    let Decision { verdict, dry_run } = Applicable::for_workload(snapshot, workload).decide(&subject);
    match verdict {
        Verdict::Allow(permit) => {
            story.with("policies", permit.to_string(), dry_run);
            Ok(format!("it would be carried {how}, {permit}"))
        }
        Verdict::Refuse(refusal) => {
            story.with("policies", refusal.to_string(), dry_run);
            Err(refusal.into())
        }
        Verdict::Unknown(policy) => {
            let text = format!("the workload names the policy {policy}, which is not known here");
            story.with("policies", text, dry_run);
            Err(crate::connection::authorize::Refusal::PolicyUnknown(policy).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::choose::route::choose;
    use crate::mesh::snapshot::tests::{service, workload};
    use crate::mesh::workload::Health;
    use crate::mesh::{Facts, GatewayRef, GatewayTarget, Protocol};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// An endpoint of a small mesh.
    #[derive(Clone, Debug)]
    struct Shape {
        healthy: bool,
        /// Its network: the client's, another one behind a gateway, or another one without.
        network: u8,
        hbone: bool,
        capacity: u32,
        has_port: bool,
        waypoint: u8,
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let usually = || prop::bool::weighted(0.8);
        let network = prop_oneof![4 => Just(0u8), 1 => Just(1), 1 => Just(2)];
        (usually(), network, usually(), 0..3u32, usually(), 0..5u8).prop_map(
            |(healthy, network, hbone, capacity, has_port, waypoint)| Shape {
                healthy,
                network,
                hbone,
                capacity,
                has_port,
                waypoint,
            },
        )
    }

    /// None, a service, a workload, one that does not exist, and a service that the client itself is behind.
    fn waypoint(kind: u8) -> Option<GatewayRef> {
        let target = match kind {
            1 => "a/way.a.svc.cluster.local",
            2 => "/10.0.1.1",
            3 => "a/unknown",
            4 => "a/own.a.svc.cluster.local",
            _ => return None,
        };
        Some(GatewayRef { target: GatewayTarget::parse(target).unwrap(), hbone_port: 15008 })
    }

    fn facts(shapes: &[Shape], of_service: u8, weighted: &[(u8, u32)]) -> Facts {
        let mut web = service("a", "web", "10.96.0.1", &[(80, 8080)]);
        let (way, own) = (service("a", "way", "10.96.0.2", &[]), service("a", "own", "10.96.0.3", &[]));
        web.waypoint = waypoint(of_service);
        web.weighted_waypoints =
            weighted.iter().filter_map(|(kind, weight)| Some((waypoint(*kind)?, *weight))).collect();
        let mut client = workload("a", "client", "10.0.0.99");
        client.services.insert(own.key.clone(), [(15008, 15008)].into());
        let mut workloads = vec![client, workload("a", "gateway", "10.0.0.98")];
        for number in 1..3 {
            let mut one = workload("a", &format!("y{number}"), &format!("10.0.1.{number}"));
            one.services.insert(way.key.clone(), [(15008, 15008)].into());
            workloads.push(one);
        }
        for (number, shape) in shapes.iter().enumerate() {
            let mut one = workload("a", &format!("w{number}"), &format!("10.0.0.{}", number + 1));
            one.services.insert(web.key.clone(), if shape.has_port { [(80, 8081)].into() } else { [].into() });
            one.capacity = shape.capacity;
            one.waypoint = waypoint(shape.waypoint);
            one.health = if shape.healthy { Health::Healthy } else { Health::Unhealthy };
            one.protocol = if shape.hbone { Protocol::Hbone } else { Protocol::Tcp };
            if shape.network > 0 {
                one.network = "far".into();
                let gateway = ["10.0.0.98", "10.0.0.97"][usize::from(shape.network) - 1];
                let target = GatewayTarget::parse(&format!("/{gateway}")).unwrap();
                one.network_gateway = Some(GatewayRef { target, hbone_port: 15008 });
            }
            workloads.push(one);
        }
        Facts { workloads, services: vec![web, way, own], ..Facts::default() }
    }

    /// What an explanation says about where a connection may go: kind of route, address, authority and workload.
    fn explained(snapshot: &Snapshot, source: &Workload, target: SocketAddr) -> (BTreeSet<String>, bool) {
        let Outlook { waypoints, lists } = outlook(snapshot, source, target);
        let found = snapshot.at(&source.network, target.ip(), &source.namespace);
        let (mut said, mut refused) = (BTreeSet::new(), false);
        let through =
            |workload: &Workload, port: u16| format!("tunnel {}:{port} {target} {}", workload.ips[0], workload.uid);
        let itself = |workload: &Workload, port: u16| {
            let to = SocketAddr::new(workload.ips[0], port);
            match (workload.protocol, &found) {
                (Protocol::Hbone, Some(ServiceOrWorkload::Service(dialled))) if workload.network != source.network => {
                    let authority = format!("{}:{}", dialled.key.hostname, target.port());
                    format!("gateway 10.0.0.98:15008 {authority} {}", workload.uid)
                }
                (Protocol::Hbone, _) => format!("tunnel {}:15008 {to} {}", to.ip(), workload.uid),
                _ => format!("direct {to} - {}", workload.uid),
            }
        };
        for (wanted, _) in waypoints.iter().filter(|(_, unused)| unused.is_none()) {
            match snapshot.gateway(wanted, &source.namespace) {
                Some(ServiceOrWorkload::Workload(workload)) => drop(said.insert(through(&workload, 15008))),
                Some(ServiceOrWorkload::Service(_)) => {}
                None => refused = true,
            }
        }
        for (service, port) in &lists {
            let all = destination::judge(snapshot, source, service, *port, &ResolvedNames::new());
            let usable: Vec<_> = all.iter().filter(|one| one.unusable.is_none()).collect();
            refused |= usable.is_empty();
            let is_dialled = matches!(&found, Some(ServiceOrWorkload::Service(dialled)) if dialled.key == service.key);
            said.extend(usable.into_iter().map(|one| match is_dialled {
                true => itself(&one.workload, one.port.unwrap_or(0)),
                false => through(&one.workload, one.port.unwrap_or(0)),
            }));
        }
        match &found {
            None => drop(said.insert(format!("direct {target} - -"))),
            Some(ServiceOrWorkload::Workload(workload)) if waypoints.iter().all(|(_, unused)| unused.is_some()) => {
                said.insert(itself(workload, target.port()));
            }
            Some(_) => {}
        }
        (said, refused)
    }

    /// What the data path does, for many draws.
    fn chosen(snapshot: &Snapshot, source: &Workload, target: SocketAddr) -> (BTreeSet<String>, bool) {
        let (mut said, mut refused) = (BTreeSet::new(), false);
        // The first number draws the waypoint, the next ones its endpoint.
        for (first, next) in (0..6).flat_map(|first| (0..12).map(move |next| (first, next))) {
            let mut numbers = std::iter::once(first).chain(std::iter::repeat(next));
            let mut random = |below: u64| numbers.next().unwrap_or(0) % below;
            match choose(snapshot, source, target, &[15001], &ResolvedNames::new(), &mut Chance::of(&mut random)) {
                Err(_) => refused = true,
                Ok(route) => {
                    let ExplainedRoute { kind, to, authority, workload, .. } = shown(&route);
                    let [authority, workload] = [authority, workload].map(|text| text.unwrap_or_else(|| "-".into()));
                    said.insert(format!("{kind} {to} {authority} {workload}"));
                }
            }
        }
        (said, refused)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// In whatever mesh: the workloads, kinds of routes, authorities and refusals.
        #[test]
        fn an_explanation_and_the_data_path_never_differ(
            shapes in prop::collection::vec(shape(), 0..5),
            of_service in 0..5u8,
            weighted in prop::collection::vec((1..5u8, 0..3u32), 0..3),
        ) {
            let snapshot = Snapshot::build(1, facts(&shapes, of_service, &weighted));
            let source = snapshot.workload_of_pod("a", "client").unwrap().clone();
            let workloads = (1..6).map(|number| format!("10.0.0.{number}:8080"));
            let others = ["10.96.0.1:80", "10.96.0.1:81", "10.96.0.2:15008", "192.0.2.1:80", "10.0.1.1:80"];
            for target in workloads.chain(others.map(str::to_owned)) {
                let target: SocketAddr = target.parse().unwrap();
                let (explained, chosen) = (explained(&snapshot, &source, target), chosen(&snapshot, &source, target));
                prop_assert_eq!(explained, chosen, "{}", target);
            }
        }
    }
}
