//! Verifying capture from inside the pod: an ordinary connection, as the application would open it, must arrive at our
//! listener. Only then is the pod reported as captured.

use crate::connection::Pod;
use crate::connection::pod::PROBE_IPS;
use crate::mesh::address::is_link_local;
use crate::sys::netns::NetnsError;
use crate::sys::socket::{ordinary, reset_on_close, start_connect};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// Ports that probes go to, one each. There are several because during an upgrade two daemons listen, and the kernel
/// gives each connection to either.
const PROBE_PORTS: std::ops::Range<u16> = 15091..15099;

/// How long a probe may take to arrive.
const DEADLINE: Duration = Duration::from_secs(2);

/// Why capture could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The probe could not be sent.
    #[error("a probe to {to} could not be sent from inside the pod: {source}")]
    Send {
        /// Where to.
        to: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The probe did not arrive at the listener.
    #[error(
        "a probe to {0} from inside the pod was not captured: other rules in the pod come before ours, or a filter drops what ours redirect (nft list ruleset in the pod shows them)"
    )]
    NotCaptured(IpAddr),
}

/// Probes each IP family that is redirected and in which the pod has an address.
pub async fn verify(pod: &Pod, ipv6: bool) -> Result<(), VerifyError> {
    for probe in PROBE_IPS.into_iter().filter(|ip| ip.is_ipv4() || ipv6) {
        let own =
            pod.addresses.load().iter().copied().find(|ip| ip.is_ipv4() == probe.is_ipv4() && !is_link_local(*ip));
        let Some(own) = own else { continue };
        match one_family(pod, probe).await {
            // A pod without a default route still reaches its neighbours.
            Err(VerifyError::Send { source, .. }) if unreachable(&source) => one_family(pod, neighbour(own)).await?,
            other => other?,
        }
    }
    Ok(())
}

async fn one_family(pod: &Pod, ip: IpAddr) -> Result<(), VerifyError> {
    let targets: Vec<SocketAddr> = PROBE_PORTS.map(|port| SocketAddr::new(ip, port)).collect();
    let arrived = pod.probes.expect(&targets);
    let _forget = Forget(pod);
    // The sockets live until a probe has arrived.
    let probes = pod.netns.enter(|| {
        let send = |to: &SocketAddr| {
            let started = ordinary(*to).and_then(|socket| {
                // Its port is free again at once: an application may want to listen there.
                reset_on_close(&socket);
                start_connect(&socket, *to).map(|()| socket)
            });
            started.map_err(|source| VerifyError::Send { to: *to, source })
        };
        targets.iter().map(send).collect::<Result<Vec<_>, _>>()
    })?;
    let _sockets = probes?;
    let arrival = tokio::time::timeout(DEADLINE, arrived.notified()).await;
    arrival.map_err(|_| VerifyError::NotCaptured(ip))
}

/// Ends the expectation of probes, also when the verification is given up.
struct Forget<'a>(&'a Pod);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.probes.forget();
    }
}

fn unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable)
}

/// Another address in the smallest network around `ip`.
fn neighbour(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4) ^ 1)),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) ^ 1)),
    }
}
