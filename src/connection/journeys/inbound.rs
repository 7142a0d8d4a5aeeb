//! Port 15008: a tunnel from a peer. The tunnel is accepted once. Then each of its streams takes the steps choose,
//! authorize, dial, forward and report, as a task of the same worker.

use super::ending::{CarriedBy, CarriedEnd, ResetUnlessDone};
use super::lookup::{check_waypoint, facts_for, own_credentials, own_facts};
use crate::connection::accept::{AcceptError, AcceptedTunnel, TunnelPeer, TunnelStop, tunnel as tunnelled};
use crate::connection::authorize::{self, Permit, Registration, Subject};
use crate::connection::budget::Reservation;
use crate::connection::choose;
use crate::connection::dial::{self, DialError};
use crate::connection::forward::{self, ForwardError};
use crate::connection::headers;
use crate::connection::pod::Pod;
use crate::connection::report::stages::Stage;
use crate::connection::report::{Details, Direction, Failure, Record, record::SocketCount};
use crate::connection::worker::{Accepted, Counted, Worker};
use crate::hbone::request::RequestError;
use crate::hbone::{self, ConnectRequest, Incoming, TunnelError};
use crate::mesh::address::canonical;
use crate::task::slots::Slot;
use http::StatusCode;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// How long a tunnel lasts after its peer's certificate was revoked or has expired, so that the streams can be reset
/// first.
const DISTRUST_GRACE: Duration = Duration::from_millis(500);

/// Streams of one tunnel that begin before everything else of the worker has had its turn.
const STREAMS_PER_TURN: usize = 8;

/// Accepts one tunnel and carries its streams. Until the peer has proven its identity, the connection is counted by
/// `slot` alone; afterwards it is counted in the budget, for the peer.
pub async fn tunnel(worker: &Arc<Worker>, pod: &Arc<Pod>, accepted: Accepted, slot: Slot) {
    let reporter = &worker.shared.reporter;
    let (peer, at) = (canonical(accepted.peer), accepted.at);
    let mut record = Record::accepted(reporter, &pod.uid, Direction::Inbound, peer, at);
    let _count = SocketCount::new(reporter, Direction::Inbound);
    let ChargedTunnel { tunnel: AcceptedTunnel { peer, mut server }, reservation: _reservation } =
        match accept_tunnel(worker, pod, accepted, &mut record).await {
            Ok(None) => {
                reporter.metrics.unused.inc();
                return record.finish(Ok(()));
            }
            Ok(Some(tunnel)) => {
                // From here on each stream has its own record.
                record.finish(Ok(()));
                tunnel
            }
            Err(failure) => {
                if matches!(failure, Failure::Accept(AcceptError::Deadline)) {
                    reporter.metrics.late_handshake();
                }
                return record.finish(Err(failure));
            }
        };
    drop(slot);
    let peer = Arc::new(peer);
    if let Err(error) = serve_streams(worker, pod, &peer, &mut server).await {
        reporter.tunnel_ended(Direction::Inbound, peer.source, &peer.identity, &error);
    }
}

/// Takes the streams of a tunnel until it ends. The error says how it broke.
async fn serve_streams(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    peer: &Arc<TunnelPeer>,
    server: &mut hbone::Server,
) -> Result<(), TunnelError> {
    let drain = pod.signal();
    let (mut going_away, mut end) = (false, None);
    let mut begun = 0;
    loop {
        let next = tokio::select! {
            next = server.next() => next,
            () = drain.gentle(), if !going_away => {
                going_away = true;
                server.go_away();
                continue;
            }
            () = peer.chain.ending(), if !going_away => {
                going_away = true;
                server.go_away();
                continue;
            }
            () = drain.now() => {
                stop_all(peer, server, TunnelStop::Drained);
                return Ok(());
            }
            // The streams are reset first; until then the tunnel must go on.
            why = peer.chain.distrusted(), if end.is_none() => {
                stop_all(peer, server, TunnelStop::Distrusted(why));
                end = Some(Instant::now() + DISTRUST_GRACE);
                server.go_away();
                continue;
            }
            () = tokio::time::sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => return Ok(()),
        };
        match next {
            Some(Ok(incoming)) if end.is_some() => incoming.refuse(StatusCode::FORBIDDEN),
            Some(Ok(incoming)) => {
                let (own, pod, peer, active) = (worker.clone(), pod.clone(), peer.clone(), pod.active.token());
                worker.tasks.spawn(async move { stream(&own, &pod, &peer, incoming, active).await });
                begun += 1;
                if begun % STREAMS_PER_TURN == 0 {
                    tokio::task::yield_now().await;
                }
            }
            Some(Err(error)) => return Err(error),
            None => return Ok(()),
        }
    }
}

