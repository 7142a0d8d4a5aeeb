//! All objects, and the facts that follow from them. A change of an object marks the facts that depend on it;
//! [`Index::take_changes`] makes these anew and returns those that differ.

use super::object::{Asked, Endpoint, Gateway, Key, Namespace, Node, Pod, Service, Slice};
use super::read::Faults;
use super::space::Space;
use super::workload::{Around, nowhere, of_endpoint, of_pod};
use super::{resource, service};
use crate::control_plane::Cluster;
use crate::control_plane::catalog::{Change, Kind, Resource};
use crate::mesh::workload::Locality;
use crate::mesh::{GatewayRef, Text};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Most services of one workload.
const SERVICES_MAX: usize = 250;
/// Most ports of all services of one workload.
const PORTS_MAX: usize = 4_000;

/// The keys of the policies that select a pod of a namespace with some labels.
pub type Policies<'a> = &'a dyn Fn(&str, &BTreeMap<String, String>) -> Vec<Text>;

/// All objects, and the facts that follow from them.
#[derive(Debug)]
pub struct Index {
    cluster: Cluster,
    spaces: HashMap<Text, Space>,
    nodes: HashMap<Text, Locality>,
    pods_of_node: HashMap<Text, HashSet<Key>>,
    gateways: HashMap<Key, Gateway>,
    /// What was returned last, by name of the resource.
    published: HashMap<Text, Arc<Resource>>,
    /// The workloads of each slice among these.
    published_of_slice: HashMap<Key, Vec<Text>>,
    marked: Marked,
    faults: Faults,
}

/// What may have changed.
#[derive(Debug, Default)]
struct Marked {
    pods: HashSet<Key>,
    services: HashSet<Key>,
    slices: HashSet<Key>,
    /// Namespaces of which everything may have changed.
    spaces: HashSet<Text>,
    /// Namespaces of which all pods may have changed.
    pods_of: HashSet<Text>,
    gateways: HashSet<Key>,
    all: bool,
    all_pods: bool,
}

impl Index {
    /// An empty index.
    pub fn new(cluster: &Cluster) -> Self {
        Self {
            cluster: cluster.clone(),
            spaces: HashMap::new(),
            nodes: HashMap::new(),
            pods_of_node: HashMap::new(),
            gateways: HashMap::new(),
            published: HashMap::new(),
            published_of_slice: HashMap::new(),
            marked: Marked::default(),
            faults: Faults::default(),
        }
    }

    /// How many workloads and services are known.
    #[cfg(test)]
    pub fn facts(&self) -> usize {
        self.published.len()
    }

