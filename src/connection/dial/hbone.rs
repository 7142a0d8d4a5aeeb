//! Opening a stream with CONNECT through a pooled tunnel, and dialling the tunnel if there is none.

use super::direct::{DialledLeg, OpenLegs, SocketConfig, outbound};
use super::error::{ANSWER_DEADLINE, DialError, HANDSHAKE_DEADLINE, TunnelDialError};
use super::pool::{Behind, DialledTunnel, Lease, Pool, TunnelKey};
use crate::connection::choose::TunnelHop;
use crate::hbone::carrier::Carrier;
use crate::hbone::client::OpenError;
use crate::hbone::ping::GONE_AFTER;
use crate::hbone::{self, ConnectRequest, Engine, Stream, TunnelError};
use crate::identity::verify::{PeerError, peer_name};
use crate::identity::{Credentials, TlsFacts};
use crate::mesh::SpiffeName;
use crate::sys::netns::Netns;
use crate::sys::socket::set_tunnel_options;
use crate::task::Signal;
use rustls::ClientConfig;
use rustls::pki_types::{IpAddr, ServerName};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// How many tunnels that turn out to be going away are replaced for one stream. The pool may hold several of them, and
/// each is only found out when a stream is opened on it.
const REPLACEMENTS_MAX: u32 = 8;

/// Pauses before a request is repeated that the peer refused with REFUSED_STREAM.
const REFUSED_PAUSES: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(40), Duration::from_millis(160), Duration::from_millis(640)];

/// The near end of a tunnel: the pod that it starts in, and how it is set up.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Uid of the pod that the tunnel starts in.
    pub pod: crate::mesh::Text,
    /// Number of the pod's capture.
    pub capture: u64,
    /// Network namespace of the pod.
    pub netns: Netns,
    /// The pod's certificate.
    pub credentials: Arc<Credentials>,
    /// Signals when the tunnel has to end.
    pub drain: Signal,
    /// The daemon's open connections in the namespace.
    pub legs: OpenLegs,
    /// Socket settings.
    pub sockets: SocketConfig,
    /// HTTP/2 settings.
    pub hbone: hbone::Config,
    /// The data path that owns the tunnel.
    pub engine: Engine,
    /// Accounts for what the far end makes the node buffer.
    pub buffers: Arc<hbone::Buffers>,
}

impl Origin {
    /// The key of tunnels from here to `hop`, or to what is behind it, for a far end with one of the `expected`
    /// identities.
    pub(super) fn key(&self, hop: &TunnelHop, expected: &[SpiffeName], behind: Option<Behind>) -> TunnelKey {
        TunnelKey {
            pod: self.pod.clone(),
            capture: self.capture,
            own: self.credentials.identity.clone(),
            generation: self.credentials.generation,
            expected: expected.to_vec(),
            to: hop.to,
            uid: hop.uid.clone(),
            behind,
        }
    }
}

/// A stream through a pooled tunnel.
#[derive(Debug)]
pub struct OpenedStream {
    /// The stream.
    pub stream: Stream,
    /// Keeps the stream's slot on the tunnel.
    pub lease: Lease,
    /// How long it took.
    pub took: Opening,
}

/// How long the opening of a stream took.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// To connect TCP, if the tunnel was not open yet.
    pub dial: Option<Duration>,
    /// For TLS and HTTP/2, if the tunnel was not open yet.
    pub tls: Option<Duration>,
    /// Until the answer to CONNECT.
    pub connect: Duration,
}

/// Opens a stream through a tunnel to `hop`. `going_away` is called for each tunnel that is replaced.
pub async fn open(
    pool: &Arc<Pool>,
    origin: &Origin,
    hop: &TunnelHop,
    request: &ConnectRequest,
    going_away: &(dyn Fn() + Sync),
) -> Result<OpenedStream, DialError> {
    let key = origin.key(hop, &hop.expected, None);
    let dial = || dial(origin.clone(), hop.expected.clone(), hop.to);
    open_on(pool, &origin.drain, &Wanted { key, spread: 1, going_away }, request, dial).await
}

/// The tunnels on which a stream may be opened.
pub(super) struct Wanted<'a> {
    /// Their key.
    pub key: TunnelKey,
    /// How many to have before streams share them.
    pub spread: usize,
    /// Called for each tunnel that is replaced.
    pub going_away: &'a (dyn Fn() + Sync),
}

