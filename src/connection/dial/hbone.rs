//! CONNECT through a pooled tunnel.

use super::direct::{SocketConfig, outbound};
use super::pool::{Dialled, Key, Lease, Pool};
use super::{ANSWER_DEADLINE, DialError, TunnelDialError};
use crate::connection::choose::HboneWay;
use crate::hbone::client::{OpenError, handshake};
use crate::hbone::{self, ConnectRequest, Stream};
use crate::identity::{Credentials, TlsFacts};
use crate::sys::netns::Netns;
use crate::task::Signal;
use rustls::ClientConfig;
use rustls::pki_types::{IpAddr, ServerName};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::TlsConnector;

/// How long TLS and HTTP/2 together may take after TCP.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Where a tunnel starts and how it is set up.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Uid of the pod.
    pub pod: crate::mesh::Text,
    /// Its namespace.
    pub netns: Netns,
    /// Its certificate.
    pub credentials: Arc<Credentials>,
    /// Ends the tunnel.
    pub drain: Signal,
    /// Socket settings.
    pub sockets: SocketConfig,
    /// HTTP/2 settings.
    pub hbone: hbone::Config,
}

/// A stream through a tunnel; the lease keeps its place.
#[derive(Debug)]
pub struct Opened {
    /// The stream.
    pub stream: Stream,
    /// Its place on the tunnel.
    pub lease: Lease,
}

/// Opens a stream. A tunnel that turns out to be going away before the request was sent is replaced once.
pub async fn open(
    pool: &Arc<Pool>,
    origin: &Origin,
    way: &HboneWay,
    request: &ConnectRequest,
) -> Result<Opened, DialError> {
    let key = Key {
        pod: origin.pod.clone(),
        own: origin.credentials.identity.clone(),
        generation: origin.credentials.generation,
        expected: way.expected.clone(),
        to: way.to,
        uid: way.uid.clone(),
    };
    let mut second = false;
    loop {
        let dial = || {
            let origin = origin.clone();
            dial(origin.netns, origin.credentials.client(&way.expected), way.to, origin.sockets, origin.hbone)
        };
        let lease = pool.checkout(&key, &origin.drain, dial).await?;
        let answer = tokio::time::timeout(ANSWER_DEADLINE, lease.tunnel().open(request)).await;
        match answer {
            Ok(Ok(stream)) => return Ok(Opened { stream, lease }),
            Ok(Err(OpenError::TunnelGone(_))) if !second => {
                lease.retire();
                second = true;
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(DialError::AnswerDeadline),
        }
    }
}

async fn dial(
    netns: Netns,
    tls: Arc<ClientConfig>,
    to: SocketAddr,
    sockets: SocketConfig,
    config: hbone::Config,
) -> Result<Dialled, TunnelDialError> {
    let socket = outbound(&netns, to, &sockets).await.map_err(|error| match error {
        DialError::Netns(error) => TunnelDialError::Netns(error),
        DialError::Connect { to, source } => TunnelDialError::Connect { to, source },
        _ => TunnelDialError::Blocked(to),
    })?;
    let shake = async {
        // The verifier checks the SPIFFE name; this name is neither sent (SNI is off) nor looked at.
        let unused = ServerName::IpAddress(IpAddr::from(to.ip()));
        let tls = TlsConnector::from(tls).connect(unused, socket).await.map_err(TunnelDialError::Tls)?;
        let facts = TlsFacts::of(tls.get_ref().1);
        let (tunnel, driver) = handshake(tls, &config).await.map_err(TunnelDialError::Http2)?;
        let run = Box::pin(async move {
            if let Err(error) = driver.run().await {
                tracing::debug!(%error, peer = %to, "tunnel ended");
            }
        });
        Ok(Dialled { tunnel, tls: facts, run })
    };
    let deadline = tokio::time::timeout(HANDSHAKE_DEADLINE, shake).await;
    deadline.unwrap_or(Err(TunnelDialError::HandshakeDeadline(to)))
}
