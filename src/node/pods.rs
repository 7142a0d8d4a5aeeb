//! The set of pods of this node, from a file: one task per pod, so that no pod waits for another.

use super::capture::Capturer;
use super::pod;
use super::status::{Board, State};
use crate::mesh::Text;
use crate::sys::netns::Netns;
use crate::task::files::{FileWatch, from_yaml};
use crate::task::ready::Pending;
use crate::task::{Drain, Group};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A pod as the pods file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Service account.
    pub service_account: Text,
    /// Uid; unique on the node.
    pub uid: Text,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// Why a pods file is refused.
#[derive(Debug, thiserror::Error)]
pub enum PodsFileError {
    /// It cannot be read.
    #[error("pods file {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// It cannot be understood.
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
}

/// Reads and checks a pods file.
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
            faults.push(format!("pod {label}: has the uid {} of pod {}/{}", pod.uid, other.namespace, other.name));
        }
        if specs.iter().any(|s| *s.name == *pod.name && *s.namespace == *pod.namespace) {
            faults.push(format!("pod {label} is there twice"));
        }
        specs.push(PodSpec {
            name: pod.name.into(),
            namespace: pod.namespace.into(),
            service_account: pod.service_account.into(),
            uid: pod.uid.into(),
            netns: pod.netns,
        });
    }
    if faults.is_empty() { Ok(specs) } else { Err(content(faults.join("; "))) }
}

/// Keeps one task per pod.
#[derive(Debug)]
pub struct Pods {
    capturer: Arc<Capturer>,
    board: Arc<Board>,
    kept: HashMap<Text, Kept>,
}

#[derive(Debug)]
struct Kept {
    spec: PodSpec,
    /// The namespace behind the path: the same one may go by several names.
    netns: Place,
    remove: Drain,
    task: Group,
}

impl Pods {
    /// No pods yet.
    pub fn new(capturer: Arc<Capturer>, board: Arc<Board>) -> Self {
        Self { capturer, board, kept: HashMap::new() }
    }

    /// Follows the pods file for as long as it is awaited; `ready` is given up when each pod of the first reading has
    /// had one attempt, however that ended.
    pub async fn follow(mut self, path: PathBuf, ready: Pending) {
        let mut watch = FileWatch::new(&path);
        let mut ready = Some(Arc::new(ready));
        loop {
            match read(&path) {
                Ok(specs) => {
                    tracing::info!(pods = specs.len(), "pods file applied");
                    self.apply(specs, ready.as_ref());
                    ready = None;
                }
                Err(error) => tracing::error!(%error, "pods file refused; the pods before stay as they are"),
            }
            watch.changed().await;
        }
    }

    fn apply(&mut self, specs: Vec<PodSpec>, ready: Option<&Arc<Pending>>) {
        let wanted: HashMap<Text, (PodSpec, Place)> =
            specs.into_iter().map(|spec| (spec.uid.clone(), (spec.clone(), Place::of(&spec)))).collect();
        for (uid, kept) in &self.kept {
            if wanted.get(uid).is_some_and(|(spec, _)| *spec == kept.spec) {
                continue;
            }
            if wanted.values().any(|(_, place)| *place == kept.netns) {
                // The namespace stays wanted under another entry: its rules must not go, not even for a moment.
                kept.remove.at_once();
            } else {
                kept.remove.gently();
            }
        }
        for (uid, (spec, netns)) in wanted {
            let before = self.kept.get(&uid);
            if before.is_some_and(|kept| kept.spec == spec && !kept.remove.signal().is_gentle()) {
                continue;
            }
            // Whoever had the uid or the namespace, and is to give it up, has to be out of it first.
            let had_it = |(other, kept): &(&Text, &Kept)| {
                (**other == uid || kept.netns == netns) && kept.remove.signal().is_gentle()
            };
            let earlier: Vec<Group> = self.kept.iter().filter(had_it).map(|(_, kept)| kept.task.clone()).collect();
            let (remove, task) = (Drain::default(), Group::default());
            let (capturer, board, signal, ready) =
                (self.capturer.clone(), self.board.clone(), remove.signal(), ready.cloned());
            self.kept.insert(uid, Kept { spec: spec.clone(), netns, remove, task: task.clone() });
            task.spawn(async move {
                for earlier in earlier {
                    earlier.finished().await;
                }
                board.set(&spec, State::Pending("being captured".into()));
                pod::keep(capturer, board, spec, signal, ready).await;
            });
        }
        self.kept.retain(|_, kept| kept.task.len() > 0);
    }
}

/// A namespace by what it is, or where it cannot be opened, by its path.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Id((u64, u64)),
    Path(PathBuf),
}

impl Place {
    fn of(spec: &PodSpec) -> Self {
        Netns::open(&spec.netns).map_or_else(|_| Self::Path(spec.netns.clone()), |netns| Self::Id(netns.id()))
    }
}
