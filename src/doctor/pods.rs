//! Each pod of the node: its state, whether tunnels reach it from another pod, and whether the kubelet's probes do.

use super::{DEADLINE, Line, bad, note, well};
use crate::config::Config;
use crate::node::{Source, redirect};
use crate::sys::counter::{self, Family};
use crate::sys::netns::Netns;
use crate::sys::socket::{Bind, LegOptions, outgoing, start_connect};
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

/// Port to which a connection with the probes' address is tried; nobody need listen there.
const SPOOFED: u16 = 15092;
/// How long it may take to arrive.
const SPOOF_WAIT: Duration = Duration::from_millis(100);
/// How often it is tried.
const SPOOF_ROUNDS: usize = 3;

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
                lines.extend(seen(&label, pod));
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
    lines.extend(host.map(|_| spoofs(pods, mark)).unwrap_or_default());
    lines
}

/// What the daemon has seen in a pod that somebody should know.
fn seen(label: &str, pod: &Value) -> Vec<Line> {
    let mut lines = Vec::new();
    if let Some(why) = pod["rulesUnread"].as_str() {
        lines.push(note("other rules", format!("{label}: what other rules it has cannot be read: {why}")));
    }
    let rules: Vec<&str> = pod["otherRules"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !rules.is_empty() {
        let rules = rules.join("; ");
        lines.push(note("other rules", format!("{label}: these may take traffic before ours do: {rules}")));
    }
    if let Some(why) = pod["inboundUnverified"].as_str() {
        lines.push(note("inbound", format!("{label}: {why}")));
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

/// Whether a pod can pose as the kubelet's probes towards its neighbour, past which no policy is asked. All are tried at once; a
/// probe of the kubelet may arrive by chance at the same moment, but not three times.
fn spoofs(pods: &[Pod], mark: u32) -> Vec<Line> {
    let mut passed: Vec<Option<bool>> = vec![Some(true); pods.len()];
    for _ in 0..SPOOF_ROUNDS {
        let tried: Vec<_> = (0..pods.len()).map(|at| spoof(pods, at, mark)).collect();
        std::thread::sleep(SPOOF_WAIT);
        for ((pod, passed), tried) in pods.iter().zip(&mut passed).zip(tried) {
            let now = tried.and_then(|(before, _socket)| Some(probed(pod)? > before));
            *passed = passed.zip(now).map(|(earlier, now)| earlier && now);
        }
    }
    let line = |(at, passed): (usize, Option<bool>)| {
        let (pod, other, passed) = (pods.get(at)?, another(pods, at)?, passed?);
        Some(match passed {
            false => well("probe spoof", format!("{}: {} cannot pose as the kubelet's probes", pod.label, other.label)),
            true => bad(
                "probe spoof",
                format!(
                    "{}: what {} sends from {} arrives, past every policy: the host does not see it; load nf_tables_bridge, or \
                     br_netfilter with net.bridge.bridge-nf-call-iptables=1, or let the CNI check source addresses",
                    pod.label,
                    other.label,
                    probes_address(pod),
                ),
            ),
        })
    };
    passed.into_iter().enumerate().filter_map(line).collect()
}

fn probes_address(pod: &Pod) -> &'static str {
    if pod.ip.is_ipv4() { redirect::PROBE_V4 } else { redirect::PROBE_V6 }
}

/// Connections from the probes' address that the pod has seen.
fn probed(pod: &Pod) -> Option<u64> {
    pod.netns.enter(|| counter::packets(Family::Inet, redirect::TABLE, redirect::PROBED)).ok()?.ok()
}

/// Begins a connection to a pod from its neighbour, with the probes' address; with how many have arrived before. The socket is
/// none where it cannot even be sent.
fn spoof(pods: &[Pod], at: usize, mark: u32) -> Option<(u64, Option<TcpStream>)> {
    let (pod, from) = (pods.get(at)?, another(pods, at)?);
    let source = probes_address(pod).parse::<IpAddr>().ok()?;
    let before = probed(pod)?;
    let to = SocketAddr::new(pod.ip, SPOOFED);
    let open = || {
        let source = Bind { address: SocketAddr::new(source, 0), foreign: true };
        let socket = outgoing(to, Some(source), mark, &LegOptions { keepalive: None, notsent_lowat: None })?;
        start_connect(&socket, to)?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    };
    Some((before, from.netns.enter(open).ok()?.ok()))
}
