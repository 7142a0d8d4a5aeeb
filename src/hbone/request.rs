//! The CONNECT request and its answer: writing and parsing their authority and headers. Pure. The parser accepts any
//! input and is fuzzed.
//!
//! The headers are for telemetry only (source: ztunnel's HBONE requests). Nothing here may grant access.

use super::codec::fields::{BAGGAGE, FORWARDED, NETWORK, RequestHead, TRACEPARENT, writable};
use super::codec::hpack;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The destination of a stream, as the peer wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    /// A CONNECT request has no `:scheme` and `:path` (RFC 9113 section 8.5). With `:protocol` it is an extended one
    /// (RFC 8441), which is not a tunnel.
    #[error("a CONNECT request for {0:?} with a scheme, path or protocol")]
    Extended(String),
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
    /// The network that the connection comes from, if it has crossed to another one.
    pub network: Option<String>,
}

impl ConnectRequest {
    /// Makes a request of well-formed fields. A header that is repeated or too long is ignored.
    pub fn from_head(head: RequestHead) -> Result<Self, RequestError> {
        let parts = head.into_parts();
        if parts.method != "CONNECT" {
            return Err(RequestError::Method(parts.method));
        }
        let authority = parts.authority.unwrap_or_default();
        if parts.extended {
            return Err(RequestError::Extended(authority));
        }
        Ok(Self {
            authority: Authority::parse(&authority)?,
            baggage: parts.baggage,
            forwarded: parts.forwarded,
            traceparent: parts.traceparent,
            network: parts.network,
        })
    }

    /// Appends the request as a header block. Headers whose value cannot be written are left out.
    pub fn encode(&self, out: &mut Vec<u8>) {
        hpack::method_connect(out);
        hpack::authority(&self.authority.to_string(), out);
        let named = [
            (BAGGAGE, &self.baggage),
            (FORWARDED, &self.forwarded),
            (TRACEPARENT, &self.traceparent),
            (NETWORK, &self.network),
        ];
        for (name, value) in named {
            if let Some(value) = value.as_deref().and_then(writable) {
                hpack::field(name, value, out);
            }
        }
    }

    /// Whether the request says that the connection comes from another network than `own`.
    pub fn is_from_other_network(&self, own: &str) -> bool {
        self.network.as_deref().is_some_and(|network| !network.eq_ignore_ascii_case(own))
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

/// Appends the answer to a request as a header block: status 200 accepts it. `baggage` describes the workload that
/// accepts; it is left out if it cannot be written.
pub fn encode_response(status: u16, baggage: Option<&str>, out: &mut Vec<u8>) {
    hpack::status(status, out);
    if let Some(value) = baggage.and_then(writable) {
        hpack::field(BAGGAGE, value, out);
    }
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

    fn decoded(block: &[u8]) -> RequestHead {
        let mut head = RequestHead::default();
        let whole = hpack::Decoder::new().decode(block, usize::MAX, &mut |name, value| head.field(name, value));
        assert_eq!(whole, Ok(true));
        assert_eq!(head.check(), Ok(()));
        head
    }

    fn head(fields: &[(&str, &str)]) -> RequestHead {
        let mut head = RequestHead::default();
        fields.iter().for_each(|(name, value)| head.field(name.as_bytes(), value.as_bytes()));
        assert_eq!(head.check(), Ok(()));
        head
    }

    #[test]
    fn a_request_survives_the_wire() {
        let request = ConnectRequest {
            authority: Authority::Address("10.0.0.1:80".parse().unwrap()),
            baggage: Some("k8s.namespace.name=a".into()),
            forwarded: Some("for=\"10.0.0.2:1234\";host=web.a.svc".into()),
            traceparent: None,
            network: Some("net-1".into()),
        };
        let mut block = Vec::new();
        request.encode(&mut block);
        let parsed = ConnectRequest::from_head(decoded(&block)).unwrap();
        assert_eq!(parsed, request);
        assert_eq!(parsed.forwarded_host(), Some("web.a.svc"));
        for (own, other) in [("net-1", false), ("NET-1", false), ("net-2", true), ("", true)] {
            assert_eq!(parsed.is_from_other_network(own), other, "{own}");
        }
        let silent = ConnectRequest { network: None, ..parsed };
        assert!(!silent.is_from_other_network("net-1"));
    }

    #[test]
    fn other_requests_are_refused() {
        let get = [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "a:80")];
        assert_eq!(ConnectRequest::from_head(head(&get)), Err(RequestError::Method("GET".into())));
        for name in [":scheme", ":path", ":protocol"] {
            let extended = [(":method", "CONNECT"), (":authority", "a:80"), (name, "websocket")];
            assert_eq!(
                ConnectRequest::from_head(head(&extended)),
                Err(RequestError::Extended("a:80".into())),
                "{name}"
            );
        }
        let nowhere = head(&[(":method", "CONNECT")]);
        assert_eq!(ConnectRequest::from_head(nowhere), Err(RequestError::Authority(String::new())));
    }

    #[test]
    fn the_beginning_of_a_long_authority_is_not_taken_for_an_authority() {
        let long = format!("{}:80{}", "a".repeat(297), "0".repeat(10));
        let request = ConnectRequest::from_head(head(&[(":method", "CONNECT"), (":authority", &long)]));
        assert_eq!(request, Err(RequestError::Authority(long[..300].into())));
    }

    #[test]
    fn values_that_cannot_be_written_are_left_out() {
        for (value, written) in [
            ("a=b", Some("a=b")),
            ("a\tb", Some("a\tb")),
            (" a=b\t", Some("a=b")),
            ("", Some("")),
            ("a\r\nb: c", None),
            ("a\nb", None),
            ("a\0", None),
            ("a\u{7f}", None),
            ("é", None),
        ] {
            let authority = Authority::Host("a".into(), 80);
            let value = Some(value.to_owned());
            let (baggage, traceparent) = (value.clone(), value);
            let request = ConnectRequest { authority, baggage, forwarded: None, traceparent, network: None };
            let mut block = Vec::new();
            request.encode(&mut block);
            let parsed = ConnectRequest::from_head(decoded(&block)).unwrap();
            assert_eq!(parsed.baggage.as_deref(), written, "{request:?}");
            assert_eq!(parsed.traceparent.as_deref(), written, "{request:?}");
        }
    }

    #[test]
    fn an_answer_survives_the_wire() {
        for status in [100, 200, 204, 400, 404, 431, 500, 503] {
            for (baggage, expected) in [(None, None), (Some("a=b"), Some("a=b")), (Some("a\r\n"), None)] {
                let (mut block, mut head) = (Vec::new(), super::super::codec::fields::ResponseHead::default());
                encode_response(status, baggage, &mut block);
                let mut found = None;
                let whole = hpack::Decoder::new().decode(&block, 4096, &mut |name, value| {
                    head.field(name, value);
                    if name == b"baggage" {
                        found = Some(String::from_utf8(value.to_vec()).unwrap());
                    }
                });
                assert_eq!(whole, Ok(true));
                assert_eq!(head.check(), Ok(status));
                assert_eq!(found.as_deref(), expected);
            }
        }
        let mut block = Vec::new();
        encode_response(200, None, &mut block);
        assert_eq!(block, [0x88], "the common answer takes one byte");
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
