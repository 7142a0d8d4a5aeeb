//! Addresses, one type for each kind: an address in a network, a CIDR in a network, a reference to a gateway.

use super::name::{NameError, ServiceKey, Text};
use ipnet::IpNet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// An IP address together with the network it is meaningful in (empty: the default network).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Network id; IP addresses of different networks have nothing to do with each other.
    pub network: Text,
    /// The address, never an IPv4-mapped IPv6 one.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A range of addresses in a network.
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

/// Where a waypoint or gateway is to be found.
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
    /// Where it is.
    pub target: GatewayTarget,
    /// Port on which it takes HBONE, as its service numbers it.
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
    /// Reads `network/ip` (the network may be empty) or `namespace/hostname`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match parse_network_address(text) {
            Some(address) => Ok(Self::Address(address)),
            None => ServiceKey::parse(text).map(Self::Hostname),
        }
    }
}

/// Reads `network/ip`; `None` where the part behind the slash is no IP address.
pub fn parse_network_address(text: &str) -> Option<NetworkAddress> {
    let (network, ip) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    Some(NetworkAddress { network: network.into(), ip: ip.to_canonical() })
}

/// Reads `network/ip/length`; `None` where it is anything else.
pub fn parse_network_cidr(text: &str) -> Option<NetworkCidr> {
    let (network, range) = text.split_once('/')?;
    Some(NetworkCidr { network: network.into(), range: range.parse().ok()? })
}

/// Whether an address means nothing outside of its own link.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// The address with an IPv4-mapped IPv6 address written as the IPv4 address that it is.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        // A link-local address keeps its interface.
        IpAddr::V6(_) => address,
    }
}
