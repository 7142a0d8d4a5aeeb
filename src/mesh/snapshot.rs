//! An immutable snapshot of the mesh facts with the indexes that connections and DNS need.
//!
//! The cost of a lookup does not depend on the size of the mesh. Finding the range that contains an address costs one
//! lookup for each prefix length in use.

use super::address::{GatewayRef, GatewayTarget, NetworkAddress, NetworkCidr, range_starts};
use super::egress::{EgressPolicies, EgressPolicy};
use super::fact_key::FactKey;
use super::index::{Claimant, Index};
use super::name::{ServiceKey, Text};
use super::policy::Policy;
use super::service::Service;
use super::workload::{Ports, Protocol, Workload};
use ipnet::IpNet;
use rpds::{HashTrieMapSync, HashTrieSetSync, RedBlackTreeMapSync};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// A complete set of facts, before it is indexed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// All workloads.
    pub workloads: Vec<Workload>,
    /// All services.
    pub services: Vec<Service>,
    /// All policies.
    pub policies: Vec<Policy>,
    /// All egress policies.
    pub egress: Vec<EgressPolicy>,
}

/// Which kinds of facts have been received completely. Until all are, no pod is approved: a policy that has not arrived
/// yet cannot be told from a policy that does not exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Workloads and services.
    pub addresses: bool,
    /// Policies.
    pub policies: bool,
}

impl Synced {
    /// All facts have been received.
    pub const ALL: Self = Self { addresses: true, policies: true };

    /// The kinds of facts that are incomplete, in words; `None` if all have been received.
    pub fn missing(self) -> Option<&'static str> {
        match (self.addresses, self.policies) {
            (true, true) => None,
            (true, false) => Some("policies"),
            (false, true) => Some("workloads and services"),
            (false, false) => Some("workloads, services and policies"),
        }
    }
}

/// An endpoint of a service: a workload with its port map for that service.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// Maps service ports to target ports at this endpoint.
    pub ports: &'a Ports,
}

/// The service or workload that an address or a gateway reference stands for.
#[derive(Clone, Debug)]
pub enum ServiceOrWorkload {
    /// A service, found by a virtual address, a range or its name.
    Service(Arc<Service>),
    /// A workload, found by its own address or host name.
    Workload(Arc<Workload>),
}

/// The endpoints of one service by uid. The order is fixed, so that every choice among them sees the same one.
#[derive(Clone, Debug, Default)]
pub(super) struct Endpoints {
    pub(super) by_uid: RedBlackTreeMapSync<Text, Arc<Workload>>,
    /// Version of the last change of any of them.
    pub(super) version: u64,
}

impl PartialEq for Endpoints {
    /// Compares the facts. When they arrived makes no difference.
    fn eq(&self, other: &Self) -> bool {
        self.by_uid == other.by_uid
    }
}

/// The indexed facts. A copy shares everything that it does not change, so that changing one workload among fifty
/// thousand takes microseconds. The indexes keep all claimants of a key, so that the same facts give the same snapshot
/// in whatever order they arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Increases by one with every change.
    pub version: u64,
    /// Version of the last change of a policy.
    pub policies_version: u64,
    /// Which facts have been received completely.
    pub synced: Synced,
    /// The node on which the daemon runs; empty if not configured.
    pub(super) node: Text,
    /// Which destinations outside the mesh pods may connect to.
    pub egress: Arc<EgressPolicies>,
    /// Trust domains that are equivalent to each workload's own.
    pub trust_domain_aliases: Arc<[Text]>,
    /// The cluster in which the daemon runs; empty if not configured.
    pub(super) cluster: Text,
    /// Keys that were asked for and do not exist. A range is in here for a while after each answer about it. `None` if
    /// the control plane announces everything, so that nothing need be asked for.
    pub(super) absent: Option<HashTrieSetSync<FactKey>>,
    pub(super) workloads: HashTrieMapSync<Text, Arc<Workload>>,
    pub(super) by_address: Index<NetworkAddress, Workload>,
    pub(super) by_pod: Index<(Text, Text), Workload>,
    pub(super) by_workload_host: Index<(Text, Text), Workload>,
    pub(super) services: HashTrieMapSync<ServiceKey, Arc<Service>>,
    pub(super) by_vip: Index<NetworkAddress, Service>,
    pub(super) by_hostname: Index<Text, Service>,
    pub(super) by_cidr: Index<NetworkCidr, Service>,
    /// The prefix lengths in use, as (is IPv4, length), with the number of ranges that have each.
    pub(super) cidr_lengths: BTreeMap<(bool, u8), usize>,
    pub(super) endpoints: HashTrieMapSync<ServiceKey, Endpoints>,
    pub(super) policies: HashTrieMapSync<Text, Arc<Policy>>,
    pub(super) global_policies: Index<(), Policy>,
    pub(super) namespace_policies: Index<Text, Policy>,
}

