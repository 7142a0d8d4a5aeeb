//! Details of a connection whose route is known.

use crate::mesh::{Service, SpiffeName, Text, Workload};
use std::net::SocketAddr;
use std::sync::Arc;

/// Details of a connection whose route is known. Logs, metrics and the list of live connections show them.
#[derive(Debug)]
pub struct Details {
    /// Source workload, if it is known.
    pub source_workload: Option<Arc<Workload>>,
    /// Identity of the source, if the connection uses mutual TLS.
    pub source_identity: Option<SpiffeName>,
    /// Destination workload, if it is known.
    pub destination_workload: Option<Arc<Workload>>,
    /// Identity of the destination, if the connection uses mutual TLS: inbound the pod's own; outbound once the far end
    /// has proven it.
    pub destination_identity: Option<SpiffeName>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// Outbound: the address that the daemon connects to. Inbound: the application's address.
    pub actual: SocketAddr,
    /// The CONNECT authority, for a connection through a tunnel.
    pub authority: Option<String>,
    /// Uid of the gateway's workload through which another network is reached.
    pub gateway: Option<Text>,
    /// Identity that the gateway has proven.
    pub gateway_identity: Option<SpiffeName>,
    /// The rule that allowed it.
    pub rule: Option<String>,
}
