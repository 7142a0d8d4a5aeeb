//! The sockets of a pod's DNS, in its namespace.

use super::PORT;
use crate::sys::conntrack::Conntrack;
use crate::sys::datagram;
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::socket::bind_stream;
use std::io;

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
