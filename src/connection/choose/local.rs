//! Inbound: the CONNECT authority → the pod's own socket. Whatever is not this pod's is refused here, with the status
//! that the reference gives.

use super::{RouteError, waypoint};
use crate::hbone::Authority;
use crate::mesh::address::{NetworkAddress, is_link_local};
use crate::mesh::snapshot::Known;
use crate::mesh::workload::Delivery;
use crate::mesh::{Service, Snapshot, Text, Workload};
use http::StatusCode;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Where an inbound stream goes.
#[derive(Clone, Debug)]
pub struct LocalTarget {
    /// The application's address: always the pod's own.
    pub address: SocketAddr,
    /// What was asked for, where the application is told so by the PROXY protocol.
    pub announce: Option<SocketAddr>,
    /// The service that was asked for, where a host name was.
    pub service: Option<Arc<Service>>,
}

/// Why an inbound stream is refused before any policy is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// The address is not this pod's, and this pod is not its waypoint.
    #[error(
        "ip mismatch: {asked} != {own}; if {asked} is behind an interface in the pod, name that in the annotation istio.io/reroute-virtual-interfaces (rerouteVirtualInterfaces in the pods file)"
    )]
    IpMismatch {
        /// What was asked for.
        asked: IpAddr,
        /// The pod's address on this connection.
        own: IpAddr,
    },
    /// No service of this name that this pod serves.
    #[error("no service or workload for hostname: {0}")]
    UnknownHost(String),
    /// The service has no such port here.
    #[error("requested service {0}:{1} found, but cannot resolve port")]
    UnknownPort(String, u16),
    /// To one of our own listeners.
    #[error("attempted recursive call to ourselves ({0})")]
    Loop(SocketAddr),
    /// The pod takes streams in a way that we do not know.
    #[error("the workload's application tunnel has a protocol or port that is not known here")]
    Delivery,
    /// The application is to be told an address, and the service has none.
    #[error("requested service {0} found, but has no IP addresses")]
    NoVip(String),
}

impl LocalError {
    /// The status for the peer (source: the reference's inbound HBONE table).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::IpMismatch { .. } => StatusCode::BAD_REQUEST,
            Self::UnknownHost(_) | Self::UnknownPort(..) | Self::Loop(_) | Self::Delivery | Self::NoVip(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// Whether an address means nothing outside of its own machine or link.
pub fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || is_link_local(ip)
}

/// The addresses and ports that are the pod's own.
#[derive(Clone, Copy, Debug)]
pub struct OwnSockets<'a> {
    /// The pod's workload, with its addresses.
    pub workload: &'a Workload,
    /// Addresses that the pod's interfaces hold.
    pub interfaces: &'a [IpAddr],
    /// Ports in the pod on which the daemon listens.
    pub daemon_ports: &'a [u16],
}

impl OwnSockets<'_> {
    /// Whether an address is one of the pod's.
    pub fn owns(self, ip: IpAddr) -> bool {
        self.workload.ips.contains(&ip) || self.interfaces.contains(&ip)
    }

    /// Whether a source address is one that only the pod itself can have.
    pub fn is_the_pod(self, source: IpAddr) -> bool {
        is_local(source) || self.owns(source)
    }

    /// Refuses a connection of the pod to a listener of the daemon in the pod itself.
    pub fn check_outbound(self, destination: SocketAddr) -> Result<(), RouteError> {
        if self.daemon_ports.contains(&destination.port()) && self.owns(destination.ip()) {
            return Err(RouteError::Loop(destination));
        }
        Ok(())
    }

    /// Refuses the streams of a tunnel that ends at `local`, where that is not an address by which others reach the pod.
    pub fn check_tunnel(self, local: IpAddr) -> Result<(), LocalError> {
        if !self.owns(local) || is_local(local) { Err(self.mismatch(local)) } else { Ok(()) }
    }

    /// Refuses a plaintext connection to a listener of the daemon, and one to another pod. `is_ours`: the daemon has
    /// opened it itself.
    pub fn check_plaintext(self, destination: SocketAddr, is_ours: bool) -> Result<(), LocalError> {
        if is_ours || self.daemon_ports.contains(&destination.port()) {
            return Err(LocalError::Loop(destination));
        }
        if self.owns(destination.ip()) { Ok(()) } else { Err(self.mismatch(destination.ip())) }
    }

    fn mismatch(self, asked: IpAddr) -> LocalError {
        LocalError::IpMismatch { asked, own: self.workload.ips.first().copied().unwrap_or(asked) }
    }
}

