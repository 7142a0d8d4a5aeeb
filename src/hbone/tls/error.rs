//! Why a TLS connection fails after its handshake.

use super::record::RecordError;
use rustls::AlertDescription;
use std::io;

/// Why a connection fails. Nothing more can be received on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A record cannot be opened or sealed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The peer ended the connection with this alert. The words are the same as in rustls.
    #[error("received fatal alert: {0:?}")]
    Alert(AlertDescription),
    /// The peer sent something that is not allowed here.
    #[error("unexpected TLS message: {0}")]
    Unexpected(&'static str),
    /// The peer sent something of the wrong length.
    #[error("malformed TLS message: {0}")]
    Malformed(&'static str),
    /// The peer sent a value that does not exist.
    #[error("illegal value in a TLS message: {0}")]
    Illegal(&'static str),
    /// The peer keeps us busy without sending data.
    #[error("key_update_flood: too many TLS records without data")]
    Flood,
    /// The byte stream ended without a close_notify alert, so the end of the data may be missing. The owner of the
    /// socket reports this.
    #[error("the peer closed the connection without a TLS close_notify")]
    Truncated,
    /// We have already sent our last record.
    #[error("the TLS connection is already closed for sending")]
    Closed,
    /// The keys that follow the current ones cannot be derived.
    #[error("the next TLS keys cannot be derived")]
    Keys,
}

impl TlsError {
    /// The alert that the peer should get for this (RFC 8446 section 6.2). `None`: it expects none.
    pub fn alert(&self) -> Option<u8> {
        let alert = match self {
            Self::Alert(_) | Self::Truncated | Self::Closed => return None,
            Self::Record(RecordError::Overflow) => AlertDescription::RecordOverflow,
            Self::Record(RecordError::BadMac) => AlertDescription::BadRecordMac,
            Self::Record(RecordError::Unexpected) | Self::Unexpected(_) | Self::Flood => {
                AlertDescription::UnexpectedMessage
            }
            Self::Record(RecordError::Buffer | RecordError::Exhausted | RecordError::Library) | Self::Keys => {
                AlertDescription::InternalError
            }
            Self::Malformed(_) => AlertDescription::DecodeError,
            Self::Illegal(_) => AlertDescription::IllegalParameter,
        };
        Some(alert.into())
    }
}

impl From<TlsError> for io::Error {
    /// An alert becomes the error that rustls has for it, because callers look for that one.
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Alert(alert) => Self::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert)),
            TlsError::Truncated => Self::new(io::ErrorKind::UnexpectedEof, error),
            TlsError::Closed => Self::new(io::ErrorKind::BrokenPipe, error),
            _ => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}
