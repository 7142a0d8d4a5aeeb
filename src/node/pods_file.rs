//! Enrolment by the pods file: a YAML list of this node's pods, read again whenever it changes.

use super::pods::Pods;
use super::spec::{INTERFACES_MAX, Interface, NetnsRef, PodSpec, Settings};
use crate::task::files::{FileWatch, from_yaml};
use crate::task::ready::Pending;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a pods file is refused.
#[derive(Debug, thiserror::Error)]
pub enum PodsFileError {
    /// It cannot be read.
    #[error("pods file {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// It is not valid.
    #[error("pods file {0}: {1}")]
    Content(PathBuf, String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    pods: Vec<FilePod>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FilePod {
    name: String,
    namespace: String,
    service_account: String,
    uid: String,
    netns: PathBuf,
    dns_capture: Option<bool>,
    #[serde(default)]
    bypass_inbound_capture: bool,
    #[serde(default)]
    reroute_virtual_interfaces: Vec<String>,
}

/// Reads and checks a pods file. The error names every fault.
pub fn read(path: &Path) -> Result<Vec<PodSpec>, PodsFileError> {
    let content = |reason: String| PodsFileError::Content(path.to_owned(), reason);
    let text = std::fs::read_to_string(path).map_err(|error| PodsFileError::Read(path.to_owned(), error))?;
    let file: File = from_yaml(&text).map_err(content)?;
    let mut faults = Vec::new();
    let mut specs: Vec<PodSpec> = Vec::new();
    for pod in file.pods {
        let label = format!("{}/{}", pod.namespace, pod.name);
        let fields = [&pod.name, &pod.namespace, &pod.service_account, &pod.uid];
        if fields.iter().any(|field| field.is_empty()) || pod.netns.as_os_str().is_empty() {
            faults.push(format!("pod {label}: name, namespace, serviceAccount, uid and netns must not be empty"));
            continue;
        }
        if let Some(other) = specs.iter().find(|s| *s.uid == *pod.uid) {
            faults.push(format!("pod {label}: has the same uid {} as pod {}/{}", pod.uid, other.namespace, other.name));
        }
        if specs.iter().any(|s| *s.name == *pod.name && *s.namespace == *pod.namespace) {
            faults.push(format!("pod {label}: is listed twice"));
        }
        let mut virtual_interfaces = Vec::new();
        for name in &pod.reroute_virtual_interfaces {
            match Interface::new(name) {
                Some(interface) if virtual_interfaces.contains(&interface) => {}
                Some(interface) if virtual_interfaces.len() < INTERFACES_MAX => virtual_interfaces.push(interface),
                Some(_) => {
                    faults.push(format!("pod {label}: more than {INTERFACES_MAX} virtual interfaces"));
                    break;
                }
                None => faults.push(format!("pod {label}: {name:?} is not a valid interface name")),
            }
        }
        let settings =
            Settings { dns: pod.dns_capture, bypass_inbound: pod.bypass_inbound_capture, virtual_interfaces };
        specs.push(PodSpec {
            name: pod.name.into(),
            namespace: pod.namespace.into(),
            service_account: pod.service_account.into(),
            uid: pod.uid.into(),
            netns: NetnsRef::Path(pod.netns),
            ips: Vec::new(),
            settings,
            powers: None,
        });
    }
    if faults.is_empty() { Ok(specs) } else { Err(content(faults.join("; "))) }
}

/// Follows the pods file until cancelled. `ready` is held until each pod of the first version has had one attempt,
/// successful or not.
pub async fn follow(mut pods: Pods, path: PathBuf, ready: Pending) {
    let mut watch = FileWatch::new(&path);
    let mut ready = Some(Arc::new(ready));
    loop {
        match read(&path) {
            Ok(specs) => {
                tracing::info!(pods = specs.len(), "pods file applied");
                pods.apply(specs, ready.as_ref());
                ready = None;
            }
            Err(error) => tracing::error!(%error, "pods file refused; the previous pods stay"),
        }
        watch.changed().await;
    }
}
