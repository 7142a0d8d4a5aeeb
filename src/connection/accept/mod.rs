//! Step 1: a captured socket becomes a known source: [`captured::Captured`] with its original destination, or
//! [`tunnel::AcceptedTunnel`] with its proven identity.

pub mod captured;
pub mod error;
pub mod listener;
pub mod tunnel;

pub use captured::captured;
pub use error::AcceptError;
pub use tunnel::{AcceptedTunnel, TunnelPeer};
