//! Facts of objects as the API gives them: tables for pods, services and waypoints, and random changes against a list
//! from scratch.

mod changes;
mod pods;
mod services;
mod waypoints;

use super::{Index, Reader, api};
use crate::control::xds::decode::{self, Names};
use crate::control_plane::Cluster;
use crate::control_plane::catalog::Resource;
use crate::mesh::{Service, Text, Workload};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

fn cluster() -> Cluster {
    Cluster {
        namespace: "istio-system".into(),
        trust_domain: "cluster.local".into(),
        id: "Kubernetes".into(),
        domain: "cluster.local".into(),
    }
}

/// A cluster, and what daemons know of it.
struct World {
    reader: Reader,
    index: Index,
    known: BTreeMap<String, Arc<Resource>>,
    /// Policies that each pod with a label lists, by namespace.
    policies: BTreeMap<String, (String, String)>,
}

fn read<T: DeserializeOwned>(object: &Value) -> T {
    serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object}"))
}

impl World {
    fn new() -> Self {
        let cluster = cluster();
        let (reader, index) = (Reader::new(cluster.domain.clone()), Index::new(&cluster));
        Self { reader, index, known: BTreeMap::new(), policies: BTreeMap::new() }
    }

    fn of(objects: &[Value]) -> Self {
        let mut world = Self::new();
        objects.iter().for_each(|object| world.set(object));
        world.publish();
        world
    }

    fn set(&mut self, object: &Value) {
        let kind = object["kind"].as_str().unwrap();
        let removed = || (kind, &object["metadata"]["namespace"], &object["metadata"]["name"]);
        let there = match kind {
            "Pod" => self.reader.pod(&read::<api::Pod>(object)).map(|pod| self.index.set_pod(pod)),
            "Service" => self.reader.service(&read::<api::Service>(object)).map(|s| self.index.set_service(s)),
            "EndpointSlice" => self.reader.slice(&read::<api::EndpointSlice>(object)).map(|s| self.index.set_slice(s)),
            "Node" => self.reader.node(&read::<api::Node>(object)).map(|node| self.index.set_node(node)),
            "Namespace" => self.reader.namespace(&read::<api::Namespace>(object)).map(|n| self.index.set_namespace(n)),
            "Gateway" => self.reader.gateway(&read::<api::Gateway>(object)).map(|g| self.index.set_gateway(g)),
            other => panic!("{other}"),
        };
        if there.is_none() {
            let (kind, namespace, name) = removed();
            self.remove(kind, namespace.as_str().unwrap_or_default(), name.as_str().unwrap_or_default());
        }
    }

    fn remove(&mut self, kind: &str, namespace: &str, name: &str) {
        match kind {
            "Pod" => self.index.remove_pod(namespace, name),
            "Service" => self.index.remove_service(namespace, name),
            "EndpointSlice" => self.index.remove_slice(namespace, name),
            "Node" => self.index.remove_node(name),
            "Namespace" => self.index.remove_namespace(name),
            "Gateway" => self.index.remove_gateway(namespace, name),
            other => panic!("{other}"),
        }
    }

    /// Daemons learn of all changes. Returns how many there were.
    fn publish(&mut self) -> usize {
        let policies = &self.policies;
        let listed = |namespace: &str, labels: &BTreeMap<String, String>| {
            let of = |from: &str| {
                let (key, value) = policies.get(from)?;
                (labels.get(key) == Some(value)).then(|| Text::from(format!("{from}/p").as_str()))
            };
            let mut all: Vec<Text> = [of(namespace), of("istio-system")].into_iter().flatten().collect();
            all.sort();
            all.dedup();
            all
        };
        let changes = self.index.take_changes(&listed);
        let count = changes.len();
        for (_, name, resource) in changes {
            match resource {
                Some(resource) => drop(self.known.insert(name.to_string(), resource)),
                None => drop(self.known.remove(&*name).expect("only what is known is removed")),
            }
        }
        assert!(!self.index.has_changes());
        count
    }

    fn decoded(&self, name: &str) -> Option<decode::Address> {
        let resource = self.known.get(name)?;
        let decoded = decode::address(name, &resource.content, &mut Names::default()).unwrap();
        assert!(decoded.faults.is_empty(), "{:?}", decoded.faults);
        Some(decoded.value)
    }

    fn workload(&self, name: &str) -> Option<Workload> {
        match self.decoded(name)? {
            decode::Address::Workload(workload) => Some(*workload),
            decode::Address::Service(_) => panic!("{name} is a service"),
        }
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<Workload> {
        self.workload(&format!("Kubernetes//Pod/{namespace}/{name}"))
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Service> {
        let name = format!("{namespace}/{name}.{namespace}.svc.cluster.local");
        match self.decoded(&name)? {
            decode::Address::Service(service) => Some(*service),
            decode::Address::Workload(_) => panic!("{name} is a workload"),
        }
    }

    fn faults(&mut self) -> Vec<String> {
        self.reader.take_faults().named
    }
}

/// Puts `other` into `object`, field by field.
fn merge(object: &mut Value, other: &Value) {
    match (object, other) {
        (Value::Object(object), Value::Object(other)) => {
            for (key, value) in other {
                merge(object.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (object, other) => *object = other.clone(),
    }
}

fn with(mut object: Value, other: Value) -> Value {
    merge(&mut object, &other);
    object
}

/// A pod `a/p` that runs and is ready.
fn pod(other: Value) -> Value {
    let pod = json!({
        "kind": "Pod",
        "metadata": {"namespace": "a", "name": "p", "uid": "u1", "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "web",
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    });
    with(pod, other)
}

/// A service `a/s` for these pods.
fn service(other: Value) -> Value {
    let service = json!({
        "kind": "Service",
        "metadata": {"namespace": "a", "name": "s"},
        "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
            "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    });
    with(service, other)
}

/// A service `a/s` without selector.
fn bare_service() -> Value {
    let mut service = service(json!({}));
    service["spec"].as_object_mut().unwrap().remove("selector");
    service
}

/// A slice of the service `a/s`.
fn slice(other: Value) -> Value {
    let slice = json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "a", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4",
        "endpoints": [],
        "ports": [{"name": "http", "port": 9000, "protocol": "TCP"}],
    });
    with(slice, other)
}

fn namespace(name: &str, labels: Value, annotations: Value) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels, "annotations": annotations}})
}
