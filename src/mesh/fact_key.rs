//! The key under which a control plane that announces facts only on demand is asked for a fact.

use super::address::{GatewayRef, GatewayTarget, NetworkAddress};
use super::name::{ServiceKey, Text};
use std::fmt;

/// The key of a fact. Its `Display` form is the resource name on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FactKey {
    /// The service or workload that has this address.
    Address(NetworkAddress),
    /// The services with a range that begins at this address. It has the same name on the wire as [`FactKey::Address`],
    /// but is tracked as a question of its own.
    Range(NetworkAddress),
    /// The service or workload with this host name.
    Service(ServiceKey),
    /// The workload with this uid.
    Workload(Text),
}

impl FactKey {
    /// The key of the service or workload that a gateway reference names.
    pub fn of_gateway(gateway: &GatewayRef) -> Self {
        match &gateway.target {
            GatewayTarget::Hostname(key) => Self::Service(key.clone()),
            GatewayTarget::Address(address) => Self::Address(address.clone()),
        }
    }
}

impl fmt::Display for FactKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) | Self::Range(address) => address.fmt(f),
            Self::Service(key) => key.fmt(f),
            Self::Workload(uid) => f.write_str(uid),
        }
    }
}
