//! Step 3: where does a connection go, and how? `route` decides for outbound connections, with `waypoint`, `gateway` and
//! `destination` for its parts; `local` decides for inbound ones. They are pure: decisions on one snapshot of the facts.
//! `chance` is what else comes in: random numbers, and what this node has learnt about endpoints, which `endpoints`
//! keeps.

pub mod chance;
pub mod destination;
pub mod endpoints;
pub mod error;
pub mod gateway;
pub mod local;
pub mod measured;
pub mod metrics;
pub mod outlook;
pub mod retry_budget;
pub mod route;
#[cfg(test)]
mod routing_table;
pub mod standing;
pub mod waypoint;

pub use chance::{Chance, Known};
pub use endpoints::{EndpointLists, InFlight, Pick};
pub use error::{NoWay, RouteError};
pub use local::{LocalError, OwnSockets, is_local};
pub use route::{GatewayHop, NextHop, TunnelHop};
pub use standing::{Evidence, Witness};

use crate::mesh::Text;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Addresses of the host names that have been resolved for this connection. A name that could not be resolved has none.
pub type ResolvedNames = BTreeMap<Text, Vec<IpAddr>>;
