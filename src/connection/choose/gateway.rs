//! Other networks: a workload there is reached through a gateway, in a tunnel inside the tunnel to the gateway.
//!
//! The gateway sees the name of the service and the client's identity. It chooses the endpoint, and passes the inner
//! tunnel on as it is. Nothing else leads there: what cannot be reached so is refused, and never sent in plaintext.

use super::destination::{self, ChosenEndpoint};
use super::error::NoWay;
use super::{Chance, ResolvedNames, RouteError};
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::{FactKey, GatewayRef, GatewayTarget, Service, Snapshot, SpiffeName, Workload};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A workload of a gateway to another network.
#[derive(Debug)]
pub struct Gateway {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The gateway's service, if it was found through one.
    pub service: Option<Arc<Service>>,
    /// Address and port of its HBONE listener.
    pub to: SocketAddr,
}

/// Finds the gateway to `workload`, which is in another network. If the gateway has addresses of both families, one of
/// the family of `asked` is preferred.
pub fn resolve(
    snapshot: &Snapshot,
    source: &Workload,
    workload: &Workload,
    asked: IpAddr,
    names: &ResolvedNames,
    chance: &mut Chance<'_>,
) -> Result<Gateway, RouteError> {
    let refuse = |why| RouteError::OtherNetwork(workload.uid.clone(), why);
    let wanted = destination::way_to(snapshot, source, workload).map_err(refuse)?;
    let (chosen, service) = match snapshot.gateway(wanted, &source.namespace) {
        Some(ServiceOrWorkload::Workload(workload)) => {
            (ChosenEndpoint { workload, port: wanted.hbone_port, pick: None }, None)
        }
        Some(ServiceOrWorkload::Service(service)) => {
            let chosen = endpoint(snapshot, &service, wanted, names, chance);
            (chosen.ok_or_else(|| refuse(NoWay::NoGatewayEndpoint(wanted.target.to_string())))?, Some(service))
        }
        None => return Err(RouteError::Unasked(FactKey::of_gateway(wanted))),
    };
    let asked = match &wanted.target {
        GatewayTarget::Address(address) => address.ip,
        GatewayTarget::Hostname(_) => asked,
    };
    let ip = destination::address(&chosen.workload, service.as_deref(), asked, names)?;
    Ok(Gateway { to: SocketAddr::new(ip, chosen.port), workload: chosen.workload, service })
}

/// Chooses an endpoint of a gateway's service. It is reached directly, in whatever network it is said to be: control
/// planes announce a gateway's outer address as one of the network behind it. They do not always announce that it speaks
/// HBONE, because the reference with the HBONE port says so.
fn endpoint(
    snapshot: &Snapshot,
    service: &Service,
    wanted: &GatewayRef,
    names: &ResolvedNames,
    chance: &mut Chance<'_>,
) -> Option<ChosenEndpoint> {
    let usable = snapshot.endpoints(&service.key).filter_map(|endpoint| {
        let port = service.target_port(Some(endpoint.ports), wanted.hbone_port)?;
        let workload = endpoint.workload;
        let host = &workload.hostname;
        let named = || !host.is_empty() && names.get(host).is_none_or(|ips| !ips.is_empty());
        (service.may_use(workload) && (!workload.ips.is_empty() || named())).then(|| ChosenEndpoint {
            workload: workload.clone(),
            port,
            pick: None,
        })
    });
    let usable: Vec<ChosenEndpoint> = usable.collect();
    let total: u64 = usable.iter().map(|one| u64::from(one.workload.capacity)).sum();
    let mut left = if total == 0 { return None } else { chance.below(total) };
    usable.into_iter().find(|one| {
        let weight = u64::from(one.workload.capacity);
        let is_it = left < weight;
        left = left.saturating_sub(weight);
        is_it
    })
}

/// The identities that the far end of the inner tunnel may prove: those that the service names through which `workload`
/// was chosen. A workload with addresses is a single one, so its own identity counts too. One without stands for all
/// endpoints of the service in its network, and has no identity itself.
pub fn expected_behind(workload: &Workload, service: Option<&Service>) -> Result<Vec<SpiffeName>, RouteError> {
    let named = service.into_iter().flat_map(|service| &service.subject_alt_names);
    let mut names: Vec<SpiffeName> = named.filter_map(|name| SpiffeName::parse(name).ok()).collect();
    if !workload.ips.is_empty() {
        names.extend(workload.identity());
    }
    names.sort();
    names.dedup();
    if names.is_empty() { Err(RouteError::OtherNetwork(workload.uid.clone(), NoWay::NoIdentity)) } else { Ok(names) }
}
