//! Checks each pod of the node: its state, whether tunnels reach it from another pod, whether kubelet probes reach it,
//! and whether its neighbour could pass for the kubelet.

use super::daemon;
use super::finding::{DEADLINE, Finding, Verdict, fail, note, ok};
use super::pod_table::since;
use crate::config::Config;
use crate::node::{PodSource, redirect};
use crate::ports::HBONE;
use crate::sys::netns::{Netns, id_at};
use crate::sys::nftables::{self, Family};
use crate::sys::socket::{Bind, LegOptions, outgoing, start_connect};
use crate::task::thread;
use serde_json::Value;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Pause between two polls.
const POLL_EVERY: Duration = Duration::from_millis(10);

/// How long a pod may be without an address while it starts or ends.
const BARE_FOR: Duration = Duration::from_secs(30);

/// How long a spoofed packet may take to arrive.
const SPOOF_WAIT: Duration = Duration::from_millis(100);
/// How many times spoofing is tried.
const SPOOF_ROUNDS: usize = 3;

/// A pod that can be checked.
struct Pod {
    label: String,
    netns: Netns,
    ip: IpAddr,
}

/// The result of a check, and the pods that took part in it.
struct Attempt {
    finding: Finding,
    between: Vec<String>,
}

pub(super) async fn all(config: &Config, pods: &[Value]) -> Vec<Finding> {
    let mut lines = Vec::new();
    let mut found = Vec::new();
    for pod in pods {
        let label = label(pod);
        let known = Pod::of(&label, pod, &config.dns.proc);
        match state(pod) {
            "captured" => {
                let older = pod["uncapturedConnections"].as_u64().unwrap_or(0);
                lines.push(match older {
                    0 => ok("pod", format!("{label} is captured")),
                    _ => note(
                        "pod",
                        format!("{label} is captured; {older} pre-existing connections continue in plaintext"),
                    ),
                });
                lines.extend(seen(&label, pod));
                match known {
                    Ok(pod) => found.push(pod),
                    Err(why) => lines.push(note("pod", format!("{label} cannot be checked from here: {why}"))),
                }
            }
            "releasing" => {
                lines.push(note(
                    "pod",
                    format!("{label} is releasing: it is no longer enrolled, and its connections end"),
                ));
            }
            _ => lines.push(not_captured(&label, pod, matches!(known, Err(UnreachablePod::Bare)), SystemTime::now())),
        }
    }
    if pods.is_empty() {
        lines.push(note("pod", "no pod of this node is enrolled"));
    }
    let mark = config.node.mark;
    let probes = matches!(config.node.source, PodSource::Kubernetes(_)).then(|| config.node.host_netns.clone());
    let port = config.admin.admin_port;
    let tried = thread::run_blocking(move || {
        let tried = try_all(&found, mark, probes.as_deref());
        let failed = tried.iter().any(|tried| tried.finding.verdict == Verdict::Fail);
        let now = if failed { daemon::pods(port).ok() } else { None };
        tried.into_iter().map(|tried| unless_gone(tried, now.as_deref())).collect::<Vec<_>>()
    });
    lines.extend(tried.await.unwrap_or_default());
    lines
}

/// The finding for a pod that is not captured. `bare`: its namespace holds no address.
fn not_captured(label: &str, pod: &Value, bare: bool, now: SystemTime) -> Finding {
    let (state, reason) = (state(pod), pod["reason"].as_str().unwrap_or_default());
    let bare = if bare { "; its namespace holds no address" } else { "" };
    // The container runtime adds the address late and removes it before the end of the pod is announced, but neither
    // takes long.
    match bare.is_empty() || since(pod, now).is_none_or(|since| since >= BARE_FOR) {
        true => fail("pod", format!("{label} is {state}: {reason}{bare}")),
        false => note("pod", format!("{label} is ending or starting: its namespace holds no address ({reason})")),
    }
}

