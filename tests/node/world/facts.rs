//! The mesh facts of a test, in the form of the mesh file.

use super::Pod;
use serde_json::{Value, json};

#[derive(Clone, Debug, Default)]
pub struct Mesh {
    pub workloads: Vec<Value>,
    pub services: Vec<Value>,
    pub policies: Vec<Value>,
    pub egress: Vec<Value>,
}

pub fn hostname(name: &str) -> String {
    format!("{name}.ns.svc.cluster.local")
}

impl Mesh {
    pub fn workload(&mut self, pod: &Pod, protocol: &str) {
        self.workloads.push(json!({
            "uid": format!("c1//Pod/ns/{}", pod.name), "name": pod.name, "namespace": "ns",
            "serviceAccount": pod.name, "trustDomain": "cluster.local", "workloadIps": [pod.v4, pod.v6],
            "protocol": protocol, "node": format!("n{}", pod.node), "workloadName": pod.name,
            "canonicalName": pod.name, "canonicalRevision": "v1", "clusterId": "c1", "services": {},
        }));
    }

    /// Adds a service with virtual addresses in front of pods that all have the same ports.
    pub fn service(&mut self, name: &str, vips: &[&str], ports: &Value, endpoints: &[&Pod]) {
        let vips: Vec<String> = vips.iter().map(|vip| format!("/{vip}")).collect();
        self.services.push(json!({
            "name": name, "namespace": "ns", "hostname": hostname(name), "vips": vips, "ports": ports,
        }));
        for pod in endpoints {
            self.of(&pod.name)["services"][format!("ns/{}", hostname(name))] = ports.clone();
        }
    }

    /// The workload of a pod, to be changed by the test.
    pub fn of(&mut self, pod: &str) -> &mut Value {
        self.workloads.iter_mut().find(|w| w["name"] == pod).expect("a workload of this name")
    }

    pub fn is_hbone(&self, pod: &str) -> bool {
        self.workloads.iter().any(|w| w["name"] == pod && w["protocol"] == "HBONE")
    }

    /// Adds a policy with one rule of one clause of one match.
    pub fn policy(&mut self, name: &str, scope: &str, action: &str, test: Value) {
        self.policies.push(json!({
            "name": name, "namespace": "ns", "scope": scope, "action": action, "dryRun": false, "rules": [[[test]]],
        }));
    }

    pub fn json(&self) -> String {
        let mut all = json!({"workloads": self.workloads, "services": self.services, "policies": self.policies});
        // Other daemons that a test starts do not know it.
        if !self.egress.is_empty() {
            all["egress"] = self.egress.clone().into();
        }
        serde_json::to_string_pretty(&all).unwrap()
    }
}

/// A match on the identity of one peer.
pub fn principal(name: &str) -> Value {
    json!({"principals": [{"Exact": format!("cluster.local/ns/ns/sa/{name}")}]})
}
