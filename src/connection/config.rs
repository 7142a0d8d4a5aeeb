//! Settings of the data plane. This file only holds values; `config` reads them from the environment.

use super::dial::direct::SocketConfig;
use super::dial::pool::PoolConfig;
use crate::hbone;

/// What happens to connections to a pod whose workload has a waypoint, if they have not come through it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaypointCheck {
    /// Nothing.
    Off,
    /// They are counted and logged.
    #[default]
    Report,
    /// They are refused.
    Enforce,
}

impl WaypointCheck {
    /// The word of the setting.
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Report => "report",
            Self::Enforce => "enforce",
        }
    }
}

/// Settings of the data plane.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Number of worker threads.
    pub workers: usize,
    /// Marks and options of the daemon's sockets.
    pub sockets: SocketConfig,
    /// HTTP/2 settings of all tunnels.
    pub hbone: hbone::Config,
    /// Settings of the tunnel pool.
    pub pool: PoolConfig,
    /// Most connections that may be open at once. Further ones are reset and counted.
    pub max_connections: usize,
    /// Most endpoints of a service that may be set aside at once, in percent.
    pub set_aside_max: usize,
    /// Whether a stream whose application expects a PROXY protocol header is delivered to the pod's loopback address
    /// instead of its own address.
    pub localhost_app_tunnel: bool,
    /// What happens to connections that have bypassed the waypoint of their destination.
    pub waypoint_check: WaypointCheck,
    /// Whether the 200 that accepts a stream carries the workload's baggage header.
    pub response_baggage: bool,
}
