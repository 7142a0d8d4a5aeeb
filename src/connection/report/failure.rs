//! Every way a connection can end otherwise than well, in one closed list. From it follow, by exhaustive matches, the
//! word in metrics, the response flag, whose fault it was, and whether trying again is safe.

use crate::connection::accept::AcceptError;
use crate::connection::authorize::Refusal;
use crate::connection::budget::Refused;
use crate::connection::choose::{LocalError, RouteError};
use crate::connection::dial::{DialError, TunnelDialError};
use crate::connection::forward::{ForwardError, Stop};
use crate::hbone::client::OpenError;
use crate::hbone::request::RequestError;
use crate::identity::store::StoreError;
use crate::identity::verify::is_revoked;
use crate::mesh::Text;
use crate::task::places::Full;

/// How a connection ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The node has no room for it.
    #[error(transparent)]
    Budget(#[from] Refused),
    /// Accepted faster than connections can be begun.
    #[error("too many connections at once: {0} wait for a worker already")]
    Queue(usize),
    /// Too many that have not proven who they are.
    #[error("too many handshakes at once: {0}")]
    Handshakes(#[from] Full),
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
const REVOKED: (&str, &str, Fault) = ("cert_revoked", "CERT_REVOKED", Fault::Peer);

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
    /// Word for the metric label, response flag of the access log and traffic metrics (source: the reference's
    /// response_flags), and whose fault it is.
    fn kind(&self) -> (&'static str, &'static str, Fault) {
        match self {
            Self::Budget(Refused::Full { .. }) | Self::Queue(_) => ("limit", "CONNECT", Fault::Us),
            Self::Budget(Refused::Pod { .. }) => ("largest_consumer", "CONNECT", Fault::App),
            Self::Budget(Refused::Peer { .. }) => ("largest_peer", "CONNECT", Fault::Peer),
            Self::Handshakes(_) => ("handshake_limit", "CONNECT", Fault::Peer),
            Self::LocalWorkload(_) => ("workload_unknown", "CONNECT", Fault::Mesh),
            Self::Accept(error) => match error {
                AcceptError::OriginalDestination(_) => ("original_destination_unknown", "CONNECT", Fault::Us),
                AcceptError::Socket(_) => ("socket", "CONNECT", Fault::App),
                AcceptError::Tls(error) if is_revoked(error) => REVOKED,
                AcceptError::Tls(_) | AcceptError::NoCertificate => ("peer_tls", "TLS_FAILURE", Fault::Peer),
                AcceptError::Http2(_) => ("peer_http2", "H2_HANDSHAKE_FAILURE", Fault::Peer),
                AcceptError::Silent => ("peer_silent", "TLS_FAILURE", Fault::Peer),
                AcceptError::Deadline => ("peer_handshake_deadline", "TLS_FAILURE", Fault::Peer),
            },
            Self::Identity(_) => ("identity", "IDENTITY_ERROR", Fault::Us),
            Self::Request(_) => ("bad_request", "CONNECT", Fault::Peer),
            Self::Refused(refusal) => refusal_kind(refusal),
            Self::Route(error) => match error {
                RouteError::Loop(_) => ("loop", "CONNECT", Fault::App),
                RouteError::UnknownWaypoint { .. } => ("waypoint_unknown", "CONNECT", Fault::Mesh),
                RouteError::NoEndpoint(_) => ("no_endpoint", "CONNECT", Fault::Mesh),
                RouteError::NoPort(..) => ("no_port", "CONNECT", Fault::App),
                RouteError::NoAddress(_) => ("no_address", "CONNECT", Fault::Mesh),
                RouteError::OtherNetwork(_) => ("other_network", "CONNECT", Fault::Mesh),
                RouteError::Identity(..) => ("bad_identity", "CONNECT", Fault::Mesh),
                RouteError::Protocol(_) => ("protocol", "CONNECT", Fault::Mesh),
                RouteError::Unresolved(_) | RouteError::Resolve(_) => ("name_not_resolved", "CONNECT", Fault::Mesh),
                RouteError::Unasked(_) | RouteError::Ask(_) => ("no_answer", "CONNECT", Fault::Mesh),
            },
            Self::Local(error) => match error {
                LocalError::IpMismatch { .. } => ("ip_mismatch", "CONNECT", Fault::Peer),
                LocalError::UnknownHost(_) => ("unknown_host", "CONNECT", Fault::Peer),
                LocalError::UnknownPort(..) => ("no_port", "CONNECT", Fault::Peer),
                LocalError::Loop(_) => ("loop", "CONNECT", Fault::Peer),
                LocalError::Delivery => ("application_tunnel", "CONNECT", Fault::Us),
                LocalError::NoVip(_) => ("no_address", "CONNECT", Fault::Mesh),
            },
            Self::Dial(error) => dial_kind(error),
            Self::Answer(_) => ("tunnel_broken", "CONNECT", Fault::Peer),
            Self::Forward(error) => match error {
                ForwardError::App(_) => ("app_reset", "CONNECT", Fault::App),
                ForwardError::Far(_) | ForwardError::Reset(_) => ("peer_reset", "CONNECT", Fault::Peer),
                ForwardError::Tunnel(_) => ("tunnel_broken", "CONNECT", Fault::Peer),
                ForwardError::HalfClosedSilence(_) => ("half_closed_silence", "CONNECT", Fault::App),
                ForwardError::Stopped(Stop::Revoked(_)) => ("policy_change", "DENY", Fault::Policy),
                ForwardError::Stopped(Stop::CertificateRevoked) => REVOKED,
                ForwardError::Stopped(Stop::CertificateExpired) => ("cert_expired", "TLS_FAILURE", Fault::Peer),
                ForwardError::Stopped(Stop::Drained) => ("drained", "-", Fault::Us),
            },
            Self::Abandoned => ("drained", "-", Fault::Us),
        }
    }

    /// The word in `culvert_connection_failures_total{reason}`.
    pub fn word(&self) -> &'static str {
        self.kind().0
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

fn refusal_kind(refusal: &Refusal) -> (&'static str, &'static str, Fault) {
    match refusal {
        Refusal::Denied(_) => ("denied", "DENY", Fault::Policy),
        Refusal::NotAllowed(_) => ("not_allowed", "DENY", Fault::Policy),
        Refusal::PolicyUnknown(_) => ("policy_unknown", "DENY", Fault::Mesh),
        Refusal::WorkloadUnknown => ("workload_unknown", "DENY", Fault::Mesh),
    }
}

fn dial_kind(error: &DialError) -> (&'static str, &'static str, Fault) {
    match error {
        DialError::Netns(_) => ("netns", "CONNECT", Fault::Us),
        DialError::Connect { .. } => ("connect", "CONNECT", Fault::Peer),
        DialError::ConnectDeadline(_) => ("connect_deadline", "CONNECT", Fault::Peer),
        DialError::Identity(_) => ("identity", "IDENTITY_ERROR", Fault::Us),
        DialError::Tunnel(error) => match **error {
            TunnelDialError::Blocked(_) => ("tunnel_blocked", "NETWORK_POLICY", Fault::Peer),
            TunnelDialError::Connect { .. } => ("tunnel_connect", "CONNECT", Fault::Peer),
            TunnelDialError::Netns(_) => ("netns", "CONNECT", Fault::Us),
            TunnelDialError::Tls(ref error) if is_revoked(error) => REVOKED,
            TunnelDialError::Tls(_) => ("tunnel_tls", "TLS_FAILURE", Fault::Peer),
            TunnelDialError::Http2(_) => ("tunnel_http2", "H2_HANDSHAKE_FAILURE", Fault::Peer),
            TunnelDialError::HandshakeDeadline(_) => ("tunnel_handshake_deadline", "TLS_FAILURE", Fault::Peer),
            TunnelDialError::Draining => ("drained", "CONNECT", Fault::Us),
        },
        DialError::Open(error) => match error {
            OpenError::Refused => ("stream_refused", "CONNECT", Fault::Peer),
            OpenError::TunnelGone(_) | OpenError::Broken(_) => ("tunnel_broken", "CONNECT", Fault::Peer),
            OpenError::Status(status) if status.as_u16() == 401 => ("peer_denied", "CONNECT", Fault::Policy),
            OpenError::Status(_) => ("peer_refused", "CONNECT", Fault::Peer),
            OpenError::Request(_) => ("request", "CONNECT", Fault::Us),
        },
        DialError::AnswerDeadline => ("answer_deadline", "CONNECT", Fault::Peer),
        DialError::Abandoned => ("abandoned", "CONNECT", Fault::App),
    }
}
