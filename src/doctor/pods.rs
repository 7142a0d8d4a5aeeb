//! Each pod of the node: its state, whether tunnels reach it from another pod, and whether the kubelet's probes do.

use super::{DEADLINE, Line, bad, note, well};
use crate::config::Config;
use crate::node::{Source, redirect};
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, outgoing, start_connect};
use crate::task::thread;
use serde_json::Value;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Pause between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(10);

/// Port on which tunnels are taken.
const TUNNELS: u16 = 15008;

/// A pod as far as it can be tried.
struct Pod {
    label: String,
    netns: Netns,
    ip: IpAddr,
}

pub(super) async fn all(config: &Config, pods: &[Value]) -> Vec<Line> {
    let text = |pod: &Value, key: &str| pod[key].as_str().unwrap_or_default().to_owned();
    let mut lines = Vec::new();
    let mut captured = Vec::new();
    for pod in pods {
        let label = format!("{}/{}", text(pod, "namespace"), text(pod, "name"));
        let (state, reason) = (text(pod, "state"), text(pod, "reason"));
        match state.as_str() {
            "captured" => {
                let older = pod["uncapturedConnections"].as_u64().unwrap_or(0);
                lines.push(match older {
                    0 => well("pod", format!("{label} is captured")),
                    _ => note(
                        "pod",
                        format!("{label} is captured; {older} connections are older and go on in plaintext"),
                    ),
                });
                captured.push((label, text(pod, "netns")));
            }
            "releasing" => lines.push(note("pod", format!("{label} is being released"))),
            _ => lines.push(bad("pod", format!("{label} is {state}: {reason}"))),
        }
    }
    if pods.is_empty() {
        lines.push(note("pod", "no pod of this node is to be captured"));
    }
    let mut found = Vec::new();
    for (label, netns) in captured {
        match Pod::of(label.clone(), &netns) {
            Some(pod) => found.push(pod),
            None => {
                lines.push(note("pod", format!("{label} cannot be tried from here: its namespace is known as {netns}")))
            }
        }
    }
    let mark = config.node.mark;
    let probes = matches!(config.node.source, Source::Kubernetes(_)).then(|| config.node.host_netns.clone());
    let tried = thread::beside(move || try_all(&found, mark, probes.as_deref()));
    lines.extend(tried.await.unwrap_or_default());
    lines
}

/// Tries all at once, so that many that do not answer take no longer than one.
fn try_all(pods: &[Pod], mark: u32, host: Option<&Path>) -> Vec<Line> {
    let tunnels: Vec<_> = (0..pods.len()).map(|at| start_tunnel(pods, at, mark)).collect();
    let probes: Vec<_> = pods.iter().map(|pod| host.map(|host| start_probe(pod, host))).collect();
    let end = Instant::now() + DEADLINE;
    let mut lines = Vec::new();
    for ((pod, (started, whence)), probed) in pods.iter().zip(tunnels).zip(probes) {
        lines.push(tunnel(pod, started.and_then(|stream| connected(&stream, end)), &whence));
        lines.extend(probed.map(|started| probe(pod, started.and_then(|probe| arrived(&probe, end)))));
    }
    lines
}

/// The next pod of another namespace; `None` where there is none.
fn another(pods: &[Pod], at: usize) -> Option<&Pod> {
    let own = pods.get(at)?;
    let (before, after) = pods.split_at_checked(at)?;
    after.iter().chain(before).find(|other| other.netns != own.netns)
}

impl Pod {
    fn of(label: String, path: &str) -> Option<Self> {
        let netns = Netns::open(Path::new(path)).ok()?;
        let usable = |ip: &IpAddr| !crate::mesh::address::is_link_local(*ip);
        let mut ips: Vec<IpAddr> = netns.addresses().ok()?.into_iter().map(|(ip, _)| ip).filter(usable).collect();
        ips.sort();
        Some(Self { label, ip: *ips.first()?, netns })
    }
}

