//! The destination a redirected connection was opened to, as connection tracking remembers it.

use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;

/// Reads `SO_ORIGINAL_DST` (IPv4) or `IP6T_SO_ORIGINAL_DST` (IPv6) of an accepted socket whose peer is `peer`.
///
/// There is no fall-back to the local address: a connection whose destination is unknown is an error for the caller.
pub fn original_dst(socket: &impl AsFd, peer: SocketAddr) -> io::Result<SocketAddr> {
    if peer.ip().to_canonical().is_ipv4() {
        let raw = getsockopt(socket, sockopt::OriginalDst)?;
        let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
        Ok(SocketAddr::new(IpAddr::V4(ip), u16::from_be(raw.sin_port)))
    } else {
        let raw = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
        let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
        // A link-local address is nothing without its interface.
        Ok(SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
    }
}
