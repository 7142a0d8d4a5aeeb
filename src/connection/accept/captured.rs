//! A redirected connection and its original destination.

use super::error::AcceptError;
use crate::mesh::address::canonical;
use crate::sys::original_dst::original_dst;
use crate::sys::socket::reset_on_close;
use std::net::{SocketAddr, TcpStream};

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

/// Asks the kernel for the original destination of a socket that was accepted on `port`. If the kernel does not know it,
/// the socket is reset; the local address is never used instead.
pub fn captured(socket: TcpStream, source: SocketAddr, port: u16) -> Result<Captured, AcceptError> {
    let destination = original_dst(&socket, source).map_err(|error| {
        reset_on_close(&socket);
        AcceptError::OriginalDestination(error)
    })?;
    let destination = canonical(destination);
    // Without a redirection the destination is the local address, and its port is the listener's.
    let redirected = destination.port() != port || {
        let local = canonical(socket.local_addr().map_err(AcceptError::Socket)?);
        (destination.ip(), destination.port()) != (local.ip(), local.port())
    };
    Ok(Captured { app: socket, source: canonical(source), destination, redirected })
}
