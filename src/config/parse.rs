//! Readers of the values that have a form of their own. Pure.

use super::kind::{Custom, number};
use crate::mesh::{SpiffeName, Text};
use crate::node::selectors::{EnablementSelector, read_selectors};
use crate::rpc::{Token, tls::Roots};
use http::Uri;
use serde_json::Value;
use std::net::IpAddr;
use std::time::Duration;

/// `https://host:port`. The scheme may be left out. Only TLS is accepted, because the token goes over this connection.
pub const ADDRESS: Custom<Uri> = Custom { expected: "https://host:port, or host:port", read: address };

fn address(text: &str) -> Result<Uri, String> {
    let expected = || ADDRESS.expected.to_owned();
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: Uri = whole.parse().map_err(|_| expected())?;
    let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
    let is_valid = uri.scheme_str() == Some("https") && uri.host().is_some_and(|host| !host.is_empty()) && is_bare;
    if is_valid { Ok(uri) } else { Err(expected()) }
}

/// An IP address, kept as it was written.
pub const IP: Custom<String> = Custom { expected: "an IP address", read: ip };

fn ip(text: &str) -> Result<String, String> {
    match text.parse::<IpAddr>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(IP.expected.into()),
    }
}

/// Trust domains, separated by commas.
pub const TRUST_DOMAINS: Custom<Vec<String>> =
    Custom { expected: "trust domains in lower case, comma-joined", read: trust_domains };

fn trust_domains(text: &str) -> Result<Vec<String>, String> {
    let all: Vec<String> = text.split(',').map(|domain| domain.trim().to_owned()).collect();
    let is_valid = |domain: &String| SpiffeName::new(domain, "a", "a").is_ok();
    if all.iter().all(is_valid) { Ok(all) } else { Err(TRUST_DOMAINS.expected.into()) }
}

/// One trust domain. Of several the first counts.
pub const TRUST_DOMAIN: Custom<String> = Custom {
    expected: "one trust domain in lower case; of several, comma-joined, the first is used",
    read: trust_domain,
};

fn trust_domain(text: &str) -> Result<String, String> {
    trust_domains(text)?.into_iter().next().ok_or_else(|| TRUST_DOMAIN.expected.into())
}

/// A DNS domain, kept in lower case and without dots at its ends.
pub const DOMAIN: Custom<String> = Custom { expected: "a domain such as cluster.local", read: domain };

fn domain(text: &str) -> Result<String, String> {
    let bare = text.trim_matches('.').to_ascii_lowercase();
    let is_valid = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if bare.split('.').all(is_valid) { Ok(bare) } else { Err(DOMAIN.expected.into()) }
}

/// Selectors of pods and namespaces.
pub const SELECTORS: Custom<Vec<EnablementSelector>> = Custom { expected: "a YAML list of selectors", read: selectors };

fn selectors(text: &str) -> Result<Vec<EnablementSelector>, String> {
    read_selectors(text).map_err(|error| format!("a list of selectors: {error}"))
}

/// A number of worker threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// That many; 0 means one for each CPU.
    Count(usize),
    /// That part of the CPUs, in percent.
    Percent(usize),
}

/// A number of worker threads, or a share of the CPUs.
pub const THREADS: Custom<Threads> =
    Custom { expected: "a number from 0 to 4096, or a share from 1% to 100%", read: threads };

fn threads(text: &str) -> Result<Threads, String> {
    match text.strip_suffix('%') {
        Some(percent) => number(percent, 1..=100).map(Threads::Percent),
        None => number(text, 0..=4096).map(Threads::Count),
    }
}

/// A Kubernetes quantity of CPUs, rounded up.
pub const CPUS: Custom<usize> = Custom { expected: "a number of CPUs such as 2, 1.5 or 500m", read: cpus };

fn cpus(text: &str) -> Result<usize, String> {
    let whole = |text: &str| text.parse::<usize>().ok().filter(|n| *n <= 4_096_000);
    let found = match (text.strip_suffix('m'), text.split_once('.')) {
        (Some(milli), _) => whole(milli).map(|milli| milli.div_ceil(1000)),
        (None, Some((cpus, part))) => {
            whole(part).and(whole(cpus)).map(|cpus| cpus + usize::from(part.bytes().any(|digit| digit != b'0')))
        }
        (None, None) => whole(text),
    };
    found.filter(|cpus| *cpus <= 4096).ok_or_else(|| CPUS.expected.into())
}

/// A mark of packets. It must lie within the bits that the rules compare, and differ from the mark that brings replies
/// back (0x111).
pub const PACKET_MARK: Custom<u32> = Custom { expected: "a number from 1 to 4095 other than 273", read: packet_mark };

fn packet_mark(text: &str) -> Result<u32, String> {
    number(text, 1..=0xfff).ok().filter(|mark| *mark != 0x111).ok_or_else(|| PACKET_MARK.expected.into())
}

/// A workload, by namespace, name and service account.
pub const WORKLOAD: Custom<[Text; 3]> = Custom { expected: "namespace/name/serviceaccount", read: workload };

fn workload(text: &str) -> Result<[Text; 3], String> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts[..] {
        [namespace, name, account]
            if !name.is_empty() && SpiffeName::new("cluster.local", namespace, account).is_ok() =>
        {
            Ok([namespace.into(), name.into(), account.into()])
        }
        _ => Err(WORKLOAD.expected.into()),
    }
}

/// Most ports that may be listed.
const PORTS_MAX: usize = 256;

/// Ports, separated by commas.
pub const PORTS: Custom<Vec<u16>> =
    Custom { expected: "up to 256 ports from 1 to 65535, comma-joined", read: read_ports };

fn read_ports(text: &str) -> Result<Vec<u16>, String> {
    let ports = text.split(',').map(|port| port.trim().parse().ok().filter(|port| *port != 0));
    let ports: Option<Vec<u16>> = ports.collect();
    ports.filter(|ports| ports.len() <= PORTS_MAX).ok_or_else(|| PORTS.expected.into())
}

/// Root certificates. The form of the text says what it is, never whether a file exists at the moment: it may be
/// mounted later.
pub fn roots(text: &str) -> Roots {
    match text {
        "SYSTEM" => Roots::System,
        pem if pem.starts_with("-----BEGIN") => Roots::Inline(pem.to_owned()),
        path => Roots::File(path.into()),
    }
}

/// A token. A path has a slash; a token (a JWT) has none.
pub fn token(text: &str) -> Token {
    if text.contains('/') { Token::File(text.into()) } else { Token::Literal(text.to_owned()) }
}

/// A duration as `/config_dump` shows it.
pub fn shown_duration(duration: Duration) -> Value {
    humantime::format_duration(duration).to_string().into()
}
