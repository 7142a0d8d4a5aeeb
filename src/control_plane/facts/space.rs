//! The objects of one namespace, and which of them belong together.

use super::label_index::LabelIndex;
use super::object::{Endpoint, Namespace, Pod, PodRef, Service, Slice};
use crate::mesh::Text;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Most endpoints of all slices of a namespace that are no pods, with their ports: each is a workload of its own, which
/// every daemon gets.
const ADDRESSES_MAX: usize = 100_000;

/// The objects of one namespace.
#[derive(Debug, Default)]
pub struct Space {
    /// The namespace itself, once it is known.
    pub namespace: Option<Namespace>,
    /// Pods by name.
    pub pods: HashMap<Text, Pod>,
    /// Services by name.
    pub services: HashMap<Text, Service>,
    /// Slices by name.
    pub slices: HashMap<Text, Slice>,
    /// Pods by label.
    pods_by_label: LabelIndex,
    /// Services by one label of their selector.
    services_by_label: LabelIndex,
    /// That label of each service.
    label_of_service: HashMap<Text, (String, String)>,
    /// Endpoints of all slices that are no pods, with their ports.
    addresses: usize,
    /// Slices by service.
    slices_of_service: HashMap<Text, BTreeSet<Text>>,
    /// Slices by pod that they refer to, with the uids by which they do; without one, any pod of the name is meant.
    slices_of_pod: HashMap<Text, BTreeMap<Text, Vec<Option<Text>>>>,
}

impl Space {
    /// Whether nothing is known of it any more.
    pub fn is_empty(&self) -> bool {
        self.namespace.is_none() && self.pods.is_empty() && self.services.is_empty() && self.slices.is_empty()
    }

    /// Adds a pod or replaces it. Whether something has changed.
    pub fn set_pod(&mut self, pod: Pod) -> bool {
        if self.pods.get(&pod.name) == Some(&pod) {
            return false;
        }
        if self.pods.get(&pod.name).is_none_or(|old| old.labels != pod.labels) {
            self.unlabel(&pod.name);
            for (key, value) in &*pod.labels {
                self.pods_by_label.add(key, value, &pod.name);
            }
        }
        self.pods.insert(pod.name.clone(), pod);
        true
    }

    /// Removes a pod. Whether there was one.
    pub fn remove_pod(&mut self, name: &str) -> bool {
        self.unlabel(name);
        self.pods.remove(name).is_some()
    }

    fn unlabel(&mut self, name: &str) {
        let Some(old) = self.pods.get(name) else { return };
        for (key, value) in &*old.labels {
            self.pods_by_label.remove(key, value, name);
        }
    }

    /// Replaces a service, or removes it. Returns the pods that may be endpoints of the old one or of the new one;
    /// `None` if nothing has changed.
    pub fn set_service(&mut self, name: &Text, service: Option<Service>) -> Option<BTreeSet<Text>> {
        if self.services.get(name) == service.as_ref() {
            return None;
        }
        let mut pods = BTreeSet::new();
        if let Some(old) = self.services.remove(name) {
            self.endpoints(&old, &mut pods);
            if let Some((key, value)) = self.label_of_service.remove(name) {
                self.services_by_label.remove(&key, &value, name);
            }
        }
        if let Some(new) = service {
            self.endpoints(&new, &mut pods);
            // The label that the fewest others are found by, so that a pod has few candidates.
            let rarest = new.selector.iter().min_by_key(|(key, value)| self.services_by_label.count(key, value));
            if let Some((key, value)) = rarest {
                self.services_by_label.add(key, value, name);
                self.label_of_service.insert(name.clone(), (key.clone(), value.clone()));
            }
            self.services.insert(name.clone(), new);
        }
        Some(pods)
    }

    /// Adds the pods of a service to `pods`.
    fn endpoints(&self, service: &Service, pods: &mut BTreeSet<Text>) {
        if service.selector.is_empty() {
            let slices = self.slices_of(&service.name).filter_map(|slice| self.slices.get(slice));
            pods.extend(slices.flat_map(referred).map(|pod| pod.name.clone()));
            return;
        }
        let with = |(key, value): (&String, &String)| self.pods_by_label.get(key, value);
        // Every label must match, so the rarest one names all candidates.
        let rarest = service.selector.iter().map(with).min_by_key(|names| names.map_or(0, |names| names.len()));
        let candidates = rarest.flatten().into_iter().flatten();
        let is_selected = |name: &&Text| self.pods.get(&***name).is_some_and(|pod| selects(service, pod));
        pods.extend(candidates.filter(is_selected).cloned());
    }

