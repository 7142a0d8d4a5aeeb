//! The labels of a connection's traffic. They are some twenty texts, so the connections that share facts find their metrics
//! by these, without making the texts again.

use super::details::Details;
use super::direction::Direction;
use super::metrics::{Traffic, TrafficLabels, UNKNOWN};
use crate::mesh::{Service, SpiffeName, Workload};
use crate::telemetry::series::{Series, SeriesHandle, SeriesTrace};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// Most combinations of facts that are remembered. Beyond it, all are found anew.
const COMBINATIONS_MAX: usize = 1024;

/// The traffic metrics that connections have used, by the facts that their labels are made of.
#[derive(Debug, Default)]
pub struct KnownLabels(Mutex<HashMap<Facts, Known>>);

/// The facts that labels are made of. Workloads and services stand for what they are: facts that change are other ones.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Facts {
    direction: Direction,
    source: Option<usize>,
    destination: Option<usize>,
    service: Option<usize>,
    identity: Option<SpiffeName>,
    is_behind_gateway: bool,
}

#[derive(Debug)]
struct Known {
    metrics: SeriesTrace<TrafficLabels, Traffic>,
    /// Nothing else can have the addresses of these facts as long as there are references, although the facts may be gone.
    _workloads: [Option<Weak<Workload>>; 2],
    _service: Option<Weak<Service>>,
}

impl KnownLabels {
    /// The traffic metrics of a connection.
    pub fn traffic(
        &self,
        all: &Series<TrafficLabels, Traffic>,
        direction: Direction,
        details: &Details,
    ) -> SeriesHandle<TrafficLabels, Traffic> {
        let workload = |workload: &Option<Arc<Workload>>| workload.as_ref().map(|one| Arc::as_ptr(one).addr());
        let facts = Facts {
            direction,
            source: workload(&details.source_workload),
            destination: workload(&details.destination_workload),
            service: details.service.as_ref().map(|one| Arc::as_ptr(one).addr()),
            identity: details.source_identity.clone(),
            is_behind_gateway: details.gateway.is_some(),
        };
        if let Some(known) = self.0.lock().get(&facts).and_then(|known| all.again(&known.metrics)) {
            return known;
        }
        let labels = labels(direction, details);
        let traffic = all.of(&labels);
        // Beyond the limit of label sets, there may be room for it later.
        if *traffic.labels() == labels {
            let workloads = [&details.source_workload, &details.destination_workload];
            let known = Known {
                metrics: traffic.trace(),
                _workloads: workloads.map(|workload| workload.as_ref().map(Arc::downgrade)),
                _service: details.service.as_ref().map(Arc::downgrade),
            };
            let mut all = self.0.lock();
            if all.len() >= COMBINATIONS_MAX {
                all.clear();
            }
            all.insert(facts, known);
        }
        traffic
    }
}

/// The labels of a connection's traffic.
fn labels(direction: Direction, details: &Details) -> TrafficLabels {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::snapshot::tests::workload;
    use crate::sys::allocations;
    use crate::telemetry::series::Config;
    use std::time::Duration;

    fn details(source: &Arc<Workload>, destination: &Arc<Workload>) -> Details {
        Details {
            source_workload: Some(source.clone()),
            source_identity: source.identity().ok(),
            destination_workload: Some(destination.clone()),
            destination_identity: None,
            service: None,
            actual: ([10, 0, 0, 2], 80).into(),
            authority: None,
            gateway: None,
            rule: None,
        }
    }

    #[test]
    fn connections_with_the_same_facts_find_their_metrics_without_making_texts() {
        let (known, all) =
            (KnownLabels::default(), Series::new(Config { max: 10_000, idle: Duration::from_secs(600) }));
        let [one, two] = ["one", "two"].map(|name| Arc::new(workload("a", name, "10.0.0.1")));
        let there = details(&one, &two);
        let first = known.traffic(&all, Direction::Outbound, &there);
        let before = allocations::count();
        let second = known.traffic(&all, Direction::Outbound, &there);
        assert_eq!(allocations::count() - before, 0);
        assert!(std::ptr::eq(&*first, &*second));
        let without_identity = Details { source_identity: None, ..details(&one, &two) };
        let behind = Details { gateway: Some("gateway".into()), ..details(&one, &two) };
        let others = [
            (Direction::Inbound, there),
            (Direction::Outbound, details(&two, &one)),
            (Direction::Outbound, without_identity),
            (Direction::Outbound, behind),
        ];
        for (direction, other) in &others {
            let found = known.traffic(&all, *direction, other);
            assert!(!std::ptr::eq(&*first, &*found) && *found.labels() == labels(*direction, other), "{other:?}");
        }
    }

    #[test]
    fn facts_that_have_changed_have_their_own_labels_wherever_they_are_in_memory() {
        let (known, all) = (KnownLabels::default(), Series::default());
        let one = Arc::new(workload("a", "one", "10.0.0.1"));
        for number in 0..2 * COMBINATIONS_MAX {
            let new = Workload { workload_name: format!("w{number}").into(), ..(*one).clone() };
            let found = known.traffic(&all, Direction::Inbound, &details(&one, &Arc::new(new)));
            assert_eq!(found.labels().destination_workload, format!("w{number}"));
        }
        assert!(known.0.lock().len() <= COMBINATIONS_MAX);
    }
}
