//! What a CONNECT says of its source besides its authority: baggage, forwarded, traceparent. For telemetry only.

use crate::mesh::{Service, Workload};
use std::fmt::Write as _;
use std::net::SocketAddr;

/// The baggage of a workload: `key=value` joined by commas, empty ones left out, values percent-encoded where they
/// hold a character that baggage gives a meaning to (W3C Baggage).
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

/// The original client, and the service that it asked for.
pub fn forwarded(source: SocketAddr, service: Option<&Service>) -> String {
    match service {
        Some(service) => format!("for=\"{source}\";host={}", service.key.hostname),
        None => format!("for=\"{source}\""),
    }
}

/// A new W3C trace context that is not sampled.
pub fn traceparent() -> String {
    format!("00-{:032x}-{:016x}-00", rand::random::<u128>().max(1), rand::random::<u64>().max(1))
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
}
