//! Step 3: where does a connection go, and how? `route` decides for outbound connections, with `waypoint` and
//! `destination` for its parts; `local` decides for inbound ones. All of it is pure: decisions on one snapshot of the
//! facts. Random choices come in as an argument.

pub mod destination;
pub mod error;
pub mod local;
pub mod route;
pub mod waypoint;

pub use error::RouteError;
pub use local::{LocalError, OwnSockets, is_local};
pub use route::{NextHop, TunnelHop};

use crate::mesh::Text;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Returns a number below its argument: a random one in the daemon, a chosen one in tests.
pub type Chance<'a> = &'a mut dyn FnMut(u64) -> u64;

/// Addresses of the host names that have been resolved for this connection. A name that could not be resolved has none.
pub type ResolvedNames = BTreeMap<Text, Vec<IpAddr>>;
