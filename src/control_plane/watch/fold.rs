//! What is known of the cluster, from the events of the API. No I/O.

use super::known::Known;
use super::object::{Event, Item, Key, Kind};
use super::outbox::Outbox;
use crate::control_plane::catalog::{self, Change};
use crate::control_plane::facts::object::Pod;
use crate::control_plane::facts::read::Faults;
use crate::control_plane::facts::{Index, Reader, resource};
use crate::control_plane::policies::{self, BYTES_MAX, COUNT_MAX, LISTED_MAX, Touched};
use crate::control_plane::running_pods::RunningPod;
use crate::control_plane::{Cluster, RunningPods};
use crate::mesh::Text;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is known of the cluster.
#[derive(Debug)]
pub struct Fold {
    reader: Reader,
    index: Index,
    policies: policies::Index,
    policies_changed: bool,
    /// What was left out of policies.
    faults: Faults,
    running: Arc<RunningPods>,
    known: [Known; Kind::ALL.len()],
    has_published: bool,
    /// Statuses that policies should have.
    pub outbox: Outbox,
}

impl Fold {
    /// Nothing is known yet.
    pub fn new(cluster: &Cluster, running: Arc<RunningPods>) -> Self {
        Self {
            reader: Reader::new(cluster.domain.clone()),
            index: Index::new(cluster),
            policies: policies::Index::new(cluster),
            policies_changed: false,
            faults: Faults::default(),
            running,
            known: Default::default(),
            has_published: false,
            outbox: Outbox::default(),
        }
    }

    /// How many objects of a kind are known.
    pub fn count(&self, kind: Kind) -> usize {
        self.known.get(kind as usize).map_or(0, Known::len)
    }

    /// Whether every kind has been listed once.
    pub fn is_complete(&self) -> bool {
        self.known.iter().all(Known::is_listed)
    }

    /// Whether there is something to publish. The first time there always is, even if the cluster is empty.
    pub fn has_changes(&self) -> bool {
        !self.has_published || self.policies_changed || self.index.has_changes()
    }

    /// What was left out since the last call, of objects, of facts and of policies.
    pub fn take_faults(&mut self) -> [Faults; 3] {
        [self.reader.take_faults(), self.index.take_faults(), std::mem::take(&mut self.faults)]
    }

    /// How many namespaces have too many policies.
    pub fn closed(&self) -> usize {
        self.policies.closed()
    }

    /// Takes note of an event.
    pub fn apply(&mut self, event: Event) {
        let kind = event.kind();
        let Some(known) = self.known.get_mut(kind as usize) else { return };
        match event {
            Event::Begun(_) => known.begin(),
            Event::Set(_, key, item) => {
                known.set(&key);
                self.set(&key, item);
            }
            Event::Gone(_, key) => {
                known.remove(&key);
                self.remove(kind, &key);
            }
            Event::Listed(_) | Event::Absent(_) => {
                if matches!(event, Event::Absent(_)) {
                    // As if the list were empty.
                    known.begin();
                }
                for key in known.end() {
                    self.remove(kind, &key);
                }
                if kind == Kind::Pods {
                    self.running.set_complete();
                }
            }
        }
    }

    fn set(&mut self, key: &Key, item: Item) {
        match item {
            Item::Pod(pod) => match self.reader.pod(&pod.content) {
                Some(pod) => self.set_pod(pod),
                None => self.remove(Kind::Pods, key),
            },
            Item::Service(service) => match self.reader.service(&service.content) {
                Some(service) => self.index.set_service(service),
                None => self.remove(Kind::Services, key),
            },
            Item::Slice(slice) => match self.reader.slice(&slice.content) {
                Some(slice) => self.index.set_slice(slice),
                None => self.remove(Kind::EndpointSlices, key),
            },
            Item::Node(node) => match self.reader.node(&node.content) {
                Some(node) => self.index.set_node(node),
                None => self.remove(Kind::Nodes, key),
            },
            Item::Namespace(namespace) => match self.reader.namespace(&namespace.content) {
                Some(namespace) => self.index.set_namespace(namespace),
                None => self.remove(Kind::Namespaces, key),
            },
            Item::Gateway(gateway) => match self.reader.gateway(&gateway.content) {
                Some(gateway) => self.index.set_gateway(gateway),
                None => self.remove(Kind::Gateways, key),
            },
            Item::Authorization(object) => {
                self.policies_changed = true;
                self.policies.set_authorization(*object);
            }
            Item::Authentication(object) => {
                self.policies_changed = true;
                self.policies.set_authentication(*object);
            }
        }
    }

