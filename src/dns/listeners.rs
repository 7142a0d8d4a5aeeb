//! The sockets of a pod's DNS, in its namespace.

use super::PORT;
use crate::sys::conntrack::Conntrack;
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::socket::{bind_datagram, bind_stream};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
        let mut ips: Vec<IpAddr> = vec![Ipv4Addr::LOCALHOST.into()];
        ips.extend(ipv6.then_some(IpAddr::V6(Ipv6Addr::LOCALHOST)));
        netns.enter(|| {
            let mut all = Self { conntrack: Conntrack::open().ok(), ..Self::default() };
            for ip in ips {
                let address = SocketAddr::new(ip, PORT);
                // Unmarked: what answers needs no exemption, and a mark would make the kernel route each answer twice.
                all.datagrams.push(bind_datagram(address, reuse_port)?);
                all.streams.push(bind_stream(address, mark, reuse_port)?);
            }
            Ok(all)
        })
    }
}