/// Finds the target of a stream that asks for `authority` on a connection to `own` (the pod's address), but none of our own
/// ports.
pub fn choose(
    snapshot: &Snapshot,
    workload: &Workload,
    own: IpAddr,
    own_ports: &[u16],
    authority: &Authority,
) -> Result<LocalTarget, LocalError> {
    let (port, service) = match authority {
        Authority::Address(address) => {
            let tunnelled = workload.application_tunnel.is_some();
            if address.ip() != own && !tunnelled && !is_our_client(snapshot, workload, address.ip()) {
                return Err(LocalError::IpMismatch { asked: address.ip(), own });
            }
            (address.port(), None)
        }
        Authority::Host(host, port) => {
            let (port, service) = by_host(snapshot, workload, host, *port)?;
            (port, Some(service))
        }
    };
    let delivery = workload.application_tunnel.map_or(Delivery::Plain, |tunnel| tunnel.delivery);
    let announce = match (delivery, authority) {
        (Delivery::Plain, _) => None,
        (Delivery::Proxy, Authority::Address(asked)) => Some(*asked),
        (Delivery::Proxy, Authority::Host(host, asked)) => {
            let vip = service.as_deref().and_then(|service| vip(service, &workload.network));
            Some(SocketAddr::new(vip.ok_or_else(|| LocalError::NoVip(host.clone()))?, *asked))
        }
        (Delivery::Unsupported, _) => return Err(LocalError::Delivery),
    };
    let address = SocketAddr::new(own, workload.application_tunnel.and_then(|t| t.port).unwrap_or(port));
    if own_ports.contains(&address.port()) {
        return Err(LocalError::Loop(address));
    }
    Ok(LocalTarget { address, announce, service })
}

fn by_host(snapshot: &Snapshot, workload: &Workload, host: &str, port: u16) -> Result<(u16, Arc<Service>), LocalError> {
    let unknown = || LocalError::UnknownHost(host.to_owned());
    let service = snapshot.service_by_hostname(host, &workload.namespace).ok_or_else(unknown)?;
    let own_ports = workload.services.get(&service.key);
    let serves_it = own_ports.is_some() || serves_as_waypoint(snapshot, service, workload);
    if !serves_it {
        return Err(unknown());
    }
    let target = service.target_port(own_ports, port).ok_or_else(|| LocalError::UnknownPort(host.to_owned(), port))?;
    Ok((target, service.clone()))
}

/// Whether the address belongs to somebody who has this workload as waypoint.
fn is_our_client(snapshot: &Snapshot, workload: &Workload, ip: IpAddr) -> bool {
    match snapshot.at(&workload.network, ip, &workload.namespace) {
        Some(Known::Service(service)) => serves_as_waypoint(snapshot, &service, workload),
        Some(Known::Workload(other)) => other.waypoint.iter().any(|way| waypoint::is_behind(snapshot, way, workload)),
        None => false,
    }
}

/// The virtual address of a service that stands for it: of the workload's network, and IPv4, first.
fn vip(service: &Service, network: &Text) -> Option<IpAddr> {
    let rank = |vip: &&NetworkAddress| (vip.network != *network, vip.ip.is_ipv6());
    service.vips.iter().min_by_key(rank).map(|vip| vip.ip)
}

