//! The file of enrolled pods. A daemon that starts while the Kubernetes API is away captures them again. A saved pod
//! counts only if one of its processes is in the network namespace that was captured, and that still holds the pod's
//! address. The API replaces the saved pods as soon as it has sent pods and namespaces.

use super::facts::PodFacts;
use crate::mesh::Text;
use crate::node::spec::{INTERFACES_MAX, Interface, Powers, Settings};
use crate::sys::netns::Netns;
use crate::task::{Group, files, thread};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Version of the file format.
const FORMAT: u32 = 1;
/// Most bytes of the file.
const BYTES_MAX: u64 = 16 << 20;
/// Most pods in the file.
const PODS_MAX: usize = 4096;
/// Shortest time between two writes.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// The same after a failed write.
const RETRY: Duration = Duration::from_secs(30);
/// File that identifies this start of the machine. Network namespaces of an earlier start mean nothing.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug, Serialize, Deserialize)]
struct File {
    format: u32,
    node: String,
    boot: String,
    pods: Vec<SavedPod>,
}

/// One pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SavedPod {
    uid: String,
    static_uid: Option<String>,
    name: String,
    namespace: String,
    service_account: String,
    /// Device and inode of its network namespace.
    netns: (u64, u64),
    ips: Vec<IpAddr>,
    containers: Vec<String>,
    dns_capture: Option<bool>,
    bypass_inbound: bool,
    virtual_interfaces: Vec<String>,
    net_admin: bool,
    net_raw: bool,
}

impl SavedPod {
    pub(super) fn of(pod: &PodFacts, netns: &Netns, ips: Vec<IpAddr>) -> Self {
        let Settings { dns, bypass_inbound, virtual_interfaces } = &pod.settings;
        Self {
            uid: pod.uid.to_string(),
            static_uid: pod.static_uid.as_ref().map(ToString::to_string),
            name: pod.name.to_string(),
            namespace: pod.namespace.to_string(),
            service_account: pod.service_account.to_string(),
            netns: netns.id(),
            ips,
            containers: pod.containers.iter().map(ToString::to_string).collect(),
            dns_capture: *dns,
            bypass_inbound: *bypass_inbound,
            virtual_interfaces: virtual_interfaces.iter().map(ToString::to_string).collect(),
            net_admin: pod.powers.net_admin,
            net_raw: pod.powers.net_raw,
        }
    }

    /// The facts about the pod, as far as its capture depends on them.
    fn facts(&self) -> PodFacts {
        let text = |text: &String| Text::from(text.as_str());
        PodFacts {
            uid: text(&self.uid),
            static_uid: self.static_uid.as_ref().map(text),
            name: text(&self.name),
            namespace: text(&self.namespace),
            service_account: text(&self.service_account),
            settings: Settings {
                dns: self.dns_capture,
                bypass_inbound: self.bypass_inbound,
                virtual_interfaces: self
                    .virtual_interfaces
                    .iter()
                    .take(INTERFACES_MAX)
                    .filter_map(|name| Interface::new(name))
                    .collect(),
            },
            powers: Powers { net_admin: self.net_admin, net_raw: self.net_raw },
            ips: self.ips.clone(),
            containers: self.containers.iter().map(text).collect(),
            ..PodFacts::default()
        }
    }
}

/// Reads the file. Returns no pods if there is no file, or it is from an earlier start of the machine.
fn read(path: &Path, node: &str, boot: &str) -> Result<Vec<SavedPod>, String> {
    let Some(bytes) = files::read_bounded(path, BYTES_MAX).map_err(|error| error.to_string())? else {
        return Ok(Vec::new());
    };
    let file: File = serde_json::from_slice(&bytes).map_err(|error| format!("it is not valid: {error}"))?;
    match file {
        File { format, .. } if format != FORMAT => Err(format!("it has format {format}, this version knows {FORMAT}")),
        File { node: other, .. } if other != node => {
            Err(format!("it belongs to node {other:?}, and this is node {node:?}"))
        }
        File { pods, .. } if pods.len() > PODS_MAX => Err(format!("it has more than {PODS_MAX} pods")),
        File { boot: earlier, .. } if earlier != boot => Ok(Vec::new()),
        File { pods, .. } => Ok(pods),
    }
}

fn write(path: &Path, file: &File) -> io::Result<()> {
    files::write_atomically(path, &serde_json::to_vec(file)?)
}

/// The saved pods, and the writes of the file.
#[derive(Debug)]
pub(super) struct SavedPods {
    /// `None` if pods are not saved.
    path: Option<PathBuf>,
    node: String,
    boot: String,
    /// Pods that an earlier daemon had enrolled, until the API has sent pods and namespaces.
    pods: HashMap<Text, (PodFacts, (u64, u64))>,
    written: Option<Vec<SavedPod>>,
    writing: Option<Vec<SavedPod>>,
    next: Instant,
    results: (mpsc::Sender<io::Result<()>>, mpsc::Receiver<io::Result<()>>),
}

impl SavedPods {
    /// Reads the file. A file that cannot be used is logged and ignored.
    pub(super) async fn read(path: Option<PathBuf>, node: &str) -> Self {
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
        let read_all = {
            let (path, node, boot) = (path.clone(), node.to_owned(), boot.clone());
            move || path.map_or_else(|| Ok(Vec::new()), |path| read(&path, &node, &boot))
        };
        let read = thread::run_blocking(read_all).await.unwrap_or_else(|| Err("the helper thread failed".into()));
        let enrolled = read.unwrap_or_else(|error| {
            let path = path.as_ref().map(|path| path.display().to_string());
            tracing::warn!(path, error, "cannot use the file of enrolled pods; they wait for the Kubernetes API");
            Vec::new()
        });
        let pods =
            enrolled.iter().map(|enrolled| (Text::from(enrolled.uid.as_str()), (enrolled.facts(), enrolled.netns)));
        let node = node.to_owned();
        let (written, writing) = (None, None);
        Self {
            path,
            node,
            boot,
            pods: pods.collect(),
            written,
            writing,
            next: Instant::now(),
            results: mpsc::channel(1),
        }
    }

