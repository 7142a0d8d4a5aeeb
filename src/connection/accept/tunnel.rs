//! A tunnel from a peer: mutual TLS, then HTTP/2, both before one deadline.

use super::{AcceptError, HANDSHAKE_DEADLINE};
use crate::hbone;
use crate::identity::verify::peer_name;
use crate::identity::{Chain, Credentials, READ_BUFFER_BYTES, TLS_BUFFER_BYTES, TlsFacts};
use crate::mesh::SpiffeName;
use crate::mesh::address::canonical;
use crate::sys::socket::{LegOptions, set_leg_options};
use std::io;
use std::net::SocketAddr;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A peer that has proven who it is.
#[derive(Debug)]
pub struct Peer {
    /// Its identity.
    pub identity: SpiffeName,
    /// Its address.
    pub source: SocketAddr,
    /// The pod's address that it connected to.
    pub local: SocketAddr,
    /// What TLS agreed on.
    pub tls: TlsFacts,
    /// By which it can be heard that the peer is revoked.
    pub chain: Chain,
    /// The tunnel.
    pub tunnel: hbone::Server<TlsStream<BufReader<TcpStream>>>,
}

/// Shakes hands with whoever connected to the pod's HBONE port.
pub async fn handshake(
    socket: std::net::TcpStream,
    source: SocketAddr,
    legs: &LegOptions,
    credentials: &Credentials,
    config: &hbone::Config,
) -> Result<Peer, AcceptError> {
    set_leg_options(&socket, legs).map_err(AcceptError::Socket)?;
    let local = canonical(socket.local_addr().map_err(AcceptError::Socket)?);
    let socket = TcpStream::from_std(socket).map_err(AcceptError::Socket)?;
    let socket = BufReader::with_capacity(READ_BUFFER_BYTES, socket);
    let shake = async {
        let tls = TlsAcceptor::from(credentials.server())
            .accept_with(socket, |tls| tls.set_buffer_limit(Some(TLS_BUFFER_BYTES)))
            .await
            .map_err(AcceptError::Tls)?;
        let state = tls.get_ref().1;
        let peer = state.peer_certificates().unwrap_or_default();
        let leaf = peer.first().ok_or(AcceptError::NoCertificate)?;
        let chain = credentials.watch(peer);
        let identity = peer_name(leaf).map_err(|error| AcceptError::Tls(io::Error::other(error)))?;
        let facts = TlsFacts::of(state);
        let tunnel = hbone::Server::handshake(tls, config).await?;
        Ok(Peer { identity, source: canonical(source), local, tls: facts, chain, tunnel })
    };
    tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await.unwrap_or(Err(AcceptError::Deadline))
}
