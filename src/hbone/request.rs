//! The CONNECT request: writing and parsing its authority and headers. Pure. The parser accepts any input and is
//! fuzzed.
//!
//! The headers are for telemetry only (source: ztunnel's HBONE requests). Nothing here may grant access.

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

const BAGGAGE: &str = "baggage";
const FORWARDED: &str = "forwarded";
const TRACEPARENT: &str = "traceparent";

/// Longest header value that is accepted from a peer, in bytes.
const VALUE_MAX: usize = 4096;

/// The destination of a stream, as the peer wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// `ip:port`.
    Address(SocketAddr),
    /// `host:port`.
    Host(String, u16),
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// Why a request is not a valid HBONE request. The reason is logged; the peer gets status 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The method is not CONNECT.
    #[error("expected method CONNECT, got {0}")]
    Method(String),
    /// The authority is not `ip:port` or `host:port`.
    #[error("no valid authority pseudo header: {0:?}")]
    Authority(String),
}

impl Authority {
    /// Parses `ip:port`, `[ip]:port` or `host:port`. Refuses IPv6 zones, user parts, port 0 and characters that host
    /// names do not have. An IPv4-mapped address becomes the IPv4 address.
    pub fn parse(text: &str) -> Result<Self, RequestError> {
        let bad = || RequestError::Authority(text.chars().take(300).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let port: u16 = port.parse().map_err(|_| bad())?;
        if port == 0 {
            return Err(bad());
        }
        if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            let ip: std::net::Ipv6Addr = v6.parse().map_err(|_| bad())?;
            return Ok(Self::Address(SocketAddr::new(IpAddr::V6(ip).to_canonical(), port)));
        }
        if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(ip), port)));
        }
        let label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        // Some parsers read a host whose last label is a number as an IPv4 address (RFC 3696 section 2).
        let numeric = host.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
        if host.len() > 253 || numeric || !host.split('.').all(label) {
            return Err(bad());
        }
        Ok(Self::Host(host.to_ascii_lowercase(), port))
    }
}

/// A CONNECT request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The destination of the stream.
    pub authority: Authority,
    /// Description of the source workload: `key=value` pairs separated by commas (W3C Baggage).
    pub baggage: Option<String>,
    /// The original client, and the host name of the service that it dialled, if any.
    pub forwarded: Option<String>,
    /// Trace context (W3C Trace Context).
    pub traceparent: Option<String>,
}

impl ConnectRequest {
    /// Parses a request. A header that is repeated or too long is ignored.
    pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Self, RequestError> {
        if method != Method::CONNECT {
            return Err(RequestError::Method(method.as_str().chars().take(32).collect()));
        }
        // A CONNECT request has only an authority. With a scheme or path it is an extended CONNECT, or malformed.
        if uri.scheme().is_some() || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(RequestError::Authority(uri.to_string().chars().take(300).collect()));
        }
        let authority = uri.authority().ok_or_else(|| RequestError::Authority(String::new()))?;
        let value = |name: &str| {
            let mut all = headers.get_all(name).iter();
            let (Some(value), None) = (all.next(), all.next()) else { return None };
            let text = value.to_str().ok()?;
            (text.len() <= VALUE_MAX).then(|| text.to_owned())
        };
        Ok(Self {
            authority: Authority::parse(authority.as_str())?,
            baggage: value(BAGGAGE),
            forwarded: value(FORWARDED),
            traceparent: value(TRACEPARENT),
        })
    }

    /// The request as HTTP. Headers whose value cannot be written are left out.
    pub fn to_http(&self) -> Result<Request<()>, http::Error> {
        let mut request = Request::builder().method(Method::CONNECT).uri(self.authority.to_string()).body(())?;
        let named = [(BAGGAGE, &self.baggage), (FORWARDED, &self.forwarded), (TRACEPARENT, &self.traceparent)];
        for (name, value) in named {
            if let Some(value) = value.as_deref().and_then(|v| HeaderValue::from_str(v).ok()) {
                request.headers_mut().insert(name, value);
            }
        }
        Ok(request)
    }

    /// The `host=` of the `forwarded` header: the service that the client dialled.
    pub fn forwarded_host(&self) -> Option<&str> {
        self.forwarded
            .as_deref()?
            .split(';')
            .find_map(|part| part.trim().strip_prefix("host="))
            .map(|h| h.trim_matches('"'))
    }
}

/// The response that accepts a stream, with the baggage of the workload that accepts it.
pub fn accepted(baggage: Option<&str>) -> http::Response<()> {
    let mut response = http::Response::new(());
    if let Some(value) = baggage.and_then(|b| HeaderValue::from_str(b).ok()) {
        response.headers_mut().insert(BAGGAGE, value);
    }
    response
}

/// A response that refuses a stream.
pub fn refused(status: StatusCode) -> http::Response<()> {
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn authorities() {
        for (text, expected) in [
            ("10.0.0.1:80", Some("10.0.0.1:80")),
            ("[fd00::1]:80", Some("[fd00::1]:80")),
            ("[::ffff:10.0.0.1]:80", Some("10.0.0.1:80")),
            ("Web.Retail.svc.cluster.local:8080", Some("web.retail.svc.cluster.local:8080")),
            ("host:080", Some("host:80")),
            ("10.0.0.1", None),
            ("10.0.0.1:", None),
            ("10.0.0.1:0", None),
            ("10.0.0.1:65536", None),
            ("10.0.0.1:+80", None),
            ("10.0.0:80", None),
            ("[fe80::1%eth0]:80", None),
            ("fd00::1:80", None),
            ("user@host:80", None),
            ("a..b:80", None),
            ("ho st:80", None),
            (":80", None),
            ("", None),
        ] {
            let parsed = Authority::parse(text).ok().map(|a| a.to_string());
            assert_eq!(parsed.as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_request_survives_the_wire() {
        let request = ConnectRequest {
            authority: Authority::Address("10.0.0.1:80".parse().unwrap()),
            baggage: Some("k8s.namespace.name=a".into()),
            forwarded: Some("for=\"10.0.0.2:1234\";host=web.a.svc".into()),
            traceparent: None,
        };
        let http = request.to_http().unwrap();
        let parsed = ConnectRequest::parse(http.method(), http.uri(), http.headers()).unwrap();
        assert_eq!(parsed, request);
        assert_eq!(parsed.forwarded_host(), Some("web.a.svc"));
    }

    proptest! {
        #[test]
        fn parsing_is_total_and_what_is_taken_prints_back(text in "\\PC{0,40}") {
            if let Ok(authority) = Authority::parse(&text) {
                prop_assert_eq!(Authority::parse(&authority.to_string()), Ok(authority));
            }
        }
    }
}
