//! Accepting a tunnel: mutual TLS, then HTTP/2, both within one deadline. Until the peer has proven its identity it
//! costs the node as little as possible, and no pod is charged for it.

use super::error::{AcceptError, HANDSHAKE_DEADLINE, SILENCE_DEADLINE};
use crate::hbone::ping::GONE_AFTER;
use crate::hbone::{self, Buffers};
use crate::identity::verify::peer_name;
use crate::identity::{Chain, Credentials, READ_BUFFER_BYTES, TLS_BUFFER_BYTES, TlsFacts};
use crate::mesh::address::canonical;
use crate::mesh::{SpiffeName, Text};
use crate::sys::read_buffer::ReadBuffered;
use crate::sys::socket::{LegOptions, give_up_after, reset_on_close, set_leg_options};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A tunnel whose peer has proven its identity.
#[derive(Debug)]
pub struct AcceptedTunnel {
    /// The peer.
    pub peer: TunnelPeer,
    /// The server end, from which its streams come.
    pub server: hbone::Server<TlsStream<ReadBuffered<TcpStream>>>,
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
    /// TLS version, key exchange and cipher.
    pub tls: TlsFacts,
    /// The peer's certificate chain; it signals when a certificate in it is revoked or expires.
    pub chain: Chain,
}

/// Waits for the first byte on a new connection to the pod's HBONE port. No TLS state is allocated before it comes.
/// `None` means that the client closed the connection without sending anything: it only checked whether the port is
/// open, as `culvert doctor` does, and nothing has failed.
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

/// Performs both handshakes. What this tunnel later makes the node buffer is booked on a separate account in `buffers`.
pub async fn handshake(
    socket: TcpStream,
    source: SocketAddr,
    credentials: &Credentials,
    config: &hbone::Config,
    buffers: &Arc<Buffers>,
) -> Result<AcceptedTunnel, AcceptError> {
    let local = canonical(socket.local_addr().map_err(AcceptError::Socket)?);
    let socket = ReadBuffered::new(socket);
    let mut tls = TlsAcceptor::from(credentials.server())
        .accept_with(socket, |tls| tls.set_buffer_limit(Some(TLS_BUFFER_BYTES)))
        .await
        .map_err(AcceptError::Tls)?;
    tls.get_mut().0.trust(READ_BUFFER_BYTES);
    let state = tls.get_ref().1;
    let certificates = state.peer_certificates().unwrap_or_default();
    let leaf = certificates.first().ok_or(AcceptError::NoCertificate)?;
    let chain = credentials.watch(certificates);
    let identity = peer_name(leaf).map_err(|error| AcceptError::Tls(io::Error::other(error)))?;
    let facts = TlsFacts::of(state);
    let name = Text::from(identity.to_string());
    let account = buffers.account(&name, true);
    tls.get_mut().0.before_close(reset_if_cut(&account));
    let server = hbone::Server::handshake(tls, config, &account).await?;
    let peer = TunnelPeer { identity, name, source: canonical(source), local, tls: facts, chain };
    Ok(AcceptedTunnel { peer, server })
}

/// The action for the end of a tunnel's socket: a tunnel that was cut is reset. After an orderly close the kernel would
/// go on retransmitting unacknowledged data to a peer that may be gone.
pub fn reset_if_cut(account: &Arc<hbone::Account>) -> impl Fn(&TcpStream) + Send + Sync + 'static {
    let account = account.clone();
    move |socket| {
        if account.is_cut() {
            reset_on_close(socket);
        }
    }
}

/// Fails with [`AcceptError::Deadline`] if the handshake takes longer than [`HANDSHAKE_DEADLINE`].
pub async fn with_deadline<T, E: From<AcceptError>>(shake: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await.unwrap_or(Err(AcceptError::Deadline.into()))
}
