//! Where a connection may be led before chance decides, for explanations: the same facts as in `route`, in the same
//! order, without choosing. Pure.

use super::waypoint;
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{GatewayRef, Service, Snapshot, Workload};
use std::net::SocketAddr;
use std::sync::Arc;

/// Where a connection may be led.
#[derive(Debug, Default)]
pub struct Outlook {
    /// The waypoints of which one is drawn, and why the source does not use it, if so.
    pub waypoints: Vec<(GatewayRef, Option<&'static str>)>,
    /// The services, and their ports, of which an endpoint is chosen: those of waypoints, and the one that is dialled.
    pub lists: Vec<(Arc<Service>, u16)>,
}

/// Where a connection from `source` to `target` may be led.
pub fn outlook(snapshot: &Snapshot, source: &Workload, target: SocketAddr) -> Outlook {
    let Some(found) = snapshot.at(&source.network, target.ip(), &source.namespace) else { return Outlook::default() };
    let (wanted, service) = match &found {
        ServiceOrWorkload::Service(service) => (waypoint::all_drawn(service), Some(service.clone())),
        ServiceOrWorkload::Workload(workload) => (workload.waypoint.iter().collect(), None),
    };
    let judged = |wanted: &GatewayRef| (wanted.clone(), waypoint::unused(snapshot, source, wanted, &found));
    let waypoints: Vec<_> = wanted.into_iter().map(judged).collect();
    let of_waypoint = |(wanted, _): &(GatewayRef, Option<_>)| match snapshot.gateway(wanted, &source.namespace) {
        Some(ServiceOrWorkload::Service(behind)) => Some((behind, wanted.hbone_port)),
        Some(ServiceOrWorkload::Workload(_)) | None => None,
    };
    let mut lists: Vec<_> = waypoints.iter().filter(|(_, unused)| unused.is_none()).filter_map(of_waypoint).collect();
    let is_direct = waypoints.is_empty() || waypoints.iter().any(|(_, unused)| unused.is_some());
    lists.extend(
        service.filter(|service| is_direct && !service.is_passthrough()).map(|dialled| (dialled, target.port())),
    );
    Outlook { waypoints, lists }
}
