//! Questions and answers as the mesh sees them, without the wire format. Pure.

use std::net::IpAddr;

/// The record type of a question, as far as it makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryKind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// All records.
    Any,
    /// Ports.
    Srv,
    /// HTTPS and SVCB, which carry addresses.
    Https,
    /// Any other type.
    Other,
}

/// An answer from the mesh facts. Without records it says that the name exists and has no record of that type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshAnswer {
    /// The canonical name that the records belong to, if the name in the question is an alias of it.
    pub alias: Option<String>,
    /// The records.
    pub records: Vec<MeshRecord>,
    /// The zone that a negative answer is given for.
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
        /// Its addresses, sent as additional records.
        addresses: Vec<IpAddr>,
    },
}
