//! Clients that run while something happens to the cluster. Each is a pod of its own, so that it continues whatever
//! happens to the API.

use super::{Cluster, SHOP, eventually};
use serde::Deserialize;
use std::collections::BTreeMap;

pub struct Load {
    name: String,
    seconds: u32,
}

/// The results of its connections.
#[derive(Debug, Deserialize)]
pub struct Outcome {
    pub ok: u64,
    pub failed: u64,
    pub errors: BTreeMap<String, u64>,
    #[serde(default)]
    pub median: f64,
    #[serde(default)]
    pub p99: f64,
}

impl Load {
    /// Requests from a pod of a node, each on a new connection.
    pub fn requests(cluster: &Cluster, name: &str, node: &str, url: &str, rate: u32, seconds: u32) -> Self {
        Self::start(cluster, name, node, &["load", url, &rate.to_string(), &seconds.to_string()], seconds)
    }

    /// Requests to the service of four pods, from a pod of each node.
    pub fn from_both_nodes(cluster: &Cluster, rate: u32, seconds: u32) -> [Self; 2] {
        ["n1", "n2"]
            .map(|node| Self::requests(cluster, &format!("requests-{node}"), node, "http://web/", rate, seconds))
    }

    /// Long-lived connections, with one message a second on each.
    pub fn held(cluster: &Cluster, name: &str, node: &str, address: &str, count: u32, seconds: u32) -> Self {
        Self::start(cluster, name, node, &["hold", address, &count.to_string(), &seconds.to_string()], seconds)
    }

    fn start(cluster: &Cluster, name: &str, node: &str, arguments: &[&str], seconds: u32) -> Self {
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {SHOP}, labels: {{made-by: scenario}}}}\nspec:\n  nodeName: {node}\n  \
             serviceAccountName: front\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: load, image: \"example.org/app:1\", args: {arguments:?}}}\n"
        ));
        let load = Self { name: name.into(), seconds };
        load.phase(cluster, &["Running", "Succeeded"]);
        load
    }

    fn phase(&self, cluster: &Cluster, wanted: &[&str]) {
        eventually(&format!("pod {} is {}", self.name, wanted.join(" or ")), || {
            let phase = cluster
                .try_kubectl(&["-n", SHOP, "get", "pod", &self.name, "-o", "jsonpath={.status.phase}"])
                .unwrap_or_else(|why| why);
            (!wanted.contains(&phase.as_str())).then_some(phase)
        });
    }

    /// Waits for its end and returns the results.
    pub fn finish(self, cluster: &Cluster) -> Outcome {
        self.phase(cluster, &["Succeeded", "Failed"]);
        let log = cluster.kubectl(&["-n", SHOP, "logs", &self.name]);
        cluster.kubectl(&["-n", SHOP, "delete", "pod", &self.name, "--wait=false"]);
        let outcome: Outcome =
            serde_json::from_str(&log).unwrap_or_else(|_| panic!("{} s of {}: {log}", self.seconds, self.name));
        eprintln!(
            "{}: {} ok, {} failed, median {:.1} ms, p99 {:.1} ms {:?}",
            self.name, outcome.ok, outcome.failed, outcome.median, outcome.p99, outcome.errors
        );
        outcome
    }

    /// Waits for its end. Fails if any request or connection failed.
    pub fn all_well(self, cluster: &Cluster) {
        let name = self.name.clone();
        let outcome = self.finish(cluster);
        assert!(outcome.ok > 0 && outcome.failed == 0, "{name}: {outcome:?}");
    }
}
