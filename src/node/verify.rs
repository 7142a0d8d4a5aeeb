//! Verifying capture from inside the pod: an ordinary connection, as the application would open it, must arrive at our
//! listener. Only then is the pod reported as captured.

use crate::connection::Pod;
use crate::sys::netns::NetnsError;
use crate::sys::socket::{ordinary, start_connect};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// Where probes go: addresses for documentation, which nobody has.
const PROBE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77));
const PROBE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77));
const PROBE_PORT: u16 = 15099;

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
    #[error("a probe to {0} from inside the pod was not captured: other rules in the pod come before ours")]
    NotCaptured(SocketAddr),
}

/// Probes each IP family in which the pod has an address.
pub async fn verify(pod: &Pod) -> Result<(), VerifyError> {
    for (probe, v4) in [(PROBE_V4, true), (PROBE_V6, false)] {
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let own = pod.addresses.iter().find(|ip| ip.is_ipv4() == v4 && !link_local(ip));
        let Some(own) = own else { continue };
        match one(pod, SocketAddr::new(probe, PROBE_PORT)).await {
            // A pod without a default route still reaches its neighbours.
            Err(VerifyError::Send { source, .. }) if unreachable(&source) => {
                one(pod, SocketAddr::new(neighbour(*own), PROBE_PORT)).await?;
            }
            other => other?,
        }
    }
    Ok(())
}

async fn one(pod: &Pod, to: SocketAddr) -> Result<(), VerifyError> {
    let arrived = pod.probes.expect(to);
    // The socket lives until the probe has arrived.
    let probe = pod.netns.enter(|| {
        let socket = ordinary(to)?;
        start_connect(&socket, to)?;
        Ok(socket)
    })?;
    let _socket = probe.map_err(|source| VerifyError::Send { to, source })?;
    match tokio::time::timeout(DEADLINE, arrived).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(VerifyError::NotCaptured(to)),
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