/// An accepted tunnel and its reservation in the node's budget.
struct ChargedTunnel {
    tunnel: AcceptedTunnel,
    reservation: Reservation,
}

/// Accepts a tunnel. `None` if the client closed the connection without sending anything.
async fn accept_tunnel(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    Accepted { socket, peer, .. }: Accepted,
    record: &mut Record,
) -> Result<Option<ChargedTunnel>, Failure> {
    let Some(socket) = tunnelled::first_byte(socket, &pod.sockets.legs).await? else { return Ok(None) };
    let shared = &worker.shared;
    let shake = async {
        let (_, workload) = own_facts(worker, pod).await?;
        record.lap(Stage::Facts);
        let credentials = own_credentials(worker, &workload).await?;
        record.lap(Stage::Certificate);
        let hbone = &shared.config.hbone;
        Ok(tunnelled::handshake(&worker.engine, socket, peer, &credentials, hbone, &shared.buffers).await?)
    };
    // Boxed: the handshakes need more memory than an open tunnel, which must not keep it.
    let tunnel: AcceptedTunnel = Box::pin(tunnelled::with_deadline::<_, Failure>(shake)).await?;
    record.lap(Stage::Tls);
    let reservation = shared.budget.reserve(&pod.usage, Some(&tunnel.peer.name))?;
    Ok(Some(ChargedTunnel { tunnel, reservation }))
}

/// Tells all connections of a tunnel to stop. Those that are still being opened stop as soon as they are carried.
fn stop_all(peer: &TunnelPeer, server: &hbone::Server, why: TunnelStop) {
    // Fails only if there is a reason already.
    let _ = peer.stop.set(why);
    server.stop_all();
}

/// Opens one stream of a tunnel. This completes when it is refused, or when it is carried: then the worker's engine has
/// it.
async fn stream(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    peer: &Arc<TunnelPeer>,
    mut incoming: Incoming,
    active: TaskTrackerToken,
) {
    let mut record = Record::begin(&worker.shared.reporter, &pod.uid, Direction::Inbound, peer.source);
    let reservation = match worker.shared.budget.reserve(&pod.usage, Some(&peer.name)) {
        Ok(reservation) => reservation,
        Err(refused) => {
            incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
            return record.finish(Err(refused.into()));
        }
    };
    let request = incoming.request.clone();
    let admitted = tokio::select! {
        admitted = Box::pin(admit(worker, pod, peer, request, &mut record)) => admitted,
        () = incoming.abandoned() => Err(DialError::Abandoned.into()),
    };
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(failure) => {
            incoming.refuse(status(&failure));
            return record.finish(Err(failure));
        }
    };
    let AdmittedStream { app, permit, baggage, preface } = admitted;
    // It fits into the socket's empty send buffer.
    if let Err(error) = (&*app).write_all(&preface) {
        return record.finish(Err(ForwardError::App(error).into()));
    }
    let (app, entry) = match app.into_parts() {
        Ok(parts) => parts,
        Err(error) => return record.finish(Err(ForwardError::App(error).into())),
    };
    let counted =
        Counted { _load: None, _active: active, _reservation: reservation, _task: worker.tasks.token(), _socket: None };
    let revocation = permit.revocation();
    let tunnel = CarriedBy::Inbound(peer.clone(), permit, entry);
    let ending = CarriedEnd { record, tunnel, _counted: counted };
    // Answers 200, now that the application's socket is open.
    let stream = incoming.accept(baggage.as_deref());
    let silence = worker.shared.config.hbone.half_closed_silence;
    let stopper = forward::over_stream(app, stream, silence, &worker.tasks, ending);
    if peer.stop.get().is_some() {
        stopper.stop();
    }
    revocation.stops(stopper);
}

/// A stream that is allowed, with the open socket to its application.
struct AdmittedStream {
    app: ResetUnlessDone,
    permit: Registration,
    baggage: Option<String>,
    /// What the application receives before the stream: a PROXY protocol header, or nothing.
    preface: Vec<u8>,
}

