//! The sockets of a pod's DNS server, in the pod's namespace, and the check that a request comes from that pod.

use crate::ports;
use crate::sys::conntrack::Conntrack;
use crate::sys::datagram;
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::socket::bind_stream;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// Bound sockets of a pod's server, before it serves them.
#[derive(Debug, Default)]
pub struct Listeners {
    pub(super) datagrams: Vec<std::net::UdpSocket>,
    pub(super) streams: Vec<std::net::TcpListener>,
    /// Finds out which resolver the pod asked; `None` if the kernel does not support it.
    pub(super) conntrack: Option<Conntrack>,
}

impl Listeners {
    /// Binds the sockets in a pod's namespace.
    pub fn bind(netns: &Netns, ipv6: bool, mark: u32, reuse_port: bool) -> Result<io::Result<Self>, NetnsError> {
        netns.enter(|| {
            let mut all = Self { conntrack: Conntrack::open().ok(), ..Self::default() };
            for v4 in [true, false].into_iter().take(if ipv6 { 2 } else { 1 }) {
                // Without a mark: answers need no exemption from the redirection, and a mark would make the kernel
                // route each of them twice.
                all.datagrams.push(datagram::bind(ports::DNS, v4, reuse_port)?);
                all.streams.push(bind_stream(ports::DNS, v4, mark, reuse_port)?);
            }
            Ok(all)
        })
    }
}

/// Whether a request comes from the pod itself: it was sent to a loopback address, or was redirected and so arrives on
/// the address that it came from. Other requests are not answered. The kernel and the pod's rules (`node/legs.rs`)
/// prevent other hosts from using the pod's address.
pub(super) fn is_the_pod(client: IpAddr, local: IpAddr) -> bool {
    local.is_loopback() || client == local
}

/// The resolver's address with the client's interface, if the address is link-local.
pub(super) fn on_the_link_of(client: SocketAddr, asked: SocketAddr) -> SocketAddr {
    match (client, asked) {
        (SocketAddr::V6(client), SocketAddr::V6(asked)) if asked.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*asked.ip(), asked.port(), 0, client.scope_id()).into()
        }
        (_, asked) => asked,
    }
}
