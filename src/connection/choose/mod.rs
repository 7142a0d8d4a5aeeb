//! Step 3: where does it go, and by which way? Pure decisions on one snapshot; chance comes in as an argument.

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

/// Gives a number below its argument; random in the daemon, chosen in tests.
pub type Chance<'a> = &'a mut dyn FnMut(u64) -> u64;

/// Addresses of host names that have been resolved for this connection.
pub type ResolvedNames = BTreeMap<Text, Vec<IpAddr>>;
