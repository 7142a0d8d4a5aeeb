//! The endpoint of a service: by port, address, health, preference, then by chance weighted with capacity.

use super::{Chance, RouteError};
use crate::mesh::service::{HealthPolicy, IpFamilies, Mode, Scope};
use crate::mesh::snapshot::Endpoint;
use crate::mesh::workload::{Health, Workload};
use crate::mesh::{Service, Snapshot};
use std::net::IpAddr;
use std::sync::Arc;

/// A chosen workload, and the port to use on it.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its port.
    pub port: u16,
}

/// Chooses an endpoint of `service` for its `port`, as seen from `source`.
pub fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Service,
    port: u16,
    chance: Chance<'_>,
) -> Result<Chosen, RouteError> {
    let target = service.ports.get(&port);
    let mut elsewhere = None;
    let usable = snapshot.endpoints(&service.key).filter_map(|endpoint| {
        let port = target_port(service, &endpoint, port)?;
        let any_health = service.load_balancer.as_ref().is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
        let healthy = any_health || endpoint.workload.health == Health::Healthy;
        // Gateways to other networks are not spoken to: their endpoints are none as long as there are others.
        if endpoint.workload.network != source.network {
            elsewhere = Some(endpoint.workload.uid.clone());
            return None;
        }
        (healthy && !endpoint.workload.ips.is_empty()).then(|| Chosen { workload: endpoint.workload.clone(), port })
    });
    let candidates: Vec<Chosen> = preferred(source, service, usable.collect());
    let weights: u64 = candidates.iter().map(|c| u64::from(c.workload.capacity)).sum();
    if weights == 0 {
        let name = service.key.hostname.clone();
        if let Some(uid) = elsewhere {
            return Err(RouteError::OtherNetwork(uid));
        }
        return Err(if target.is_none() { RouteError::NoPort(name, port) } else { RouteError::NoEndpoint(name) });
    }
    let mut left = chance(weights);
    for candidate in candidates {
        let weight = u64::from(candidate.workload.capacity);
        if left < weight {
            return Ok(candidate);
        }
        left -= weight;
    }
    Err(RouteError::NoEndpoint(service.key.hostname.clone()))
}

/// The endpoint's own map first, then the service's target port, then the application tunnel's port.
fn target_port(service: &Service, endpoint: &Endpoint<'_>, port: u16) -> Option<u16> {
    let own = endpoint.ports.get(&port).copied().filter(|p| *p != 0);
    let tunnel = endpoint.workload.application_tunnel.and_then(|t| t.port).map(|_| port);
    let of_service = service.ports.get(&port).copied().filter(|p| *p != 0);
    own.or(of_service).or(tunnel)
}

fn preferred(source: &Workload, service: &Service, all: Vec<Chosen>) -> Vec<Chosen> {
    let Some(lb) = service.load_balancer.as_ref() else { return all };
    let rank = |chosen: &Chosen| {
        let matching = |scope: &&Scope| same(**scope, source, &chosen.workload);
        lb.preferences.iter().take_while(matching).count()
    };
    match lb.mode {
        Mode::Standard | Mode::Passthrough => all,
        Mode::Strict => all.into_iter().filter(|c| rank(c) == lb.preferences.len()).collect(),
        Mode::Failover => {
            let best = all.iter().map(rank).max();
            all.into_iter().filter(|c| Some(rank(c)) == best).collect()
        }
    }
}

fn same(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster_id == b.cluster_id,
        Scope::Network => a.network == b.network,
    }
}

/// The address to use of a workload: the one asked for if it is one of its own, else the first that the service's
/// families allow, the family of `asked` preferred.
pub fn address(workload: &Workload, service: Option<&Service>, asked: IpAddr) -> Result<IpAddr, RouteError> {
    if workload.ips.contains(&asked) {
        return Ok(asked);
    }
    let families = service.and_then(|s| s.ip_families);
    let allowed = |ip: &&IpAddr| match families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::V4) => ip.is_ipv4(),
        Some(IpFamilies::V6) => ip.is_ipv6(),
    };
    let same_family = workload.ips.iter().filter(allowed).find(|ip| ip.is_ipv4() == asked.is_ipv4());
    let any = || workload.ips.iter().find(allowed);
    same_family.or_else(any).copied().ok_or_else(|| RouteError::NoAddress(workload.uid.clone()))
}
