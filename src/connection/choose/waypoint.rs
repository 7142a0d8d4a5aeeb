//! Waypoints: finding the workload behind one, by address or host name. A waypoint that cannot be found is an error and
//! never bypassed. Whether a workload is itself behind the waypoint is answered here too, because a waypoint must not
//! get its own traffic back, and is not reached through itself.

use super::destination::{self, ChosenEndpoint};
use super::{Chance, ResolvedNames, RouteError};
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{FactKey, GatewayRef, GatewayTarget, Service, Snapshot, SpiffeName, Text, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// A waypoint, resolved to a workload.
#[derive(Debug)]
pub struct Waypoint {
    /// The workload to connect to and its HBONE port.
    pub chosen: ChosenEndpoint,
    /// The waypoint's service, if it was found through one.
    pub service: Option<Arc<Service>>,
    /// The address by which the destination names it, if it does so by an address.
    pub named: Option<IpAddr>,
}

/// Finds a workload for `waypoint`, which `destination` refers to.
pub fn resolve(
    snapshot: &Snapshot,
    source: &Workload,
    waypoint: &GatewayRef,
    destination: &Text,
    chance: &mut Chance<'_>,
) -> Result<Waypoint, RouteError> {
    let unknown = |reason: String| RouteError::UnknownWaypoint {
        waypoint: waypoint.target.to_string(),
        destination: destination.clone(),
        reason,
    };
    let named = match &waypoint.target {
        GatewayTarget::Address(address) => Some(address.ip),
        GatewayTarget::Hostname(_) => None,
    };
    match snapshot.gateway(waypoint, &source.namespace) {
        Some(ServiceOrWorkload::Workload(workload)) => {
            let chosen = ChosenEndpoint { workload, port: waypoint.hbone_port, pick: None };
            Ok(Waypoint { chosen, service: None, named })
        }
        Some(ServiceOrWorkload::Service(service)) => {
            let mut chosen =
                destination::choose(snapshot, source, &service, waypoint.hbone_port, &ResolvedNames::new(), chance)
                    .map_err(|error| unknown(error.to_string()))?;
            if let Some(pick) = &mut chosen.pick {
                pick.is_waypoint = true;
            }
            Ok(Waypoint { chosen, service: Some(service), named })
        }
        None => Err(match snapshot.unasked(FactKey::of_gateway(waypoint)) {
            Some(wanted) => RouteError::Unasked(wanted),
            None => unknown("neither a service nor a workload".into()),
        }),
    }
}

/// The waypoint of a service for one connection: chosen at random by weight, if the service has weighted waypoints.
pub fn draw<'a>(service: &'a Service, chance: &mut Chance<'_>) -> Option<&'a GatewayRef> {
    let total: u64 = service.weighted_waypoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
    if total == 0 {
        return service.waypoint.as_ref();
    }
    let mut left = chance.below(total);
    for (waypoint, weight) in &service.weighted_waypoints {
        if left < u64::from(*weight) {
            return Some(waypoint);
        }
        left -= u64::from(*weight);
    }
    service.waypoint.as_ref()
}

/// All waypoints of a service. Clients that do not know weighted waypoints use the single one.
pub fn all(service: &Service) -> impl Iterator<Item = &GatewayRef> {
    service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint))
}

/// Why connections of `source` to a destination that has this waypoint do not go through it; `None` if they do.
pub fn unused(
    snapshot: &Snapshot,
    source: &Workload,
    waypoint: &GatewayRef,
    destination: &ServiceOrWorkload,
) -> Option<&'static str> {
    let (is_own, is_itself) = match destination {
        // Of several waypoints each may get the connection, and must not pass it on to another one.
        ServiceOrWorkload::Service(service) => {
            let found = snapshot.gateway(waypoint, &source.namespace);
            let is_itself = matches!(found, Some(ServiceOrWorkload::Service(found)) if found.key == service.key);
            (all(service).any(|one| is_behind(snapshot, one, source)), is_itself)
        }
        ServiceOrWorkload::Workload(workload) => {
            (is_behind(snapshot, waypoint, source), is_behind(snapshot, waypoint, workload))
        }
    };
    match (is_own, is_itself) {
        (true, _) => Some("the pod is itself a waypoint of the destination"),
        (false, true) => Some("it is the destination itself"),
        (false, false) => None,
    }
}

/// All waypoints that [`draw`] may return for a service.
pub fn all_drawn(service: &Service) -> Vec<&GatewayRef> {
    let drawn = service.weighted_waypoints.iter().filter(|(_, weight)| *weight > 0);
    let drawn: Vec<&GatewayRef> = drawn.map(|(waypoint, _)| waypoint).collect();
    if drawn.is_empty() { service.waypoint.iter().collect() } else { drawn }
}

/// Whether `workload` is the waypoint, or one of the workloads behind it.
pub fn is_behind(snapshot: &Snapshot, waypoint: &GatewayRef, workload: &Workload) -> bool {
    // The workload itself says so. An on-demand control plane may not have been asked for the service yet.
    if let GatewayTarget::Hostname(key) = &waypoint.target
        && workload.services.contains_key(key)
    {
        return true;
    }
    match snapshot.gateway(waypoint, &workload.namespace) {
        Some(ServiceOrWorkload::Workload(one)) => one.uid == workload.uid,
        Some(ServiceOrWorkload::Service(service)) => workload.services.contains_key(&service.key),
        None => false,
    }
}

/// The waypoint of a workload, if a connection from `peer` to it has not come through it. The waypoint itself may be
/// reached by everybody.
pub fn bypassed<'a>(snapshot: &Snapshot, workload: &'a Workload, peer: Option<&SpiffeName>) -> Option<&'a GatewayRef> {
    let wanted = workload.waypoint.as_ref().filter(|wanted| !is_behind(snapshot, wanted, workload))?;
    let is_peer = |one: &Workload| peer.is_some_and(|peer| one.has_identity(peer));
    let came_through = match snapshot.gateway(wanted, &workload.namespace) {
        Some(ServiceOrWorkload::Workload(one)) => is_peer(&one),
        Some(ServiceOrWorkload::Service(service)) => snapshot.endpoints(&service.key).any(|one| is_peer(one.workload)),
        None => false,
    };
    (!came_through).then_some(wanted)
}
