//! Port 15001: a connection that the pod opened. Steps: accept, choose, dial, forward, report. The destination's node
//! authorizes it.

use super::egress::Outside;
use super::ending::{CarriedBy, CarriedEnd, ResetUnlessDone, stop_signal, unless_client_resets};
use super::lookup::{find_route, own_credentials, own_facts};
use crate::connection::accept;
use crate::connection::choose::{NextHop, RouteError, TunnelHop, is_local};
use crate::connection::dial::{self, hbone::OpenedStream, hbone::Origin};
use crate::connection::forward::{ForwardError, Stop};
use crate::connection::pod::Pod;
use crate::connection::report::{Details, Direction, Failure, Record, live::Connection, record::SocketCount};
use crate::connection::worker::{Counted, Worker};
use crate::connection::{forward, headers};
use crate::hbone::{Authority, ConnectRequest};
use crate::identity::Credentials;
use crate::mesh::address::canonical;
use std::net::SocketAddr;
use std::sync::Arc;

/// Carries one connection that the pod opened.
///
/// This completes when the connection has ended, or when it is carried over a tunnel: then the worker's engine has it.
pub async fn outbound(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    counted: Counted,
) {
    let mut record = Record::begin(&worker.shared.reporter, &pod.uid, Direction::Outbound, canonical(peer));
    let count = SocketCount::new(&worker.shared.reporter, Direction::Outbound);
    // Boxed: opening needs more memory than forwarding, and an open connection must not keep it.
    let OpenedOutbound { app, live, far } = match Box::pin(open(worker, pod, socket, peer, &mut record)).await {
        Ok(Some(opened)) => opened,
        Ok(None) => return record.finish(Ok(())),
        Err(failure) => return record.finish(Err(failure)),
    };
    let silence = worker.shared.config.hbone.half_closed_silence;
    match far {
        FarSide::Direct(far, outside) => {
            let stop = async {
                tokio::select! {
                    why = stop_signal(pod, None) => why,
                    why = revoked(outside) => why,
                }
            };
            let result = forward::over_tcp(&app, &far, &live.bytes, silence, stop).await;
            if result.is_ok() {
                far.done();
                app.done();
            }
            record.finish(result.map_err(Failure::from));
        }
        FarSide::Tunnel(OpenedStream { stream, lease }) => match app.into_parts() {
            Ok((app, entry)) => {
                let tunnel = CarriedBy::Outbound(lease);
                let ending =
                    CarriedEnd { record, live, entry, tunnel, _counted: Counted { _socket: Some(count), ..counted } };
                forward::over_stream(app, stream, silence, &worker.tasks, ending);
            }
            Err(error) => record.finish(Err(ForwardError::App(error).into())),
        },
    }
}

/// Resolves when egress policies no longer allow a connection, if it is one to a destination outside the mesh.
async fn revoked(outside: Option<Outside>) -> Stop {
    match outside {
        Some(outside) => outside.revoked().await,
        None => std::future::pending().await,
    }
}

/// An outbound connection whose far side is open.
struct OpenedOutbound {
    app: ResetUnlessDone,
    live: Arc<Connection>,
    far: FarSide,
}

/// The far side of an outbound connection.
enum FarSide {
    Direct(ResetUnlessDone, Option<Outside>),
    Tunnel(OpenedStream),
}

/// The steps accept, choose and dial. `None` for a capture check, which needs nothing more than to arrive.
async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<Option<OpenedOutbound>, Failure> {
    let shared = &worker.shared;
    let captured = accept::captured(socket, peer, &pod.sockets.legs)?;
    if pod.capture_checks.take(captured.destination) {
        return Ok(None);
    }
    record.destination(captured.destination);
    let app = ResetUnlessDone::accepted(captured.app);
    // The daemon's own port was dialled, or a connection of the daemon was redirected back to it. If it were carried,
    // it would come back again, without end.
    if !captured.redirected || pod.legs.contains(captured.source, captured.destination) {
        return Err(RouteError::Loop(captured.destination).into());
    }
    let (snapshot, source) = own_facts(worker, pod).await?;
    pod.with_own(&source, |own| own.check_outbound(captured.destination))?;
    let route = find_route(&shared.mesh, pod, snapshot, &source, captured.destination).await?;
    let details = |hop: Option<&TunnelHop>, actual| Details {
        source_identity: hop.and(source.identity().ok()),
        destination_identity: None,
        source_workload: Some(source.clone()),
        destination_workload: route.workload.clone(),
        service: route.service.clone(),
        actual,
        authority: hop.map(|hop| hop.authority.to_string()),
        rule: None,
    };
    match &route.next_hop {
        NextHop::Direct { to } => {
            let outside = route.workload.is_none() && route.service.is_none();
            let outside = outside.then(|| Outside::new(shared, pod, &source, *to));
            let allowed = outside.as_ref().map_or(Ok(None), Outside::authorize);
            let rule = allowed.as_ref().ok().and_then(|by| by.as_ref().map(ToString::to_string));
            let live = record.opened(Details { rule, ..details(None, *to) });
            allowed?;
            // A pod with several addresses may have bound one of them; keep it as the source.
            let own = Some(captured.source.ip())
                .filter(|ip| ip.is_ipv4() == to.is_ipv4() && !is_local(*ip) && pod.addresses.load().contains(ip));
            let far = unless_client_resets(&app, dial::direct::outbound(&pod.netns, *to, own, &pod.sockets, &pod.legs))
                .await?;
            Ok(Some(OpenedOutbound { app, live, far: FarSide::Direct(ResetUnlessDone::dialled(far), outside) }))
        }
        NextHop::Tunnel(hop) => {
            let live = record.opened(details(Some(hop), hop.to));
            let origin = origin(worker, pod, own_credentials(worker, &source).await?);
            let request = ConnectRequest {
                authority: Authority::Address(hop.authority),
                baggage: Some(headers::baggage(&source)),
                forwarded: Some(headers::forwarded(captured.source, route.service.as_deref())),
                traceparent: Some(headers::traceparent()),
            };
            let opened = unless_client_resets(&app, dial::hbone::open(&worker.pool, &origin, hop, &request)).await?;
            let _known = live.tls.set(opened.lease.tls());
            record.proven(opened.lease.peer());
            Ok(Some(OpenedOutbound { app, live, far: FarSide::Tunnel(opened) }))
        }
    }
}

/// The near end for a tunnel of the pod.
fn origin(worker: &Worker, pod: &Pod, credentials: Arc<Credentials>) -> Origin {
    Origin {
        pod: pod.uid.clone(),
        capture: pod.capture,
        netns: pod.netns.clone(),
        credentials,
        drain: pod.signal(),
        legs: pod.legs.clone(),
        sockets: pod.sockets,
        hbone: worker.shared.config.hbone,
        engine: worker.engine.clone(),
        buffers: worker.shared.buffers.clone(),
    }
}
