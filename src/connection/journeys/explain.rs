//! What would happen to a connection of a pod now, step by step. The steps are those of the journey `outbound`, and they
//! ask the same functions; nothing is dialled.

use super::egress::Outside;
use super::lookup::find_route;
use crate::connection::authorize::Subject;
use crate::connection::authorize::decide::{Applicable, Decision, Verdict};
use crate::connection::choose::destination::{self, Judged};
use crate::connection::choose::route::Route;
use crate::connection::choose::{NextHop, ResolvedNames, TunnelHop, waypoint};
use crate::connection::pod::Pod;
use crate::connection::report::Failure;
use crate::connection::worker::Shared;
use crate::hbone::Authority;
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{GatewayRef, Service, Snapshot, Text, Workload};
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;

/// Most endpoints that are listed.
const LISTED_MAX: usize = 100;

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
    candidates(shared, (&snapshot, &source), target, story);
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
fn candidates(shared: &Shared, (snapshot, source): (&Snapshot, &Workload), target: SocketAddr, story: &mut Story) {
    let found = snapshot.at(&source.network, target.ip(), &source.namespace);
    let (waypoints, service): (Vec<GatewayRef>, _) = match &found {
        Some(ServiceOrWorkload::Service(service)) => (waypoint::all(service).cloned().collect(), Some(service)),
        Some(ServiceOrWorkload::Workload(workload)) => (workload.waypoint.iter().cloned().collect(), None),
        None => return,
    };
    let mut through = false;
    for wanted in &waypoints {
        let unused = found.as_ref().and_then(|found| waypoint::unused(snapshot, source, wanted, found));
        through |= unused.is_none();
        let text = match unused {
            Some(why) => format!("{} is not used: {why}", wanted.target),
            None => format!("connections go through the waypoint {}", wanted.target),
        };
        story.step("waypoint", text);
        if let (None, Some(ServiceOrWorkload::Service(behind))) = (unused, snapshot.gateway(wanted, &source.namespace))
        {
            list(shared, (snapshot, source), (&behind, wanted.hbone_port), story);
        }
    }
    if let (false, Some(service)) = (through, service)
        && !service.is_passthrough()
    {
        list(shared, (snapshot, source), (service, target.port()), story);
    }
}

fn list(
    shared: &Shared,
    (snapshot, source): (&Snapshot, &Workload),
    (service, port): (&Service, u16),
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
    let line = |Judged { workload, port, unusable }: &Judged| {
        let at = workload.ips.first().map_or_else(|| workload.hostname.to_string(), ToString::to_string);
        let at = port.map_or_else(|| at.clone(), |port| format!("{at} port {port}"));
        match unusable {
            None => format!("{} at {at}: {}", workload.uid, aside(workload).unwrap_or_else(|| "may be chosen".into())),
            Some(why) => format!("{} at {at}: {why}", workload.uid),
        }
    };
    let mut details: Vec<String> = all.iter().take(LISTED_MAX).map(line).collect();
    if all.len() > LISTED_MAX {
        details.push(format!("and {} more", all.len() - LISTED_MAX));
    }
    story.with(
        "endpoints",
        format!("{eligible} of {} of {} port {port} may be chosen", all.len(), service.key),
        details,
    );
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