fn serves_as_waypoint(snapshot: &Snapshot, service: &Service, workload: &Workload) -> bool {
    waypoint::all(service).any(|way| waypoint::is_behind(snapshot, way, workload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::ports::own_ports;
    use crate::mesh::snapshot::tests::{service, workload};
    use crate::mesh::workload::ApplicationTunnel;
    use crate::mesh::{Facts, GatewayRef, GatewayTarget};

    #[test]
    fn what_an_inbound_stream_may_ask_for() {
        let mut server = workload("a", "server", "10.0.0.2");
        let mut waypoint = workload("a", "waypoint", "10.0.0.4");
        let mut sandwiched = workload("a", "sandwiched", "10.0.0.5");
        sandwiched.application_tunnel = Some(ApplicationTunnel { delivery: Delivery::Plain, port: Some(9000) });
        let mut web = service("a", "web", "10.96.0.1", &[(80, 8080), (81, 0)]);
        let way = service("a", "way", "10.96.0.2", &[(15008, 15008)]);
        server.services.insert(web.key.clone(), [(81, 8181)].into());
        waypoint.services.insert(way.key.clone(), [].into());
        let target = GatewayTarget::Hostname(way.key.clone());
        web.waypoint = Some(GatewayRef { target, hbone_port: 15008 });
        let facts =
            Facts { workloads: vec![server, waypoint, sandwiched], services: vec![web, way], ..Facts::default() };
        let snapshot = Snapshot::build(1, facts);
        for (pod, own, authority, expected) in [
            ("server", "10.0.0.2", "10.0.0.2:80", Ok("10.0.0.2:80")),
            ("server", "10.0.0.2", "10.0.0.3:80", Err((400, "ip mismatch"))),
            ("server", "10.0.0.2", "127.0.0.1:80", Err((400, "ip mismatch"))),
            ("server", "10.0.0.2", "169.254.169.254:80", Err((400, "ip mismatch"))),
            ("server", "10.0.0.2", "10.96.0.1:80", Err((400, "ip mismatch"))),
            ("server", "10.0.0.2", "10.0.0.2:15001", Err((503, "recursive"))),
            ("server", "10.0.0.2", "10.0.0.2:15006", Err((503, "recursive"))),
            ("server", "10.0.0.2", "10.0.0.2:15008", Err((503, "recursive"))),
            ("server", "10.0.0.2", "10.0.0.2:15053", Err((503, "recursive"))),
            ("server", "10.0.0.2", "web.a.svc.cluster.local:80", Ok("10.0.0.2:8080")),
            ("server", "10.0.0.2", "web.a.svc.cluster.local:81", Ok("10.0.0.2:8181")),
            ("server", "10.0.0.2", "web.a.svc.cluster.local:82", Err((503, "cannot resolve port"))),
            ("server", "10.0.0.2", "other.a.svc.cluster.local:80", Err((503, "no service"))),
            ("server", "10.0.0.2", "way.a.svc.cluster.local:15008", Err((503, "no service"))),
            ("waypoint", "10.0.0.4", "10.96.0.1:80", Ok("10.0.0.4:80")),
            ("waypoint", "10.0.0.4", "10.0.0.2:80", Err((400, "ip mismatch"))),
            ("waypoint", "10.0.0.4", "web.a.svc.cluster.local:80", Ok("10.0.0.4:8080")),
            ("sandwiched", "10.0.0.5", "10.0.0.2:80", Ok("10.0.0.5:9000")),
        ] {
            let workload = snapshot.workload_of_pod("a", pod).unwrap();
            let asked = Authority::parse(authority).unwrap();
            let found = choose(&snapshot, workload, own.parse().unwrap(), own_ports(true), &asked);
            match (found, expected) {
                (Ok(target), Ok(address)) => assert_eq!(target.address.to_string(), address, "{pod} {authority}"),
                (Err(error), Err((status, word))) => {
                    assert_eq!(error.status().as_u16(), status, "{pod} {authority}");
                    assert!(error.to_string().contains(word), "{pod} {authority}: {error}");
                }
                (found, _) => panic!("{pod} {authority}: {found:?}, expected {expected:?}"),
            }
        }
    }
}
