//! Why an outbound connection has no route.

use crate::dns::ResolveError;
use crate::mesh::store::AskError;
use crate::mesh::{Text, Wanted};
use std::net::SocketAddr;

/// Why an outbound connection has no route. Every one ends the connection; none is a fall-back to plaintext.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// To one of our own listeners.
    #[error("attempted recursive call to ourselves ({0})")]
    Loop(SocketAddr),
    /// The waypoint that the destination asks for cannot be resolved.
    #[error("unknown waypoint: {waypoint} of {destination}: {reason}")]
    UnknownWaypoint {
        /// The reference.
        waypoint: String,
        /// Who refers to it.
        destination: Text,
        /// What is missing.
        reason: String,
    },
    /// The service has no endpoint that may be used.
    #[error("no healthy upstream: {0}")]
    NoEndpoint(Text),
    /// The service does not have this port.
    #[error("no healthy upstream: service {0} has no port {1}")]
    NoPort(Text, u16),
    /// The chosen workload has no address.
    #[error("no ip addresses were resolved for workload: {0}")]
    NoAddress(Text),
    /// The chosen workload is in another network.
    #[error("no valid routing destination for workload: {0} is in another network")]
    OtherNetwork(Text),
    /// The chosen workload takes traffic in a way that we do not speak.
    #[error("workload {0} takes traffic by a protocol that is not known here")]
    Protocol(Text),
    /// Facts that must be asked for first. Never the end of a connection: it asks, and chooses again.
    #[error("{0} has not been asked for yet")]
    Unasked(Wanted),
    /// A host name that must be resolved first. Never the end of a connection, as above.
    #[error("{0} has not been resolved yet")]
    Unresolved(Text),
    /// A host name that could not be resolved.
    #[error("no ip addresses were resolved for workload: {0}")]
    Resolve(#[from] ResolveError),
    /// Facts that were asked for and did not come.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The chosen workload's identity is no valid name.
    #[error("the identity of workload {0} is not valid: {1}")]
    Identity(Text, String),
}
