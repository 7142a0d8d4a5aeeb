//! An immutable picture of the mesh with the indexes that connections need; every lookup is O(1) but for CIDR services.

use super::address::{GatewayRef, GatewayTarget, NetworkAddress};
use super::name::{ServiceKey, Text};
use super::policy::{Policy, PolicyScope};
use super::service::Service;
use super::workload::{NetworkMode, Ports, Protocol, Workload};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Facts as they are learned, before they are indexed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// All workloads.
    pub workloads: Vec<Workload>,
    /// All services.
    pub services: Vec<Service>,
    /// All policies.
    pub policies: Vec<Policy>,
}

/// One workload behind a service, with its own port map for that service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Service port to target port at this endpoint.
    pub ports: Ports,
}

/// What an address stands for.
#[derive(Clone, Debug)]
pub enum Known {
    /// A service's virtual address.
    Service(Arc<Service>),
    /// A workload's own address.
    Workload(Arc<Workload>),
}

/// The indexed, immutable facts.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Rises by one with every change.
    pub version: u64,
    workloads: HashMap<Text, Arc<Workload>>,
    by_address: HashMap<NetworkAddress, Arc<Workload>>,
    by_pod: HashMap<(Text, Text), Arc<Workload>>,
    by_workload_host: HashMap<(Text, Text), Arc<Workload>>,
    services: HashMap<ServiceKey, Arc<Service>>,
    by_vip: HashMap<NetworkAddress, Vec<Arc<Service>>>,
    by_hostname: HashMap<Text, Vec<Arc<Service>>>,
    cidr_services: Vec<Arc<Service>>,
    endpoints: HashMap<ServiceKey, Vec<Endpoint>>,
    policies: HashMap<Text, Arc<Policy>>,
    global_policies: Vec<Arc<Policy>>,
    namespace_policies: HashMap<Text, Vec<Arc<Policy>>>,
}

impl Snapshot {
    /// Indexes `facts` from scratch.
    pub fn build(version: u64, facts: Facts) -> Self {
        let mut snapshot = Self { version, ..Self::default() };
        for service in facts.services {
            snapshot.add_service(Arc::new(service));
        }
        for workload in facts.workloads {
            snapshot.add_workload(Arc::new(workload));
        }
        for policy in facts.policies {
            snapshot.add_policy(Arc::new(policy));
        }
        snapshot
    }

    fn add_service(&mut self, service: Arc<Service>) {
        for vip in &service.vips {
            self.by_vip.entry(vip.clone()).or_default().push(service.clone());
        }
        if !service.cidrs.is_empty() {
            self.cidr_services.push(service.clone());
        }
        self.by_hostname.entry(service.key.hostname.clone()).or_default().push(service.clone());
        self.services.insert(service.key.clone(), service);
    }

    fn add_workload(&mut self, workload: Arc<Workload>) {
        if workload.network_mode == NetworkMode::Standard {
            for ip in &workload.ips {
                let address = NetworkAddress { network: workload.network.clone(), ip: *ip };
                let better = self.by_address.get(&address).is_none_or(|other| rank(&workload) > rank(other));
                if better {
                    self.by_address.insert(address, workload.clone());
                }
            }
        }
        for (key, ports) in &workload.services {
            let endpoint = Endpoint { workload: workload.clone(), ports: ports.clone() };
            self.endpoints.entry(key.clone()).or_default().push(endpoint);
        }
        if !workload.hostname.is_empty() {
            let host = (workload.namespace.clone(), workload.hostname.clone());
            self.by_workload_host.insert(host, workload.clone());
        }
        self.by_pod.insert((workload.namespace.clone(), workload.name.clone()), workload.clone());
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn add_policy(&mut self, policy: Arc<Policy>) {
        match policy.scope {
            PolicyScope::Global => self.global_policies.push(policy.clone()),
            PolicyScope::Namespace => {
                self.namespace_policies.entry(policy.namespace.clone()).or_default().push(policy.clone());
            }
            PolicyScope::WorkloadSelector => {}
        }
        self.policies.insert(policy.key.clone(), policy);
    }

    /// The workload with this uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a pod of this node.
    pub fn workload_of_pod(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.by_pod.get(&(namespace.into(), name.into()))
    }

    /// The workload that owns an address.
    pub fn workload_at(&self, network: &Text, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&NetworkAddress { network: network.clone(), ip })
    }

