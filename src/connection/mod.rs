//! The path of a connection. The folders are its steps, and their alphabetical order is their order in time:
//! accept → authorize → choose → dial → forward → report. A step names only steps before it; [`journey`] knows all.
//!
//! - *outbound* (15001): accept, choose, dial, forward, report. The destination's side authorizes.
//! - *inbound* (15008): a tunnel is accepted once; each stream is then chosen, authorized, dialled, forwarded, reported.
//! - *plaintext* (15006): like an inbound stream, without tunnel and without identity.

pub mod accept;
pub mod authorize;
pub mod choose;
pub mod dial;
pub mod forward;
pub mod headers;
pub mod journey;
pub mod pod;
pub mod report;
pub mod worker;

pub use pod::Pod;
pub use worker::{Entrance, Shared, Workers};

use crate::hbone;
use dial::direct::SocketConfig;
use dial::pool::PoolConfig;

/// Settings of the data plane.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Worker threads.
    pub workers: usize,
    /// Marks and options of sockets.
    pub sockets: SocketConfig,
    /// HTTP/2 settings.
    pub hbone: hbone::Config,
    /// Tunnel pool settings.
    pub pool: PoolConfig,
    /// Connections that may be open at once; further ones are reset and counted.
    pub max_connections: usize,
    /// Whether the 200 of an accepted stream carries the workload's baggage.
    pub response_baggage: bool,
}
