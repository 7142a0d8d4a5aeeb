//! The daemon of this node, through its own ports.

use super::finding::{DEADLINE, Finding, fail, note, ok};
use crate::config::{CaSource, Config};
use crate::sys::clock;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime};

/// How long a page of the daemon may take: that of a large mesh is made for a while.
const PAGE_DEADLINE: Duration = Duration::from_secs(5);

/// What the daemon of this node is set to, by variable, as its admin port says.
pub fn settings(port: u16) -> Result<BTreeMap<String, String>, String> {
    let (_, body) = get(port, "/config_dump")?;
    let dump: serde_json::Value = serde_json::from_str(&body).map_err(|error| format!("/config_dump: {error}"))?;
    let settings = dump.pointer("/config/settings").and_then(serde_json::Value::as_object);
    let settings = settings.ok_or("it does not tell its settings: another version?")?;
    let text = |(name, value): (&String, &serde_json::Value)| Some((name.clone(), value.as_str()?.to_owned()));
    Ok(settings.iter().filter_map(text).collect())
}

/// What the daemon of this node says of itself.
pub(super) struct Daemon {
    pub(super) pods: Vec<serde_json::Value>,
    ready: (u16, String),
    metrics: String,
    dump: serde_json::Value,
}

impl Daemon {
    pub(super) fn look(config: &Config) -> Result<Self, String> {
        let admin = &config.admin;
        let json = |path: &str| {
            let (_, body) = get(admin.admin_port, path)?;
            serde_json::from_str::<serde_json::Value>(&body).map_err(|error| format!("{path}: {error}"))
        };
        let pods = pods(admin.admin_port)?;
        let metrics = get(admin.stats_port, "/metrics")?.1;
        Ok(Self { pods, ready: get(crate::admin::READY_PORT, "/healthz/ready")?, metrics, dump: json("/config_dump")? })
    }

    pub(super) fn readiness(&self) -> Finding {
        match &self.ready {
            (200, _) => ok("daemon", "runs and is ready"),
            (_, why) => fail("daemon", format!("runs and is not ready: {}", why.trim())),
        }
    }

    pub(super) fn files(&self) -> Finding {
        let metric = |name: &str| {
            let line = self.metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
            line.unwrap_or(0.0)
        };
        let (open, max) = (metric("process_open_fds "), metric("process_max_fds "));
        let text = format!("{open} of {max} are open");
        match open > 0.8 * max {
            true => fail(
                "open files",
                format!(
                    "{text}: the largest pod's newest connections are refused; raise the limit of the container runtime"
                ),
            ),
            false => ok("open files", text),
        }
    }

    /// Certificates are made by the CA's clock, and judged by those of this node and of its peers.
    pub(super) fn clock(&self, config: &Config) -> Finding {
        let now = SystemTime::now();
        let here = humantime::format_rfc3339_seconds(now);
        let time = |value: &serde_json::Value| humantime::parse_rfc3339(value.as_str()?).ok();
        let all =
            self.dump.get("certificates").and_then(serde_json::Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let mut seen = 0;
        for identity in all {
            let name = identity["identity"].as_str().unwrap_or_default();
            if let Some(error) = identity["error"].as_str().filter(|error| error.contains("clock")) {
                return fail(
                    "clock",
                    format!("{name}: {error}; it is {here} here: set this node's clock, or the CA's"),
                );
            }
            let Some(leaf) = identity["certChain"].get(0) else { continue };
            seen += 1;
            let (from, to) = (&leaf["validFrom"], &leaf["expirationTime"]);
            if time(from).is_some_and(|from| from > now) || time(to).is_some_and(|to| to < now) {
                let text = format!("{name} is valid from {from} to {to}, and it is {here} here: set this node's clock");
                return fail("clock", format!("{text}, or the CA's"));
            }
        }
        let failed = self.failures("clock");
        if failed > 0.0 {
            let text =
                format!("{failed} handshakes have failed because a certificate was not valid by one of the two clocks");
            return note(
                "clock",
                format!("{text}; it is {here} here: compare with the peers, which the access log names"),
            );
        }
        if clock::is_synchronized() == Some(false) {
            let text = "no time service keeps this node's clock: peers refuse certificates once it is a minute off";
            return note("clock", format!("{text}; it is {here} here"));
        }
        match (&config.ca, seen) {
            (CaSource::Builtin(_), _) => ok(
                "clock",
                format!("it is {here}: with the built-in CA this node's own clock counts, compare with others"),
            ),
            (CaSource::Istio(_), 0) => note("clock", "no certificate yet by which it could be compared with the CA's"),
            (CaSource::Istio(_), _) => ok("clock", format!("agrees with the CA's: {seen} certificates are valid now")),
        }
    }

    /// Connections that failed for a reason.
    fn failures(&self, reason: &str) -> f64 {
        let label = format!("reason=\"{reason}\"");
        let lines = self
            .metrics
            .lines()
            .filter(|line| line.starts_with("culvert_connection_failures_total{") && line.contains(&label));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }
}

/// The pods of the node, as the daemon knows them now.
pub(super) fn pods(admin_port: u16) -> Result<Vec<serde_json::Value>, String> {
    let (_, body) = get(admin_port, "/pods")?;
    let pods: serde_json::Value = serde_json::from_str(&body).map_err(|error| format!("/pods: {error}"))?;
    Ok(pods.as_array().cloned().unwrap_or_default())
}

/// Asks one of the daemon's own ports.
pub(super) fn get(port: u16, path: &str) -> Result<(u16, String), String> {
    let end = Instant::now() + PAGE_DEADLINE;
    let work = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), DEADLINE)?;
        stream.set_write_timeout(Some(DEADLINE))?;
        write!(stream, "GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n")?;
        let (mut answer, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut buffer)? {
                0 => return Ok::<_, io::Error>(answer),
                length => answer.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            }
        }
    };
    let answer = work().map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            format!("no answer within {} s", PAGE_DEADLINE.as_secs())
        }
        _ => error.to_string(),
    })?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("it is no HTTP")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("it is no HTTP")?;
    Ok((code, body.to_owned()))
}
