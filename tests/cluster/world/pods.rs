//! Watches pods through the API, and records the order of changes.

use super::{Cluster, SHOP, root};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::BufReader;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

/// What was seen of a pod.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Whether it was Ready before peers were told that it speaks HBONE.
    pub ready_before_enabled: bool,
    /// Whether peers were told that it speaks HBONE.
    pub enabled: bool,
}

pub struct Watched {
    process: Child,
    reader: JoinHandle<BTreeMap<String, Seen>>,
}

impl Watched {
    /// Watches the pods of the application that are made from now on.
    pub fn start(cluster: &Cluster) -> Self {
        let before: Vec<String> = cluster.pods(SHOP, "app", None);
        let mut process = Command::new(root().join("scripts/cluster"))
            .args(["kubectl", "-n", SHOP, "get", "pods", "-l", "app", "--watch", "-o", "json"])
            .env("CULVERT_CLUSTER_NAME", cluster.folder().file_name().unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut seen = BTreeMap::<String, Seen>::new();
            // The watch ends with its process, perhaps in the middle of an object.
            for pod in serde_json::Deserializer::from_reader(out).into_iter::<Value>().map_while(Result::ok) {
                let name = super::name_of(&pod);
                if before.contains(&name) || !pod["metadata"]["deletionTimestamp"].is_null() {
                    continue;
                }
                let enabled = pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled";
                let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
                let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
                let of_pod = seen.entry(name).or_default();
                of_pod.enabled |= enabled;
                of_pod.ready_before_enabled |= ready && !enabled;
            }
            seen
        });
        Self { process, reader }
    }

    /// What was seen of each new pod, by its name.
    pub fn stop(mut self) -> BTreeMap<String, Seen> {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.reader.join().unwrap()
    }
}