fn label(pod: &Value) -> String {
    let text = |key: &str| pod[key].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

fn state(pod: &Value) -> &str {
    pod["state"].as_str().unwrap_or_default()
}

/// Turns a failure into a note if a pod that took part has ended in the meantime. `now`: the daemon's current list.
fn unless_gone(tried: Attempt, now: Option<&[Value]>) -> Finding {
    let Attempt { finding, between } = tried;
    let is_there = |wanted: &String| {
        let Some(now) = now else { return true };
        now.iter().any(|pod| label(pod) == *wanted && state(pod) == "captured")
    };
    match between.iter().find(|wanted| !is_there(wanted)) {
        Some(gone) if finding.verdict == Verdict::Fail => {
            let text = format!("{gone} ended or was released during the check: {}", finding.text);
            note(finding.check, text)
        }
        _ => finding,
    }
}

/// Checks all pods at once, so that many pods that do not answer take no longer than one.
fn try_all(pods: &[Pod], mark: u32, host: Option<&Path>) -> Vec<Attempt> {
    let mut tunnels: Vec<_> = (0..pods.len()).map(|at| Tunnel::start(pods, at, mark)).collect();
    let probes: Vec<_> = pods.iter().map(|pod| host.map(|host| start_probe(pod, host))).collect();
    let end = Instant::now() + DEADLINE;
    // A connection is closed as soon as it is established. The daemon waits for its first byte, and would count one
    // that stays silent as a failure.
    let open = |tunnels: &mut Vec<Tunnel>| tunnels.iter_mut().map(Tunnel::poll).filter(|done| !done).count() > 0;
    while open(&mut tunnels) && Instant::now() < end {
        std::thread::sleep(POLL_EVERY);
    }
    let mut tried = Vec::new();
    for ((pod, started), probed) in pods.iter().zip(tunnels).zip(probes) {
        let between = [Some(&pod.label), started.from.as_ref()].into_iter().flatten().cloned().collect();
        let source = started.from.clone().unwrap_or_else(|| "this node".to_owned());
        tried.push(Attempt { finding: tunnel_finding(pod, started.result(), &source), between });
        tried.extend(probed.map(|started| Attempt {
            finding: probe_finding(pod, started.and_then(|probe| arrived(pod, &probe, end))),
            between: vec![pod.label.clone()],
        }));
    }
    tried.extend(host.map(|_| spoofs(pods, mark)).unwrap_or_default());
    tried
}

/// Notes for what the daemon reports about a captured pod.
fn seen(label: &str, pod: &Value) -> Vec<Finding> {
    let mut lines = Vec::new();
    if let Some(why) = pod["rulesUnread"].as_str() {
        lines.push(note("other rules", format!("{label}: rules other than ours cannot be read: {why}")));
    }
    let rules: Vec<&str> = pod["otherRules"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !rules.is_empty() {
        let rules = rules.join("; ");
        lines.push(note("other rules", format!("{label}: these rules may take traffic before ours do: {rules}")));
    }
    if let Some(why) = pod["inboundUnverified"].as_str() {
        lines.push(note("inbound", format!("{label}: {why}")));
    }
    lines
}

/// The next pod with another network namespace; `None` if there is none.
fn another(pods: &[Pod], at: usize) -> Option<&Pod> {
    let own = pods.get(at)?;
    let (before, after) = pods.split_at_checked(at)?;
    after.iter().chain(before).find(|other| other.netns != own.netns)
}

/// Why a pod cannot be checked.
#[derive(Debug, thiserror::Error)]
enum UnreachablePod {
    #[error("its network namespace {0} cannot be opened")]
    Netns(String),
    #[error("its namespace holds no address")]
    Bare,
}

impl Pod {
    /// Opens a pod's network namespace from its entry on `/pods`: by the path, by the daemon's own descriptor, or by
    /// one of the processes below `proc`.
    fn of(label: &str, entry: &Value, proc: &Path) -> Result<Self, UnreachablePod> {
        let (path, held) = (entry["netns"].as_str().unwrap_or_default(), &entry["netnsHeld"]);
        let id = held["device"].as_u64().zip(held["inode"].as_u64());
        let open = |path: &Path| Netns::open(path).ok().filter(|netns| id.is_none_or(|id| id == netns.id()));
        let by_path = open(Path::new(path)).or_else(|| open(Path::new(held["file"].as_str()?)));
        let processes = || {
            let all = std::fs::read_dir(proc).ok()?.flatten().map(|entry| entry.path().join("ns/net"));
            let mut its = all.filter(|path| id.is_some() && id_at(path) == id);
            its.find_map(|path| open(&path))
        };
        let netns = by_path.or_else(processes).ok_or_else(|| UnreachablePod::Netns(path.to_owned()))?;
        let usable = |ip: &IpAddr| !crate::mesh::address::is_link_local(*ip);
        let held = netns.addresses().map_err(|_| UnreachablePod::Netns(path.to_owned()))?;
        let ip = held.into_iter().map(|(ip, _)| ip).filter(usable).min().ok_or(UnreachablePod::Bare)?;
        Ok(Self { label: label.to_owned(), ip, netns })
    }
}

/// A connection to a pod's tunnel port.
struct Tunnel {
    /// The pod that it comes from; `None` if it comes from the node.
    from: Option<String>,
    state: Result<Option<TcpStream>, io::Error>,
}

impl Tunnel {
    /// Starts connecting, from another pod of the node or else from the own namespace. The mark lets it bypass the
    /// redirection.
    fn start(pods: &[Pod], at: usize, mark: u32) -> Self {
        let from = another(pods, at);
        let open = |pod: &Pod| {
            let (to, legs) = (SocketAddr::new(pod.ip, HBONE), LegOptions { keepalive: None, notsent_lowat: None });
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
        Self { from: from.map(|other| other.label.clone()), state: started.map(Some) }
    }

    /// Whether the result is known. Closes the connection as soon as it is established.
    fn poll(&mut self) -> bool {
        let Ok(Some(stream)) = &self.state else { return true };
        match stream.take_error() {
            Ok(Some(error)) | Err(error) => self.state = Err(error),
            Ok(None) if stream.peer_addr().is_ok() => self.state = Ok(None),
            Ok(None) => return false,
        }
        true
    }

    fn result(self) -> io::Result<()> {
        self.state.and_then(|waits| if waits.is_some() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) })
    }
}

fn tunnel_finding(pod: &Pod, reached: io::Result<()>, source: &str) -> Finding {
    match reached {
        Ok(()) => ok("port 15008", format!("{} accepts tunnels from {source}", pod.label)),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => fail(
            "port 15008",
            format!(
                "{} does not answer {source}: something drops the packets, such as a NetworkPolicy or a firewall; allow TCP {HBONE} to the pods of \
                 namespace {}",
                pod.label,
                pod.label.split('/').next().unwrap_or_default()
            ),
        ),
        Err(error) => fail("port 15008", format!("{} cannot be reached from {source}: {error}", pod.label)),
    }
}

/// A connection from the node to a port that was opened in a pod for this check.
struct Probe {
    listener: TcpListener,
    _client: TcpStream,
}

/// Connects to a pod as the kubelet does for its probes.
fn start_probe(pod: &Pod, host: &Path) -> Result<Probe, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let listener = pod.netns.enter(|| TcpListener::bind((pod.ip, 0))).map_err(|error| text(&error))?;
    let listener = listener.map_err(|error| text(&error))?;
    listener.set_nonblocking(true).map_err(|error| text(&error))?;
    let to = listener.local_addr().map_err(|error| text(&error))?;
    let host = Netns::open(host).map_err(|error| text(&error))?;
    let client = host.enter(|| {
        let socket = crate::sys::socket::ordinary(to)?;
        start_connect(&socket, to)?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    });
    let client = client.map_err(|error| text(&error))?.map_err(|error| text(&error))?;
    Ok(Probe { listener, _client: client })
}