/// The steps choose, authorize and dial.
async fn admit(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    peer: &TunnelPeer,
    request: Result<ConnectRequest, RequestError>,
    record: &mut Record,
) -> Result<AdmittedStream, Failure> {
    let shared = &worker.shared;
    let request = request?;
    record.traced(request.traceparent.as_deref());
    let (snapshot, workload) = own_facts(worker, pod).await?;
    let own = peer.local.ip();
    pod.with_own(&workload, |sockets| sockets.check_tunnel(own))?;
    let snapshot = facts_for(&shared.mesh, pod, snapshot, &workload, &request.authority).await?;
    let target = choose::local::choose(&snapshot, &workload, own, pod.own_ports(), &request.authority)?;
    record.destination(peer.local);
    record.lap(Stage::Facts);
    check_waypoint(worker, pod, &workload, peer.source.ip(), Some(&peer.identity)).await?;
    let subject = Subject { peer: Some(peer.identity.clone()), source: peer.source.ip(), destination: target.address };
    // Register before asking for the permit, so that no policy change is missed in between.
    let registration = shared.permits.register(&workload, &subject);
    let permit = authorize::authorize(&shared.mesh, &registration).await;
    record.lap(Stage::Policy);
    // The host in the peer's `forwarded` header is used for telemetry, and only if it is a service of this workload.
    let by_host = request.forwarded_host().and_then(|h| snapshot.service_by_hostname(h, &workload.namespace)).cloned();
    let by_host = by_host.filter(|service| workload.services.contains_key(&service.key));
    let by_target = |port| snapshot.service_by_target(&workload, port).cloned();
    let live = record.opened(Details {
        source_workload: if request.is_from_other_network(&workload.network) {
            // The address is the gateway's, and the client's would mean nothing here.
            None
        } else {
            snapshot.workload_at(&workload.network, peer.source.ip()).cloned()
        },
        source_identity: Some(peer.identity.clone()),
        destination_workload: Some(workload.clone()),
        destination_identity: workload.identity().ok(),
        service: target.service.or(by_host).or_else(|| by_target(target.address.port())),
        actual: target.address,
        authority: Some(request.authority.clone()),
        gateway: None,
        rule: permit.as_ref().ok().map(Permit::text),
    });
    record.proven(&peer.proven);
    drop(snapshot);
    let client = peer.source.ip();
    let (permit, netns) = (permit?, &pod.netns);
    let (app, preface) = match target.announce {
        None => {
            (dial::direct::to_app(&permit, netns, target.address, client, &pod.sockets, &pod.legs).await?, Vec::new())
        }
        Some(asked) => {
            let ip = match (shared.config.localhost_app_tunnel, target.address.ip().is_ipv4()) {
                (false, _) => target.address.ip(),
                (true, true) => Ipv4Addr::LOCALHOST.into(),
                (true, false) => Ipv6Addr::LOCALHOST.into(),
            };
            let to = SocketAddr::new(ip, target.address.port());
            // The PROXY protocol header names the client, so the connection comes from the pod's own address.
            let app = dial::direct::to_app(&permit, netns, to, to.ip(), &pod.sockets, &pod.legs).await?;
            (app, headers::proxy_v2(peer.source, asked, &peer.identity))
        }
    };
    live.leg_port.store(app.entry.port(), Ordering::Relaxed);
    record.lap(Stage::Dial);
    record.open();
    let baggage = shared.config.response_baggage.then(|| headers::baggage(&workload));
    Ok(AdmittedStream { app: ResetUnlessDone::dialled(app), permit: registration, baggage, preface })
}

/// The HTTP status with which a stream is refused (source: ztunnel's inbound HBONE handling).
fn status(failure: &Failure) -> StatusCode {
    match failure {
        Failure::Request(_) => StatusCode::BAD_REQUEST,
        Failure::Local(error) => error.status(),
        Failure::Refused(_) => StatusCode::UNAUTHORIZED,
        Failure::Budget(_)
        | Failure::Queue(_)
        | Failure::Handshakes(_)
        | Failure::LocalWorkload(_)
        | Failure::Accept(_)
        | Failure::Identity(_)
        | Failure::Route(_)
        | Failure::Dial(_)
        | Failure::Answer(_)
        | Failure::Forward(_)
        | Failure::Abandoned => StatusCode::SERVICE_UNAVAILABLE,
    }
}
