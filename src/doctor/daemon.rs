//! Queries the running daemon of this node through its HTTP ports, and checks what it says: readiness, open files,
//! clocks.

use super::finding::{DEADLINE, Finding, fail, note, ok};
use crate::config::{CaSource, Config};
use crate::sys::clock;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime};

/// How long a page of the daemon may take. The pages of a large mesh take a while to make.
const PAGE_DEADLINE: Duration = Duration::from_secs(5);

/// The settings of the running daemon by variable, from its admin port.
pub fn settings(port: u16) -> Result<BTreeMap<String, String>, String> {
    let (_, body) = get(port, "/config_dump")?;
    let dump: serde_json::Value = serde_json::from_str(&body).map_err(|error| format!("/config_dump: {error}"))?;
    let settings = dump.pointer("/config/settings").and_then(serde_json::Value::as_object);
    let settings = settings.ok_or("/config_dump has no settings; is the daemon of another version?")?;
    let text = |(name, value): (&String, &serde_json::Value)| Some((name.clone(), value.as_str()?.to_owned()));
    Ok(settings.iter().filter_map(text).collect())
}

/// The state of the running daemon.
pub(super) struct Daemon {
    pub(super) pods: Vec<serde_json::Value>,
    ready: (u16, String),
    metrics: String,
    dump: serde_json::Value,
}

impl Daemon {
    pub(super) fn query(config: &Config) -> Result<Self, String> {
        let admin = &config.admin;
        let json = |path: &str| {
            let (_, body) = get(admin.admin_port, path)?;
            serde_json::from_str::<serde_json::Value>(&body).map_err(|error| format!("{path}: {error}"))
        };
        let pods = pods(admin.admin_port)?;
        let metrics = get(admin.stats_port, "/metrics")?.1;
        Ok(Self { pods, ready: get(crate::ports::READY, "/healthz/ready")?, metrics, dump: json("/config_dump")? })
    }

    pub(super) fn readiness(&self) -> Finding {
        match &self.ready {
            (200, _) => ok("daemon", "the daemon runs and is ready"),
            (_, why) => fail("daemon", format!("the daemon runs but is not ready: {}", why.trim())),
        }
    }

    pub(super) fn files(&self) -> Finding {
        let metric = |name: &str| {
            let line = self.metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
            line.unwrap_or(0.0)
        };
        let (open, max) = (metric("process_open_fds "), metric("process_max_fds "));
        let text = format!("{open} of at most {max} files are open");
        match open > 0.8 * max {
            true => fail(
                "open files",
                format!(
                    "{text}: the newest connections of the largest pod are refused; raise the container runtime's limit of \
                     open files (LimitNOFILE)"
                ),
            ),
            false => ok("open files", text),
        }
    }

    /// Checks the clocks. Certificates are issued by the CA's clock, and verified by those of this node and of its
    /// peers.
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
                let text = format!("no new certificate for {name}: {error}; this node's time is {here}");
                return fail("clock", format!("{text}: correct this node's clock or the CA's"));
            }
            let Some(leaf) = identity["certChain"].get(0) else { continue };
            seen += 1;
            let (from, to) = (&leaf["validFrom"], &leaf["expirationTime"]);
            if time(from).is_some_and(|from| from > now) || time(to).is_some_and(|to| to < now) {
                let text =
                    format!("the certificate of {name} is valid from {from} to {to}; this node's time is {here}");
                return fail("clock", format!("{text}: correct this node's clock or the CA's"));
            }
        }
        let failed = self.failures("clock");
        if failed > 0.0 {
            let text = format!(
                "{failed} handshakes have failed because a certificate was not valid by the clock of one of the two nodes"
            );
            return note(
                "clock",
                format!("{text}; this node's time is {here}: compare it with the peers that the access log names"),
            );
        }
        if clock::is_synchronized() == Some(false) {
            let text =
                "no time service synchronizes this node's clock, and peers refuse certificates once it is a minute off";
            return note("clock", format!("{text}; this node's time is {here}: start a time service such as chrony"));
        }
        match (&config.ca, seen) {
            (CaSource::Builtin(_), _) => ok(
                "clock",
                format!("this node's time is {here}; the built-in CA uses this clock, so compare it with other nodes"),
            ),
            (CaSource::Istio(_), 0) => note(
                "clock",
                "this node's clock cannot be compared with the CA's before the first certificate is issued",
            ),
            (CaSource::Istio(_), _) => {
                ok("clock", format!("this node's clock agrees with the CA's: all {seen} certificates are valid now"))
            }
        }
    }

    /// The number of connections that failed for a reason.
    fn failures(&self, reason: &str) -> f64 {
        let label = format!("reason=\"{reason}\"");
        let lines = self
            .metrics
            .lines()
            .filter(|line| line.starts_with("culvert_connection_failures_total{") && line.contains(&label));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }
}

/// The daemon's current list of pods.
pub(super) fn pods(admin_port: u16) -> Result<Vec<serde_json::Value>, String> {
    let (_, body) = get(admin_port, "/pods")?;
    let pods: serde_json::Value = serde_json::from_str(&body).map_err(|error| format!("/pods: {error}"))?;
    Ok(pods.as_array().cloned().unwrap_or_default())
}

/// What to say if the admin port cannot be asked.
pub fn not_asked(port: u16, error: &str) -> String {
    format!(
        "the daemon does not answer on port {port}: {error}; run this command in its container or network namespace"
    )
}

/// Sends a GET request to one of the daemon's ports. Returns the status and the body.
pub(super) fn get(port: u16, path: &str) -> Result<(u16, String), String> {
    request(port, "GET", path, "")
}

/// Sends a request to one of the daemon's ports. Returns the status and the body.
pub(super) fn request(port: u16, method: &str, path: &str, body: &str) -> Result<(u16, String), String> {
    let end = Instant::now() + PAGE_DEADLINE;
    let work = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), DEADLINE)?;
        stream.set_write_timeout(Some(DEADLINE))?;
        write!(stream, "{method} {path} HTTP/1.0\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
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
    const NOT_HTTP: &str = "the answer is not HTTP; does another program listen on this port?";
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(NOT_HTTP)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(NOT_HTTP)?;
    Ok((code, body.to_owned()))
}
