//! What the journeys ask: the pod's own facts and certificate, and the route, which may lead to further questions.

use crate::connection::choose::{self, ResolvedNames, RouteError, route::Route};
use crate::connection::pod::Pod;
use crate::connection::report::Failure;
use crate::connection::worker::Worker;
use crate::identity::Credentials;
use crate::mesh::{self, Snapshot, Wanted, Workload};
use rand::seq::SliceRandom;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The facts of now, and the pod's own workload among them.
pub async fn own_facts(worker: &Worker, pod: &Pod) -> Result<(Arc<Snapshot>, Arc<Workload>), Failure> {
    pod.facts(&worker.shared.mesh).await.ok_or_else(|| Failure::LocalWorkload(pod.uid.clone()))
}

/// The certificate of the pod's own workload.
pub async fn own_credentials(worker: &Worker, workload: &Workload) -> Result<Arc<Credentials>, Failure> {
    let identity =
        workload.identity().map_err(|error| RouteError::Identity(workload.uid.clone(), error.to_string()))?;
    Ok(worker.shared.identities.get(&identity).await?)
}

/// Questions that one connection may ask: of the control plane for its destination, a waypoint, and what these lead to; of
/// the pod's resolvers for the endpoints that have no address but a host name, of which each choice may find another.
const QUESTIONS_MAX: usize = 8;

/// The route to `target`; asks for facts that are told only when asked for, resolves host names, and chooses again.
pub async fn find_route(
    mesh: &mesh::Store,
    pod: &Pod,
    mut snapshot: Arc<Snapshot>,
    source: &Workload,
    target: SocketAddr,
) -> Result<Route, RouteError> {
    let (own_ports, mut names, mut unresolved) = (pod.own_ports(), ResolvedNames::new(), None);
    let choose = |snapshot: &Snapshot, names: &ResolvedNames| {
        choose::route::choose(snapshot, source, target, own_ports, names, &mut |below| rand::random_range(0..below))
    };
    for _ in 0..QUESTIONS_MAX {
        match choose(&snapshot, &names) {
            Err(RouteError::Unasked(Wanted::Address(at))) => mesh.ask_address(&pod.uid, &at).await?,
            Err(RouteError::Unasked(wanted)) => mesh.ask(&pod.uid, wanted).await?,
            Err(RouteError::Unresolved(name)) => {
                // Another endpoint may do where this one's name cannot be resolved.
                let addresses = pod.resolver.addresses(source, &name, target.is_ipv4()).await;
                let addresses = addresses.map_err(|error| unresolved = Some(error)).unwrap_or_default();
                names.insert(name, pick_address(addresses, target.is_ipv4()));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::NoAddress(_))) if unresolved.is_some() => {
                return Err(unresolved.map_or(error, RouteError::from));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::UnknownWaypoint { .. })) => {
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

/// One of a host's addresses, of the wanted family where there is one: drawn once, so that asking for it leads somewhere.
fn pick_address(mut addresses: Vec<IpAddr>, v4: bool) -> Vec<IpAddr> {
    if addresses.iter().any(|ip| ip.is_ipv4() == v4) {
        addresses.retain(|ip| ip.is_ipv4() == v4);
    }
    addresses.shuffle(&mut rand::rng());
    addresses.truncate(1);
    addresses
}
