//! Headers that describe a connection besides the CONNECT authority: `baggage`, `forwarded` and `traceparent` of a
//! tunnel's stream, and the PROXY protocol header for applications that expect one. Receivers use the first three for
//! telemetry only; nothing grants access because of them.

use crate::mesh::{Service, SpiffeName, Workload};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

/// The `baggage` header of a workload: `key=value` pairs separated by commas. Empty values are left out, and characters
/// with a meaning in baggage are percent-encoded (W3C Baggage).
pub fn baggage(workload: &Workload) -> String {
    let kind = format!("k8s.{}.name", workload.workload_type.as_str());
    let members: [(&str, &str); 7] = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (&kind, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let mut text = String::new();
    for (key, value) in members.into_iter().filter(|(_, value)| !value.is_empty()) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_graphic() && !b"\",;\\%=".contains(&byte) {
                text.push(char::from(byte));
            } else {
                // Writing to a String cannot fail.
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

/// The `forwarded` header: the original client, and the service that it dialled, if it dialled one.
pub fn forwarded(source: SocketAddr, service: Option<&Service>) -> String {
    match service {
        Some(service) => format!("for=\"{source}\";host={}", service.key.hostname),
        None => format!("for=\"{source}\""),
    }
}

/// A new `traceparent` header (W3C Trace Context) with the sampled flag off.
pub fn traceparent() -> String {
    format!("00-{:032x}-{:016x}-00", rand::random::<u128>().max(1), rand::random::<u64>().max(1))
}

/// A PROXY protocol header, version 2: the client's address, the address that it dialled, and in TLV 0xD0 the identity
/// that TLS proved (source: the PROXY protocol specification and Istio's waypoint binding). If one address is IPv4 and
/// the other IPv6, both are written as IPv6.
pub fn proxy_v2(client: SocketAddr, asked: SocketAddr, identity: &SpiffeName) -> Vec<u8> {
    const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
    const VERSION_2_PROXY: u8 = 0x21;
    const TCP4: u8 = 0x11;
    const TCP6: u8 = 0x21;
    const PEER_IDENTITY: u8 = 0xd0;
    let mut addresses = Vec::new();
    let family = match (client.ip(), asked.ip()) {
        (IpAddr::V4(client), IpAddr::V4(asked)) => {
            addresses.extend(client.octets().into_iter().chain(asked.octets()));
            TCP4
        }
        (client, asked) => {
            for ip in [client, asked] {
                let v6 = match ip {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                addresses.extend(v6.octets());
            }
            TCP6
        }
    };
    addresses.extend(client.port().to_be_bytes().into_iter().chain(asked.port().to_be_bytes()));
    let identity = identity.to_string();
    // The conversion cannot fail: an identity has three parts of at most 253 bytes each.
    let length = u16::try_from(identity.len()).unwrap_or(0);
    addresses.push(PEER_IDENTITY);
    addresses.extend(length.to_be_bytes());
    addresses.extend(identity.bytes().take(usize::from(length)));
    let length = u16::try_from(addresses.len()).unwrap_or(0);
    let mut header = SIGNATURE.to_vec();
    header.extend([VERSION_2_PROXY, family]);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::snapshot::tests::{service, workload};

    #[test]
    fn baggage_names_what_is_known_and_escapes_what_would_be_read_wrongly() {
        let mut client = workload("a", "client", "10.0.0.1");
        client.canonical_revision = "1,2=3%".into();
        assert_eq!(
            baggage(&client),
            "k8s.cluster.name=c1,k8s.namespace.name=a,k8s.deployment.name=client,service.name=client,\
             service.version=1%2C2%3D3%25"
        );
    }

    #[test]
    fn forwarded_and_traceparent_have_their_forms() {
        let source = "[fd00::1]:1234".parse().unwrap();
        assert_eq!(forwarded(source, None), "for=\"[fd00::1]:1234\"");
        let web = service("a", "web", "10.96.0.1", &[]);
        assert_eq!(forwarded(source, Some(&web)), "for=\"[fd00::1]:1234\";host=web.a.svc.cluster.local");
        let trace = traceparent();
        assert_eq!((trace.len(), trace.split('-').count()), (55, 4));
    }

    #[test]
    fn a_proxy_header_says_who_asks_for_what_in_either_family() {
        let identity = SpiffeName::new("td", "a", "b").unwrap();
        let header = |client: &str, asked: &str| proxy_v2(client.parse().unwrap(), asked.parse().unwrap(), &identity);
        let v4 = header("10.0.0.1:258", "10.0.0.2:80");
        assert_eq!(&v4[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x24");
        assert_eq!(&v4[16..28], &[10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 80]);
        assert_eq!(&v4[28..31], &[0xd0, 0, 21]);
        assert_eq!(&v4[31..], b"spiffe://td/ns/a/sa/b");
        for (client, asked) in [("[fd00::1]:1", "[fd00::2]:2"), ("10.0.0.1:1", "[fd00::2]:2")] {
            let header = header(client, asked);
            assert_eq!((header[13], header.len()), (0x21, 16 + 36 + 3 + 21), "{client} {asked}");
        }
    }
}
