//! Why a stream to the control plane ended, and what that means for the next one.

use crate::rpc;
use std::time::Duration;
use tonic::{Code, Status};

/// How long the first response of each type may take.
pub(super) const FIRST_RESPONSE: Duration = Duration::from_secs(60);

/// Why a stream ended, or never began.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error(transparent)]
    Connect(#[from] rpc::ConnectError),
    #[error("the control plane refused the stream: {}: {}", .0.code(), .0.message())]
    Refused(Box<Status>),
    #[error("the stream has failed: {}: {}", .0.code(), .0.message())]
    Failed(Box<Status>),
    #[error("the control plane has ended the stream")]
    Complete,
    #[error("no first response within {} s", FIRST_RESPONSE.as_secs())]
    Silent,
    #[error("the control plane does not read requests")]
    Stuck,
}

impl StreamError {
    /// The word in `istio_xds_connection_terminations_total{reason}` (source: ztunnel).
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Refused(_) => "ConnectionError",
            Self::Complete => "Complete",
            Self::Failed(status) if is_recycled(status) => "Reconnect",
            Self::Failed(_) | Self::Silent | Self::Stuck => "Error",
        }
    }

    /// Whether the server ended the stream on purpose, as istiod does with every stream after a while. A server that is
    /// killed does not: its connection breaks.
    pub(super) fn is_orderly(&self) -> bool {
        match self {
            Self::Complete => true,
            Self::Failed(status) => is_recycled(status) && !is_broken(status),
            Self::Connect(_) | Self::Refused(_) | Self::Silent | Self::Stuck => false,
        }
    }

    /// Whether the server found a message too large.
    pub(super) fn is_too_large(&self) -> bool {
        // The same code means that there are too many requests; only the text distinguishes the two (source: gRPC's
        // server).
        let too_large =
            |status: &Status| status.code() == Code::ResourceExhausted && status.message().contains("larger than max");
        matches!(self, Self::Refused(status) | Self::Failed(status) if too_large(status))
    }
}

/// Whether a stream ends with this status when the server limits its age or shuts down.
fn is_recycled(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => ["transport is closing", "goaway"].iter().any(|text| status.message().contains(text)),
        _ => false,
    }
}

/// Whether the connection below the stream has broken.
fn is_broken(status: &Status) -> bool {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        let is_io = |error: &h2::Error| error.is_io();
        if error.is::<std::io::Error>() || error.downcast_ref::<h2::Error>().is_some_and(is_io) {
            return true;
        }
        next = error.source();
    }
    false
}