    /// Whether its slices have more endpoints that are no pods than daemons can be told of.
    pub fn has_too_many_addresses(&self) -> bool {
        self.addresses > ADDRESSES_MAX
    }

    /// Replaces a slice, or removes it. Returns the pods whose services may differ now; `None` if nothing has changed.
    pub fn set_slice(&mut self, name: &Text, slice: Option<Slice>) -> Option<BTreeSet<Text>> {
        if self.slices.get(name) == slice.as_ref() {
            return None;
        }
        let mut pods = BTreeSet::new();
        if let Some(old) = self.slices.remove(name) {
            self.forget_slice(&old);
            self.addresses -= addresses(&old);
            self.referred_by(&old, &mut pods);
        }
        if let Some(new) = slice {
            self.referred_by(&new, &mut pods);
            self.addresses += addresses(&new);
            self.slices_of_service.entry(new.service.clone()).or_default().insert(name.clone());
            for pod in referred(&new) {
                let slices = self.slices_of_pod.entry(pod.name.clone()).or_default();
                slices.entry(name.clone()).or_default().push(pod.uid.clone());
            }
            self.slices.insert(name.clone(), new);
        }
        Some(pods)
    }

    /// The pods of a slice count only where the service has no selector.
    fn referred_by(&self, slice: &Slice, pods: &mut BTreeSet<Text>) {
        if self.services.get(&slice.service).is_some_and(|service| service.selector.is_empty()) {
            pods.extend(referred(slice).map(|pod| pod.name.clone()));
        }
    }

    fn forget_slice(&mut self, old: &Slice) {
        if let Some(slices) = self.slices_of_service.get_mut(&old.service) {
            slices.remove(&old.name);
            if slices.is_empty() {
                self.slices_of_service.remove(&old.service);
            }
        }
        for pod in referred(old) {
            if let Some(slices) = self.slices_of_pod.get_mut(&pod.name) {
                slices.remove(&old.name);
                if slices.is_empty() {
                    self.slices_of_pod.remove(&pod.name);
                }
            }
        }
    }

    /// The names of the slices of a service.
    pub fn slices_of(&self, service: &str) -> impl Iterator<Item = &Text> {
        self.slices_of_service.get(service).into_iter().flatten()
    }

    /// The services of which a pod is an endpoint, in the order of their names.
    pub fn services_of(&self, pod: &Pod) -> Vec<&Service> {
        let mut services = BTreeMap::new();
        for (key, value) in &*pod.labels {
            let candidates = self.services_by_label.get(key, value).into_iter().flatten();
            let known = candidates.filter_map(|name| self.services.get(name));
            services.extend(known.filter(|service| selects(service, pod)).map(|service| (&service.name, service)));
        }
        // Not those that refer to an earlier pod of the same name.
        let is_meant = |uids: &Vec<Option<Text>>| uids.iter().any(|uid| uid.as_ref().is_none_or(|uid| *uid == pod.uid));
        let slices = self.slices_of_pod.get(&pod.name).into_iter().flatten().filter(|(_, uids)| is_meant(uids));
        let of_slices = slices.filter_map(|(name, _)| self.services.get(&self.slices.get(name)?.service));
        let of_slices = of_slices.filter(|service| service.selector.is_empty());
        services.extend(of_slices.map(|service| (&service.name, service)));
        services.into_values().collect()
    }
}

/// Whether a service selects a pod. One without selector selects none.
fn selects(service: &Service, pod: &Pod) -> bool {
    !service.selector.is_empty() && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
}

/// The endpoints of a slice that are no pods, with their ports.
fn addresses(slice: &Slice) -> usize {
    let count = slice.endpoints.iter().filter(|endpoint| matches!(endpoint, Endpoint::Address { .. })).count();
    count * (1 + slice.ports.len())
}

/// The pods that a slice refers to.
fn referred(slice: &Slice) -> impl Iterator<Item = &PodRef> {
    slice.endpoints.iter().filter_map(|endpoint| match endpoint {
        Endpoint::Pod(pod) => Some(pod),
        Endpoint::Address { .. } => None,
    })
}
