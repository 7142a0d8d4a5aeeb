//! Why the far side could not be opened, and how long opening it may take.

use crate::connection::choose::Evidence;
use crate::hbone::TunnelError;
use crate::hbone::client::OpenError;
use crate::identity::store::StoreError;
use crate::identity::verify::tls_reason;
use crate::mesh::Text;
use crate::ports::HBONE;
use crate::sys::netns::NetnsError;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long TCP may take to connect.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long the TLS and HTTP/2 handshakes of a tunnel may take together, after TCP has connected.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the far end of a tunnel may take to answer a CONNECT request. It may wait for facts (5 s), for a policy (5
/// s) and for its application (10 s) itself; the rest is margin.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(25);

/// How long an endpoint may take to answer while there is another one that can be tried instead. One lost packet is
/// sent again within that time.
pub const ATTEMPT_PATIENCE: Duration = Duration::from_secs(2);

/// Why the far side could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The pod's network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// TCP could not connect.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// The destination.
        to: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// TCP did not connect in time.
    #[error("connection failed: {0}: no answer within {deadline} s", deadline = CONNECT_DEADLINE.as_secs())]
    ConnectDeadline(SocketAddr),
    /// There is no certificate for the pod.
    #[error("identity error: {0}")]
    Identity(#[from] StoreError),
    /// The tunnel could not be opened. All connections that waited for it share the error.
    #[error(transparent)]
    Tunnel(#[from] Arc<TunnelDialError>),
    /// The tunnel is open, but the stream was refused or broke.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The far end did not answer the CONNECT request in time.
    #[error("no answer to CONNECT within {} s", ANSWER_DEADLINE.as_secs())]
    AnswerDeadline,
    /// The endpoint did not answer for a while, and another one was to be tried.
    #[error("no answer within {} s", ATTEMPT_PATIENCE.as_secs())]
    Unanswered,
    /// The client gave up meanwhile.
    #[error("the client gave up before the connection was open")]
    Abandoned,
}

impl DialError {
    /// What the error says against the endpoint that was dialled; `None` if the error is this node's, the client's or a
    /// policy's.
    pub fn evidence(&self) -> Option<Evidence> {
        match self {
            Self::Netns(_) | Self::Identity(_) | Self::Abandoned => None,
            Self::Connect { source, .. } => connect_evidence(source),
            Self::ConnectDeadline(_) | Self::AnswerDeadline | Self::Unanswered => Some(Evidence::TimedOut),
            Self::Tunnel(error) => error.evidence(),
            Self::Open(OpenError::Refused) => Some(Evidence::Refused),
            Self::Open(OpenError::TunnelGone(_)) => Some(Evidence::GoingAway),
            Self::Open(OpenError::Broken(_)) => Some(Evidence::Reset),
            // The address is not that pod's any more, or its application cannot be reached.
            Self::Open(OpenError::Status(status)) => matches!(status.as_u16(), 400 | 503).then_some(Evidence::Refused),
        }
    }

    /// Whether a waypoint has answered. It answers for what is behind it, so this says nothing against itself.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Open(OpenError::Status(_)))
    }
}

impl TunnelDialError {
    fn evidence(&self) -> Option<Evidence> {
        match self {
            Self::Netns(_) | Self::Draining => None,
            Self::Blocked(_) => Some(Evidence::TimedOut),
            Self::Connect { source, .. } => connect_evidence(source),
            // Another workload may have the address by now.
            Self::Tls(_) | Self::Http2(_) | Self::HandshakeDeadline(_) => Some(Evidence::Handshake),
            // An endpoint behind a gateway is reached through the gateway only.
            Self::Gateway { error, .. } => error.evidence(),
            Self::Behind { error, .. } => error.evidence(),
        }
    }
}

/// What an error of TCP says against the destination. Other errors are this node's: no ports, no descriptors.
fn connect_evidence(error: &io::Error) -> Option<Evidence> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Some(Evidence::Refused),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Some(Evidence::Reset),
        io::ErrorKind::TimedOut => Some(Evidence::TimedOut),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Some(Evidence::Unreachable),
        _ => None,
    }
}