impl Claimant for Workload {
    /// Pods rank before other workloads, then HBONE before other protocols, then the smaller uid.
    fn order(&self, other: &Self) -> Ordering {
        let rank = |w: &Self| (!w.uid.contains("//Pod/"), w.protocol != Protocol::Hbone);
        rank(self).cmp(&rank(other)).then_with(|| self.uid.cmp(&other.uid))
    }

    fn same(&self, other: &Self) -> bool {
        self.uid == other.uid
    }
}

impl Claimant for Service {
    /// Canonical services rank before others, then those that are named after their own namespace, then the smaller
    /// key.
    fn order(&self, other: &Self) -> Ordering {
        let rank = |s: &Self| (!s.canonical, !s.is_named_after_its_namespace());
        rank(self).cmp(&rank(other)).then_with(|| self.key.cmp(&other.key))
    }

    fn same(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Claimant for Policy {
    fn order(&self, other: &Self) -> Ordering {
        self.key.cmp(&other.key)
    }

    fn same(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Snapshot {
    /// An empty snapshot for a node and cluster. `on_demand`: the control plane announces facts only when asked for
    /// them.
    pub fn empty(node: Text, cluster: Text, on_demand: bool) -> Self {
        Self { node, cluster, absent: on_demand.then(HashTrieSetSync::default), ..Self::default() }
    }

    /// The workload with this uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a pod of this node. A pod and node of the same names in another cluster are not taken for it.
    pub fn workload_of_pod(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.claims_of_pod(namespace, name).iter().find(|workload| self.is_here(workload))
    }

    /// The clusters of all pods of this name that are not on this node.
    pub fn clusters_of_pod(&self, namespace: &str, name: &str) -> Vec<&Text> {
        let claims = self.claims_of_pod(namespace, name).iter();
        claims.filter(|workload| !self.is_here(workload)).map(|workload| &workload.cluster_id).collect()
    }

    fn claims_of_pod(&self, namespace: &str, name: &str) -> &[Arc<Workload>] {
        self.by_pod.get(&(Text::from(namespace), Text::from(name)))
    }

    /// Whether a workload is on this node. Facts without a cluster belong to this cluster.
    fn is_here(&self, workload: &Workload) -> bool {
        let says = |ours: &Text, theirs: &Text| ours.is_empty() || ours == theirs;
        says(&self.node, &workload.node)
            && (workload.cluster_id.is_empty() || says(&self.cluster, &workload.cluster_id))
    }

    /// The workload that has this address as its own.
    pub fn workload_at(&self, network: &Text, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&NetworkAddress { network: network.clone(), ip }).first()
    }

    /// The service with this virtual address, for a client of `client_namespace`: a service of the client's own
    /// namespace first, then a canonical one, then one that is named after its own namespace, then the first by name.
    pub fn service_at(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        preferred(self.by_vip.get(&NetworkAddress { network: network.clone(), ip }), client_namespace)
    }

    /// The service with a range that contains an address: a service of the client's own namespace first, then the one
    /// with the longest prefix.
    pub fn service_around(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        let mut best: Option<&Arc<Service>> = None;
        for (_, length) in self.cidr_lengths.keys().rev().filter(|(v4, _)| *v4 == ip.is_ipv4()) {
            let Ok(range) = IpNet::new(ip, *length) else { continue };
            let key = NetworkCidr { network: network.clone(), range: range.trunc() };
            if let Some(found) = preferred(self.by_cidr.get(&key), client_namespace) {
                if &*found.key.namespace == client_namespace {
                    return Some(found);
                }
                best = best.or(Some(found));
            }
        }
        best
    }

    /// The service with this host name, with the preferences of [`Snapshot::service_at`].
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        preferred(self.by_hostname.get(hostname), client_namespace)
    }

    /// All services with this host name, canonical ones first.
    pub fn services_by_hostname(&self, hostname: &str) -> &[Arc<Service>] {
        self.by_hostname.get(hostname)
    }

    /// The service or workload that a gateway reference names, for a client of `client_namespace`. A service comes
    /// before a workload of the same name.
    pub fn gateway(&self, gateway: &GatewayRef, client_namespace: &str) -> Option<ServiceOrWorkload> {
        match &gateway.target {
            GatewayTarget::Hostname(key) => {
                let service = self.services.get(key).cloned().map(ServiceOrWorkload::Service);
                let host = (key.namespace.clone(), key.hostname.clone());
                service.or_else(|| self.by_workload_host.get(&host).first().cloned().map(ServiceOrWorkload::Workload))
            }
            GatewayTarget::Address(address) => self.at(&address.network, address.ip, client_namespace),
        }
    }

    /// What an address stands for: a service with this virtual address, else a workload with this address, else a
    /// service with a range that contains it. A pod whose address lies in a service's range is still found as that pod.
    pub fn at(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Option<ServiceOrWorkload> {
        let service = self.service_at(network, ip, client_namespace).cloned().map(ServiceOrWorkload::Service);
        let workload = || self.workload_at(network, ip).cloned().map(ServiceOrWorkload::Workload);
        let around = || self.service_around(network, ip, client_namespace).cloned().map(ServiceOrWorkload::Service);
        service.or_else(workload).or_else(around)
    }

    /// Whether the control plane announces everything without being asked.
    pub fn announces_everything(&self) -> bool {
        self.absent.is_none()
    }

    /// The key, if the control plane must be asked for it first: it is not known, and not known to be absent either.
    pub fn unasked(&self, wanted: FactKey) -> Option<FactKey> {
        let absent = self.absent.as_ref()?;
        (!self.holds(&wanted) && !absent.contains(&wanted)).then_some(wanted)
    }

    /// The ranges that must be asked for before it is certain that no service has a range that contains this address.
    pub fn unasked_around(&self, at: &NetworkAddress) -> Vec<FactKey> {
        if self.announces_everything() {
            return Vec::new();
        }
        let range = |ip| FactKey::Range(NetworkAddress { network: at.network.clone(), ip });
        range_starts(at.ip).into_iter().filter_map(|ip| self.unasked(range(ip))).collect()
    }

    /// The facts on the way to a service that may be outdated: the service and its waypoints. Empty if the control
    /// plane announces every change.
    pub fn refreshable(&self, network: &Text, ip: IpAddr, client_namespace: &str) -> Vec<FactKey> {
        let Some(ServiceOrWorkload::Service(service)) =
            self.absent.as_ref().and(self.at(network, ip, client_namespace))
        else {
            return Vec::new();
        };
        let waypoints = service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint));
        let mut wanted: Vec<FactKey> = waypoints.map(FactKey::of_gateway).collect();
        wanted.push(FactKey::Service(service.key.clone()));
        wanted
    }

    /// Whether the snapshot contains a fact with this key.
    pub fn holds(&self, wanted: &FactKey) -> bool {
        match wanted {
            FactKey::Address(at) => !self.by_vip.get(at).is_empty() || !self.by_address.get(at).is_empty(),
            // A known range does not exclude further ranges with the same first address.
            FactKey::Range(_) => false,
            FactKey::Service(key) => {
                let host = (key.namespace.clone(), key.hostname.clone());
                self.services.contains_key(key) || !self.by_workload_host.get(&host).is_empty()
            }
            FactKey::Workload(uid) => self.workloads.contains_key(uid),
        }
    }

    /// The endpoints of a service, healthy or not, ordered by uid.
    pub fn endpoints(&self, key: &ServiceKey) -> impl Iterator<Item = Endpoint<'_>> {
        let key = key.clone();
        self.endpoints.get(&key).into_iter().flat_map(|all| all.by_uid.values()).filter_map(move |workload| {
            let ports = workload.services.get(&key)?;
            Some(Endpoint { workload, ports })
        })
    }

