//! The path of a connection. The folders are its steps, and their alphabetical order is their order in time:
//! accept → authorize → choose → dial → forward → report. A step names only steps before it; this file knows all.
//!
//! - *outbound* (15001): accept, choose, dial, forward, report. The destination's side authorizes.
//! - *inbound* (15008): a tunnel is accepted once; each stream is then chosen, authorized, dialled, forwarded, reported.
//! - *plaintext* (15006): like an inbound stream, without tunnel and without identity.

pub mod accept;
pub mod authorize;
mod between;
pub mod budget;
pub mod choose;
pub mod dial;
pub mod forward;
pub mod headers;
pub mod pod;
pub mod report;
pub mod worker;

pub use pod::Pod;
pub use worker::{Entrance, Shared, Workers};

use accept::{AcceptError, Peer, tunnel as tunnelled};
use authorize::{Live, Subject};
use between::{ResetUnlessDone, find_route, is_local, local_facts, origin, own_credentials, status, stop, unless_gone};
use budget::Open;
use choose::{HboneWay, LocalError, RouteError, Way};
use dial::{DialError, direct::SocketConfig, hbone::Opened, pool::PoolConfig};
use report::{Details, Direction, Failure, Record, live::Connection, record::SocketCount};
use worker::Worker;

use crate::hbone::{self, Authority, ConnectRequest, Incoming};
use crate::mesh::{SpiffeName, Text, address::canonical};
use crate::task::slots::Slot;
use http::StatusCode;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long the tunnel of a peer that is not trusted any more lasts, for its streams to be reset in order.
const DISTRUST_GRACE: Duration = Duration::from_millis(500);

/// Settings of the data plane.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Worker threads.
    pub workers: usize,
    /// Marks and options of sockets.
    pub sockets: SocketConfig,
    /// HTTP/2 settings.
    pub hbone: hbone::Config,
    /// Tunnel pool settings.
    pub pool: PoolConfig,
    /// Connections that may be open at once; further ones are reset and counted.
    pub max_connections: usize,
    /// Whether streams with a PROXY protocol header go to the pod's loopback address instead of its own.
    pub localhost_app_tunnel: bool,
    /// Whether the 200 of an accepted stream carries the workload's baggage.
    pub response_baggage: bool,
}

/// 15001: a connection that the pod opened.
pub async fn outbound(worker: &Arc<Worker>, pod: &Arc<Pod>, socket: std::net::TcpStream, peer: SocketAddr) {
    let mut record = Record::begin(&worker.shared.reporter, &pod.uid, Direction::Outbound, canonical(peer));
    let _count = SocketCount::new(&worker.shared.reporter, Direction::Outbound);
    let result = outbound_steps(worker, pod, socket, peer, &mut record).await;
    record.finish(result);
}

