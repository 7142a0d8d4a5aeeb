//! The access log: one line for each connection at its end (target `access`), with ztunnel's field names in ztunnel's
//! order.

use super::direction::Direction;
use super::failure::Failure;
use super::live::Connection;
use super::stages::Stages;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The data of a connection's end, in addition to what is known of it while it is open.
#[derive(Debug)]
pub struct Summary<'a> {
    /// How long it was open.
    pub duration: Duration,
    /// Why it failed or was refused; `None` if it ended well.
    pub failure: Option<&'a Failure>,
    /// The endpoints that were tried before, and why each was left.
    pub tried: Option<&'a str>,
    /// How long each stage took, if the line is to show it.
    pub stages: Option<&'a Stages>,
}

/// Writes a line with the fields that all lines about a connection with a known route have, and then the given fields.
macro_rules! line {
    ($level:expr, $message:literal, $connection:expr $(, $($rest:tt)*)?) => {{
        let c: &Connection = $connection;
        let d = &c.details;
        let (source, to) = (d.source_workload.as_deref(), d.destination_workload.as_deref());
        let hop = match c.direction {
            Direction::Outbound => d.actual,
            Direction::Inbound => c.destination,
        };
        tracing::event!(target: "access", $level,
            src.addr = %c.source,
            src.workload = source.map(|w| &**w.shown_name()),
            src.namespace = source.map(|w| &*w.namespace),
            src.identity = d.source_identity.as_ref().map(display),
            src.cluster = source.map(|w| &*w.cluster_id),
            dst.addr = %hop,
            dst.hbone_addr = d.authority.as_ref().map(display),
            dst.service = d.service.as_ref().map(|s| &*s.key.hostname),
            dst.workload = to.map(|w| &**w.shown_name()),
            dst.namespace = to.map(|w| &*w.namespace),
            dst.identity = c.destination_identity().map(display),
            dst.cluster = to.map(|w| &*w.cluster_id),
            dst.gateway = d.gateway.as_deref(),
            dst.gateway_identity = c.gateway_identity().map(display),
            direction = c.direction.word(),
            $($($rest)*,)?
            $message)
    }};
}

/// Writes the debug line for a connection whose route has become known.
pub fn opened(connection: &Connection) {
    line!(tracing::Level::DEBUG, "connection opened", connection);
}

/// Writes the line for the end of a connection whose route was known.
pub fn complete(summary: &Summary<'_>, connection: &Connection) {
    // "Sent" is what the pod of this node sent: outbound the client, inbound the server.
    let sent = connection.bytes.up.load(Ordering::Relaxed);
    let received = connection.bytes.down.load(Ordering::Relaxed);
    let duration = format!("{}ms", summary.duration.as_millis());
    match summary.failure {
        None => line!(
            tracing::Level::INFO,
            "connection complete",
            connection,
            bytes_sent = sent,
            bytes_recv = received,
            duration = duration.as_str(),
            tried = summary.tried,
            stages = summary.stages.map(display)
        ),
        Some(failure) => line!(
            tracing::Level::ERROR,
            "connection complete",
            connection,
            bytes_sent = sent,
            bytes_recv = received,
            duration = duration.as_str(),
            error = failure.to_string().as_str(),
            reason = failure.word(),
            next_step = failure.reason().advice(),
            tried = summary.tried,
            stages = summary.stages.map(display)
        ),
    }
}

/// Writes the line for a connection that failed before its route was known. `suppressed` such lines were left out
/// before it.
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
        next_step = failure.reason().advice(),
        lines_suppressed = (suppressed > 0).then_some(suppressed),
        "connection failed");
}
