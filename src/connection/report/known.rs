//! What the record of a connection knows of it: before its route is known, and since then.

use super::direction::Direction;
use super::live::Connection;
use crate::mesh::Text;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a record knows.
#[derive(Debug)]
pub enum Known {
    /// The route is not known yet.
    Begun(Box<Begun>),
    /// The route is known.
    Routed(Arc<Connection>),
}

/// What is known of a connection from its begin.
#[derive(Clone, Debug)]
pub struct Begun {
    /// Uid of its pod.
    pub pod: Text,
    /// Its direction.
    pub direction: Direction,
    /// Address that opened it.
    pub source: SocketAddr,
    /// The destination, once it is known.
    pub destination: Option<SocketAddr>,
    /// When it was accepted.
    pub start: Instant,
}

impl Known {
    /// Uid of its pod.
    pub fn pod(&self) -> &Text {
        match self {
            Self::Begun(begun) => &begun.pod,
            Self::Routed(connection) => &connection.pod,
        }
    }

    /// Its direction.
    pub fn direction(&self) -> Direction {
        match self {
            Self::Begun(begun) => begun.direction,
            Self::Routed(connection) => connection.direction,
        }
    }

    /// Address that opened it.
    pub fn source(&self) -> SocketAddr {
        match self {
            Self::Begun(begun) => begun.source,
            Self::Routed(connection) => connection.source,
        }
    }

    /// The destination, if it is known.
    pub fn destination(&self) -> Option<SocketAddr> {
        match self {
            Self::Begun(begun) => begun.destination,
            Self::Routed(connection) => Some(connection.destination),
        }
    }

    /// Time since its begin.
    pub fn elapsed(&self) -> Duration {
        match self {
            Self::Begun(begun) => begun.start.elapsed(),
            Self::Routed(connection) => connection.since.elapsed(),
        }
    }

    /// The connection, if its route is known.
    pub fn connection(&self) -> Option<&Arc<Connection>> {
        match self {
            Self::Begun(_) => None,
            Self::Routed(connection) => Some(connection),
        }
    }
}