async fn outbound_steps(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<(), Failure> {
    // Boxed, so that an open connection does not keep the room that opening it took.
    let Some(Outward { app, live, far }) = Box::pin(open(worker, pod, socket, peer, record)).await? else {
        return Ok(());
    };
    let silence = worker.shared.config.hbone.half_closed_silence;
    match far {
        Far::Direct(far) => {
            forward::over_tcp(&app, &far, &live.bytes, silence, stop(pod, None, None)).await?;
            far.done();
        }
        Far::Tunnel(Opened { stream, lease }) => {
            let stop = stop(pod, None, Some(lease.chain()));
            forward::over_stream(&app, stream, &live.bytes, silence, stop).await?;
        }
    }
    app.done();
    Ok(())
}

/// An outbound connection whose far side is open.
struct Outward {
    app: ResetUnlessDone,
    live: Arc<Connection>,
    far: Far,
}

enum Far {
    Direct(ResetUnlessDone),
    Tunnel(Opened),
}

/// Accept, choose, dial; `None` for a probe of capture, which has arrived with that.
async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<Option<Outward>, Failure> {
    let shared = &worker.shared;
    let captured = accept::captured(socket, peer, &pod.sockets.legs)?;
    if pod.probes.take(captured.destination) {
        return Ok(None);
    }
    record.destination(captured.destination);
    let app = ResetUnlessDone::new(captured.app);
    // Passed on, it would come back to us, and so on without end.
    if !captured.redirected || pod.legs.contains(captured.source, captured.destination) {
        return Err(RouteError::Loop(captured.destination).into());
    }
    let (snapshot, source) = local_facts(worker, pod).await?;
    if pod.own_ports().contains(&captured.destination.port()) && pod.owns(&source, captured.destination.ip()) {
        return Err(RouteError::Loop(captured.destination).into());
    }
    let route = find_route(&shared.mesh, pod, snapshot, &source, captured.destination).await?;
    let details = |way: Option<&HboneWay>, actual| Details {
        source_identity: way.and(source.identity().ok()),
        destination_identity: None,
        source_workload: Some(source.clone()),
        destination_workload: route.workload.clone(),
        service: route.service.clone(),
        actual,
        authority: way.map(|way| way.authority.to_string()),
        rule: None,
    };
    match &route.way {
        Way::Direct { to } => {
            let live = record.opened(details(None, *to));
            // A pod with several addresses has chosen one of them.
            let own = Some(captured.source.ip())
                .filter(|ip| ip.is_ipv4() == to.is_ipv4() && !is_local(*ip) && pod.addresses.load().contains(ip));
            let far = unless_gone(&app, dial::direct::outbound(&pod.netns, *to, own, &pod.sockets, &pod.legs)).await?;
            Ok(Some(Outward { app, live, far: Far::Direct(ResetUnlessDone::dialled(far)) }))
        }
        Way::Hbone(way) => {
            let live = record.opened(details(Some(way), way.to));
            let origin = origin(worker, pod, own_credentials(worker, &source).await?);
            let request = ConnectRequest {
                authority: Authority::Address(way.authority),
                baggage: Some(headers::baggage(&source)),
                forwarded: Some(headers::forwarded(captured.source, route.service.as_deref())),
                traceparent: Some(headers::traceparent()),
            };
            let opened = unless_gone(&app, dial::hbone::open(&worker.pool, &origin, way, &request)).await?;
            let _known = live.tls.set(opened.lease.tls());
            record.proven(opened.lease.peer());
            Ok(Some(Outward { app, live, far: Far::Tunnel(opened) }))
        }
    }
}

/// 15008: a tunnel from a peer; its streams become tasks of this worker. Until the peer has proven who it is, it has
/// `place` and no more; then it is charged for.
pub async fn tunnel(worker: &Arc<Worker>, pod: &Arc<Pod>, socket: std::net::TcpStream, peer: SocketAddr, place: Slot) {
    let reporter = &worker.shared.reporter;
    let record = Record::begin(reporter, &pod.uid, Direction::Inbound, canonical(peer));
    let _count = SocketCount::new(reporter, Direction::Inbound);
    let (Peer { identity, source, local, tls, chain, tunnel: mut server }, key, _open) =
        match shake_hands(worker, pod, socket, peer).await {
            Ok(None) => {
                reporter.metrics.unused.inc();
                return record.finish(Ok(()));
            }
            Ok(Some(known)) => {
                // From here on each stream has its own record.
                record.finish(Ok(()));
                known
            }
            Err(failure) => {
                if matches!(failure, Failure::Accept(AcceptError::Deadline)) {
                    reporter.metrics.late_handshake();
                }
                return record.finish(Err(failure));
            }
        };
    drop(place);
    let peer = Arc::new(PeerFacts { identity, key, source, local, tls, chain });
    let drain = pod.signal();
    let (mut going_away, mut end) = (false, None);
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
            () = drain.now() => return,
            // Its streams stop by themselves, each with its own line, for which the tunnel must go on for a moment.
            _ = peer.chain.distrusted(), if end.is_none() => {
                end = Some(Instant::now() + DISTRUST_GRACE);
                server.go_away();
                continue;
            }
            () = tokio::time::sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => return,
        };
        match next {
            Some(Ok(incoming)) if end.is_some() => incoming.refuse(StatusCode::FORBIDDEN),
            Some(Ok(incoming)) => {
                let (own, pod, peer, active) = (worker.clone(), pod.clone(), peer.clone(), pod.active.token());
                worker.tasks.spawn(async move {
                    stream(&own, &pod, &peer, incoming).await;
                    drop(active);
                });
            }
            Some(Err(error)) => {
                return reporter.tunnel_ended(Direction::Inbound, peer.source, &peer.identity, &error);
            }
            None => return,
        }
    }
}

