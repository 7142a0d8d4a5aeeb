//! A tunnel from a peer: mutual TLS, then HTTP/2, both before one deadline.

use super::error::{AcceptError, HANDSHAKE_DEADLINE, SILENCE_DEADLINE};
use crate::hbone::ping::GONE_AFTER;
use crate::hbone::{self, Buffers};
use crate::identity::verify::peer_name;
use crate::identity::{Chain, Credentials, READ_BUFFER_BYTES, TLS_BUFFER_BYTES, TlsFacts};
use crate::mesh::SpiffeName;
use crate::mesh::address::canonical;
use crate::sys::read_buffer::ReadBuffered;
use crate::sys::socket::{LegOptions, give_up_after, reset_on_close, set_leg_options};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
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
    pub tunnel: hbone::Server<TlsStream<ReadBuffered<TcpStream>>>,
}

/// Waits until whoever connected to the pod's HBONE port says something. Until then nothing is held for it. `None`: it has left
/// in order without a word. It has looked whether the port is open, as `culvert doctor` does, and nothing has failed.
pub async fn first_byte(socket: std::net::TcpStream, legs: &LegOptions) -> Result<Option<TcpStream>, AcceptError> {
    let set = set_leg_options(&socket, legs).and_then(|()| give_up_after(&socket, GONE_AFTER, legs));
    set.map_err(AcceptError::Socket)?;
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

/// Shakes hands; what the peer makes us hold afterwards goes on an account of its own in `buffers`.
pub async fn handshake(
    socket: TcpStream,
    source: SocketAddr,
    credentials: &Credentials,
    config: &hbone::Config,
    buffers: &Arc<Buffers>,
) -> Result<Peer, AcceptError> {
    let local = canonical(socket.local_addr().map_err(AcceptError::Socket)?);
    let socket = ReadBuffered::new(socket);
    let mut tls = TlsAcceptor::from(credentials.server())
        .accept_with(socket, |tls| tls.set_buffer_limit(Some(TLS_BUFFER_BYTES)))
        .await
        .map_err(AcceptError::Tls)?;
    tls.get_mut().0.trust(READ_BUFFER_BYTES);
    let state = tls.get_ref().1;
    let peer = state.peer_certificates().unwrap_or_default();
    let leaf = peer.first().ok_or(AcceptError::NoCertificate)?;
    let chain = credentials.watch(peer);
    let identity = peer_name(leaf).map_err(|error| AcceptError::Tls(io::Error::other(error)))?;
    let facts = TlsFacts::of(state);
    let account = buffers.account(&identity.to_string(), true);
    tls.get_mut().0.before_close(reset_if_cut(&account));
    let tunnel = hbone::Server::handshake(tls, config, &account).await?;
    Ok(Peer { identity, source: canonical(source), local, tls: facts, chain, tunnel })
}

/// A tunnel that is cut is reset: a peer that is gone would be sent what it has not acknowledged for as long as the kernel likes.
pub fn reset_if_cut(account: &Arc<hbone::Account>) -> impl Fn(&TcpStream) + Send + Sync + 'static {
    let account = account.clone();
    move |socket| {
        if account.is_cut() {
            reset_on_close(socket);
        }
    }
}

/// Gives a handshake its deadline.
pub async fn with_deadline<T, E: From<AcceptError>>(shake: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await.unwrap_or(Err(AcceptError::Deadline.into()))
}
