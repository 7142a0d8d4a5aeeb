//! Port 15001: a connection that the pod opened. Steps: accept, choose, dial, forward, report. The destination's node
//! authorizes it.

use super::egress::Outside;
use super::ending::{CarriedBy, CarriedEnd, ResetUnlessDone, note_reset, stop_signal, unless_client_resets};
use super::lookup::{find_route, own_credentials, own_facts};
use crate::connection::accept;
use crate::connection::choose::route::Route;
use crate::connection::choose::{Evidence, InFlight, NextHop, RouteError, Witness, is_local};
use crate::connection::dial::error::ATTEMPT_PATIENCE;
use crate::connection::dial::hbone::{OpenedStream, Opening, Origin};
use crate::connection::dial::{self, DialError};
use crate::connection::forward::{ForwardError, Stop};
use crate::connection::pod::Pod;
use crate::connection::report::stages::Stage;
use crate::connection::report::{Details, Direction, Failure, Record, live::Connection, record::SocketCount};
use crate::connection::worker::{Accepted, Counted, Worker};
use crate::connection::{forward, headers};
use crate::hbone::ConnectRequest;
use crate::identity::Credentials;
use crate::mesh::Workload;
use crate::mesh::address::canonical;
use crate::ports::OUTBOUND;
use std::net::{SocketAddr, TcpStream};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How often a connection is tried on another endpoint.
const RETRIES_MAX: usize = 2;

/// Carries one connection that the pod opened.
///
/// This completes when the connection has ended, or when it is carried over a tunnel: then the worker's engine has it.
pub async fn outbound(worker: &Arc<Worker>, pod: &Arc<Pod>, Accepted { socket, peer, at }: Accepted, counted: Counted) {
    let mut record = Record::accepted(&worker.shared.reporter, &pod.uid, Direction::Outbound, canonical(peer), at);
    let count = SocketCount::new(&worker.shared.reporter, Direction::Outbound);
    // Boxed: opening needs more memory than forwarding, and an open connection must not keep it.
    match Box::pin(open(worker, pod, socket, peer, &mut record)).await {
        Ok(Some(opened)) => carry(worker, pod, opened, record, (count, counted)).await,
        Ok(None) => record.finish(Ok(())),
        Err(failure) => record.finish(Err(failure)),
    }
}

