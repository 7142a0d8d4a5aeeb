//! Step 1: who connects, and what did they dial? `listener` accepts sockets. A socket then becomes a
//! [`captured::Captured`] connection with its original destination, or a [`tunnel::AcceptedTunnel`] whose peer has
//! proven its identity.

pub mod captured;
pub mod error;
pub mod listener;
pub mod socks;
pub mod tunnel;

pub use captured::captured;
pub use error::AcceptError;
pub use tunnel::{AcceptedTunnel, TunnelPeer, TunnelStop};
