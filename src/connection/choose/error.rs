//! Why an outbound connection has no route.

use crate::dns::ResolveError;
use crate::mesh::store::AskError;
use crate::mesh::{FactKey, Text};
use std::net::SocketAddr;

/// Why a workload in another network cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoWay {
    /// No gateway is announced for it.
    #[error("has no network gateway")]
    NoGateway,
    /// It does not speak HBONE.
    #[error("does not accept HBONE: plaintext is never sent to another network")]
    Plaintext,
    /// The connection is to an address of a workload. A gateway is asked for a service by its name.
    #[error("only services can be reached there, not workloads by their address")]
    NotService,
    /// Nothing is known about its gateway.
    #[error("its network gateway {0} is unknown: neither a service nor a workload")]
    UnknownGateway(String),
    /// The service that is its gateway has no usable endpoint.
    #[error("its network gateway {0} has no usable endpoint with the HBONE port")]
    NoGatewayEndpoint(String),
    /// Nothing says who may be at the far end of the inner tunnel.
    #[error("its service names no identity (subject alternative name) that it could prove")]
    NoIdentity,
}

/// Why an outbound connection has no route. None of these falls back to plaintext: they end the connection, except for
/// the two that ask for something first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// It would lead to one of the daemon's own listeners.
    #[error("attempted recursive call to ourselves ({0})")]
    Loop(SocketAddr),
    /// The destination has a waypoint, and the waypoint cannot be resolved.
    #[error("unknown waypoint: {waypoint} of {destination}: {reason}")]
    UnknownWaypoint {
        /// Address or host name of the waypoint.
        waypoint: String,
        /// The service or workload that has it.
        destination: Text,
        /// Why it cannot be resolved.
        reason: String,
    },
    /// The service has no usable endpoint.
    #[error("no healthy upstream: {0}")]
    NoEndpoint(Text),
    /// The service does not have this port.
    #[error("no healthy upstream: service {0} has no port {1}")]
    NoPort(Text, u16),
    /// The chosen workload has no address.
    #[error("no ip addresses were resolved for workload: {0}")]
    NoAddress(Text),
    /// The chosen workload is in another network and cannot be reached there.
    #[error("no valid routing destination for workload: {0} is in another network, and {1}")]
    OtherNetwork(Text, NoWay),
    /// The chosen workload expects a tunnel protocol that this version does not support.
    #[error("workload {0} expects a tunnel protocol that this version does not support")]
    Protocol(Text),
    /// An on-demand control plane must be asked for these facts first. The connection asks and chooses again.
    #[error("the control plane has not been asked for {0} yet")]
    Unasked(FactKey),
    /// This host name must be resolved first. The connection resolves it and chooses again.
    #[error("{0} has not been resolved yet")]
    Unresolved(Text),
    /// The workload's host name could not be resolved.
    #[error("no ip addresses were resolved for workload: {0}")]
    Resolve(#[from] ResolveError),
    /// The control plane was asked for facts and did not answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The chosen workload's identity is not a valid SPIFFE name.
    #[error("the identity of workload {0} is not valid: {1}")]
    Identity(Text, String),
}
