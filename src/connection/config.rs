//! Settings of the data plane.

use super::dial::direct::SocketConfig;
use super::dial::pool::PoolConfig;
use crate::hbone;

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
    /// Whether streams with a PROXY protocol header go to the pod's loopback address instead of its own.
    pub localhost_app_tunnel: bool,
    /// Whether the 200 of an accepted stream carries the workload's baggage.
    pub response_baggage: bool,
}