    /// Whether nothing at all is known.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        let (spaces, of_slices) = (self.spaces.is_empty(), self.published_of_slice.is_empty());
        spaces && of_slices && self.nodes.is_empty() && self.pods_of_node.is_empty() && self.gateways.is_empty()
    }

    /// Adds a pod or replaces it. One that has ended, or has no address, is as good as gone.
    pub fn set_pod(&mut self, pod: Pod) {
        if pod.ended || pod.ips.is_empty() {
            return self.remove_pod(&pod.namespace, &pod.name);
        }
        let key = (pod.namespace.clone(), pod.name.clone());
        let node = pod.node.clone();
        let space = self.spaces.entry(pod.namespace.clone()).or_default();
        let before = space.pods.get(&pod.name).map(|old| old.node.clone());
        if !space.set_pod(pod) {
            return;
        }
        if before.as_ref() != Some(&node) {
            if let Some(before) = before {
                self.leave_node(&before, &key);
            }
            self.pods_of_node.entry(node).or_default().insert(key.clone());
        }
        self.marked.pods.insert(key);
    }

    /// Removes a pod.
    pub fn remove_pod(&mut self, namespace: &str, name: &str) {
        let Some((namespace, space)) = self.space(namespace) else { return };
        let Some(node) = space.pods.get(name).map(|pod| pod.node.clone()) else { return };
        space.remove_pod(name);
        let key = (namespace, Text::from(name));
        self.leave_node(&node, &key);
        self.tidy(&key.0);
        self.marked.pods.insert(key);
    }

    fn leave_node(&mut self, node: &Text, key: &Key) {
        if let Some(pods) = self.pods_of_node.get_mut(node) {
            pods.remove(key);
            if pods.is_empty() {
                self.pods_of_node.remove(node);
            }
        }
    }

    /// A namespace of which something is known.
    fn space(&mut self, name: &str) -> Option<(Text, &mut Space)> {
        let name = self.spaces.get_key_value(name)?.0.clone();
        let space = self.spaces.get_mut(&name)?;
        Some((name, space))
    }

    /// Forgets a namespace of which nothing is known any more.
    fn tidy(&mut self, name: &Text) {
        if self.spaces.get(name).is_some_and(Space::is_empty) {
            self.spaces.remove(name);
        }
    }

    /// Adds a service or replaces it.
    pub fn set_service(&mut self, service: Service) {
        let key = (service.key.namespace.clone(), service.name.clone());
        self.spaces.entry(key.0.clone()).or_default();
        self.change_service(key, Some(service));
    }

    /// Removes a service.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        self.change_service((namespace.into(), name.into()), None);
    }

    fn change_service(&mut self, key: Key, service: Option<Service>) {
        let Some(space) = self.spaces.get_mut(&key.0) else { return };
        let Some(pods) = space.set_service(&key.1, service) else { return };
        self.marked.slices.extend(space.slices_of(&key.1).map(|slice| (key.0.clone(), slice.clone())));
        self.marked.pods.extend(pods.into_iter().map(|pod| (key.0.clone(), pod)));
        self.tidy(&key.0);
        self.marked.services.insert(key);
    }

    /// Adds a slice or replaces it.
    pub fn set_slice(&mut self, slice: Slice) {
        let key = (slice.namespace.clone(), slice.name.clone());
        self.spaces.entry(key.0.clone()).or_default();
        self.change_slice(key, Some(slice));
    }

    /// Removes a slice.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) {
        self.change_slice((namespace.into(), name.into()), None);
    }

    fn change_slice(&mut self, key: Key, slice: Option<Slice>) {
        let Some(space) = self.spaces.get_mut(&key.0) else { return };
        let had_too_many = space.has_too_many_addresses();
        let Some(pods) = space.set_slice(&key.1, slice) else { return };
        if space.has_too_many_addresses() != had_too_many {
            self.marked.slices.extend(space.slices.keys().map(|slice| (key.0.clone(), slice.clone())));
            if !had_too_many {
                let fault = "EndpointSlices have too many endpoints that are no pods; all of these are left out";
                self.faults.add(format!("Namespace {}: {fault}", key.0));
            }
        }
        self.marked.pods.extend(pods.into_iter().map(|pod| (key.0.clone(), pod)));
        self.tidy(&key.0);
        self.marked.slices.insert(key);
    }

    /// Adds a node or replaces it.
    pub fn set_node(&mut self, node: Node) {
        if self.nodes.get(&node.name) != Some(&node.locality) {
            self.mark_node(&node.name);
            self.nodes.insert(node.name, node.locality);
        }
    }

    /// Removes a node.
    pub fn remove_node(&mut self, name: &str) {
        if self.nodes.remove(name).is_some() {
            self.mark_node(name);
        }
    }

    fn mark_node(&mut self, name: &str) {
        self.marked.pods.extend(self.pods_of_node.get(name).into_iter().flatten().cloned());
    }

    /// Adds a namespace or replaces it.
    pub fn set_namespace(&mut self, namespace: Namespace) {
        let name = namespace.name.clone();
        let space = self.spaces.entry(name.clone()).or_default();
        if space.namespace.as_ref() != Some(&namespace) {
            self.marked.all |= self.cluster.namespace == name
                && space.namespace.as_ref().map_or("", |old| &old.network) != &*namespace.network;
            space.namespace = Some(namespace);
            self.marked.spaces.insert(name);
        }
    }

    /// Removes a namespace.
    pub fn remove_namespace(&mut self, name: &str) {
        let is_own = *self.cluster.namespace == *name;
        let Some((name, space)) = self.space(name) else { return };
        let Some(old) = space.namespace.take() else { return };
        self.marked.all |= is_own && !old.network.is_empty();
        self.tidy(&name);
        self.marked.spaces.insert(name);
    }

    /// Adds a waypoint or replaces it.
    pub fn set_gateway(&mut self, gateway: Gateway) {
        let key = (gateway.namespace.clone(), gateway.name.clone());
        if self.gateways.get(&key) != Some(&gateway) {
            self.gateways.insert(key.clone(), gateway);
            self.marked.gateways.insert(key);
        }
    }

    /// Removes a waypoint.
    pub fn remove_gateway(&mut self, namespace: &str, name: &str) {
        let key = (namespace.into(), name.into());
        if self.gateways.remove(&key).is_some() {
            self.marked.gateways.insert(key);
        }
    }

    /// The policies that select pods may have changed everywhere.
    pub fn mark_all_pods(&mut self) {
        self.marked.all_pods = true;
    }

    /// The policies that select pods may have changed in a namespace.
    pub fn mark_pods_of(&mut self, namespace: &Text) {
        self.marked.pods_of.insert(namespace.clone());
    }

    /// What was left out since the last call.
    pub fn take_faults(&mut self) -> Faults {
        std::mem::take(&mut self.faults)
    }

    /// Whether facts may have changed.
    pub fn has_changes(&self) -> bool {
        let m = &self.marked;
        let any = |sets: [&HashSet<Key>; 4]| sets.iter().any(|set| !set.is_empty());
        m.all
            || m.all_pods
            || !m.spaces.is_empty()
            || !m.pods_of.is_empty()
            || any([&m.pods, &m.services, &m.slices, &m.gateways])
    }

    /// Makes the facts anew that may have changed, and returns those that did.
    pub fn take_changes(&mut self, policies: Policies<'_>) -> Vec<Change> {
        let marked = std::mem::take(&mut self.marked);
        let marked = self.resolved(marked);
        let mut changes = Vec::new();
        for (namespace, name) in &marked.pods {
            let uid = crate::mesh::workload::pod_uid(&self.cluster.id, namespace, name);
            let new = self.pod(namespace, name, policies);
            let new = new.map(|(resource, left_out)| {
                if left_out > 0 {
                    let fault = format!("Pod {namespace}/{name}: belongs to too many services or ports; {left_out} services are left out");
                    self.faults.add(fault);
                }
                resource
            });
            self.publish(uid, new, &mut changes);
        }
        for (namespace, name) in &marked.services {
            let (resource, new) = self.service(namespace, name);
            self.publish(resource, new, &mut changes);
        }
        for key in &marked.slices {
            let new = self.slice(key);
            let names: Vec<Text> = new.keys().cloned().collect();
            let before = if names.is_empty() {
                self.published_of_slice.remove(key)
            } else {
                self.published_of_slice.insert(key.clone(), names)
            };
            for gone in before.unwrap_or_default().into_iter().filter(|name| !new.contains_key(name)) {
                self.publish(gone, None, &mut changes);
            }
            for (name, resource) in new {
                self.publish(name, Some(resource), &mut changes);
            }
        }
        changes
    }

    fn publish(&mut self, name: Text, new: Option<Resource>, changes: &mut Vec<Change>) {
        match new {
            Some(new) if self.published.get(&name).is_some_and(|old| **old == new) => {}
            Some(new) => {
                let new = Arc::new(new);
                self.published.insert(name.clone(), new.clone());
                changes.push((Kind::Address, name, Some(new)));
            }
            None if self.published.remove(&name).is_some() => changes.push((Kind::Address, name, None)),
            None => {}
        }
    }

    /// The marked objects one by one.
    fn resolved(&self, mut marked: Marked) -> Marked {
        let whole = marked.all || marked.all_pods || !marked.spaces.is_empty() || !marked.pods_of.is_empty();
        if !whole && marked.gateways.is_empty() {
            return marked;
        }
        for (name, space) in &self.spaces {
            let all = marked.all || marked.spaces.contains(name) || asks(space, &marked.gateways);
            let key = |object: &Text| (name.clone(), object.clone());
            if all || marked.all_pods || marked.pods_of.contains(name) {
                marked.pods.extend(space.pods.keys().map(key));
            }
            if all {
                marked.services.extend(space.services.keys().map(key));
            }
            if marked.all {
                marked.slices.extend(space.slices.keys().map(key));
            }
            if all || marked.gateways.is_empty() {
                continue;
            }
            let one = |asked: &Asked| matches!(asked, Asked::Gateway(gateway) if marked.gateways.contains(gateway));
            let serves = |pod: &Pod| {
                let of = pod.gateway.as_ref().map(|gateway| (name.clone(), gateway.clone()));
                of.is_some_and(|gateway| marked.gateways.contains(&gateway))
            };
            marked.pods.extend(space.pods.values().filter(|pod| one(&pod.asked) || serves(pod)).map(|p| key(&p.name)));
            let asking = space.services.values().filter(|service| one(&service.asked));
            marked.services.extend(asking.map(|service| key(&service.name)));
        }
        marked
    }

    fn network(&self) -> Text {
        let own = self.spaces.get(&self.cluster.namespace).and_then(|space| space.namespace.as_ref());
        own.map_or_else(|| "".into(), |namespace| namespace.network.clone())
    }

    /// The waypoint of an object that asks for one, or whose namespace does.
    fn waypoint(&self, namespace: &Text, space: &Space, asked: &Asked, for_services: bool) -> Option<GatewayRef> {
        let asked = match (asked, &space.namespace) {
            (Asked::Nothing, Some(namespace)) => &namespace.asked,
            (asked, _) => asked,
        };
        let Asked::Gateway(key) = asked else { return None };
        let gateway = self.gateways.get(key)?;
        let takes = if for_services { gateway.takes.services } else { gateway.takes.workloads };
        let admitted = takes && gateway.admits(namespace, space.namespace.as_ref());
        admitted.then(|| gateway.reference(&self.network()))
    }

    /// A pod's resource, and how many of its services were left out.
    fn pod(&self, namespace: &Text, name: &Text, policies: Policies<'_>) -> Option<(Resource, usize)> {
        let space = self.spaces.get(namespace)?;
        let pod = space.pods.get(name)?;
        let mut services = space.services_of(pod);
        let all = services.len();
        services.truncate(few(&services));
        let left_out = all - services.len();
        let (waypoint, application_tunnel) = match &pod.gateway {
            None => (self.waypoint(namespace, space, &pod.asked, false), None),
            // The pods of a gateway have no waypoint before them.
            Some(gateway) => {
                let gateway = self.gateways.get(&(namespace.clone(), gateway.clone()));
                (None, gateway.and_then(|gateway| gateway.binding))
            }
        };
        let names = services.iter().map(|service| service.resource.clone()).collect();
        let around = Around {
            cluster: &self.cluster,
            network: &self.network(),
            locality: self.nodes.get(&pod.node).cloned().unwrap_or_else(nowhere),
            services,
            waypoint,
            application_tunnel,
            policies: policies(namespace, &pod.labels),
        };
        Some((resource::workload(&of_pod(pod, around), names), left_out))
    }

    /// The name of a service's resource, and the resource.
    fn service(&self, namespace: &Text, name: &Text) -> (Text, Option<Resource>) {
        let found = self.spaces.get(namespace).and_then(|space| Some((space, space.services.get(name)?)));
        let Some((space, service)) = found else {
            let resource = format!("{namespace}/{name}.{namespace}.svc.{}", self.cluster.domain);
            return (resource.as_str().into(), None);
        };
        let asked = if service.is_gateway { &Asked::None } else { &service.asked };
        let waypoint = self.waypoint(namespace, space, asked, true);
        let distribution = space.namespace.as_ref().and_then(|namespace| namespace.distribution);
        let fact = service::fact(service, &self.network(), distribution, waypoint);
        (service.resource.clone(), Some(resource::service(&fact)))
    }

    /// The workloads of the endpoints of a slice that are no pods. Of two with one address, the first counts.
    fn slice(&self, (namespace, name): &Key) -> BTreeMap<Text, Resource> {
        let mut resources = BTreeMap::new();
        let found = self.spaces.get(namespace).filter(|space| !space.has_too_many_addresses()).and_then(|space| {
            let slice = space.slices.get(name)?;
            Some((slice, space.services.get(&slice.service)?))
        });
        let Some((slice, service)) = found else { return resources };
        let mut known = BTreeSet::new();
        let network = self.network();
        for endpoint in &slice.endpoints {
            let Endpoint::Address { ip, ready } = endpoint else { continue };
            if known.insert(*ip) {
                let fact = of_endpoint(slice, service, (*ip, *ready), &self.cluster, &network);
                let new = resource::workload(&fact, vec![service.resource.clone()]);
                resources.insert(fact.uid, new);
            }
        }
        resources
    }
}

/// Whether a namespace asks for one of these waypoints for everything in it.
fn asks(space: &Space, gateways: &HashSet<Key>) -> bool {
    let asked = space.namespace.as_ref().map(|namespace| &namespace.asked);
    matches!(asked, Some(Asked::Gateway(gateway)) if gateways.contains(gateway))
}

/// How many of these services a workload may have: their ports are repeated for each of their pods.
fn few(services: &[&Service]) -> usize {
    let mut ports = 0;
    let fits = |service: &&&Service| {
        ports += service.ports.len();
        ports <= PORTS_MAX
    };
    services.iter().take(SERVICES_MAX).take_while(fits).count()
}
