//! The journeys of a connection, one for each listener. Each file reads from top to bottom as its steps in order.
//! `lookup` is what the journeys ask of the mesh, `ending` what makes them stop early and how sockets are closed then.

mod egress;
mod ending;
pub mod explain;
mod inbound;
mod lookup;
mod outbound;
mod plaintext;
mod socks;

pub use inbound::tunnel;
pub use outbound::outbound;
pub use plaintext::plaintext;
pub use socks::socks;