/// The peer, its identity as the budget knows it, and its place there; `None` where it has left without a word.
async fn shake_hands(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
) -> Result<Option<(Peer, Text, Open)>, Failure> {
    let Some(socket) = tunnelled::first_byte(socket, &pod.sockets.legs).await? else { return Ok(None) };
    let shared = &worker.shared;
    let shake = async {
        let (_, workload) = local_facts(worker, pod).await?;
        let credentials = own_credentials(worker, &workload).await?;
        let hbone = &shared.config.hbone;
        Ok(tunnelled::handshake(socket, peer, &credentials, hbone, &shared.buffers).await?)
    };
    // Boxed, so that an open tunnel does not keep the room that opening it took.
    let peer: Peer = Box::pin(tunnelled::in_time::<_, Failure>(shake)).await?;
    let key = Text::from(peer.identity.to_string());
    let open = shared.budget.open(&pod.open, Some(&key))?;
    Ok(Some((peer, key, open)))
}

/// What is known of the peer of a tunnel.
#[derive(Debug)]
struct PeerFacts {
    identity: SpiffeName,
    /// The identity, as the budget knows it.
    key: Text,
    source: SocketAddr,
    local: SocketAddr,
    tls: crate::identity::TlsFacts,
    chain: crate::identity::Chain,
}

/// One CONNECT stream of a tunnel.
async fn stream(worker: &Arc<Worker>, pod: &Arc<Pod>, peer: &PeerFacts, mut incoming: Incoming) {
    let mut record = Record::begin(&worker.shared.reporter, &pod.uid, Direction::Inbound, peer.source);
    let _open = match worker.shared.budget.open(&pod.open, Some(&peer.key)) {
        Ok(open) => open,
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
    let result = match admitted {
        Ok(admitted) => carry(worker, pod, peer, incoming, admitted).await,
        Err(failure) => {
            incoming.refuse(status(&failure));
            Err(failure)
        }
    };
    record.finish(result);
}

/// A stream that may go, and the application's socket that is open for it.
struct Admitted {
    app: ResetUnlessDone,
    permit: Live,
    live: Arc<Connection>,
    baggage: Option<String>,
    /// What the application is told before the stream.
    preface: Vec<u8>,
}

async fn admit(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    peer: &PeerFacts,
    request: Result<ConnectRequest, crate::hbone::request::RequestError>,
    record: &mut Record,
) -> Result<Admitted, Failure> {
    let shared = &worker.shared;
    let request = request?;
    let (snapshot, workload) = local_facts(worker, pod).await?;
    let own = peer.local.ip();
    if !pod.owns(&workload, own) || is_local(own) {
        return Err(LocalError::IpMismatch { asked: own, own: workload.ips.first().copied().unwrap_or(own) }.into());
    }
    let target = choose::local::choose(&snapshot, &workload, own, pod.own_ports(), &request.authority)?;
    record.destination(peer.local);
    let subject = Subject { peer: Some(peer.identity.clone()), source: peer.source.ip(), destination: target.address };
    // Registered before it is asked for: no policy change can fall between the two.
    let live_permit = shared.permits.register(&workload, &subject);
    let permit = authorize::authorize(&shared.mesh, &live_permit).await;
    // What the peer says it asked for counts only if it is a service of this workload.
    let by_host = request.forwarded_host().and_then(|h| snapshot.service_by_hostname(h, &workload.namespace)).cloned();
    let by_host = by_host.filter(|service| workload.services.contains_key(&service.key));
    let by_target = |port| snapshot.service_by_target(&workload, port).cloned();
    let live = record.opened(Details {
        source_workload: snapshot.workload_at(&workload.network, peer.source.ip()).cloned(),
        source_identity: Some(peer.identity.clone()),
        destination_workload: Some(workload.clone()),
        destination_identity: workload.identity().ok(),
        service: target.service.or(by_host).or_else(|| by_target(target.address.port())),
        actual: target.address,
        authority: Some(request.authority.to_string()),
        rule: permit.as_ref().ok().map(ToString::to_string),
    });
    let _known = live.tls.set(peer.tls);
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
            // Who the client is, is said in front of the stream; the connection itself is the daemon's.
            let app = dial::direct::to_app(&permit, netns, to, to.ip(), &pod.sockets, &pod.legs).await?;
            (app, headers::proxy_v2(peer.source, asked, &peer.identity))
        }
    };
    let baggage = shared.config.response_baggage.then(|| headers::baggage(&workload));
    Ok(Admitted { app: ResetUnlessDone::dialled(app), permit: live_permit, live, baggage, preface })
}