    /// Version of the last change of the endpoints of a service; 0 if it has none.
    pub fn endpoints_version(&self, key: &ServiceKey) -> u64 {
        self.endpoints.get(key).map_or(0, |all| all.version)
    }

    /// Endpoints of services that are not known (yet): the service's key and the workloads' uids.
    pub fn staged(&self) -> impl Iterator<Item = (&ServiceKey, Vec<&Text>)> {
        let unknown = self.endpoints.iter().filter(|(key, _)| !self.services.contains_key(key));
        unknown.map(|(key, all)| (key, all.by_uid.keys().collect()))
    }

    /// The service that leads to this workload's `port`; `None` unless there is exactly one.
    pub fn service_by_target(&self, workload: &Workload, port: u16) -> Option<&Arc<Service>> {
        let leads = |(key, own): (&ServiceKey, &Ports)| {
            let service = self.services.get(key)?;
            let mut all = service.ports.keys().chain(own.keys());
            all.any(|from| service.target_port(Some(own), *from) == Some(port)).then_some(service)
        };
        let mut candidates = workload.services.iter().filter_map(leads);
        candidates.next().filter(|_| candidates.next().is_none())
    }

    /// A policy by `namespace/name`.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The policies that apply to every workload of a namespace: the global ones, then the namespace's own.
    pub fn policies_for_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<Policy>> {
        self.global_policies.get(&()).iter().chain(self.namespace_policies.get(namespace))
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

    /// The numbers of workloads, services and policies.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.workloads.size(), self.services.size(), self.policies.size())
    }
}

