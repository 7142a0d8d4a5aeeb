//! Details of a connection whose route is known.

use crate::hbone::Authority;
use crate::mesh::{Service, SpiffeName, Text, Workload};
use std::net::SocketAddr;
use std::sync::Arc;

/// Details of a connection whose route is known. Logs, metrics and the list of live connections show them. They refer to
/// facts that are shared, because every open connection keeps its own.
#[derive(Debug)]
pub struct Details {
    /// Source workload, if it is known.
    pub source_workload: Option<Arc<Workload>>,
    /// Identity of the source, if the connection uses mutual TLS: inbound the one that TLS proved, outbound the pod's own.
    pub source_identity: Option<SpiffeName>,
    /// Destination workload, if it is known.
    pub destination_workload: Option<Arc<Workload>>,
    /// Inbound, if the connection uses mutual TLS: the pod's own identity. Outbound nothing is known until the far end has
    /// proven its identity.
    pub destination_identity: Option<SpiffeName>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// Outbound: the address that the daemon connects to. Inbound: the application's address.
    pub actual: SocketAddr,
    /// The CONNECT authority, for a connection through a tunnel.
    pub authority: Option<Authority>,
    /// Uid of the gateway's workload through which another network is reached.
    pub gateway: Option<Text>,
    /// The rule that allowed it.
    pub rule: Option<Text>,
}