/// Opens a stream on a pooled tunnel, or on one that `dial` dials. A tunnel that turns out to be going away before the
/// request was sent is replaced, up to `REPLACEMENTS_MAX` times. A request that the peer refuses with REFUSED_STREAM is
/// repeated after a pause, as often as there are `REFUSED_PAUSES`. In both cases HTTP/2 guarantees that the peer has not
/// acted on the request.
pub(super) async fn open_on<D, F>(
    pool: &Arc<Pool>,
    drain: &Signal,
    wanted: &Wanted<'_>,
    request: &ConnectRequest,
    dial: D,
) -> Result<OpenedStream, DialError>
where
    D: Fn() -> F,
    F: Future<Output = Result<DialledTunnel, TunnelDialError>> + Send + 'static,
{
    let (mut replaced, mut pauses, begun) = (0, REFUSED_PAUSES.iter(), Instant::now());
    loop {
        let lease = pool.checkout(&wanted.key, drain, wanted.spread, &dial).await?;
        let answer = tokio::time::timeout(ANSWER_DEADLINE, lease.tunnel().open(request)).await;
        match answer.map_or(Err(DialError::AnswerDeadline), |opened| opened.map_err(DialError::Open)) {
            Ok(stream) => {
                let (dial, tls) = lease.waited(begun).unzip();
                let waited = dial.unwrap_or_default() + tls.unwrap_or_default();
                let took = Opening { dial, tls, connect: begun.elapsed().saturating_sub(waited) };
                return Ok(OpenedStream { stream, lease, took });
            }
            // Take the tunnel out of the pool, so that the next checkout finds another one or dials.
            Err(DialError::Open(OpenError::TunnelGone(_))) if replaced < REPLACEMENTS_MAX => {
                replaced += 1;
                lease.retire();
                (wanted.going_away)();
            }
            Err(error @ DialError::Open(OpenError::Refused)) => {
                let Some(pause) = pauses.next() else { return Err(error) };
                drop(lease);
                tokio::time::sleep(*pause).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Dials a tunnel: TCP, mutual TLS, and HTTP/2 until the peer has confirmed it.
async fn dial(origin: Origin, expected: Vec<SpiffeName>, to: SocketAddr) -> Result<DialledTunnel, TunnelDialError> {
    let tls = origin.credentials.client(&expected);
    let dialled = outbound(&origin.netns, to, None, &origin.sockets, &origin.legs).await;
    let DialledLeg { entry, socket } = dialled.map_err(|error| match error {
        DialError::Netns(error) => TunnelDialError::Netns(error),
        DialError::Connect { to, source } => TunnelDialError::Connect { to, source },
        _ => TunnelDialError::Blocked(to),
    })?;
    let socket = set_tunnel_options(&socket, GONE_AFTER, &origin.sockets.legs)
        .and_then(|()| TcpStream::from_std(socket))
        .map_err(|source| TunnelDialError::Connect { to, source })?;
    let shake = async {
        let made = make(&origin, socket, tls, to, None).await?;
        Ok(DialledTunnel { entry: Some(entry), ..made })
    };
    let deadline = tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await;
    deadline.unwrap_or(Err(TunnelDialError::HandshakeDeadline(to)))
}

/// Makes a tunnel on a connected socket: mutual TLS, and HTTP/2 until the peer has confirmed it. `to` is its far end.
pub(super) async fn make(
    origin: &Origin,
    socket: TcpStream,
    tls: Arc<ClientConfig>,
    to: SocketAddr,
    carrier: Option<&Carrier>,
) -> Result<DialledTunnel, TunnelDialError> {
    let begun = Instant::now();
    // The verifier checks the SPIFFE name. This name is required by the API, but neither sent (SNI is off) nor checked.
    let unused = ServerName::IpAddress(IpAddr::from(to.ip()));
    let tls = hbone::tls::connect(socket, tls, unused).await.map_err(TunnelDialError::Tls)?;
    let facts = TlsFacts { version: tls.version, key_exchange: tls.key_exchange, cipher: tls.cipher };
    let chain = origin.credentials.watch(&tls.peer_certificates);
    let peer = tls.peer_certificates.first().map(peer_name).ok_or(PeerError::NotOneUri(0)).flatten();
    let peer = peer.map_err(|error| TunnelDialError::Tls(io::Error::other(error)))?;
    // On the client side, the pod itself is accountable for what is buffered.
    let account = origin.buffers.account(&origin.pod);
    let (tunnel, mut driver) =
        hbone::client::start(&origin.engine, tls, &origin.hbone, &account).map_err(TunnelDialError::Http2)?;
    if let Some(carrier) = carrier {
        driver.carried_by(carrier);
    }
    // With TLS 1.3 the server checks our certificate after the client's handshake is done, so a refusal arrives only
    // now. So does the limit on streams.
    driver.settled().await.map_err(|error| match error {
        TunnelError::Io(_) | TunnelError::Tls(_) => TunnelDialError::Tls(error.into_io()),
        error => TunnelDialError::Http2(error),
    })?;
    Ok(DialledTunnel { tunnel, tls: facts, peer, chain, driver, entry: None, outer: None, shake: begun.elapsed() })
}