    /// The service that a virtual address stands for, as seen by a client of `client_namespace`: the client's own
    /// namespace first, then a canonical one, then the first; exact addresses before ranges.
    pub fn service_at(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        let exact = self.by_vip.get(&NetworkAddress { network: network.clone(), ip });
        let exact = exact.and_then(|list| preferred(list.iter(), client_namespace));
        exact.or_else(|| {
            let (mut best, mut best_score) = (None, None);
            for service in self.cidr_services.iter().filter(|s| s.visible_to(client_namespace)) {
                for cidr in service.cidrs.iter().filter(|c| c.network == *network && c.range.contains(&ip)) {
                    let own = &*service.key.namespace == client_namespace;
                    let score = Some((own, cidr.range.prefix_len(), service.canonical));
                    if score > best_score {
                        (best, best_score) = (Some(service), score);
                    }
                }
            }
            best
        })
    }

    /// The service with this host name, by the same preference as [`Snapshot::service_at`].
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        preferred(self.by_hostname.get(hostname)?.iter(), client_namespace)
    }

    /// What a gateway reference names, as a client of `client_namespace` sees it; a service before a workload.
    pub fn gateway(&self, gateway: &GatewayRef, client_namespace: &str) -> Option<Known> {
        match &gateway.target {
            GatewayTarget::Hostname(key) => {
                let service = self.services.get(key).cloned().map(Known::Service);
                let host = (key.namespace.clone(), key.hostname.clone());
                service.or_else(|| self.by_workload_host.get(&host).cloned().map(Known::Workload))
            }
            GatewayTarget::Address(address) => self.at(&address.network, address.ip, client_namespace),
        }
    }

    /// What an address stands for; a service before a workload.
    pub fn at(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Option<Known> {
        let service = self.service_at(network, ip, client_namespace).cloned().map(Known::Service);
        service.or_else(|| self.workload_at(network, ip).cloned().map(Known::Workload))
    }

    /// The endpoints of a service, healthy or not.
    pub fn endpoints(&self, key: &ServiceKey) -> &[Endpoint] {
        self.endpoints.get(key).map_or(&[], Vec::as_slice)
    }

    /// A policy by `namespace/name`.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The policies that apply to every workload, then those of one namespace.
    pub fn policies_for_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<Policy>> {
        self.global_policies.iter().chain(self.namespace_policies.get(namespace).into_iter().flatten())
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }
}

/// Which of several workloads on one address is meant: a pod before others, one that takes HBONE before others.
fn rank(workload: &Workload) -> u8 {
    let pod = if workload.uid.contains("//Pod/") { 2 } else { 0 };
    pod + u8::from(workload.protocol == Protocol::Hbone)
}

fn preferred<'a>(services: impl Iterator<Item = &'a Arc<Service>>, namespace: &str) -> Option<&'a Arc<Service>> {
    let mut best: Option<(u8, &Arc<Service>)> = None;
    for service in services.filter(|s| s.visible_to(namespace)) {
        let score = if &*service.key.namespace == namespace { 2 } else { u8::from(service.canonical) };
        if best.is_none_or(|(other, _)| score > other) {
            best = Some((score, service));
        }
    }
    best.map(|(_, service)| service)
}

/// Builders of plain facts for the tests of every module above.
#[cfg(test)]
pub mod tests {
    use super::super::workload::{Health, Locality, WorkloadType};
    use super::*;
    use crate::mesh::service::Visibility;
    use std::collections::BTreeMap;

