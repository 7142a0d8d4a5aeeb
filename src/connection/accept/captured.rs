//! A redirected connection and its original destination.

use super::error::AcceptError;
use crate::mesh::address::canonical;
use crate::sys::original_dst::original_dst;
use crate::sys::socket::{LegOptions, reset_on_close, set_leg_options};
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// A redirected connection: opened by an application of the pod (outbound), or by a client to one (plaintext).
#[derive(Debug)]
pub struct Captured {
    /// The accepted socket.
    pub app: TcpStream,
    /// Address that opened it.
    pub source: SocketAddr,
    /// The original destination: the address that was dialled, before the redirection.
    pub destination: SocketAddr,
    /// Whether it was redirected. If not, the daemon's own port was dialled.
    pub redirected: bool,
}

/// Takes over an accepted socket on this worker and asks the kernel for its original destination. If the kernel does
/// not know it, the socket is reset; the local address is never used instead.
pub fn captured(socket: std::net::TcpStream, source: SocketAddr, legs: &LegOptions) -> Result<Captured, AcceptError> {
    let destination = original_dst(&socket, source).map_err(|error| {
        reset_on_close(&socket);
        AcceptError::OriginalDestination(error)
    })?;
    let local = socket.local_addr().map_err(AcceptError::Socket)?;
    set_leg_options(&socket, legs).map_err(AcceptError::Socket)?;
    let app = TcpStream::from_std(socket).map_err(AcceptError::Socket)?;
    let (destination, local) = (canonical(destination), canonical(local));
    let redirected = (destination.ip(), destination.port()) != (local.ip(), local.port());
    Ok(Captured { app, source: canonical(source), destination, redirected })
}
