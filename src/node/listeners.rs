//! The daemon's listeners inside a pod.

use super::config::Config;
use super::error::CaptureError;
use crate::connection::Entrance;
use crate::ports;
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, bind_capture, bind_loopback};
use std::net::TcpListener;

/// Ports of a pod's listeners, and how connections come to them.
const LISTENERS: [(u16, Entrance); 3] =
    [(ports::OUTBOUND, Entrance::Outbound), (ports::PLAINTEXT, Entrance::Plaintext), (ports::HBONE, Entrance::Tunnel)];

/// Binds all listeners in a pod's namespace. Accepted sockets have the options of `legs`.
pub fn bind(
    config: &Config,
    netns: &Netns,
    ipv6: bool,
    legs: &LegOptions,
) -> Result<Vec<(TcpListener, Entrance)>, CaptureError> {
    let bind = |(port, entrance)| {
        let bound = netns.enter(|| bind_capture(port, ipv6, config.mark, config.reuse_port, legs))?;
        Ok::<_, CaptureError>((bound.map_err(|source| CaptureError::Port { port, source })?, entrance))
    };
    let mut listeners: Vec<(TcpListener, Entrance)> = LISTENERS.into_iter().map(bind).collect::<Result<_, _>>()?;
    let families: &[bool] = match (config.socks, ipv6) {
        (false, _) => &[],
        (true, false) => &[true],
        (true, true) => &[true, false],
    };
    for v4 in families {
        let bound = netns.enter(|| bind_loopback(ports::SOCKS, *v4, config.reuse_port, legs))?;
        let bound = bound.map_err(|source| CaptureError::Port { port: ports::SOCKS, source })?;
        listeners.push((bound, Entrance::Socks));
    }
    Ok(listeners)
}
