//! `culvert doctor`: looks at a node as an operator would, where the daemon runs and with its settings. One line for each
//! thing, well or not, and what to do where it is not. `culvert cleanup` is beside it.

pub mod cleanup;
mod machine;
mod pods;

use crate::config::Config;
use crate::node::Source;
use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// How long anything that is tried may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// How well a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Well,
    /// Works, and somebody should know.
    Note,
    Bad,
}

/// One line.
#[derive(Debug)]
struct Line {
    verdict: Verdict,
    what: &'static str,
    text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Well => "ok  ",
            Verdict::Note => "note",
            Verdict::Bad => "FAIL",
        };
        write!(f, "{word}  {:<12}  {}", self.what, self.text)
    }
}

fn well(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Well, what, text: text.into() }
}

fn note(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Note, what, text: text.into() }
}

fn bad(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Bad, what, text: text.into() }
}

/// Looks at everything and hands each line to `say`; whether all is well.
pub async fn run(config: &Config, mut say: impl FnMut(&str)) -> bool {
    let mut all_well = true;
    let mut tell = |lines: Vec<Line>| {
        for line in lines {
            all_well &= line.verdict != Verdict::Bad;
            say(&line.to_string());
        }
    };
    tell(vec![machine::privileges(config), machine::confinement()]);
    tell(vec![machine::kernel(config).await]);
    tell(machine::sysctls(config));
    tell(reachable(config));
    if let Source::Kubernetes(kubernetes) = &config.node.source {
        tell(vec![machine::api(kubernetes).await, machine::host_rules(config).await]);
        tell(machine::plugin(kubernetes));
    }
    match Daemon::look(config) {
        Ok(daemon) => {
            tell(vec![daemon.readiness(), daemon.files(), daemon.clock()]);
            tell(pods::all(config, &daemon.pods).await);
        }
        Err(error) => tell(vec![bad(
            "daemon",
            format!(
                "does not answer on port {}: {error}; captured pods' traffic is refused until it runs",
                config.admin.admin_port
            ),
        )]),
    }
    all_well
}

/// Whether the control plane and the CA can be reached at all.
fn reachable(config: &Config) -> Vec<Line> {
    use crate::config::{CaSource, MeshSource};
    let mut targets = Vec::new();
    if let MeshSource::Xds(xds) = &config.mesh {
        targets.push(("control plane", xds.rpc.address.clone()));
    }
    if let CaSource::Istio(rpc) = &config.ca {
        targets.push(("CA", rpc.address.clone()));
    }
    let look = |(name, address): &(&str, http::Uri)| {
        let host = address.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = address.port_u16().unwrap_or(443);
        let reached = match (host, port).to_socket_addrs().map(Iterator::collect::<Vec<SocketAddr>>) {
            Ok(all) if all.iter().any(|to| TcpStream::connect_timeout(to, DEADLINE).is_ok()) => Ok(()),
            Ok(all) => Err(format!("none of its {} addresses answers; is it running?", all.len())),
            Err(error) => Err(format!("{error}; does DNS work here?")),
        };
        match reached {
            Ok(()) => well("network", format!("the {name} {address} can be reached")),
            Err(error) => bad("network", format!("the {name} {address} cannot be reached: {error}")),
        }
    };
    match targets.is_empty() {
        true => vec![well("network", "facts and certificates come from files")],
        false => targets.iter().map(look).collect(),
    }
}

/// What the daemon of this node says of itself.
struct Daemon {
    pods: Vec<serde_json::Value>,
    ready: (u16, String),
    metrics: String,
    dump: serde_json::Value,
}

impl Daemon {
    fn look(config: &Config) -> Result<Self, String> {
        let admin = &config.admin;
        let json = |path: &str| {
            let (_, body) = get(admin.admin_port, path)?;
            serde_json::from_str::<serde_json::Value>(&body).map_err(|error| format!("{path}: {error}"))
        };
        let pods = json("/pods")?.as_array().cloned().unwrap_or_default();
        let metrics = get(admin.stats_port, "/metrics")?.1;
        Ok(Self { pods, ready: get(crate::admin::READY_PORT, "/healthz/ready")?, metrics, dump: json("/config_dump")? })
    }

    fn readiness(&self) -> Line {
        match &self.ready {
            (200, _) => well("daemon", "runs and is ready"),
            (_, why) => bad("daemon", format!("runs and is not ready: {}", why.trim())),
        }
    }

    fn files(&self) -> Line {
        let metric = |name: &str| {
            let line = self.metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
            line.unwrap_or(0.0)
        };
        let (open, max) = (metric("process_open_fds "), metric("process_max_fds "));
        let text = format!("{open} of {max} are open");
        match open > 0.8 * max {
            true => bad(
                "open files",
                format!(
                    "{text}: the largest pod's newest connections are refused; raise the limit of the container runtime"
                ),
            ),
            false => well("open files", text),
        }
    }

    /// Certificates are made by the CA's clock; one that is not valid by ours says that the two do not agree.
    fn clock(&self) -> Line {
        let now = std::time::SystemTime::now();
        let time = |value: &serde_json::Value| humantime::parse_rfc3339(value.as_str()?).ok();
        let all =
            self.dump.get("certificates").and_then(serde_json::Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let mut seen = 0;
        for identity in all {
            let name = identity["identity"].as_str().unwrap_or_default();
            let Some(leaf) = identity["certChain"].get(0) else { continue };
            seen += 1;
            let (from, to) = (time(&leaf["validFrom"]), time(&leaf["expirationTime"]));
            if from.is_some_and(|from| from > now) || to.is_some_and(|to| to < now) {
                let (from, to) = (&leaf["validFrom"], &leaf["expirationTime"]);
                let now = humantime::format_rfc3339_seconds(now);
                return bad(
                    "clock",
                    format!(
                        "{name} is valid from {from} to {to}, and it is {now} here: set this node's clock, or the CA's"
                    ),
                );
            }
        }
        match seen {
            0 => note("clock", "no certificate yet by which it could be compared with the CA's"),
            _ => well("clock", format!("agrees with the CA's: {seen} certificates are valid now")),
        }
    }
}

/// Asks one of the daemon's own ports.
fn get(port: u16, path: &str) -> Result<(u16, String), String> {
    let work = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = work().map_err(|error| error.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("it is no HTTP")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("it is no HTTP")?;
    Ok((code, body.to_owned()))
}