/// The error's text; if two clocks differ, with a hint about that.
fn http2_reason(error: &TunnelError) -> String {
    error.clock_reason().map_or_else(|| error.to_string(), |clock| format!("{error}; {clock}"))
}

/// Why a tunnel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelDialError {
    /// TCP to the far end did not connect in time.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port {HBONE}: {0}")]
    Blocked(SocketAddr),
    /// TCP could not connect.
    #[error("connection failed: {to}: {source}")]
    Connect {
        /// Address and port of the far end.
        to: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// The pod's network namespace cannot be entered.
    #[error(transparent)]
    Netns(NetnsError),
    /// TLS failed: the far end has not proven an expected identity, or it does not accept ours.
    #[error("tls error: {}", tls_reason(.0))]
    Tls(io::Error),
    /// The HTTP/2 handshake failed.
    #[error("http2 handshake failed: {}", http2_reason(.0))]
    Http2(TunnelError),
    /// The TLS and HTTP/2 handshakes did not finish in time.
    #[error("the handshake with {0} took longer than {deadline} s", deadline = HANDSHAKE_DEADLINE.as_secs())]
    HandshakeDeadline(SocketAddr),
    /// The gateway to another network cannot be reached, or refuses.
    #[error("network gateway {gateway}: {error}")]
    Gateway {
        /// Uid of the gateway's workload.
        gateway: Text,
        /// What failed.
        error: Box<DialError>,
    },
    /// The tunnel to the gateway is open, and the one inside it failed.
    #[error("behind network gateway {gateway}: {error}")]
    Behind {
        /// Uid of the gateway's workload.
        gateway: Text,
        /// What failed.
        error: Box<TunnelDialError>,
    },
    /// The daemon is ending, or the pod is being released.
    #[error("pool draining")]
    Draining,
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;
    use std::io::ErrorKind;

    #[test]
    fn what_failures_say_against_the_endpoint() {
        let to: SocketAddr = "10.0.0.2:80".parse().unwrap();
        let connect = |kind: ErrorKind| DialError::Connect { to, source: kind.into() };
        let tunnel = |error| DialError::Tunnel(Arc::new(error));
        let status = |code| DialError::Open(OpenError::Status(StatusCode::from_u16(code).unwrap()));
        for (error, said) in [
            (connect(ErrorKind::ConnectionRefused), Some("refused")),
            (connect(ErrorKind::ConnectionReset), Some("reset")),
            (connect(ErrorKind::HostUnreachable), Some("unreachable")),
            // This node's own shortage.
            (connect(ErrorKind::AddrNotAvailable), None),
            (connect(ErrorKind::OutOfMemory), None),
            (DialError::ConnectDeadline(to), Some("timed_out")),
            (DialError::AnswerDeadline, Some("timed_out")),
            (DialError::Unanswered, Some("timed_out")),
            (DialError::Abandoned, None),
            (tunnel(TunnelDialError::Blocked(to)), Some("timed_out")),
            (tunnel(TunnelDialError::Connect { to, source: ErrorKind::ConnectionRefused.into() }), Some("refused")),
            (tunnel(TunnelDialError::Tls(ErrorKind::InvalidData.into())), Some("handshake")),
            (tunnel(TunnelDialError::HandshakeDeadline(to)), Some("handshake")),
            (tunnel(TunnelDialError::Draining), None),
            (DialError::Open(OpenError::Refused), Some("refused")),
            (status(503), Some("refused")),
            (status(400), Some("refused")),
            // A policy's decision, and those of waypoints.
            (status(401), None),
            (status(403), None),
            (status(404), None),
            (status(429), None),
        ] {
            assert_eq!(error.evidence().map(Evidence::word), said, "{error}");
        }
    }
}
