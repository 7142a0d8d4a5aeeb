//! Opening a stream with CONNECT through a pooled tunnel, and dialling the tunnel if there is none.

use super::direct::{DialledLeg, OpenLegs, SocketConfig, outbound};
use super::error::{ANSWER_DEADLINE, DialError, HANDSHAKE_DEADLINE, TunnelDialError};
use super::pool::{DialledTunnel, Lease, Pool, TunnelKey};
use crate::connection::choose::TunnelHop;
use crate::hbone::client::OpenError;
use crate::hbone::ping::GONE_AFTER;
use crate::hbone::{self, ConnectRequest, Engine, Stream, TunnelError};
use crate::identity::verify::{PeerError, peer_name};
use crate::identity::{Credentials, TlsFacts};
use crate::mesh::SpiffeName;
use crate::sys::netns::Netns;
use crate::sys::socket::set_tunnel_options;
use crate::task::Signal;
use rustls::pki_types::{IpAddr, ServerName};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

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

/// A stream through a pooled tunnel.
#[derive(Debug)]
pub struct OpenedStream {
    /// The stream.
    pub stream: Stream,
    /// Keeps the stream's slot on the tunnel.
    pub lease: Lease,
}

/// Opens a stream. A tunnel that turns out to be going away before the request was sent is replaced, up to
/// `REPLACEMENTS_MAX` times. A request that the peer refuses with REFUSED_STREAM is repeated after a pause, as often as
/// there are `REFUSED_PAUSES`. In both cases HTTP/2 guarantees that the peer has not acted on the request. `going_away`
/// is called for each tunnel that is replaced.
pub async fn open(
    pool: &Arc<Pool>,
    origin: &Origin,
    hop: &TunnelHop,
    request: &ConnectRequest,
    going_away: &(dyn Fn() + Sync),
) -> Result<OpenedStream, DialError> {
    let key = TunnelKey {
        pod: origin.pod.clone(),
        capture: origin.capture,
        own: origin.credentials.identity.clone(),
        generation: origin.credentials.generation,
        expected: hop.expected.clone(),
        to: hop.to,
        uid: hop.uid.clone(),
    };
    let (mut replaced, mut pauses) = (0, REFUSED_PAUSES.iter());
    loop {
        let dial = || {
            let origin = origin.clone();
            dial(origin, hop.expected.clone(), hop.to)
        };
        let lease = pool.checkout(&key, &origin.drain, dial).await?;
        let answer = tokio::time::timeout(ANSWER_DEADLINE, lease.tunnel().open(request)).await;
        match answer.map_or(Err(DialError::AnswerDeadline), |opened| opened.map_err(DialError::Open)) {
            Ok(stream) => return Ok(OpenedStream { stream, lease }),
            // Take the tunnel out of the pool, so that the next checkout finds another one or dials.
            Err(DialError::Open(OpenError::TunnelGone(_))) if replaced < REPLACEMENTS_MAX => {
                replaced += 1;
                lease.retire();
                going_away();
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
    set_tunnel_options(&socket, GONE_AFTER, &origin.sockets.legs)
        .map_err(|source| TunnelDialError::Connect { to, source })?;
    let shake = async {
        // The verifier checks the SPIFFE name. This name is required by the API, but neither sent (SNI is off) nor
        // checked.
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
        // With TLS 1.3 the server checks our certificate after the client's handshake is done, so a refusal arrives
        // only now. So does the limit on streams.
        driver.settled().await.map_err(|error| match error {
            TunnelError::Io(_) | TunnelError::Tls(_) => TunnelDialError::Tls(error.into_io()),
            error => TunnelDialError::Http2(error),
        })?;
        Ok(DialledTunnel { tunnel, tls: facts, peer, chain, driver, entry: Some(entry) })
    };
    let deadline = tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await;
    deadline.unwrap_or(Err(TunnelDialError::HandshakeDeadline(to)))
}
