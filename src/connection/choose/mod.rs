//! Step 3: where does it go, and by which way? Pure decisions on one snapshot; chance comes in as an argument.

pub mod destination;
pub mod local;
pub mod route;
pub mod waypoint;

pub use local::LocalError;
pub use route::{HboneWay, Way};

use crate::dns::ResolveError;
use crate::mesh::store::AskError;
use crate::mesh::{FactKey, Text};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Ports of the daemon inside a pod; nothing may be sent to them through the daemon itself. The last is the daemon's only where
/// the pod's DNS is taken: else it is the application's.
const OWN_PORTS: [u16; 4] = [15001, 15006, 15008, crate::ports::DNS];

/// The daemon's ports in a pod, by whether its DNS is taken.
pub fn own_ports(dns: bool) -> &'static [u16] {
    match (&OWN_PORTS, dns) {
        (all, true) => all,
        ([without @ .., _], false) => without,
    }
}

/// Port on which a node tunnel takes HBONE.
pub const HBONE_PORT: u16 = 15008;

/// Gives a number below its argument; random in the daemon, chosen in tests.
pub type Chance<'a> = &'a mut dyn FnMut(u64) -> u64;

/// Addresses of host names that have been resolved for this connection.
pub type Names = BTreeMap<Text, Vec<IpAddr>>;

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
    Unasked(FactKey),
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
