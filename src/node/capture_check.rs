//! The capture check: verifies the redirection of a pod in both directions. A connection from inside the pod, opened as
//! the application would open it, and connections from the node to the pod's address, opened as its clients would, must
//! arrive at the daemon's listeners.

use super::redirect;
use crate::connection::Pod;
use crate::connection::capture_checks::CAPTURE_CHECK_IPS;
use crate::mesh::address::is_link_local;
use crate::ports::{CAPTURE_CHECKS, HBONE, INBOUND_CHECK};
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::nftables::{self, Family};
use crate::sys::socket::{ordinary, reset_on_close, start_connect};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use socket2::Socket;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// Rounds of the inbound check: how many connections are opened at once, and how long they may take to arrive.
const INBOUND_ROUNDS: [(usize, Duration); 2] = [(1, Duration::from_millis(300)), (8, Duration::from_millis(500))];

/// Time between two checks of a captured pod.
pub const CHECK_EVERY: Duration = Duration::from_secs(30);
/// How long the outbound check may take to arrive.
const DEADLINE: Duration = Duration::from_secs(2);

/// Why the capture check failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureCheckError {
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The connection could not be opened.
    #[error("cannot open a check connection from inside the pod to {to}: {source}")]
    Send {
        /// Its destination.
        to: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another program answers for the pod.
    #[error(
        "a connection from the node to {0} was answered, and not by culvert: other rules in the pod precede ours, or another pod \
         has its address; traffic to it bypasses the pod's policies"
    )]
    NotOurs(SocketAddr),
    /// The connection did not arrive at the daemon's listener.
    #[error(
        "a check connection to {0} from inside the pod was not captured: other rules in the pod precede ours, or a filter drops the redirected traffic (nft list ruleset in the pod shows them)"
    )]
    NotCaptured(IpAddr),
    /// The same in the daemon's own network namespace, whose rules another command writes.
    #[error(
        "a check connection to {ip} was not captured: run `culvert redirect` in this network namespace, with the same \
         CULVERT_REDIRECT_UID ({user}), before the daemon; or other rules precede its rules (nft list ruleset shows them)"
    )]
    NotRedirected {
        /// The check's destination.
        ip: IpAddr,
        /// The daemon's user.
        user: u32,
    },
}

/// Checks the outbound direction for each IP family that is redirected and in which the pod has an address.
pub async fn check_outbound(pod: &Pod, ipv6: bool) -> Result<(), CaptureCheckError> {
    for check_ip in CAPTURE_CHECK_IPS.into_iter().filter(|ip| ip.is_ipv4() || ipv6) {
        let own =
            pod.addresses.load().iter().copied().find(|ip| ip.is_ipv4() == check_ip.is_ipv4() && !is_link_local(*ip));
        let Some(own) = own else { continue };
        match one_family(pod, check_ip).await {
            // A pod without a default route can still reach its neighbours. Where the rules know the daemon by its user,
            // they let its connections to them pass.
            Err(CaptureCheckError::Send { source, .. }) if unreachable(&source) && pod.sockets.mark != 0 => {
                one_family(pod, neighbour(own)).await?
            }
            other => other?,
        }
    }
    Ok(())
}

async fn one_family(pod: &Pod, ip: IpAddr) -> Result<(), CaptureCheckError> {
    let targets: Vec<SocketAddr> = CAPTURE_CHECKS.map(|port| SocketAddr::new(ip, port)).collect();
    let arrived = pod.capture_checks.expect(&targets);
    let _forget = StopExpecting(pod);
    // The sockets stay open until one connection has arrived.
    let sockets = pod.netns.enter(|| {
        let send = |to: &SocketAddr| {
            let started = ordinary(*to).and_then(|socket| {
                // Closing frees the port at once: an application may want to listen on it.
                reset_on_close(&socket);
                start_connect(&socket, *to).map(|()| socket)
            });
            started.map_err(|source| CaptureCheckError::Send { to: *to, source })
        };
        targets.iter().map(send).collect::<Result<Vec<_>, _>>()
    })?;
    let _sockets = sockets?;
    let arrival = tokio::time::timeout(DEADLINE, arrived.notified()).await;
    arrival.map_err(|_| CaptureCheckError::NotCaptured(ip))
}

/// Result of checking the daemon's own network namespace, where only the outbound direction can be checked: connections
/// from the inside do not pass the rules of inbound ones.
pub fn of_own(user: u32, outbound: Result<(), CaptureCheckError>) -> Result<Option<String>, CaptureCheckError> {
    match outbound {
        Err(CaptureCheckError::NotCaptured(ip)) => Err(CaptureCheckError::NotRedirected { ip, user }),
        Err(error) => Err(error),
        Ok(()) => Ok(Some(
            "in dedicated mode the inbound redirection cannot be checked from inside; it was written in one transaction with the \
             outbound one, which has been checked"
                .into(),
        )),
    }
}

/// A network namespace from which the pod can be called as its clients call it.
#[derive(Debug)]
pub struct VantagePoint {
    /// Its name in messages.
    pub name: &'static str,
    /// The namespace.
    pub netns: Netns,
    /// Whether an answer from another program proves that the pod is not captured. It proves nothing where another
    /// program may give the node's connections the address of kubelet probes, on the check ports too.
    pub is_sure: bool,
}

/// Result of one inbound check.
enum Inbound {
    Arrived,
    /// Another program has answered or refused.
    Answered,
    /// There was no answer, or the connection could not be opened.
    Lost,
}

