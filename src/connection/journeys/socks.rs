//! Port 15080, on the pod's loopback address: a connection that the pod's application asks for by SOCKS5. Steps: accept,
//! choose, dial, forward, report, as for one that is redirected. The client is answered once the far side is open.

use super::ending::ResetUnlessDone;
use super::lookup::{find_route, own_facts};
use super::outbound::{Opened, Outbound, carry};
use crate::connection::accept::socks::{Reply, SocksTarget, socks as read_request};
use crate::connection::authorize::Refusal;
use crate::connection::choose::RouteError;
use crate::connection::dial::DialError;
use crate::connection::forward::ForwardError;
use crate::connection::pod::Pod;
use crate::connection::report::stages::Stage;
use crate::connection::report::{Direction, Failure, Record, record::SocketCount};
use crate::connection::worker::{Accepted, Counted, Worker};
use crate::mesh::address::canonical;
use crate::mesh::{Snapshot, Workload};
use crate::ports::SOCKS;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::sync::Arc;

/// Carries one connection that the pod asked for.
pub async fn socks(worker: &Arc<Worker>, pod: &Arc<Pod>, Accepted { socket, peer, at }: Accepted, counted: Counted) {
    let mut record = Record::accepted(&worker.shared.reporter, &pod.uid, Direction::Outbound, canonical(peer), at);
    let count = SocketCount::new(&worker.shared.reporter, Direction::Outbound);
    // Boxed: opening needs more memory than forwarding, and an open connection must not keep it.
    match Box::pin(open(worker, pod, socket, peer, &mut record)).await {
        Ok(opened) => carry(worker, pod, opened, record, (count, counted)).await,
        Err(failure) => record.finish(Err(failure)),
    }
}

async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<Opened, Failure> {
    let (app, target) = read_request(socket).await?;
    let app = ResetUnlessDone::accepted(app);
    // A reply fits into the socket's empty send buffer.
    let answer = |reply: Reply| (&*app).write_all(&reply.message());
    let reached = async {
        let (snapshot, source) = own_facts(worker, pod).await?;
        let to = address(pod, &snapshot, &source, target).await?;
        record.destination(to);
        // The client would ask itself through the daemon, again and again. The unspecified address leads to loopback.
        if (to.ip().is_loopback() || to.ip().is_unspecified()) && to.port() == SOCKS {
            return Err(RouteError::Loop(to).into());
        }
        pod.with_own(&source, |own| own.check_outbound(to))?;
        // The far side knows the pod by its address, not by the loopback address.
        let own = source.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).copied();
        let from = SocketAddr::new(own.unwrap_or(peer.ip()), peer.port());
        let outbound = Outbound { worker, pod, app: &app, source: &source, from };
        let first = find_route(&worker.shared, pod, snapshot, &source, to, &[]).await?;
        record.lap(Stage::Facts);
        outbound.reach(first, to, record).await
    };
    match reached.await {
        Ok((live, far, in_flight)) => {
            answer(Reply::Succeeded).map_err(ForwardError::App)?;
            Ok(Opened { app, live, far, in_flight })
        }
        Err(failure) => {
            // If the client has left, nobody needs the answer.
            if answer(reply(&failure)).is_ok() {
                app.done();
            }
            Err(failure)
        }
    }
}

/// The address that is meant. A name is looked up as the pod's own questions are, and counts for egress policies as if
/// the pod had asked.
async fn address(
    pod: &Pod,
    snapshot: &Snapshot,
    source: &Workload,
    target: SocksTarget,
) -> Result<SocketAddr, RouteError> {
    let (host, port) = match target {
        SocksTarget::Address(address) => return Ok(address),
        SocksTarget::Host(host, port) => (host, port),
    };
    let found = pod.resolver.look_up((snapshot, source), &host).await?;
    if let Some((name, ttl)) = &found.proven {
        pod.resolver.answered.note(name, &found.addresses, *ttl);
    }
    let first = found.addresses.first().ok_or_else(|| RouteError::NoAddress(host.as_str().into()))?;
    Ok(SocketAddr::new(*first, port))
}

/// What a client is told of a failure.
fn reply(failure: &Failure) -> Reply {
    match failure {
        Failure::Refused(Refusal::Egress(_)) => Reply::NotAllowed,
        Failure::Dial(DialError::Connect { source, .. }) if source.kind() == ErrorKind::ConnectionRefused => {
            Reply::Refused
        }
        Failure::Route(RouteError::Loop(_)) => Reply::NotAllowed,
        Failure::Route(_) | Failure::Dial(_) => Reply::Unreachable,
        _ => Reply::Failure,
    }
}