    /// An HBONE workload `namespace/name` with service account `name`.
    pub fn workload(namespace: &str, name: &str, ip: &str) -> Workload {
        Workload {
            uid: format!("c1//Pod/{namespace}/{name}").into(),
            name: name.into(),
            namespace: namespace.into(),
            trust_domain: "cluster.local".into(),
            service_account: name.into(),
            ips: vec![ip.parse().unwrap()],
            network: "".into(),
            protocol: Protocol::Hbone,
            network_mode: NetworkMode::Standard,
            waypoint: None,
            network_gateway: None,
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
            workload_name: name.into(),
            workload_type: WorkloadType::Deployment,
            hostname: "".into(),
            node: "node-1".into(),
            native_tunnel: false,
            application_tunnel: None,
            policies: Vec::new(),
            health: Health::Healthy,
            cluster_id: "c1".into(),
            locality: Locality { region: "".into(), zone: "".into(), subzone: "".into() },
            services: BTreeMap::new(),
            capacity: 1,
        }
    }

    /// A service `namespace/name.namespace.svc.cluster.local`.
    pub fn service(namespace: &str, name: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
        Service {
            key: ServiceKey {
                namespace: namespace.into(),
                hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
            },
            name: name.into(),
            vips: vec![NetworkAddress { network: "".into(), ip: vip.parse().unwrap() }],
            cidrs: Vec::new(),
            ports: ports.iter().copied().collect(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancer: None,
            ip_families: None,
            canonical: false,
            visibility: Visibility::Public,
        }
    }

    #[test]
    fn shared_vips_prefer_own_namespace_then_canonical() {
        let mut canonical = service("b", "web", "10.0.0.1", &[(80, 80)]);
        canonical.canonical = true;
        let mut hidden = service("c", "web", "10.0.0.1", &[(80, 80)]);
        hidden.visibility = Visibility::Namespace;
        let services = vec![service("a", "web", "10.0.0.1", &[(80, 80)]), canonical, hidden];
        let snapshot = Snapshot::build(1, Facts { services, ..Facts::default() });
        let ip = "10.0.0.1".parse().unwrap();
        for (client, expected) in [("a", "a"), ("b", "b"), ("c", "c"), ("z", "b")] {
            let found = snapshot.service_at(&"".into(), ip, client).unwrap();
            assert_eq!(&*found.key.namespace, expected, "client in {client}");
        }
    }

    #[test]
    fn longest_prefix_wins_among_ranges() {
        let mut wide = service("a", "wide", "10.9.9.9", &[(80, 80)]);
        wide.cidrs = vec![super::super::address::parse_network_cidr("/10.0.0.0/8").unwrap()];
        let mut narrow = service("a", "narrow", "10.9.9.8", &[(80, 80)]);
        narrow.cidrs = vec![super::super::address::parse_network_cidr("/10.1.0.0/16").unwrap()];
        let snapshot = Snapshot::build(1, Facts { services: vec![wide, narrow], ..Facts::default() });
        let found = |ip: &str| snapshot.service_at(&"".into(), ip.parse().unwrap(), "x").map(|s| s.name.to_string());
        assert_eq!(found("10.1.2.3").as_deref(), Some("narrow"));
        assert_eq!(found("10.2.2.3").as_deref(), Some("wide"));
        assert_eq!(found("11.2.2.3"), None);
    }

    #[test]
    fn a_pod_wins_an_address_over_an_entry_and_host_network_never_has_one() {
        let mut entry = workload("a", "vm", "10.0.0.5");
        entry.uid = "c1/networking.istio.io/WorkloadEntry/a/vm".into();
        let mut host = workload("a", "host", "10.0.0.6");
        host.network_mode = NetworkMode::HostNetwork;
        let workloads = vec![workload("a", "pod", "10.0.0.5"), entry, host];
        let snapshot = Snapshot::build(1, Facts { workloads, ..Facts::default() });
        let at = |ip: &str| snapshot.workload_at(&"".into(), ip.parse().unwrap()).map(|w| w.name.to_string());
        assert_eq!(at("10.0.0.5").as_deref(), Some("pod"));
        assert_eq!(at("10.0.0.6"), None);
    }
}