async fn carry(
    worker: &Worker,
    pod: &Pod,
    peer: &PeerFacts,
    incoming: Incoming,
    admitted: Admitted,
) -> Result<(), Failure> {
    let Admitted { app, permit, live, baggage, preface } = admitted;
    between::tell(&app, &preface).await?;
    let stream = incoming.accept(baggage.as_deref())?;
    let silence = worker.shared.config.hbone.half_closed_silence;
    let stop = stop(pod, Some(&permit), Some(&peer.chain));
    forward::over_stream(&app, stream, &live.bytes, silence, stop).await?;
    app.done();
    Ok(())
}

/// 15006: a connection to the pod that came in plaintext.
pub async fn plaintext(worker: &Arc<Worker>, pod: &Arc<Pod>, socket: std::net::TcpStream, peer: SocketAddr) {
    let mut record = Record::begin(&worker.shared.reporter, &pod.uid, Direction::Inbound, canonical(peer));
    let _count = SocketCount::new(&worker.shared.reporter, Direction::Inbound);
    let result = plaintext_steps(worker, pod, socket, peer, &mut record).await;
    record.finish(result);
}

async fn plaintext_steps(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<(), Failure> {
    let shared = &worker.shared;
    let captured = accept::captured(socket, peer, &pod.sockets.legs)?;
    record.destination(captured.destination);
    let client = ResetUnlessDone::new(captured.app);
    let (snapshot, workload) = local_facts(worker, pod).await?;
    let destination = captured.destination;
    // A client may use the very port that we use in its name; nobody else uses those of the pod.
    let is_the_pod = is_local(captured.source.ip()) || pod.owns(&workload, captured.source.ip());
    let ours = is_the_pod && pod.legs.contains(captured.source, destination);
    if ours || pod.own_ports().contains(&destination.port()) {
        return Err(LocalError::Loop(destination).into());
    }
    if !pod.owns(&workload, destination.ip()) {
        let own = workload.ips.first().copied().unwrap_or(destination.ip());
        return Err(LocalError::IpMismatch { asked: destination.ip(), own }.into());
    }
    let source = captured.source.ip();
    let subject = Subject { peer: None, source, destination };
    let live_permit = shared.permits.register(&workload, &subject);
    let permit = authorize::authorize(&shared.mesh, &live_permit).await;
    let live = record.opened(Details {
        source_workload: snapshot.workload_at(&workload.network, source).cloned(),
        source_identity: None,
        destination_workload: Some(workload.clone()),
        destination_identity: None,
        service: snapshot.service_by_target(&workload, destination.port()).cloned(),
        actual: destination,
        authority: None,
        rule: permit.as_ref().ok().map(ToString::to_string),
    });
    drop(snapshot);
    let permit = permit?;
    let app = dial::direct::to_app(&permit, &pod.netns, destination, source, &pod.sockets, &pod.legs);
    let app = ResetUnlessDone::dialled(unless_gone(&client, app).await?);
    let silence = shared.config.hbone.half_closed_silence;
    forward::over_tcp(&app, &client, &live.bytes, silence, stop(pod, Some(&live_permit), None)).await?;
    client.done();
    app.done();
    Ok(())
}
