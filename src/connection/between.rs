//! What the journeys do between their steps: get facts and certificates, wait, stop, and refuse.

use super::Pod;
use super::authorize::Live;
use super::choose::{self, Names, RouteError, route::Route};
use super::dial::direct::{Leg, Noted};
use super::dial::{DialError, hbone::Origin};
use super::forward::{ForwardError, Stop};
use super::report::Failure;
use super::worker::Worker;
use crate::identity::{Chain, Credentials, Distrust};
use crate::mesh::address::is_link_local;
use crate::mesh::{self, FactKey, Snapshot, Workload};
use crate::sys::leg::reset_without_data;
use crate::sys::socket::reset_on_close;
use http::StatusCode;
use rand::seq::SliceRandom;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpStream;

/// Whether an address means nothing outside of its own machine or link.
pub(super) fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || is_link_local(ip)
}

/// The facts of now, and the pod's own workload among them.
pub(super) async fn local_facts(worker: &Worker, pod: &Pod) -> Result<(Arc<Snapshot>, Arc<Workload>), Failure> {
    pod.facts(&worker.shared.mesh).await.ok_or_else(|| Failure::LocalWorkload(pod.uid.clone()))
}

/// Questions that one connection may ask: of the control plane for its destination, a waypoint, and what these lead to; of
/// the pod's resolvers for the endpoints that have no address but a host name, of which each choice may find another.
const QUESTIONS_MAX: usize = 8;

/// The route to `target`; asks for facts that are told only when asked for, resolves host names, and chooses again.
pub(super) async fn find_route(
    mesh: &mesh::Store,
    pod: &Pod,
    mut snapshot: Arc<Snapshot>,
    source: &Workload,
    target: SocketAddr,
) -> Result<Route, RouteError> {
    let (own_ports, mut names, mut unresolved) = (pod.own_ports(), Names::new(), None);
    let choose = |snapshot: &Snapshot, names: &Names| {
        choose::route::choose(snapshot, source, target, own_ports, names, &mut |below| rand::random_range(0..below))
    };
    for _ in 0..QUESTIONS_MAX {
        match choose(&snapshot, &names) {
            Err(RouteError::Unasked(FactKey::Address(at))) => mesh.ask_address(&pod.uid, &at).await?,
            Err(RouteError::Unasked(wanted)) => mesh.ask(&pod.uid, wanted).await?,
            Err(RouteError::Unresolved(name)) => {
                // Another endpoint may do where this one's name cannot be resolved.
                let addresses = pod.resolver.addresses(source, &name, target.is_ipv4()).await;
                let addresses = addresses.map_err(|error| unresolved = Some(error)).unwrap_or_default();
                names.insert(name, one_of(addresses, target.is_ipv4()));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::NoAddress(_))) if unresolved.is_some() => {
                return Err(unresolved.map_or(error, RouteError::from));
            }
            Err(error @ (RouteError::NoEndpoint(_) | RouteError::UnknownWaypoint { .. })) => {
                let old = snapshot.refreshable(&source.network, target.ip(), &source.namespace);
                if old.is_empty() {
                    return Err(error);
                }
                mesh.refresh(old).await;
                return choose(&mesh.load(), &names);
            }
            chosen => return chosen,
        }
        snapshot = mesh.load();
    }
    choose(&snapshot, &names)
}

/// One of a host's addresses, of the wanted family where there is one: drawn once, so that asking for it leads somewhere.
fn one_of(mut addresses: Vec<IpAddr>, v4: bool) -> Vec<IpAddr> {
    if addresses.iter().any(|ip| ip.is_ipv4() == v4) {
        addresses.retain(|ip| ip.is_ipv4() == v4);
    }
    addresses.shuffle(&mut rand::rng());
    addresses.truncate(1);
    addresses
}

/// The certificate of the pod's own workload.
pub(super) async fn own_credentials(worker: &Worker, workload: &Workload) -> Result<Arc<Credentials>, Failure> {
    let identity =
        workload.identity().map_err(|error| RouteError::Identity(workload.uid.clone(), error.to_string()))?;
    Ok(worker.shared.identities.get(&identity).await?)
}

/// Where a tunnel of the pod starts.
pub(super) fn origin(worker: &Worker, pod: &Pod, credentials: Arc<Credentials>) -> Origin {
    Origin {
        pod: pod.uid.clone(),
        capture: pod.capture,
        netns: pod.netns.clone(),
        credentials,
        drain: pod.signal(),
        legs: pod.legs.clone(),
        sockets: pod.sockets,
        hbone: worker.shared.config.hbone,
        buffers: worker.shared.buffers.clone(),
    }
}

/// Dials for a client; gives up when the client resets meanwhile, unless it has sent something before, which is delivered.
pub(super) async fn unless_gone<T>(
    client: &TcpStream,
    dial: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    tokio::select! {
        biased;
        dialled = dial => dialled,
        () = reset_without_data(client) => Err(DialError::Abandoned),
    }
}

/// Tells the application something before anything else. It fits into the socket's buffer, which is empty.
pub(super) async fn tell(app: &TcpStream, preface: &[u8]) -> Result<(), ForwardError> {
    let mut left = preface;
    while !left.is_empty() {
        app.writable().await.map_err(ForwardError::App)?;
        match app.try_write(left) {
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(ForwardError::App(error)),
        }
    }
    Ok(())
}

/// Resolves when a connection of the pod is to stop.
pub(super) async fn stop(pod: &Pod, permit: Option<&Live>, peer: Option<&Chain>) -> Stop {
    let drain = pod.signal();
    let revoked = async {
        let Some(permit) = permit else { return std::future::pending().await };
        permit.revoked().await;
        permit.reason().map_or(Stop::Drained, Stop::Revoked)
    };
    let distrusted = async {
        let Some(peer) = peer else { return std::future::pending().await };
        match peer.distrusted().await {
            Distrust::Revoked => Stop::CertificateRevoked,
            Distrust::Expired => Stop::CertificateExpired,
        }
    };
    tokio::select! {
        why = revoked => why,
        why = distrusted => why,
        () = drain.now() => Stop::Drained,
    }
}

/// The status with which a stream is refused (source: the reference's inbound HBONE table).
pub(super) fn status(failure: &Failure) -> StatusCode {
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

/// A client's socket that is closed with RST unless its connection came to an orderly end: a client must be able to
/// tell a refusal from an empty answer.
pub(super) struct ResetUnlessDone {
    /// Of one that we have opened.
    _noted: Option<Noted>,
    socket: TcpStream,
    done: bool,
}

impl ResetUnlessDone {
    pub(super) fn new(socket: TcpStream) -> Self {
        Self { _noted: None, socket, done: false }
    }

    /// One that we have opened.
    pub(super) fn dialled(Leg { noted, socket }: Leg) -> Self {
        Self { _noted: Some(noted), socket, done: false }
    }

    pub(super) fn done(mut self) {
        self.done = true;
    }
}

impl std::ops::Deref for ResetUnlessDone {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.socket
    }
}

impl Drop for ResetUnlessDone {
    fn drop(&mut self) {
        if !self.done {
            reset_on_close(&self.socket);
        }
    }
}
