//! What is known of a connection once its route is.

use crate::mesh::{Service, SpiffeName, Workload};
use std::net::SocketAddr;
use std::sync::Arc;

/// What is known of a connection once its route is.
#[derive(Debug)]
pub struct Details {
    /// Source workload.
    pub source_workload: Option<Arc<Workload>>,
    /// Source identity, if there is mutual TLS.
    pub source_identity: Option<SpiffeName>,
    /// Destination workload.
    pub destination_workload: Option<Arc<Workload>>,
    /// Destination identity, if there is mutual TLS: inbound our own, outbound none before it has been proven.
    pub destination_identity: Option<SpiffeName>,
    /// Service that was asked for.
    pub service: Option<Arc<Service>>,
    /// Where our leg goes (outbound), or the pod's own address (inbound).
    pub actual: SocketAddr,
    /// What was asked for at the tunnel's end.
    pub authority: Option<String>,
    /// What decided that it may go.
    pub rule: Option<String>,
}
