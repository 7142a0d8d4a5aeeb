//! What the journeys ask: the pod's own facts and certificate, and the route. Finding a route may need several
//! questions to an on-demand control plane or to the pod's resolvers.

use crate::connection::choose::{
    self, Chance, Known, LocalError, Pick, ResolvedNames, RouteError, Witness, route::Route,
};
use crate::connection::config::WaypointCheck;
use crate::connection::pod::Pod;
use crate::connection::report::Failure;
use crate::connection::worker::{Shared, Worker};
use crate::hbone::Authority;
use crate::identity::Credentials;
use crate::mesh::{FactKey, Snapshot, SpiffeName, Store, Workload};
use crate::telemetry::limit::LogLimit;
use rand::seq::SliceRandom;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The current facts and the pod's own workload. Waits for the workload to become known, and fails if it does not in
/// time.
pub async fn own_facts(worker: &Worker, pod: &Pod) -> Result<(Arc<Snapshot>, Arc<Workload>), Failure> {
    pod.facts(&worker.shared.mesh).await.ok_or_else(|| Failure::LocalWorkload(pod.uid.clone()))
}

/// The facts with which the destination of a stream is found. Streams from other networks name a service, and an
/// on-demand control plane announces the pod's own services only when it is asked.
pub async fn facts_for(
    mesh: &Store,
    pod: &Pod,
    mut snapshot: Arc<Snapshot>,
    workload: &Workload,
    authority: &Authority,
) -> Result<Arc<Snapshot>, RouteError> {
    let Authority::Host(host, _) = authority else { return Ok(snapshot) };
    for key in workload.services.keys().filter(|key| *key.hostname == **host) {
        if let Some(wanted) = snapshot.unasked(FactKey::Service(key.clone())) {
            mesh.ask(&pod.uid, wanted).await?;
            snapshot = mesh.load();
        }
    }
    Ok(snapshot)
}

/// Looks whether a connection from `peer` has bypassed the waypoint of the pod's workload. That is reported, or refused,
/// as the setting says.
pub async fn check_waypoint(
    worker: &Worker,
    pod: &Pod,
    workload: &Workload,
    source: IpAddr,
    peer: Option<&SpiffeName>,
) -> Result<(), Failure> {
    let Shared { mesh, config, reporter, .. } = &*worker.shared;
    let Some(waypoint) = workload.waypoint.as_ref().filter(|_| config.waypoint_check != WaypointCheck::Off) else {
        return Ok(());
    };
    if let Some(wanted) = mesh.load().unasked(FactKey::of_gateway(waypoint)) {
        // No connection waits for a report. Where it matters, one without an answer counts as having bypassed it.
        if config.waypoint_check == WaypointCheck::Report {
            return Ok(());
        }
        let _ = mesh.ask(&pod.uid, wanted).await;
    }
    let Some(waypoint) = choose::waypoint::bypassed(&mesh.load(), workload, peer) else { return Ok(()) };
    reporter.metrics.bypassed.inc();
    let error = LocalError::Bypassed {
        waypoint: waypoint.target.to_string(),
        peer: peer.map_or_else(|| format!("{source} without identity"), ToString::to_string),
    };
    if config.waypoint_check == WaypointCheck::Enforce {
        return Err(error.into());
    }
    static LIMIT: std::sync::LazyLock<LogLimit> = std::sync::LazyLock::new(LogLimit::default);
    if let Some(suppressed) = LIMIT.allow() {
        let uid = &*workload.uid;
        tracing::event!(target: "authorize", tracing::Level::WARN, dst.workload = uid, suppressed, "{error}");
    }
    Ok(())
}

/// The certificate of the pod's own workload.
pub async fn own_credentials(worker: &Worker, workload: &Workload) -> Result<Arc<Credentials>, Failure> {
    let identity =
        workload.identity().map_err(|error| RouteError::Identity(workload.uid.clone(), error.to_string()))?;
    Ok(worker.shared.identities.get(&identity).await?)
}

/// Most questions that one connection may ask. It asks the control plane for the destination, for a waypoint, and for
/// what these lead to. It asks the pod's resolvers for endpoints that only have a host name, and may find another one
/// each time.
const QUESTIONS_MAX: usize = 8;

/// Finds the route to `target`. Choosing may fail for lack of facts or of a resolved name; then this asks and chooses
/// again. Endpoints that were `left` are not chosen.
pub async fn find_route(
    shared: &Shared,
    pod: &Pod,
    mut snapshot: Arc<Snapshot>,
    source: &Workload,
    target: SocketAddr,
    left: &[Pick],
) -> Result<Route, RouteError> {
    let Shared { mesh, endpoints, .. } = shared;
    let (own_ports, mut names, mut unresolved) = (pod.own_ports(), ResolvedNames::new(), None);
    let choose = |snapshot: &Snapshot, names: &ResolvedNames| {
        let mut random = |below| rand::random_range(0..below);
        let known = Known { endpoints, pod: Witness(pod.capture), now: endpoints.now(), left };
        let mut chance = Chance { random: &mut random, known: Some(known) };
        choose::route::choose(snapshot, source, target, own_ports, names, &mut chance)
    };
    for _ in 0..QUESTIONS_MAX {
        match choose(&snapshot, &names) {
            Err(RouteError::Unasked(FactKey::Address(at))) => mesh.ask_address(&pod.uid, &at).await?,
            Err(RouteError::Unasked(wanted)) => mesh.ask(&pod.uid, wanted).await?,
            Err(RouteError::Unresolved(name)) => {
                // If the name does not resolve, another endpoint may be chosen, so the error is only kept for the end.
                let addresses = pod.resolver.addresses(source, &name, target.is_ipv4()).await;
                let addresses = addresses.map_err(|error| unresolved = Some(error)).unwrap_or_default();
                names.insert(name, pick_address(addresses, target.is_ipv4()));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::NoAddress(_))) if unresolved.is_some() => {
                return Err(unresolved.map_or(error, RouteError::from));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::UnknownWaypoint { .. })) => {
                // On-demand control planes do not announce new endpoints. Ask again for old facts before giving up.
                let old = snapshot.refreshable(&source.network, target.ip(), &source.namespace);
                if old.is_empty() {
                    return Err(error);
                }
                mesh.refresh(old).await;
                return choose(&mesh.load(), &names);
            }
            chosen => return chosen,
        }
        snapshot = mesh.load();
    }
    choose(&snapshot, &names)
}

/// Picks one of a host's addresses at random, of the wanted family if there is one. The pick is kept for the
/// connection, so that facts that are asked for because of it are still about the right address when the route is
/// chosen again.
fn pick_address(mut addresses: Vec<IpAddr>, v4: bool) -> Vec<IpAddr> {
    if addresses.iter().any(|ip| ip.is_ipv4() == v4) {
        addresses.retain(|ip| ip.is_ipv4() == v4);
    }
    addresses.shuffle(&mut rand::rng());
    addresses.truncate(1);
    addresses
}
