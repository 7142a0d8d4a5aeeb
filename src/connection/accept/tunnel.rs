//! Accepting a tunnel: mutual TLS, then HTTP/2, both within one deadline. Until the peer has proven its identity it
//! costs the node as little as possible, and no pod is charged for it.

use super::error::{AcceptError, HANDSHAKE_DEADLINE, SILENCE_DEADLINE};
use crate::hbone::ping::GONE_AFTER;
use crate::hbone::{self, Buffers, Engine};
use crate::identity::verify::peer_name;
use crate::identity::{Chain, Credentials, Distrust, Proven, TlsFacts};
use crate::mesh::address::canonical;
use crate::mesh::{SpiffeName, Text};
use crate::sys::socket::{LegOptions, set_tunnel_options};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::net::TcpStream;

/// A tunnel whose peer has proven its identity.
#[derive(Debug)]
pub struct AcceptedTunnel {
    /// The peer.
    pub peer: TunnelPeer,
    /// The server end, from which its streams come.
    pub server: hbone::Server,
}

/// Why all connections of a tunnel have to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelStop {
    /// The peer is not trusted any more.
    Distrusted(Distrust),
    /// The daemon is ending, or the pod is being released.
    Drained,
}

/// The peer of a tunnel.
#[derive(Debug)]
pub struct TunnelPeer {
    /// The identity that TLS proved.
    pub identity: SpiffeName,
    /// The identity as text. Buffers and budget account for the peer under this name.
    pub name: Text,
    /// Address and port that the peer connected from.
    pub source: SocketAddr,
    /// Address and port in the pod that the peer connected to.
    pub local: SocketAddr,
    /// What it has proven, for those who look at its connections.
    pub proven: Arc<Proven>,
    /// The peer's certificate chain; it signals when a certificate in it is revoked or expires.
    pub chain: Chain,
    /// Why all its connections have been told to stop, if they have.
    pub stop: OnceLock<TunnelStop>,
}

/// Waits for the first byte on a new connection to the pod's HBONE port. No TLS state is allocated before it comes.
/// `None` means that the client closed the connection without sending anything: it only checked whether the port is
/// open, as `culvert doctor` does, and nothing has failed.
pub async fn first_byte(socket: std::net::TcpStream, legs: &LegOptions) -> Result<Option<TcpStream>, AcceptError> {
    set_tunnel_options(&socket, GONE_AFTER, legs).map_err(AcceptError::Socket)?;
    let socket = TcpStream::from_std(socket).map_err(AcceptError::Socket)?;
    let ready = tokio::time::timeout(SILENCE_DEADLINE, socket.readable()).await;
    ready.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => AcceptError::Silent,
        _ => AcceptError::Socket(error),
    })?;
    let mut byte = [std::mem::MaybeUninit::uninit()];
    let left = socket2::SockRef::from(&socket).peek(&mut byte).is_ok_and(|length| length == 0);
    Ok(Some(socket).filter(|_| !left))
}

/// Performs both handshakes. The tunnel then belongs to `engine`. What it makes the node buffer is booked on a separate
/// account in `buffers`.
pub async fn handshake(
    engine: &Engine,
    socket: TcpStream,
    source: SocketAddr,
    credentials: &Credentials,
    config: &hbone::Config,
    buffers: &Arc<Buffers>,
) -> Result<AcceptedTunnel, AcceptError> {
    let local = canonical(socket.local_addr().map_err(AcceptError::Socket)?);
    let tls = hbone::tls::accept(socket, credentials.server()).await.map_err(AcceptError::Tls)?;
    let leaf = tls.peer_certificates.first().ok_or(AcceptError::NoCertificate)?;
    let chain = credentials.watch(&tls.peer_certificates);
    let identity = peer_name(leaf).map_err(|error| AcceptError::Tls(io::Error::other(error)))?;
    let facts = TlsFacts { version: tls.version, key_exchange: tls.key_exchange, cipher: tls.cipher };
    let name = Text::from(identity.to_string());
    let mut server = hbone::Server::start(engine, tls, config, &buffers.account(&name))?;
    server.settled().await?;
    let proven = Arc::new(Proven { identity: identity.clone(), gateway: None, tls: facts });
    let peer = TunnelPeer { identity, name, source: canonical(source), local, proven, chain, stop: OnceLock::new() };
    Ok(AcceptedTunnel { peer, server })
}

/// Fails with [`AcceptError::Deadline`] if the handshake takes longer than [`HANDSHAKE_DEADLINE`].
pub async fn with_deadline<T, E: From<AcceptError>>(shake: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await.unwrap_or(Err(AcceptError::Deadline.into()))
}
