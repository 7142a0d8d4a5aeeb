//! The key by which a control plane is asked for one fact, where it announces facts only on demand.

use super::address::{GatewayRef, GatewayTarget, NetworkAddress};
use super::name::{ServiceKey, Text};
use std::fmt;

/// Something that a control plane can be asked for. Displayed as its name on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FactKey {
    /// Whatever has this address.
    Address(NetworkAddress),
    /// The services with a range that begins at this address. Under the same name as the address, and answered apart from it.
    Range(NetworkAddress),
    /// The service (or workload) of this name.
    Service(ServiceKey),
    /// The workload with this uid.
    Workload(Text),
}

impl FactKey {
    /// What a gateway reference would be asked for by.
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
