//! The original destination of a redirected connection, from connection tracking.

use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;

/// Reads `SO_ORIGINAL_DST` (IPv4) or `IP6T_SO_ORIGINAL_DST` (IPv6) of an accepted socket whose client is `peer`.
///
/// An unknown original destination is an error. There is no fallback to the local address.
pub fn original_dst(socket: &impl AsFd, peer: SocketAddr) -> io::Result<SocketAddr> {
    if peer.ip().to_canonical().is_ipv4() {
        let raw = getsockopt(socket, sockopt::OriginalDst)?;
        let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
        Ok(SocketAddr::new(IpAddr::V4(ip), u16::from_be(raw.sin_port)))
    } else {
        let raw = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
        let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
        // A link-local address is valid only with its interface.
        Ok(SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
    }
}
