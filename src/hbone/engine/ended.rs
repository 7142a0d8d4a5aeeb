//! How a carried connection ends.

use super::backlog::Backlog;
use crate::hbone::buffers::Held;
use crate::hbone::codec::frame::ErrorCode;
use crate::hbone::error::TunnelError;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

/// Why carrying ended before both sides had closed in order.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The application's connection broke: it was reset, or it timed out.
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The peer reset the stream.
    #[error("the peer reset the stream ({0})")]
    Reset(ErrorCode),
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    Tunnel(Arc<TunnelError>),
    /// This node ended the tunnel because of what its peer did.
    #[error("{0}")]
    Cut(Arc<TunnelError>),
    /// One side had closed, and the other one was silent for too long.
    #[error("half-closed and silent for {0:?}")]
    HalfClosedSilence(Duration),
    /// The connection was told to stop.
    #[error("stopped")]
    Stopped,
}

impl CarryError {
    /// The error for a tunnel that has ended.
    pub(super) fn tunnel(error: &Arc<TunnelError>) -> Self {
        if error.cut().is_some() { Self::Cut(error.clone()) } else { Self::Tunnel(error.clone()) }
    }
}

/// A carried connection that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub result: Result<(), CarryError>,
    /// The application's socket. If the connection did not end in order, the owner has to reset it.
    pub app: TcpStream,
    /// What the application has not taken yet. It is to be delivered before the reset if the far side broke.
    pub rest: Rest,
}

/// Bytes that an application has not taken yet.
#[derive(Debug, Default)]
pub struct Rest {
    pub(super) backlog: Backlog,
    /// They count as held until they are dropped.
    pub(super) _held: Option<Held>,
}

impl Rest {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.backlog.is_empty()
    }

    /// The bytes, as pieces. They stay accounted for until `self` is dropped.
    pub fn take(&mut self) -> impl Iterator<Item = Vec<u8>> + use<> {
        std::mem::take(&mut self.backlog).into_chunks()
    }
}