    /// All saved pods.
    pub(super) fn all(&self) -> impl Iterator<Item = &PodFacts> {
        self.pods.values().map(|(pod, _)| pod)
    }

    /// The network namespace that a pod was captured in, by device and inode.
    pub(super) fn netns(&self, uid: &Text) -> Option<(u64, u64)> {
        self.pods.get(uid).map(|(_, netns)| *netns)
    }

    /// Forgets one pod.
    pub(super) fn remove(&mut self, uid: &Text) -> Option<PodFacts> {
        self.pods.remove(uid).map(|(pod, _)| pod)
    }

    /// Forgets all pods; returns their uids.
    pub(super) fn clear(&mut self) -> Vec<Text> {
        self.pods.drain().map(|(uid, _)| uid).collect()
    }

    /// Whether the file may be written now.
    pub(super) fn is_due(&self) -> bool {
        self.path.is_some() && self.writing.is_none() && Instant::now() >= self.next
    }

    /// Writes the pods that are enrolled now in the background, if they differ from those written last.
    pub(super) fn save(&mut self, pods: impl Iterator<Item = SavedPod>, tasks: &Group) {
        let Some(path) = self.path.clone() else { return };
        let mut pods: Vec<SavedPod> = pods.take(PODS_MAX).collect();
        pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        if self.written.as_ref() == Some(&pods) {
            return;
        }
        self.writing = Some(pods.clone());
        let file = File { format: FORMAT, node: self.node.clone(), boot: self.boot.clone(), pods };
        let results = self.results.0.clone();
        tasks.spawn(async move {
            let written = thread::run_blocking(move || write(&path, &file)).await;
            // If this fails, the enrolment loop has ended.
            let _ = results.send(written.unwrap_or_else(|| Err(io::Error::other("the writing has failed")))).await;
        });
    }

    /// A saved pod.
    pub(super) fn get(&self, uid: &Text) -> Option<&PodFacts> {
        self.pods.get(uid).map(|(pod, _)| pod)
    }

    /// Waits for the next write to end; pass the result to [`Self::ended`].
    pub(super) async fn outcome(&mut self) -> io::Result<()> {
        match self.results.1.recv().await {
            Some(result) => result,
            None => std::future::pending().await,
        }
    }

    /// Records the result of a write.
    pub(super) fn ended(&mut self, result: io::Result<()>) {
        let writing = self.writing.take();
        self.next = Instant::now() + if result.is_ok() { WRITE_EVERY } else { RETRY };
        match result {
            Ok(()) => self.written = writing,
            Err(error) => {
                let path = self.path.as_ref().map(|path| path.display().to_string());
                tracing::warn!(path, %error, "cannot write the file of enrolled pods; trying again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("culvert-saved-{name}-{}", std::process::id()))
    }

    #[test]
    fn only_a_file_of_this_node_and_start_is_read_again() {
        let path = path("whole");
        assert_eq!(read(&path, "n", "b"), Ok(Vec::new()), "there is none yet");
        let settings = Settings {
            dns: Some(false),
            bypass_inbound: true,
            virtual_interfaces: vec![Interface::new("tap0").unwrap()],
        };
        let pod = PodFacts {
            uid: "u".into(),
            static_uid: Some("file".into()),
            name: "a".into(),
            namespace: "ns".into(),
            service_account: "s".into(),
            settings,
            powers: Powers { net_admin: true, net_raw: false },
            ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            containers: vec!["c".into()],
            ..PodFacts::default()
        };
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        let id = netns.id();
        let enrolled = SavedPod::of(&pod, &netns, pod.ips.clone());
        assert_eq!((enrolled.facts(), enrolled.netns), (pod, id));
        let file = |pods| File { format: FORMAT, node: "n".into(), boot: "b".into(), pods };
        write(&path, &file(vec![enrolled.clone()])).unwrap();
        assert_eq!(read(&path, "n", "b"), Ok(vec![enrolled.clone()]));
        assert_eq!(read(&path, "n", "another start"), Ok(Vec::new()), "its namespaces no longer exist");
        assert!(read(&path, "m", "b").unwrap_err().contains("belongs to node"));
        write(&path, &file(vec![enrolled.clone(); PODS_MAX + 1])).unwrap();
        assert!(read(&path, "n", "b").unwrap_err().contains("more than"));
        // A name that is not safe to write into a script is not read from the file either.
        let odd = SavedPod { virtual_interfaces: vec!["\"; flush ruleset".into()], ..enrolled };
        assert_eq!(odd.facts().settings.virtual_interfaces, []);
        let long = std::fs::File::create(&path).unwrap();
        long.set_len(BYTES_MAX + 1).unwrap();
        assert!(read(&path, "n", "b").unwrap_err().contains("bytes"));
        std::fs::remove_file(&path).unwrap();
    }

    proptest! {
        #[test]
        fn reading_is_total(bytes: Vec<u8>) {
            let path = path("total");
            std::fs::write(&path, &bytes).unwrap();
            prop_assert!(read(&path, "n", "b").is_err());
            std::fs::remove_file(&path).unwrap();
        }
    }
}
