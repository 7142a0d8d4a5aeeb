//! Addresses as the mesh facts give them: an address in a network, a range in a network, a reference to a gateway.

use super::name::{NameError, ServiceKey, Text};
use ipnet::IpNet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// An IP address and the network in which it is valid (empty: the default network).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Network id. The same IP address in two networks stands for two different things.
    pub network: Text,
    /// The address, never an IPv4-mapped IPv6 one.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A range of IP addresses and the network in which it is valid.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// Network id.
    pub network: Text,
    /// The range.
    pub range: IpNet,
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.range)
    }
}

/// How a reference names a waypoint or gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayTarget {
    /// By service name (or the hostname of a workload).
    Hostname(ServiceKey),
    /// By address.
    Address(NetworkAddress),
}

/// A reference to a waypoint or gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayRef {
    /// The service, workload or address.
    pub target: GatewayTarget,
    /// Port on which it accepts HBONE. For a service this is the service port, not the target port.
    pub hbone_port: u16,
}

impl fmt::Display for GatewayTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(key) => key.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl GatewayTarget {
    /// Parses `network/ip` (the network may be empty) or `namespace/hostname`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match parse_network_address(text) {
            Some(address) => Ok(Self::Address(address)),
            None => ServiceKey::parse(text).map(Self::Hostname),
        }
    }
}

/// Parses `network/ip`. Returns `None` if the part after the slash is not an IP address.
pub fn parse_network_address(text: &str) -> Option<NetworkAddress> {
    let (network, ip) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    Some(NetworkAddress { network: network.into(), ip: ip.to_canonical() })
}

/// Parses `network/ip/length`. Returns `None` for anything else.
pub fn parse_network_cidr(text: &str) -> Option<NetworkCidr> {
    let (network, range) = text.split_once('/')?;
    Some(NetworkCidr { network: network.into(), range: range.parse().ok()? })
}

/// Prefix lengths for which on-demand control planes are asked. An address outside the mesh may lie in a range of any
/// of these lengths, so each length costs one more question about nearly every such address.
const V4_LENGTHS: std::ops::Range<u8> = 8..32;
const V6_LENGTHS: std::ops::RangeInclusive<u8> = 16..=64;
const V6_LONGER: [u8; 6] = [80, 96, 104, 112, 120, 124];

/// Whether a range can be found on demand, that is, whether its prefix length is one of those that are asked for.
pub fn is_asked_for(range: &IpNet) -> bool {
    let length = range.prefix_len();
    match range {
        IpNet::V4(_) => V4_LENGTHS.contains(&length),
        IpNet::V6(_) => V6_LENGTHS.contains(&length) || V6_LONGER.contains(&length),
    }
}

/// The first addresses of all ranges that may contain `ip`, without `ip` itself.
pub fn range_starts(ip: IpAddr) -> Vec<IpAddr> {
    let lengths: Vec<u8> = if ip.is_ipv4() { V4_LENGTHS.collect() } else { V6_LENGTHS.chain(V6_LONGER).collect() };
    let first = |length| IpNet::new(ip, length).ok().map(|range| range.network());
    let mut all: Vec<IpAddr> = lengths.into_iter().filter_map(first).filter(|first| *first != ip).collect();
    all.sort();
    all.dedup();
    all
}

/// Whether an address is valid only on its own link.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Converts an IPv4-mapped IPv6 address to IPv4, and returns every other address unchanged.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // Returned whole, because a link-local address needs its interface (scope id).
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_around_an_address_have_few_first_addresses() {
        let of = |ip: &str| range_starts(ip.parse().unwrap()).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(of("10.97.3.4"), ["10.0.0.0", "10.64.0.0", "10.96.0.0", "10.97.0.0", "10.97.2.0", "10.97.3.0"]);
        assert_eq!(of("10.0.0.0"), [""; 0]);
        assert!(of("255.255.255.255").len() == 24 && of("2001:db8::1").contains(&"2001:db8::".into()));
        assert!(of("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff").len() <= 55);
        let asked_for = |range: &str| is_asked_for(&range.parse().unwrap());
        assert!(
            ["10.0.0.0/8", "10.0.0.2/31", "2001::/16", "2001:db8::/64", "2001:db8::/124"].into_iter().all(asked_for)
        );
        assert!(!["0.0.0.0/0", "8.0.0.0/7", "::/0", "2001:db8::/72", "2001:db8::/126"].into_iter().any(asked_for));
    }
}