    fn set_pod(&mut self, pod: Pod) {
        let (namespace, name, uid) = (pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
        let (service_account, node) = (pod.service_account.clone(), pod.node.clone());
        // A pod that names no service account has none, whatever its identity is called: a node can make such pods
        // itself, and no others.
        if pod.running && !node.is_empty() && !uid.is_empty() && !service_account.is_empty() {
            self.running.set(RunningPod { namespace, name, uid, service_account, node });
        } else {
            self.running.remove(&namespace, &name);
        }
        self.index.set_pod(pod);
    }

    fn remove(&mut self, kind: Kind, (namespace, name): &Key) {
        match kind {
            Kind::Pods => {
                self.running.remove(namespace, name);
                self.index.remove_pod(namespace, name);
            }
            Kind::Services => self.index.remove_service(namespace, name),
            Kind::EndpointSlices => self.index.remove_slice(namespace, name),
            Kind::Nodes => self.index.remove_node(name),
            Kind::Namespaces => self.index.remove_namespace(name),
            Kind::Gateways => self.index.remove_gateway(namespace, name),
            Kind::AuthorizationPolicies => {
                self.policies_changed = true;
                self.policies.remove_authorization(namespace, name);
                self.outbox.remove(policies::Kind::Authorization, namespace, name);
            }
            Kind::PeerAuthentications => {
                self.policies_changed = true;
                self.policies.remove_authentication(namespace, name);
                self.outbox.remove(policies::Kind::Authentication, namespace, name);
            }
        }
    }

    /// The resources that differ from what was taken last.
    pub fn take_changes(&mut self) -> Vec<Change> {
        (self.has_published, self.policies_changed) = (true, false);
        let changed = self.policies.take_changes();
        match changed.workloads {
            Touched::All => self.index.mark_all_pods(),
            Touched::Namespaces(namespaces) => {
                for namespace in &namespaces {
                    self.index.mark_pods_of(namespace);
                }
            }
        }
        for wanted in changed.statuses {
            self.outbox.add(wanted);
        }
        for namespace in changed.closed {
            self.faults.add(format!(
                "Namespace {namespace}: has more than {COUNT_MAX} policies, or {} MiB of them; all are left out, and every connection to its workloads is refused until there are fewer",
                BYTES_MAX >> 20
            ));
        }
        let (policies, refused) = (&self.policies, RefCell::new(BTreeMap::<Text, usize>::new()));
        let listed = |namespace: &str, labels: &BTreeMap<String, String>| {
            let keys = policies.of_workload(namespace, labels);
            if policies.is_too_many(&keys) {
                *refused.borrow_mut().entry(namespace.into()).or_default() += 1;
            }
            keys
        };
        let mut changes = self.index.take_changes(&listed);
        for (namespace, pods) in refused.into_inner() {
            self.faults.add(format!(
                "Namespace {namespace}: more than {LISTED_MAX} policies select each of {pods} pods; all are left out there, and every connection to these pods is refused until there are fewer"
            ));
        }
        for (key, policy) in changed.policies {
            let new = policy.map(|policy| Arc::new(resource::policy(&policy)));
            changes.push((catalog::Kind::Authorization, key, new));
        }
        changes
    }
}
