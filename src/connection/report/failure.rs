//! Every way a connection can end otherwise than well, in one closed list. From it follow, by exhaustive matches, the
//! word in metrics, the response flag, whose fault it was, and whether trying again is safe.

use super::reason::Reason;
use crate::connection::accept::AcceptError;
use crate::connection::authorize::Refusal;
use crate::connection::budget::BudgetRefusal;
use crate::connection::choose::{LocalError, RouteError};
use crate::connection::dial::{DialError, TunnelDialError};
use crate::connection::forward::{ForwardError, Stop};
use crate::crypto::clock_reason;
use crate::hbone::client::OpenError;
use crate::hbone::request::RequestError;
use crate::identity::store::StoreError;
use crate::identity::verify::is_revoked;
use crate::mesh::Text;
use crate::task::slots::NoSlot;

/// How a connection ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The node has no room for it.
    #[error(transparent)]
    Budget(#[from] BudgetRefusal),
    /// Accepted faster than connections can be begun.
    #[error("too many connections at once: {0} wait for a worker already")]
    Queue(usize),
    /// Too many that have not proven who they are.
    #[error("too many handshakes at once: {0}")]
    Handshakes(#[from] NoSlot),
    /// Nothing is known about the pod yet.
    #[error("failed to fetch information about local workload: {0}")]
    LocalWorkload(Text),
    /// Step 1.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// The pod has no certificate.
    #[error("identity error: {0}")]
    Identity(#[from] StoreError),
    /// The request is no CONNECT that we take.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Step 2.
    #[error("connection closed due to policy rejection: {0}")]
    Refused(#[from] Refusal),
    /// Step 3, outbound.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Step 3, inbound.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// Step 4.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer's tunnel broke while we answered.
    #[error("h2 failed: {0}")]
    Answer(#[from] crate::hbone::TunnelError),
    /// Step 5.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Nobody said how it ended: the daemon was ended at once.
    #[error("connection closed due to connection drain")]
    Abandoned,
}

/// The peer's certificate has been revoked.
const REVOKED: (Reason, &str, Fault) = (Reason::CertRevoked, "CERT_REVOKED", Fault::Peer);

/// Two clocks differ.
const CLOCK: (Reason, &str, Fault) = (Reason::Clock, "TLS_FAILURE", Fault::Us);

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The far end's.
    Peer,
    /// The application's on this side.
    App,
    /// A policy's: it works as intended.
    Policy,
    /// The mesh's configuration.
    Mesh,
    /// Ours, or this node's.
    Us,
}

impl Failure {
    /// Reason, which gives the word of the metric's label, response flag of the access log and traffic metrics (source: the reference's
    /// response_flags), and whose fault it is.
    fn kind(&self) -> (Reason, &'static str, Fault) {
        match self {
            Self::Budget(BudgetRefusal::Full { .. }) | Self::Queue(_) => (Reason::Limit, "CONNECT", Fault::Us),
            Self::Budget(BudgetRefusal::LargestPod { .. }) => (Reason::LargestConsumer, "CONNECT", Fault::App),
            Self::Budget(BudgetRefusal::LargestPeer { .. }) => (Reason::LargestPeer, "CONNECT", Fault::Peer),
            Self::Handshakes(_) => (Reason::HandshakeLimit, "CONNECT", Fault::Peer),
            Self::LocalWorkload(_) => (Reason::WorkloadUnknown, "CONNECT", Fault::Mesh),
            Self::Accept(error) => match error {
                AcceptError::OriginalDestination(_) => (Reason::OriginalDestinationUnknown, "CONNECT", Fault::Us),
                AcceptError::Socket(_) => (Reason::Socket, "CONNECT", Fault::App),
                AcceptError::Tls(error) if is_revoked(error) => REVOKED,
                AcceptError::Tls(error) if clock_reason(error).is_some() => CLOCK,
                AcceptError::Tls(_) | AcceptError::NoCertificate => (Reason::PeerTls, "TLS_FAILURE", Fault::Peer),
                AcceptError::Http2(error) if error.io().is_some_and(|error| clock_reason(error).is_some()) => CLOCK,
                AcceptError::Http2(_) => (Reason::PeerHttp2, "H2_HANDSHAKE_FAILURE", Fault::Peer),
                AcceptError::Silent => (Reason::PeerSilent, "TLS_FAILURE", Fault::Peer),
                AcceptError::Deadline => (Reason::PeerHandshakeDeadline, "TLS_FAILURE", Fault::Peer),
            },
            Self::Identity(_) => (Reason::Identity, "IDENTITY_ERROR", Fault::Us),
            Self::Request(_) => (Reason::BadRequest, "CONNECT", Fault::Peer),
            Self::Refused(refusal) => refusal_kind(refusal),
            Self::Route(error) => match error {
                RouteError::Loop(_) => (Reason::Loop, "CONNECT", Fault::App),
                RouteError::UnknownWaypoint { .. } => (Reason::WaypointUnknown, "CONNECT", Fault::Mesh),
                RouteError::NoEndpoint(_) => (Reason::NoEndpoint, "CONNECT", Fault::Mesh),
                RouteError::NoPort(..) => (Reason::NoPort, "CONNECT", Fault::App),
                RouteError::NoAddress(_) => (Reason::NoAddress, "CONNECT", Fault::Mesh),
                RouteError::OtherNetwork(_) => (Reason::OtherNetwork, "CONNECT", Fault::Mesh),
                RouteError::Identity(..) => (Reason::BadIdentity, "CONNECT", Fault::Mesh),
                RouteError::Protocol(_) => (Reason::Protocol, "CONNECT", Fault::Mesh),
                RouteError::Unresolved(_) | RouteError::Resolve(_) => (Reason::NameNotResolved, "CONNECT", Fault::Mesh),
                RouteError::Unasked(_) | RouteError::Ask(_) => (Reason::NoAnswer, "CONNECT", Fault::Mesh),
            },
            Self::Local(error) => match error {
                LocalError::IpMismatch { .. } => (Reason::IpMismatch, "CONNECT", Fault::Peer),
                LocalError::UnknownHost(_) => (Reason::UnknownHost, "CONNECT", Fault::Peer),
                LocalError::UnknownPort(..) => (Reason::NoPort, "CONNECT", Fault::Peer),
                LocalError::Loop(_) => (Reason::Loop, "CONNECT", Fault::Peer),
                LocalError::Delivery => (Reason::ApplicationTunnel, "CONNECT", Fault::Us),
                LocalError::NoVip(_) => (Reason::NoAddress, "CONNECT", Fault::Mesh),
            },
            Self::Dial(error) => dial_kind(error),
            Self::Answer(_) => (Reason::TunnelBroken, "CONNECT", Fault::Peer),
            Self::Forward(error) => match error {
                ForwardError::App(_) => (Reason::AppReset, "CONNECT", Fault::App),
                ForwardError::Far(_) | ForwardError::Reset(_) => (Reason::PeerReset, "CONNECT", Fault::Peer),
                ForwardError::Tunnel(_) => (Reason::TunnelBroken, "CONNECT", Fault::Peer),
                ForwardError::Cut(_) => (Reason::TunnelCut, "CONNECT", Fault::Peer),
                ForwardError::HalfClosedSilence(_) => (Reason::HalfClosedSilence, "CONNECT", Fault::App),
                ForwardError::Stopped(Stop::Revoked(_)) => (Reason::PolicyChange, "DENY", Fault::Policy),
                ForwardError::Stopped(Stop::CertificateRevoked) => REVOKED,
                ForwardError::Stopped(Stop::CertificateExpired) => (Reason::CertExpired, "TLS_FAILURE", Fault::Peer),
                ForwardError::Stopped(Stop::Drained) => (Reason::Drained, "-", Fault::Us),
            },
            Self::Abandoned => (Reason::Drained, "-", Fault::Us),
        }
    }

    /// The word in `culvert_connection_failures_total{reason}`.
    pub fn word(&self) -> &'static str {
        self.kind().0.word()
    }

    /// Whether the peer's certificate has been revoked.
    pub fn is_revocation(&self) -> bool {
        self.kind() == REVOKED
    }

    /// The response flag.
    pub fn flag(&self) -> &'static str {
        self.kind().1
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        self.kind().2
    }
}

impl Fault {
    /// The word in `culvert_connection_failures_total{fault}`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::App => "app",
            Self::Policy => "policy",
            Self::Mesh => "mesh",
            Self::Us => "us",
        }
    }
}

