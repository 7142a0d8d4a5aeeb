//! Inbound: from the CONNECT authority to the pod's own socket. A request for anything that is not this pod's is
//! refused here, with the status that ztunnel gives. The checks of the pod's own addresses and ports, which every
//! journey makes, are here too.

use super::{RouteError, waypoint};
use crate::hbone::Authority;
use crate::mesh::address::{NetworkAddress, is_link_local};
use crate::mesh::snapshot::ServiceOrWorkload;
use crate::mesh::workload::Delivery;
use crate::mesh::{Service, Snapshot, Text, Workload};
use http::StatusCode;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The destination of an inbound stream.
#[derive(Clone, Debug)]
pub struct LocalTarget {
    /// Address and port of the application. The address is always the pod's own.
    pub address: SocketAddr,
    /// The address that was dialled, if the application receives it in a PROXY protocol header.
    pub announce: Option<SocketAddr>,
    /// The service, if the authority was a host name.
    pub service: Option<Arc<Service>>,
}

/// Why an inbound connection is refused before any policy is evaluated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// The address is not this pod's, and this pod is not its waypoint either.
    #[error(
        "ip mismatch: {asked} != {own}; if {asked} is behind an interface in the pod, name that in the annotation istio.io/reroute-virtual-interfaces (rerouteVirtualInterfaces in the pods file)"
    )]
    IpMismatch {
        /// The address that was asked for.
        asked: IpAddr,
        /// The pod's address on this connection.
        own: IpAddr,
    },
    /// This pod does not serve a service with this name.
    #[error("no service or workload for hostname: {0}")]
    UnknownHost(String),
    /// The service does not have this port on this pod.
    #[error("requested service {0}:{1} found, but cannot resolve port")]
    UnknownPort(String, u16),
    /// It would lead to one of the daemon's own listeners, or it is a connection that the daemon itself opened.
    #[error("attempted recursive call to ourselves ({0})")]
    Loop(SocketAddr),
    /// The workload's application tunnel is not supported.
    #[error("the workload's application tunnel has a protocol or port that this version does not support")]
    Delivery,
    /// The application expects the dialled address, and the service that was asked for by name has none.
    #[error("requested service {0} found, but has no IP addresses")]
    NoVip(String),
    /// The workload has a waypoint, and the connection has not come through it.
    #[error("the connection has bypassed the waypoint {waypoint}: it comes from {peer}")]
    Bypassed {
        /// The waypoint.
        waypoint: String,
        /// Who connected instead.
        peer: String,
    },
}

impl LocalError {
    /// The HTTP status for the peer (source: ztunnel's inbound HBONE handling).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Bypassed { .. } => StatusCode::UNAUTHORIZED,
            Self::IpMismatch { .. } => StatusCode::BAD_REQUEST,
            Self::UnknownHost(_) | Self::UnknownPort(..) | Self::Loop(_) | Self::Delivery | Self::NoVip(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// Whether an address is loopback or link-local, so that it has a meaning only on its own host or link.
pub fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || is_link_local(ip)
}

/// The addresses and ports that are the pod's own. They decide whether a connection may reach the pod at all, or would
/// lead back to the daemon.
#[derive(Clone, Copy, Debug)]
pub struct OwnSockets<'a> {
    /// The pod's workload, with its addresses.
    pub workload: &'a Workload,
    /// Addresses of the pod's interfaces.
    pub interfaces: &'a [IpAddr],
    /// Ports on which the daemon listens in the pod.
    pub daemon_ports: &'a [u16],
}

impl OwnSockets<'_> {
    /// Whether an address is one of the pod's.
    pub fn owns(self, ip: IpAddr) -> bool {
        self.workload.ips.contains(&ip) || self.interfaces.contains(&ip)
    }

    /// Whether a connection from this source address can only have been opened inside the pod.
    pub fn is_the_pod(self, source: IpAddr) -> bool {
        is_local(source) || self.owns(source)
    }

    /// Outbound: refuses a connection to a listener of the daemon in the pod itself.
    pub fn check_outbound(self, destination: SocketAddr) -> Result<(), RouteError> {
        if self.daemon_ports.contains(&destination.port()) && self.owns(destination.ip()) {
            return Err(RouteError::Loop(destination));
        }
        Ok(())
    }

    /// Inbound: refuses the streams of a tunnel to `local`, unless that is an address by which others reach the pod.
    pub fn check_tunnel(self, local: IpAddr) -> Result<(), LocalError> {
        if !self.owns(local) || is_local(local) { Err(self.mismatch(local)) } else { Ok(()) }
    }

    /// Plaintext: refuses a connection to a listener of the daemon, and one to an address that is not the pod's.
    /// `is_ours` says that the daemon itself opened the connection, so that it has come back.
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

/// Finds the destination of a stream for `authority`, on a tunnel to `own`, which is an address of the pod. Refuses the
/// ports on which the daemon listens.
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

/// Whether the address belongs to a service or workload that has this workload as its waypoint.
fn is_our_client(snapshot: &Snapshot, workload: &Workload, ip: IpAddr) -> bool {
    match snapshot.at(&workload.network, ip, &workload.namespace) {
        Some(ServiceOrWorkload::Service(service)) => serves_as_waypoint(snapshot, &service, workload),
        Some(ServiceOrWorkload::Workload(other)) => {
            other.waypoint.iter().any(|way| waypoint::is_behind(snapshot, way, workload))
        }
        None => false,
    }
}

/// The virtual address that represents a service: preferably in the workload's network, and preferably IPv4.
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
    use crate::mesh::snapshot::tests::workload;
    use crate::ports::in_pod;

    #[test]
    fn connections_to_other_pods_and_back_to_the_daemon_are_refused() {
        let server = workload("a", "server", "10.0.0.2");
        let interfaces = ["10.0.0.2", "10.0.1.2", "127.0.0.1"].map(|ip| ip.parse().unwrap());
        let own = OwnSockets { workload: &server, interfaces: &interfaces, daemon_ports: in_pod(true) };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (address, the_pod, tunnel) in [
            ("10.0.0.2", true, true),
            ("10.0.1.2", true, true),
            ("127.0.0.1", true, false),
            ("169.254.0.1", true, false),
            ("10.0.0.3", false, false),
        ] {
            assert_eq!(own.is_the_pod(ip(address)), the_pod, "{address}");
            assert_eq!(own.check_tunnel(ip(address)).is_ok(), tunnel, "{address}");
        }
        for (to, outbound, plaintext) in [
            ("10.0.0.2:80", true, true),
            ("10.0.1.2:15008", false, false),
            ("10.0.0.3:15008", true, false),
            ("10.0.0.3:80", true, false),
        ] {
            let to = to.parse().unwrap();
            assert_eq!(own.check_outbound(to).is_ok(), outbound, "{to}");
            assert_eq!(own.check_plaintext(to, false).is_ok(), plaintext, "{to}");
            assert_eq!(own.check_plaintext(to, true), Err(LocalError::Loop(to)), "{to}");
        }
    }
}
