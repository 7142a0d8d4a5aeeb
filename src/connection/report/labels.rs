//! The labels of a connection's traffic.

use super::details::Details;
use super::direction::Direction;
use super::metrics::{TrafficLabels, UNKNOWN};
use crate::mesh::SpiffeName;

/// The labels of a connection's traffic.
pub fn labels(direction: Direction, details: &Details) -> TrafficLabels {
    let known = |text: Option<&str>| match text {
        Some(text) if !text.is_empty() => text.to_owned(),
        _ => UNKNOWN.to_owned(),
    };
    let (source, destination) = (details.source_workload.as_deref(), details.destination_workload.as_deref());
    let service = details.service.as_deref();
    let tls = details.source_identity.is_some();
    let principal = |identity: Option<&SpiffeName>| known(identity.map(ToString::to_string).as_deref());
    // Behind a gateway, the workload may stand for many, of which each has its own identity.
    let destination_identity =
        destination.filter(|_| details.gateway.is_none()).and_then(|workload| workload.identity().ok());
    TrafficLabels {
        reporter: direction.reporter(),
        source_workload: known(source.map(|w| &*w.workload_name)),
        source_canonical_service: known(source.map(|w| &*w.canonical_name)),
        source_canonical_revision: known(source.map(|w| &*w.canonical_revision)),
        source_workload_namespace: known(source.map(|w| &*w.namespace)),
        source_principal: principal(details.source_identity.as_ref()),
        source_app: known(source.map(|w| &*w.canonical_name)),
        source_version: known(source.map(|w| &*w.canonical_revision)),
        source_cluster: known(source.map(|w| &*w.cluster_id)),
        destination_service: known(service.map(|s| &*s.key.hostname)),
        destination_service_namespace: known(service.map(|s| &*s.key.namespace)),
        destination_service_name: known(service.map(|s| &*s.name)),
        destination_workload: known(destination.map(|w| &*w.workload_name)),
        destination_canonical_service: known(destination.map(|w| &*w.canonical_name)),
        destination_canonical_revision: known(destination.map(|w| &*w.canonical_revision)),
        destination_workload_namespace: known(destination.map(|w| &*w.namespace)),
        destination_principal: principal(destination_identity.as_ref()),
        destination_app: known(destination.map(|w| &*w.canonical_name)),
        destination_version: known(destination.map(|w| &*w.canonical_revision)),
        destination_cluster: known(destination.map(|w| &*w.cluster_id)),
        request_protocol: "tcp",
        response_flags: "-",
        connection_security_policy: if tls { "mutual_tls" } else { "unknown" },
        source_region: known(source.map(|w| &*w.locality.region)),
        source_zone: known(source.map(|w| &*w.locality.zone)),
        destination_region: known(destination.map(|w| &*w.locality.region)),
        destination_zone: known(destination.map(|w| &*w.locality.zone)),
    }
}
