//! Questions and answers as the mesh sees them, without the wire format.

use std::net::IpAddr;

/// What is asked for, as far as it makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryKind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Everything.
    Any,
    /// Ports.
    Srv,
    /// HTTPS and SVCB, which carry addresses.
    Https,
    /// Anything else.
    Other,
}

/// An answer of our own. Without records it says that the name exists and has none of that type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshAnswer {
    /// What the name asked for is another name of, where the records are told under that one.
    pub alias: Option<String>,
    /// The records.
    pub records: Vec<MeshRecord>,
    /// The zone whose authority says so.
    pub zone: String,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshRecord {
    /// An address: A or AAAA.
    Address(IpAddr),
    /// A port of an endpoint: SRV.
    Service {
        /// The port.
        port: u16,
        /// Host name of the endpoint.
        target: String,
        /// Its addresses, told beside it.
        addresses: Vec<IpAddr>,
    },
}