/// The source address from which the connection arrives in the pod.
fn arrived(pod: &Pod, probe: &Probe, end: Instant) -> Result<IpAddr, String> {
    loop {
        match probe.listener.accept() {
            Ok((_, peer)) => return Ok(peer.ip().to_canonical()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(POLL_EVERY)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(format!(
                    "a connection from the node does not arrive: a NetworkPolicy does not allow {}, or rules of another CNI drop it",
                    probes_address(pod)
                ));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The finding for kubelet probes: they must arrive from the address that the pod's rules do not redirect.
fn probe_finding(pod: &Pod, arrived: Result<IpAddr, String>) -> Finding {
    let expected = [redirect::PROBE_V4, redirect::PROBE_V6].map(|ip| ip.parse::<IpAddr>().ok());
    match arrived {
        Ok(peer) if expected.contains(&Some(peer)) => ok("probe path", format!("{}: kubelet probes arrive", pod.label)),
        Ok(peer) => fail(
            "probe path",
            format!(
                "{}: a connection from the node arrives from {peer} and is captured, so kubelet probes fail under a STRICT policy; \
                 see the check of host rules",
                pod.label
            ),
        ),
        Err(error) => fail("probe path", format!("{}: {error}", pod.label)),
    }
}

/// Checks whether a pod can send packets to its neighbour from the address of kubelet probes, which bypass every
/// policy. All pods are tried at once, several times, because a real probe may arrive at the same moment by chance, but
/// not every time.
fn spoofs(pods: &[Pod], mark: u32) -> Vec<Attempt> {
    let mut passed: Vec<Option<bool>> = vec![Some(true); pods.len()];
    for _ in 0..SPOOF_ROUNDS {
        let tried: Vec<_> = (0..pods.len()).map(|at| spoof(pods, at, mark)).collect();
        std::thread::sleep(SPOOF_WAIT);
        for ((pod, passed), tried) in pods.iter().zip(&mut passed).zip(tried) {
            let now = tried.and_then(|(before, _socket)| Some(probed(pod)? > before));
            *passed = passed.zip(now).map(|(earlier, now)| earlier && now);
        }
    }
    let finding = |(at, passed): (usize, Option<bool>)| {
        let (pod, other, passed) = (pods.get(at)?, another(pods, at)?, passed?);
        let finding = match passed {
            false => ok("probe spoof", format!("{}: {} cannot pose as the kubelet", pod.label, other.label)),
            true => fail(
                "probe spoof",
                format!(
                    "{}: packets from {} with the source {} arrive and bypass every policy, because the host's rules do not see \
                     them; load the kernel module nf_tables_bridge, or br_netfilter with \
                     net.bridge.bridge-nf-call-iptables=1, or configure the CNI to check source addresses",
                    pod.label,
                    other.label,
                    probes_address(pod),
                ),
            ),
        };
        Some(Attempt { finding, between: vec![pod.label.clone(), other.label.clone()] })
    };
    passed.into_iter().enumerate().filter_map(finding).collect()
}

/// The source address that kubelet probes have in a pod.
fn probes_address(pod: &Pod) -> &'static str {
    if pod.ip.is_ipv4() { redirect::PROBE_V4 } else { redirect::PROBE_V6 }
}

/// The number of connections from the probes' address that have arrived in the pod.
fn probed(pod: &Pod) -> Option<u64> {
    pod.netns.enter(|| nftables::packets(Family::Inet, redirect::TABLE, redirect::PROBE_COUNTER)).ok()?.ok()
}

/// Starts a connection to a pod from its neighbour, with the probes' address as its source. Returns the number of such
/// connections that had arrived before, and the socket; no socket if the connection cannot even be sent.
fn spoof(pods: &[Pod], at: usize, mark: u32) -> Option<(u64, Option<TcpStream>)> {
    let (pod, from) = (pods.get(at)?, another(pods, at)?);
    let source = probes_address(pod).parse::<IpAddr>().ok()?;
    let before = probed(pod)?;
    let to = SocketAddr::new(pod.ip, crate::ports::DOCTOR_SPOOF);
    let open = || {
        let source = Bind { address: SocketAddr::new(source, 0), foreign: true };
        let socket = outgoing(to, Some(source), mark, &LegOptions { keepalive: None, notsent_lowat: None })?;
        start_connect(&socket, to)?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    };
    Some((before, from.netns.enter(open).ok()?.ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_may_be_without_address_for_a_while_but_not_for_ever() {
        let since = humantime::parse_rfc3339("2026-01-01T00:00:00Z").unwrap();
        let pod = |since: &str| json!({"state": "failed", "reason": "why", "since": since});
        let verdict = |since_text: &str, bare, after| {
            not_captured("a/b", &pod(since_text), bare, since + Duration::from_secs(after)).verdict
        };
        let text = "2026-01-01T00:00:00Z";
        assert_eq!(verdict(text, true, 29), Verdict::Note);
        assert_eq!(verdict(text, true, 30), Verdict::Fail);
        assert_eq!(verdict(text, false, 0), Verdict::Fail);
        assert_eq!(verdict("", true, 0), Verdict::Fail, "an unknown time counts as long");
        let said = not_captured("a/b", &pod(text), true, since + BARE_FOR).text;
        assert_eq!(said, "a/b is failed: why; its namespace holds no address");
    }
}
