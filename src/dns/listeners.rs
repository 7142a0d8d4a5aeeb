//! The sockets of a pod's DNS, in its namespace.

use super::config::PORT;
use crate::sys::conntrack::Conntrack;
use crate::sys::datagram;
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::socket::bind_stream;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// Sockets of a pod's server, bound and not yet served.
#[derive(Debug, Default)]
pub struct Listeners {
    pub(super) datagrams: Vec<std::net::UdpSocket>,
    pub(super) streams: Vec<std::net::TcpListener>,
    /// Says which resolver a pod has asked, where the kernel tells.
    pub(super) conntrack: Option<Conntrack>,
}

impl Listeners {
    /// Binds in a pod's namespace.
    pub fn bind(netns: &Netns, ipv6: bool, mark: u32, reuse_port: bool) -> Result<io::Result<Self>, NetnsError> {
        netns.enter(|| {
            let mut all = Self { conntrack: Conntrack::open().ok(), ..Self::default() };
            for v4 in [true, false].into_iter().take(if ipv6 { 2 } else { 1 }) {
                // Unmarked: what answers needs no exemption, and a mark would make the kernel route each answer twice.
                all.datagrams.push(datagram::bind(PORT, v4, reuse_port)?);
                all.streams.push(bind_stream(PORT, v4, mark, reuse_port)?);
            }
            Ok(all)
        })
    }
}

/// Whether a request comes from the pod: to a loopback address, or, redirected, to the address that it came from. Nobody else
/// is answered. That nobody outside takes the pod's address is for the kernel and the pod's rules (`node/legs.rs`) to see to.
pub(super) fn is_the_pod(client: IpAddr, local: IpAddr) -> bool {
    local.is_loopback() || client == local
}

/// A link-local resolver is on the link that the client asked by.
pub(super) fn on_the_link_of(client: SocketAddr, asked: SocketAddr) -> SocketAddr {
    match (client, asked) {
        (SocketAddr::V6(client), SocketAddr::V6(asked)) if asked.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*asked.ip(), asked.port(), 0, client.scope_id()).into()
        }
        (_, asked) => asked,
    }
}