/// Begins a connection to the pod's port for tunnels, past any redirection: from another pod of the node, else from where we
/// are; with where that is.
fn start_tunnel(pods: &[Pod], at: usize, mark: u32) -> (io::Result<TcpStream>, String) {
    let from = another(pods, at);
    let open = |pod: &Pod| {
        let (to, legs) = (SocketAddr::new(pod.ip, TUNNELS), LegOptions { keepalive: None, notsent_lowat: None });
        let socket = outgoing(to, None, mark, &legs)?;
        socket.set_nonblocking(true)?;
        start_connect(&socket, to)?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    };
    let started = match (pods.get(at), from) {
        (Some(pod), Some(other)) => {
            other.netns.enter(|| open(pod)).unwrap_or_else(|error| Err(io::Error::other(error.to_string())))
        }
        (Some(pod), None) => open(pod),
        (None, _) => Err(io::ErrorKind::NotFound.into()),
    };
    (started, from.map_or("this node".to_owned(), |other| other.label.clone()))
}

fn tunnel(pod: &Pod, reached: io::Result<()>, whence: &str) -> Line {
    match reached {
        Ok(()) => well("port 15008", format!("{} takes tunnels from {whence}", pod.label)),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => bad(
            "port 15008",
            format!(
                "{} does not answer {whence}: something drops it, such as a NetworkPolicy; allow TCP 15008 to the pods of namespace {}",
                pod.label,
                pod.label.split('/').next().unwrap_or_default()
            ),
        ),
        Err(error) => bad("port 15008", format!("{} cannot be reached from {whence}: {error}", pod.label)),
    }
}

/// Waits until a connection that has been started is there.
fn connected(stream: &TcpStream, end: Instant) -> io::Result<()> {
    loop {
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        if stream.peer_addr().is_ok() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK);
    }
}

/// A connection of the node to a port that was opened in a pod for it.
struct Probe {
    listener: TcpListener,
    _client: TcpStream,
}

/// Sends what a kubelet would send.
fn start_probe(pod: &Pod, host: &Path) -> Result<Probe, String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let listener = pod.netns.enter(|| TcpListener::bind((pod.ip, 0))).map_err(|error| said(&error))?;
    let listener = listener.map_err(|error| said(&error))?;
    listener.set_nonblocking(true).map_err(|error| said(&error))?;
    let to = listener.local_addr().map_err(|error| said(&error))?;
    let host = Netns::open(host).map_err(|error| said(&error))?;
    let client = host.enter(|| {
        let socket = crate::sys::socket::ordinary(to)?;
        start_connect(&socket, to)?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    });
    let client = client.map_err(|error| said(&error))?.map_err(|error| said(&error))?;
    Ok(Probe { listener, _client: client })
}

/// Whence it has arrived.
fn arrived(probe: &Probe, end: Instant) -> Result<IpAddr, String> {
    loop {
        match probe.listener.accept() {
            Ok((_, peer)) => return Ok(peer.ip().to_canonical()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => std::thread::sleep(LOOK),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err("a connection of the node does not arrive: a NetworkPolicy without 169.254.7.127, or rules of another CNI".into());
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// It must arrive as it was sent, from the address that the pod's rules leave alone.
fn probe(pod: &Pod, arrived: Result<IpAddr, String>) -> Line {
    let expected = [redirect::PROBE_V4, redirect::PROBE_V6].map(|ip| ip.parse::<IpAddr>().ok());
    match arrived {
        Ok(peer) if expected.contains(&Some(peer)) => {
            well("probe path", format!("{}: the kubelet's probes arrive", pod.label))
        }
        Ok(peer) => bad(
            "probe path",
            format!(
                "{}: a connection of the node arrives from {peer}, captured: under a STRICT policy probes fail; see host rules",
                pod.label
            ),
        ),
        Err(error) => bad("probe path", format!("{}: {error}", pod.label)),
    }
}
