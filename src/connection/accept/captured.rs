//! A redirected connection and where it was going.

use super::error::AcceptError;
use crate::mesh::address::canonical;
use crate::sys::original_dst::original_dst;
use crate::sys::socket::{LegOptions, reset_on_close, set_leg_options};
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// A connection taken from an application (outbound) or for one (plaintext inbound).
#[derive(Debug)]
pub struct Captured {
    /// The accepted socket.
    pub app: TcpStream,
    /// Who opened it.
    pub source: SocketAddr,
    /// Where it was going before it was redirected.
    pub destination: SocketAddr,
    /// Whether it was redirected. If not, it was opened to our own port, by whatever address.
    pub redirected: bool,
}

/// Takes over an accepted socket on this worker and asks the kernel where it was going. Unknown is an error: there is
/// no fall-back to the local address.
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