/// Calls the pod at `ips` as its clients would: in plaintext, unless inbound plaintext is not redirected, and at the
/// tunnel port. Both must arrive at the daemon. Returns why the result is unknown if nothing answers at all: the
/// network may separate the node from the pod.
pub async fn check_inbound(
    pod: &Pod,
    ips: &[IpAddr],
    plaintext: bool,
    sides: &[VantagePoint],
) -> Result<Option<String>, CaptureCheckError> {
    let own = |v4| ips.iter().copied().find(|ip| ip.is_ipv4() == v4 && !is_link_local(*ip));
    let ports = [INBOUND_CHECK, HBONE].into_iter().filter(|port| plaintext || *port == HBONE);
    let targets = ports.flat_map(|port| [own(true), own(false)].into_iter().flatten().map(move |ip| (ip, port)));
    let all = targets.map(|target| one_target(pod, SocketAddr::from(target), sides));
    let mut all: FuturesUnordered<_> = all.collect();
    let mut unknown = None;
    while let Some(result) = all.next().await {
        unknown = unknown.or(result?);
    }
    Ok(unknown)
}

async fn one_target(pod: &Pod, to: SocketAddr, sides: &[VantagePoint]) -> Result<Option<String>, CaptureCheckError> {
    let from = |side: &VantagePoint| side.name;
    let mut tries: FuturesUnordered<_> =
        sides.iter().map(|side| async move { (side.is_sure, check_from(pod, side, to).await) }).collect();
    while let Some((is_sure, result)) = tries.next().await {
        match result? {
            Inbound::Arrived => return Ok(None),
            Inbound::Answered if is_sure => return Err(CaptureCheckError::NotOurs(to)),
            Inbound::Answered | Inbound::Lost => {}
        }
    }
    let tried: Vec<&str> = sides.iter().map(from).collect();
    let tried = if tried.is_empty() { "nowhere".into() } else { tried.join(" and ") };
    Ok(Some(format!(
        "cannot verify the inbound redirection: a connection to {to} from {tried} did not arrive; does a NetworkPolicy, or a rule \
         in the pod, block connections from the node?"
    )))
}

async fn check_from(pod: &Pod, side: &VantagePoint, to: SocketAddr) -> Result<Inbound, CaptureCheckError> {
    // Usually one daemon listens. During an upgrade there are two, so a second round opens several connections.
    for (attempts, wait) in INBOUND_ROUNDS {
        let own: Vec<IpAddr> = side.netns.addresses()?.into_iter().map(|(ip, _)| ip).collect();
        let packets = |name| {
            let counted = pod.netns.enter(|| nftables::packets(Family::Inet, redirect::TABLE, name));
            counted.ok().and_then(Result::ok)
        };
        let (before, reached) = (packets(redirect::PROBE_COUNTER), packets(redirect::CHECK_COUNTER));
        let arrived = Arc::<Notify>::default();
        let any: SocketAddr =
            if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let opened = side.netns.enter(|| {
            let open = |_| {
                let socket = ordinary(to)?;
                socket.bind(&any.into())?;
                reset_on_close(&socket);
                let port = socket.local_addr()?.as_socket().map_or(0, |local| local.port());
                Ok::<_, io::Error>((socket, port))
            };
            (0..attempts).map(open).collect::<Result<Vec<_>, _>>()
        })?;
        let Ok(sockets) = opened else { return Ok(Inbound::Lost) };
        let ports: Vec<u16> = sockets.iter().map(|(_, port)| *port).collect();
        pod.capture_checks.expect_inbound(&ports, &own, &arrived);
        let _forget = StopExpectingInbound(pod, &ports);
        // Without a route the connection is lost, as it is when a rule drops it.
        let sent = side.netns.enter(|| sockets.iter().all(|(socket, _)| start_connect(socket, to).is_ok()))?;
        if sent && tokio::time::timeout(wait, arrived.notified()).await.is_ok() {
            return Ok(Inbound::Arrived);
        }
        // A firewall on the way refuses as an application would, but then nothing has arrived at the pod.
        let stopped = reached.is_some() && packets(redirect::CHECK_COUNTER) == reached;
        let answered = |(socket, _): &(Socket, u16)| match socket.take_error() {
            Ok(Some(error)) => !stopped && error.kind() == io::ErrorKind::ConnectionRefused,
            Ok(None) => socket.peer_addr().is_ok(),
            Err(_) => false,
        };
        // The node gave the connection the source address of kubelet probes, which the pod's rules let through.
        let exempt = packets(redirect::PROBE_COUNTER) != before;
        if attempts > 1 && sent && !exempt && sockets.iter().any(answered) {
            return Ok(Inbound::Answered);
        }
    }
    Ok(Inbound::Lost)
}

/// Stops expecting inbound checks.
struct StopExpectingInbound<'a>(&'a Pod, &'a [u16]);

impl Drop for StopExpectingInbound<'_> {
    fn drop(&mut self) {
        self.0.capture_checks.forget_inbound(self.1);
    }
}

/// Stops expecting outbound checks, also when the check is cancelled.
struct StopExpecting<'a>(&'a Pod);

impl Drop for StopExpecting<'_> {
    fn drop(&mut self) {
        self.0.capture_checks.forget();
    }
}

fn unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable)
}

/// Another address in the smallest network that contains `ip`.
fn neighbour(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4) ^ 1)),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) ^ 1)),
    }
}
