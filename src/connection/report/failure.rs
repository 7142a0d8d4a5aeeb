//! Every way in which a connection can end badly, as one closed list. Exhaustive matches give the reason word, the
//! response flag and the fault for each, so that a new error cannot be forgotten.

use super::reason::Reason;
use super::stages::Stage;
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

/// Why a connection failed or was refused.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The node's budget has no room for it.
    #[error(transparent)]
    Budget(#[from] BudgetRefusal),
    /// Sockets are accepted faster than workers can take them.
    #[error("too many connections at once: {0} are already waiting for a worker")]
    Queue(usize),
    /// Too many peers that have not proven their identity.
    #[error("too many handshakes at once: {0}")]
    Handshakes(#[from] NoSlot),
    /// The pod's workload is not known yet.
    #[error("failed to fetch information about local workload: {0}")]
    LocalWorkload(Text),
    /// The step accept failed.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// There is no certificate for the pod.
    #[error("identity error: {0}")]
    Identity(#[from] StoreError),
    /// The peer's request is not a valid CONNECT request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The step authorize refused it.
    #[error("connection closed due to policy rejection: {0}")]
    Refused(#[from] Refusal),
    /// The step choose found no route.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The step choose refused the destination in the pod.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The step dial failed.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer's tunnel broke while the stream was being accepted.
    #[error("h2 failed: {0}")]
    Answer(#[from] crate::hbone::TunnelError),
    /// The step forward ended early.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The connection's task was ended before it could report: the daemon ended at once.
    #[error("connection closed due to connection drain")]
    Abandoned,
}

/// The node has no room for a connection at all.
const LIMIT: (Reason, &str, Fault) = (Reason::Limit, "CONNECT", Fault::Us);
/// It has none for more connections of the pod that has the most.
const LARGEST_CONSUMER: (Reason, &str, Fault) = (Reason::LargestConsumer, "CONNECT", Fault::App);
/// It has none for more connections of the peer that has the most.
const LARGEST_PEER: (Reason, &str, Fault) = (Reason::LargestPeer, "CONNECT", Fault::Peer);
/// It has none for more peers without an identity.
const HANDSHAKE_LIMIT: (Reason, &str, Fault) = (Reason::HandshakeLimit, "CONNECT", Fault::Peer);
/// The classifications of failures for lack of room.
pub const OF_ROOM: [(Reason, &str, Fault); 4] = [LIMIT, LARGEST_CONSUMER, LARGEST_PEER, HANDSHAKE_LIMIT];

/// The classification of a revoked certificate of the peer.
const REVOKED: (Reason, &str, Fault) = (Reason::CertRevoked, "CERT_REVOKED", Fault::Peer);

/// The classification of a certificate that is not valid by one of the two clocks.
const CLOCK: (Reason, &str, Fault) = (Reason::Clock, "TLS_FAILURE", Fault::Us);

/// Whose fault a failure is, for alerts: policy refusals work as intended, and applications reset connections all the
/// time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The far end's, or the peer's.
    Peer,
    /// The fault of the application in this node's pod.
    App,
    /// A policy refused it, as intended.
    Policy,
    /// The mesh's configuration or facts.
    Mesh,
    /// The daemon's, or this node's.
    Us,
}

impl Failure {
    /// The reason, the response flag of traffic metrics (source: ztunnel's response flags), and the fault.
    fn kind(&self) -> (Reason, &'static str, Fault) {
        match self {
            Self::Budget(BudgetRefusal::Full { .. }) | Self::Queue(_) => LIMIT,
            Self::Budget(BudgetRefusal::LargestPod { .. }) => LARGEST_CONSUMER,
            Self::Budget(BudgetRefusal::LargestPeer { .. }) => LARGEST_PEER,
            Self::Handshakes(_) => HANDSHAKE_LIMIT,
            Self::LocalWorkload(_) => (Reason::WorkloadUnknown, "CONNECT", Fault::Mesh),
            Self::Accept(error) => match error {
                AcceptError::OriginalDestination(_) => (Reason::OriginalDestinationUnknown, "CONNECT", Fault::Us),
                AcceptError::Socket(_) => (Reason::Socket, "CONNECT", Fault::App),
                AcceptError::Tls(error) if is_revoked(error) => REVOKED,
                AcceptError::Tls(error) if clock_reason(error).is_some() => CLOCK,
                AcceptError::Tls(_) | AcceptError::NoCertificate => (Reason::PeerTls, "TLS_FAILURE", Fault::Peer),
                AcceptError::Http2(error) if error.clock_reason().is_some() => CLOCK,
                AcceptError::Http2(_) => (Reason::PeerHttp2, "H2_HANDSHAKE_FAILURE", Fault::Peer),
                AcceptError::Socks(_) => (Reason::Socks, "CONNECT", Fault::App),
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
                RouteError::OtherNetwork(..) => (Reason::OtherNetwork, "CONNECT", Fault::Mesh),
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
                LocalError::Bypassed { .. } => (Reason::WaypointBypassed, "DENY", Fault::Policy),
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

    /// The reason word in the access log and in `culvert_connection_failures_total{reason}`.
    pub fn word(&self) -> &'static str {
        self.kind().0.word()
    }

    /// The reason.
    pub fn reason(&self) -> Reason {
        self.kind().0
    }

    /// Whether it was not permitted, by a policy or by a limit, here or at the far end. All else is a failure.
    pub fn is_refusal(&self) -> bool {
        use Reason::{HandshakeLimit, LargestConsumer, LargestPeer, Limit, PolicyUnknown};
        let (reason, _, fault) = self.kind();
        let by_limit = [HandshakeLimit, LargestConsumer, LargestPeer, Limit, PolicyUnknown].contains(&reason);
        fault == Fault::Policy || by_limit || self.is_revocation()
    }

    /// The stage that it ended, of a connection that was not open yet.
    pub fn stage(&self) -> Option<Stage> {
        Some(match self {
            Self::Budget(_) | Self::Queue(_) | Self::Handshakes(_) => Stage::Queue,
            Self::LocalWorkload(_) | Self::Request(_) | Self::Route(_) | Self::Local(_) => Stage::Facts,
            Self::Accept(AcceptError::OriginalDestination(_) | AcceptError::Socket(_) | AcceptError::Socks(_)) => {
                Stage::Queue
            }
            Self::Accept(_) => Stage::Tls,
            Self::Identity(_) => Stage::Certificate,
            Self::Refused(_) => Stage::Policy,
            Self::Dial(error) => dial_stage(error),
            Self::Answer(_) => Stage::Connect,
            Self::Forward(_) | Self::Abandoned => return None,
        })
    }

    /// The policy rule or egress rule that refused it, if one did.
    pub fn rule(&self) -> Option<String> {
        let refusal = match self {
            Self::Refused(refusal) | Self::Forward(ForwardError::Stopped(Stop::Revoked(refusal))) => refusal,
            _ => return None,
        };
        match refusal {
            Refusal::Denied(rule) => Some(rule.to_string()),
            Refusal::Egress(by) => Some(by.to_string()),
            Refusal::NotAllowed(_) | Refusal::PolicyUnknown(_) | Refusal::WorkloadUnknown => None,
        }
    }

    /// Whether the peer's certificate has been revoked.
    pub fn is_revocation(&self) -> bool {
        self.kind() == REVOKED
    }

    /// The value of the `response_flags` label.
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

fn dial_stage(error: &DialError) -> Stage {
    match error {
        DialError::Identity(_) => Stage::Certificate,
        DialError::Tunnel(error) => tunnel_stage(error),
        DialError::Open(_) | DialError::AnswerDeadline => Stage::Connect,
        DialError::Netns(_)
        | DialError::Connect { .. }
        | DialError::ConnectDeadline(_)
        | DialError::Unanswered
        | DialError::Abandoned => Stage::Dial,
    }
}

fn tunnel_stage(error: &TunnelDialError) -> Stage {
    match error {
        TunnelDialError::Tls(_) | TunnelDialError::Http2(_) | TunnelDialError::HandshakeDeadline(_) => Stage::Tls,
        TunnelDialError::Gateway { error, .. } => dial_stage(error),
        TunnelDialError::Behind { error, .. } => tunnel_stage(error),
        TunnelDialError::Blocked(_)
        | TunnelDialError::Connect { .. }
        | TunnelDialError::Netns(_)
        | TunnelDialError::Draining => Stage::Dial,
    }
}

fn refusal_kind(refusal: &Refusal) -> (Reason, &'static str, Fault) {
    match refusal {
        Refusal::Denied(_) => (Reason::Denied, "DENY", Fault::Policy),
        Refusal::NotAllowed(_) => (Reason::NotAllowed, "DENY", Fault::Policy),
        Refusal::PolicyUnknown(_) => (Reason::PolicyUnknown, "DENY", Fault::Mesh),
        Refusal::WorkloadUnknown => (Reason::WorkloadUnknown, "DENY", Fault::Mesh),
        Refusal::Egress(_) => (Reason::EgressDenied, "DENY", Fault::Policy),
    }
}

fn dial_kind(error: &DialError) -> (Reason, &'static str, Fault) {
    match error {
        DialError::Netns(_) => (Reason::Netns, "CONNECT", Fault::Us),
        DialError::Connect { .. } => (Reason::Connect, "CONNECT", Fault::Peer),
        DialError::ConnectDeadline(_) => (Reason::ConnectDeadline, "CONNECT", Fault::Peer),
        DialError::Identity(_) => (Reason::Identity, "IDENTITY_ERROR", Fault::Us),
        DialError::Tunnel(error) => tunnel_kind(error),
        DialError::Open(error) => match error {
            OpenError::Refused => (Reason::StreamRefused, "CONNECT", Fault::Peer),
            OpenError::TunnelGone(_) | OpenError::Broken(_) => (Reason::TunnelBroken, "CONNECT", Fault::Peer),
            OpenError::Status(status) if status.as_u16() == 401 => (Reason::PeerDenied, "CONNECT", Fault::Policy),
            OpenError::Status(_) => (Reason::PeerRefused, "CONNECT", Fault::Peer),
        },
        DialError::Unanswered => (Reason::ConnectDeadline, "CONNECT", Fault::Peer),
        DialError::AnswerDeadline => (Reason::AnswerDeadline, "CONNECT", Fault::Peer),
        DialError::Abandoned => (Reason::Abandoned, "CONNECT", Fault::App),
    }
}

fn tunnel_kind(error: &TunnelDialError) -> (Reason, &'static str, Fault) {
    match *error {
        TunnelDialError::Blocked(_) => (Reason::TunnelBlocked, "NETWORK_POLICY", Fault::Peer),
        TunnelDialError::Connect { .. } => (Reason::TunnelConnect, "CONNECT", Fault::Peer),
        TunnelDialError::Netns(_) => (Reason::Netns, "CONNECT", Fault::Us),
        TunnelDialError::Tls(ref error) if is_revoked(error) => REVOKED,
        TunnelDialError::Tls(ref error) if clock_reason(error).is_some() => CLOCK,
        TunnelDialError::Tls(_) => (Reason::TunnelTls, "TLS_FAILURE", Fault::Peer),
        // With TLS 1.3 a server checks the client's certificate after the client's handshake is done, so its
        // refusal arrives as an HTTP/2 error.
        TunnelDialError::Http2(ref error) if error.clock_reason().is_some() => CLOCK,
        TunnelDialError::Http2(_) => (Reason::TunnelHttp2, "H2_HANDSHAKE_FAILURE", Fault::Peer),
        TunnelDialError::HandshakeDeadline(_) => (Reason::TunnelHandshakeDeadline, "TLS_FAILURE", Fault::Peer),
        TunnelDialError::Draining => (Reason::Drained, "CONNECT", Fault::Us),
        TunnelDialError::Gateway { ref error, .. } => dial_kind(error),
        TunnelDialError::Behind { ref error, .. } => tunnel_kind(error),
    }
}