fn refusal_kind(refusal: &Refusal) -> (Reason, &'static str, Fault) {
    match refusal {
        Refusal::Denied(_) => (Reason::Denied, "DENY", Fault::Policy),
        Refusal::NotAllowed(_) => (Reason::NotAllowed, "DENY", Fault::Policy),
        Refusal::PolicyUnknown(_) => (Reason::PolicyUnknown, "DENY", Fault::Mesh),
        Refusal::WorkloadUnknown => (Reason::WorkloadUnknown, "DENY", Fault::Mesh),
    }
}

fn dial_kind(error: &DialError) -> (Reason, &'static str, Fault) {
    match error {
        DialError::Netns(_) => (Reason::Netns, "CONNECT", Fault::Us),
        DialError::Connect { .. } => (Reason::Connect, "CONNECT", Fault::Peer),
        DialError::ConnectDeadline(_) => (Reason::ConnectDeadline, "CONNECT", Fault::Peer),
        DialError::Identity(_) => (Reason::Identity, "IDENTITY_ERROR", Fault::Us),
        DialError::Tunnel(error) => match **error {
            TunnelDialError::Blocked(_) => (Reason::TunnelBlocked, "NETWORK_POLICY", Fault::Peer),
            TunnelDialError::Connect { .. } => (Reason::TunnelConnect, "CONNECT", Fault::Peer),
            TunnelDialError::Netns(_) => (Reason::Netns, "CONNECT", Fault::Us),
            TunnelDialError::Tls(ref error) if is_revoked(error) => REVOKED,
            TunnelDialError::Tls(ref error) if clock_reason(error).is_some() => CLOCK,
            TunnelDialError::Tls(_) => (Reason::TunnelTls, "TLS_FAILURE", Fault::Peer),
            // In TLS 1.3 a server refuses a client's certificate when the client is done already.
            TunnelDialError::Http2(ref error) if error.io().is_some_and(|error| clock_reason(error).is_some()) => CLOCK,
            TunnelDialError::Http2(_) => (Reason::TunnelHttp2, "H2_HANDSHAKE_FAILURE", Fault::Peer),
            TunnelDialError::HandshakeDeadline(_) => (Reason::TunnelHandshakeDeadline, "TLS_FAILURE", Fault::Peer),
            TunnelDialError::Draining => (Reason::Drained, "CONNECT", Fault::Us),
        },
        DialError::Open(error) => match error {
            OpenError::Refused => (Reason::StreamRefused, "CONNECT", Fault::Peer),
            OpenError::TunnelGone(_) | OpenError::Broken(_) => (Reason::TunnelBroken, "CONNECT", Fault::Peer),
            OpenError::Status(status) if status.as_u16() == 401 => (Reason::PeerDenied, "CONNECT", Fault::Policy),
            OpenError::Status(_) => (Reason::PeerRefused, "CONNECT", Fault::Peer),
            OpenError::Request(_) => (Reason::Request, "CONNECT", Fault::Us),
        },
        DialError::AnswerDeadline => (Reason::AnswerDeadline, "CONNECT", Fault::Peer),
        DialError::Abandoned => (Reason::Abandoned, "CONNECT", Fault::App),
    }
}