/// The steps forward and report.
pub async fn carry(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    Opened { app, live, far, in_flight }: Opened,
    record: Record,
    (count, counted): (SocketCount, Counted),
) {
    let silence = worker.shared.config.hbone.half_closed_silence;
    match far {
        FarSide::Direct(far, outside) => {
            let (app, far) = match app.watched().and_then(|app| Ok((app, far.watched()?))) {
                Ok(both) => both,
                Err(error) => return record.finish(Err(error.into())),
            };
            let stop = async {
                tokio::select! {
                    why = stop_signal(pod, None) => why,
                    why = revoked(outside) => why,
                }
            };
            let result = forward::over_tcp(&app, &far, &*live, silence, stop).await;
            note_reset(in_flight.as_ref(), &*live, &result);
            if result.is_ok() {
                far.done();
                app.done();
            }
            record.finish(result.map_err(Failure::from));
        }
        FarSide::Tunnel(OpenedStream { stream, lease, .. }) => match app.into_parts() {
            // The daemon has accepted this socket, so it has no entry of those that the daemon opened.
            Ok((app, _)) => {
                let tunnel = CarriedBy::Outbound(lease, in_flight);
                let _counted = Counted { _socket: Some(count), ..counted };
                let ending = CarriedEnd { record, tunnel, _counted };
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
pub struct Opened {
    /// The application's socket.
    pub app: ResetUnlessDone,
    /// The connection in the list of live ones.
    pub live: Arc<Connection>,
    /// The far side.
    pub far: FarSide,
    /// Counts the connection at its endpoint.
    pub in_flight: Option<InFlight>,
}

/// The far side of an outbound connection.
pub enum FarSide {
    /// Plain TCP; to a destination outside the mesh, with what egress policies need.
    Direct(ResetUnlessDone, Option<Outside>),
    /// A stream of a tunnel.
    Tunnel(OpenedStream),
}

/// The steps accept, choose and dial. `None` for a capture check, which needs nothing more than to arrive.
async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<Option<Opened>, Failure> {
    let shared = &worker.shared;
    let captured = accept::captured(socket, peer, OUTBOUND)?;
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
    let outbound = Outbound { worker, pod, app: &app, source: &source, from: captured.source };
    let first = find_route(shared, pod, snapshot, &source, captured.destination, &[]).await?;
    record.lap(Stage::Facts);
    let (live, far, in_flight) = outbound.reach(first, captured.destination, record).await?;
    Ok(Some(Opened { app, live, far, in_flight }))
}

/// An outbound connection whose far side is to be reached.
pub struct Outbound<'a> {
    /// The worker.
    pub worker: &'a Arc<Worker>,
    /// The pod.
    pub pod: &'a Arc<Pod>,
    /// The application's socket.
    pub app: &'a TcpStream,
    /// The pod's workload.
    pub source: &'a Arc<Workload>,
    /// The application's end.
    pub from: SocketAddr,
}

impl Outbound<'_> {
    /// Dials the far side. If the endpoint that was chosen fails before any byte was carried, others are tried.
    pub async fn reach(
        &self,
        first: Route,
        destination: SocketAddr,
        record: &mut Record,
    ) -> Result<(Arc<Connection>, FarSide, Option<InFlight>), Failure> {
        let (shared, mut left, mut route) = (&self.worker.shared, Vec::new(), first);
        let mut traceparent = None;
        loop {
            let in_flight = route.pick.clone();
            let in_flight = in_flight.map(|pick| InFlight::begin(&shared.endpoints, pick, Witness(self.pod.capture)));
            let (live, outside) = self.begin(&route, record)?;
            if outside.is_some() {
                record.lap(Stage::Policy);
            }
            if route.next_hop.tunnel().is_some() {
                // Waiting for the CA must not count against the endpoint. `dial` finds the certificate at once then.
                own_credentials(self.worker, self.source).await?;
                record.lap(Stage::Certificate);
                traceparent.get_or_insert_with(|| record.traceparent());
            }
            let traceparent = traceparent.clone();
            let Some(in_flight) = in_flight else {
                let far = self.dial(&route, outside, None, traceparent).await?;
                return Ok((self.connected(live, &far, record), far, None));
            };
            let pick = in_flight.pick();
            if left.is_empty() {
                pick.list.retries.connection(shared.endpoints.now());
            }
            let may_leave = left.len() < RETRIES_MAX && pick.has_other(&left);
            let mut may_retry = None;
            let attempt = self.dial(&route, outside, Some(&in_flight), traceparent);
            // A waypoint or gateway may wait for what is behind it.
            let is_final = !pick.is_waypoint && !matches!(route.next_hop, NextHop::Gateway(_));
            let attempt = if may_leave && is_final {
                unless_unanswered(attempt, || {
                    in_flight.failed(Evidence::TimedOut);
                    *may_retry.insert(in_flight.may_retry(Evidence::TimedOut))
                })
                .await
            } else {
                attempt.await
            };
            let failure = match attempt {
                Ok(far) => {
                    in_flight.succeeded();
                    return Ok((self.connected(live, &far, record), far, Some(in_flight)));
                }
                Err(failure) => failure,
            };
            let Some(why) = evidence(&failure, &in_flight) else { return Err(failure) };
            if !may_leave || !may_retry.unwrap_or_else(|| in_flight.may_retry(why)) {
                return Err(failure);
            }
            if let Some(stage) = failure.stage() {
                record.lap(stage);
            }
            left.push(pick.clone());
            drop(in_flight);
            let again = find_route(shared, self.pod, shared.mesh.load(), self.source, destination, &left).await;
            let Some(again) = again.ok().filter(|again| again.pick.is_some()) else { return Err(failure) };
            record.lap(Stage::Facts);
            record.tried(&left_because(&route, &failure));
            route = again;
        }
    }

    /// Begins an attempt, if egress policies allow it: they apply to destinations outside the mesh.
    fn begin(&self, route: &Route, record: &mut Record) -> Result<(Arc<Connection>, Option<Outside>), Failure> {
        let outside = match &route.next_hop {
            NextHop::Direct { to } if route.workload.is_none() && route.service.is_none() => {
                Some(Outside::new(&self.worker.shared, self.pod, self.source, *to))
            }
            NextHop::Direct { .. } | NextHop::Tunnel(_) | NextHop::Gateway(_) => None,
        };
        let allowed = outside.as_ref().map_or(Ok(None), Outside::authorize);
        let rule = allowed.as_ref().ok().and_then(|by| by.as_ref().map(|by| by.to_string().into()));
        let live = record.attempted(Details { rule, ..self.details(route) });
        allowed?;
        Ok((live, outside))
    }

    /// The details of an attempt by a route.
    fn details(&self, route: &Route) -> Details {
        let hop = route.next_hop.tunnel();
        let gateway = match &route.next_hop {
            NextHop::Gateway(hop) => Some(hop.outer.uid.clone()),
            NextHop::Direct { .. } | NextHop::Tunnel(_) => None,
        };
        Details {
            source_identity: hop.and(self.source.identity().ok()),
            destination_identity: None,
            source_workload: Some(self.source.clone()),
            destination_workload: route.workload.clone(),
            service: route.service.clone(),
            actual: route.next_hop.to(),
            authority: hop.map(|hop| hop.authority.clone()),
            gateway,
            rule: None,
        }
    }

    /// Notes that the far side is open.
    fn connected(&self, live: Arc<Connection>, far: &FarSide, record: &mut Record) -> Arc<Connection> {
        match far {
            FarSide::Direct(far, _) => {
                live.leg_port.store(far.own_port(), Ordering::Relaxed);
                record.lap(Stage::Dial);
            }
            FarSide::Tunnel(opened) => {
                let Opening { dial, tls, connect } = opened.took;
                record.laps([(Stage::Dial, dial), (Stage::Tls, tls), (Stage::Connect, Some(connect))]);
                live.leg_port.store(opened.lease.port(), Ordering::Relaxed);
                record.proven(opened.lease.proven());
            }
        }
        record.open();
        record.connected();
        live
    }

    /// Dials the far side by a route.
    async fn dial(
        &self,
        route: &Route,
        outside: Option<Outside>,
        in_flight: Option<&InFlight>,
        traceparent: Option<String>,
    ) -> Result<FarSide, Failure> {
        let Self { worker, pod, app, source, from } = self;
        let (hop, gateway) = match &route.next_hop {
            NextHop::Direct { to } => {
                // A pod with several addresses may have bound one of them; keep it as the source.
                let own = Some(from.ip())
                    .filter(|ip| ip.is_ipv4() == to.is_ipv4() && !is_local(*ip) && pod.addresses.load().contains(ip));
                let far = dial::direct::outbound(&pod.netns, *to, own, &pod.sockets, &pod.legs);
                let far = unless_client_resets(&worker.ticks, app, far).await?;
                return Ok(FarSide::Direct(ResetUnlessDone::dialled(far), outside));
            }
            NextHop::Tunnel(hop) => (hop, None),
            NextHop::Gateway(hop) => (&hop.outer, Some(hop)),
        };
        let origin = origin(worker, pod, own_credentials(worker, source).await?);
        let request = ConnectRequest {
            authority: hop.authority.clone(),
            baggage: Some(headers::baggage(source)),
            forwarded: Some(headers::forwarded(*from, route.service.as_deref())),
            traceparent,
            network: gateway.map(|_| source.network.to_string()),
        };
        let going_away = || {
            if let Some(in_flight) = in_flight {
                in_flight.failed(Evidence::GoingAway);
            }
        };
        let opened = match gateway {
            None => {
                let opened = dial::hbone::open(&worker.pool, &origin, hop, &request, &going_away);
                unless_client_resets(&worker.ticks, app, opened).await?
            }
            Some(hop) => {
                let opened = dial::gateway::open_behind(&worker.pool, &origin, hop, &request, &going_away);
                unless_client_resets(&worker.ticks, app, opened).await?
            }
        };
        Ok(FarSide::Tunnel(opened))
    }
}

/// Waits for an attempt. If it takes too long and `may_leave`, it is given up.
async fn unless_unanswered<T>(
    attempt: impl Future<Output = Result<T, Failure>>,
    may_leave: impl FnOnce() -> bool,
) -> Result<T, Failure> {
    let mut attempt = pin!(attempt);
    match tokio::time::timeout(ATTEMPT_PATIENCE, &mut attempt).await {
        Ok(outcome) => outcome,
        Err(_) if may_leave() => Err(DialError::Unanswered.into()),
        Err(_) => attempt.await,
    }
}

/// What a failure says against the endpoint, which is noted there.
fn evidence(failure: &Failure, in_flight: &InFlight) -> Option<Evidence> {
    let Failure::Dial(error) = failure else { return None };
    let why = error.evidence().filter(|_| !(in_flight.pick().is_waypoint && error.is_answer()))?;
    in_flight.failed(why);
    Some(why)
}

/// The endpoint of a route and why it was left, for the access log.
fn left_because(route: &Route, failure: &Failure) -> String {
    let name = route.workload.as_ref().map_or("", |workload| &workload.name);
    format!("{name} at {}: {failure}", route.next_hop.to())
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