/// Of the claimants of a name or address, the one in the client's own namespace, else the first one that is visible to
/// the client.
fn preferred<'a>(claims: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    let own = claims.iter().find(|service| &*service.key.namespace == namespace);
    own.or_else(|| claims.iter().find(|service| service.visible_to(namespace)))
}

/// Builders of facts for the tests of this and other modules.
#[cfg(test)]
pub mod tests {
    use super::super::workload::{Health, Locality, NetworkMode, WorkloadType};
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
            known: Default::default(),
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
    fn without_a_canonical_one_a_service_of_its_own_namespace_wins_over_foreign_claims() {
        let claim = |namespace: &str, host: &str| {
            let mut made = service(namespace, "claim", "10.0.0.1", &[(80, 80)]);
            made.key.hostname = host.into();
            made
        };
        // The foreign ones come first by name.
        let services = vec![
            claim("attacker", "web.shop.svc.cluster.local"),
            service("shop", "web", "10.0.0.1", &[(80, 80)]),
            claim("attacker", "any.example"),
        ];
        let snapshot = Snapshot::build(1, Facts { services: services.clone(), ..Facts::default() });
        let found = |client: &str| {
            let by_vip = snapshot.service_at(&"".into(), "10.0.0.1".parse().unwrap(), client).unwrap();
            let by_name = snapshot.service_by_hostname("web.shop.svc.cluster.local", client).unwrap();
            [by_vip, by_name].map(|service| service.key.namespace.to_string())
        };
        assert_eq!(found("client"), ["shop", "shop"]);
        assert_eq!(found("shop"), ["shop", "shop"]);
        let own = services.iter().map(Service::is_named_after_its_namespace).collect::<Vec<_>>();
        assert_eq!(own, [false, true, false]);
        for host in ["web.shop", ".shop.svc.cluster.local", "a.b.shop.svc.cluster.local", "web.shop.svcs.local"] {
            assert!(!claim("shop", host).is_named_after_its_namespace(), "{host}");
        }
    }

    #[test]
    fn a_pod_of_another_cluster_is_not_taken_for_one_of_this_node() {
        let (mut far, mut elsewhere) = (workload("a", "pod", "10.0.0.5"), workload("a", "pod", "10.0.0.6"));
        (far.uid, far.cluster_id) = ("c2//Pod/a/pod".into(), "c2".into());
        (elsewhere.uid, elsewhere.node) = ("c1//Pod/a/pod-1".into(), "node-2".into());
        let mut snapshot = Snapshot::empty("node-1".into(), "c1".into(), false);
        snapshot.apply(1, Facts { workloads: vec![far, elsewhere], ..Facts::default() }.into());
        assert!(snapshot.workload_of_pod("a", "pod").is_none(), "neither of them");
        assert!(snapshot.clusters_of_pod("a", "pod").contains(&&"c2".into()));
        snapshot.apply(2, Facts { workloads: vec![workload("a", "pod", "10.0.0.7")], ..Facts::default() }.into());
        assert_eq!(snapshot.workload_of_pod("a", "pod").unwrap().ips[0].to_string(), "10.0.0.7");
    }

    #[test]
    fn longest_prefix_wins_among_ranges() {
        let mut wide = service("a", "wide", "10.9.9.9", &[(80, 80)]);
        wide.cidrs = vec![super::super::address::parse_network_cidr("/10.0.0.0/8").unwrap()];
        let mut narrow = service("a", "narrow", "10.9.9.8", &[(80, 80)]);
        narrow.cidrs = vec![super::super::address::parse_network_cidr("/10.1.0.0/16").unwrap()];
        let snapshot = Snapshot::build(1, Facts { services: vec![wide, narrow], ..Facts::default() });
        let found =
            |ip: &str| snapshot.service_around(&"".into(), ip.parse().unwrap(), "x").map(|s| s.name.to_string());
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
