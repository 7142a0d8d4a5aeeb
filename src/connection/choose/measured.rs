//! What `benches/choose.rs` measures: the choice of an endpoint, as a connection makes it.

use super::endpoints::{EndpointLists, InFlight};
use super::metrics::Metrics;
use super::standing::{Evidence, Witness};
use super::{Chance, Known, ResolvedNames, destination};
use crate::mesh::address::NetworkAddress;
use crate::mesh::service::{Service, Visibility};
use crate::mesh::workload::{Health, Locality, NetworkMode, WorkloadType};
use crate::mesh::{Protocol, ServiceKey, Snapshot, Store, Update, Workload};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// A service with many endpoints, and a client of it.
#[derive(Debug)]
pub struct Choice {
    snapshot: Arc<Snapshot>,
    service: Arc<Service>,
    client: Workload,
    endpoints: Arc<EndpointLists>,
}

impl Choice {
    /// A service with `count` endpoints, of which each `aside`th is set aside; 0 for none. Their weights differ if
    /// `weighted`.
    pub fn new(count: u32, aside: u32, weighted: bool) -> Option<Self> {
        let key = ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() };
        let workload = |number: u32| Workload {
            capacity: if weighted { 1 + number % 3 } else { 1 },
            services: [(key.clone(), [(80, 8080)].into())].into(),
            ..workload(number)
        };
        let service = Service { key: key.clone(), ..service() };
        let store = Store::default();
        store.update(Update {
            workloads: (0..count).map(workload).collect(),
            services: vec![service],
            ..Update::default()
        });
        let snapshot = store.load();
        let service = snapshot.services().next()?.clone();
        let endpoints = Arc::new(EndpointLists::new(50, Metrics::default()));
        let choice = Self { snapshot, service, client: self::workload(u32::MAX), endpoints };
        // The list is made by the first choice.
        choice.choose()?;
        let mut set_aside = 0;
        while aside > 0 && set_aside < count / aside {
            let connection = choice.choose()?;
            set_aside += u32::from(connection.failed(Evidence::Refused));
        }
        Some(choice)
    }

    /// Makes one choice.
    pub fn choose(&self) -> Option<InFlight> {
        let mut random = |below| rand::random_range(0..below);
        let (pod, now) = (Witness(1), self.endpoints.now());
        let known = Some(Known { endpoints: &self.endpoints, pod, now, left: &[] });
        let mut chance = Chance { random: &mut random, known };
        let names = ResolvedNames::new();
        let chosen = destination::choose(&self.snapshot, &self.client, &self.service, 80, &names, &mut chance);
        Some(InFlight::begin(&self.endpoints, chosen.ok()?.pick?, pod))
    }
}

/// A workload of this number.
pub(crate) fn workload(number: u32) -> Workload {
    Workload {
        uid: format!("c1//Pod/shop/web-{number}").into(),
        name: format!("web-{number}").into(),
        namespace: "shop".into(),
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        ips: vec![IpAddr::V4(Ipv4Addr::from_bits(number))],
        network: "".into(),
        protocol: Protocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        canonical_name: "web".into(),
        canonical_revision: "v1".into(),
        workload_name: "web".into(),
        workload_type: WorkloadType::Deployment,
        hostname: "".into(),
        node: "node-1".into(),
        native_tunnel: false,
        application_tunnel: None,
        policies: Vec::new(),
        health: Health::Healthy,
        cluster_id: "c1".into(),
        locality: Locality { region: "r".into(), zone: "z".into(), subzone: "".into() },
        services: Default::default(),
        capacity: 1,
        known: Default::default(),
    }
}

fn service() -> Service {
    Service {
        key: ServiceKey { namespace: "".into(), hostname: "".into() },
        name: "web".into(),
        vips: vec![NetworkAddress { network: "".into(), ip: Ipv4Addr::new(10, 96, 0, 1).into() }],
        cidrs: Vec::new(),
        ports: [(80, 8080)].into(),
        port_names: Default::default(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families: None,
        canonical: false,
        visibility: Visibility::Public,
    }
}
