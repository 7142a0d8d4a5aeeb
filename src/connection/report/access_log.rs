//! The access log: one line per connection at its end (target `access`), with the reference's field names in its order.

use super::details::Details;
use super::direction::Direction;
use super::failure::Failure;
use super::live::ByteCounts;
use crate::mesh::Workload;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What is known at the end of a connection besides its [`Details`].
#[derive(Debug)]
pub struct Summary<'a> {
    /// Which way.
    pub direction: Direction,
    /// Who opened it.
    pub source: SocketAddr,
    /// Where it was going.
    pub destination: Option<SocketAddr>,
    /// Bytes carried.
    pub bytes: &'a ByteCounts,
    /// How long it lived.
    pub duration: Duration,
    /// How it ended, if badly.
    pub failure: Option<&'a Failure>,
}

/// Writes the fields common to all lines about a connection whose route is known, then the given ones.
macro_rules! line {
    ($level:expr, $message:literal, $direction:expr, $source:expr, $destination:expr, $details:expr $(, $($rest:tt)*)?) => {{
        let d: &Details = $details;
        let (source, to) = (d.source_workload.as_deref(), d.destination_workload.as_deref());
        let hop = match $direction {
            Direction::Outbound => Some(d.actual),
            Direction::Inbound => $destination.or(Some(d.actual)),
        };
        tracing::event!(target: "access", $level,
            src.addr = %$source,
            src.workload = source.map(name),
            src.namespace = source.map(|w| &*w.namespace),
            src.identity = d.source_identity.as_ref().map(display),
            src.cluster = source.map(|w| &*w.cluster_id),
            dst.addr = hop.map(display),
            dst.hbone_addr = d.authority.as_deref().map(display),
            dst.service = d.service.as_ref().map(|s| &*s.key.hostname),
            dst.workload = to.map(name),
            dst.namespace = to.map(|w| &*w.namespace),
            dst.identity = d.destination_identity.as_ref().map(display),
            dst.cluster = to.map(|w| &*w.cluster_id),
            direction = $direction.word(),
            $($($rest)*,)?
            $message)
    }};
}

fn name(workload: &Workload) -> &str {
    if workload.name.is_empty() { &workload.canonical_name } else { &workload.name }
}

/// A connection's route is known; at debug level.
pub fn opened(direction: Direction, source: SocketAddr, destination: Option<SocketAddr>, details: &Details) {
    line!(tracing::Level::DEBUG, "connection opened", direction, source, destination, details);
}

/// A connection has ended.
pub fn complete(summary: &Summary<'_>, details: &Details) {
    // Outbound, "sent" is what the client sent; inbound, what the server sent: each from its own pod's viewpoint.
    let sent = summary.bytes.up.load(Ordering::Relaxed);
    let received = summary.bytes.down.load(Ordering::Relaxed);
    let duration = format!("{}ms", summary.duration.as_millis());
    let (direction, source, destination) = (summary.direction, summary.source, summary.destination);
    match summary.failure {
        None => line!(
            tracing::Level::INFO,
            "connection complete",
            direction,
            source,
            destination,
            details,
            bytes_sent = sent,
            bytes_recv = received,
            duration = duration.as_str()
        ),
        Some(failure) => line!(
            tracing::Level::ERROR,
            "connection complete",
            direction,
            source,
            destination,
            details,
            bytes_sent = sent,
            bytes_recv = received,
            duration = duration.as_str(),
            error = failure.to_string().as_str(),
            reason = failure.word()
        ),
    }
}

/// A connection failed before its route was known.
pub fn failed_early(
    direction: Direction,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    failure: &Failure,
    suppressed: u64,
) {
    tracing::event!(target: "access", tracing::Level::WARN,
        src.addr = %source,
        dst.addr = destination.map(display),
        direction = direction.word(),
        error = failure.to_string().as_str(),
        reason = failure.word(),
        lines_suppressed = (suppressed > 0).then_some(suppressed),
        "connection failed");
}
