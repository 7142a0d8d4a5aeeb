//! The set of pods of this node: one task per pod, so that no pod waits for another.

use super::capture::Capturer;
use super::pod::{self, Question, Task};
use super::status::{Board, State};
use crate::mesh::Text;
use crate::sys::netns::Netns;
use crate::task::ready::Pending;
use crate::task::{Drain, Group};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Questions about one pod that may wait.
const QUESTIONS: usize = 4;

/// Where a pod's network namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsRef {
    /// Behind a path.
    Path(PathBuf),
    /// In our hands.
    Handle(Netns),
}

impl fmt::Display for NetnsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Handle(netns) => netns.path().display().fmt(f),
        }
    }
}

/// A pod of this node.
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
    /// Its network namespace.
    pub netns: NetnsRef,
    /// Whether its DNS is taken; `None`: as the node is set.
    pub dns: Option<bool>,
}

/// Keeps one task per pod.
#[derive(Debug)]
pub struct Pods {
    capturer: Arc<Capturer>,
    board: Arc<Board>,
    kept: HashMap<Text, Kept>,
    /// Uids of pods that should be there and of which no more is known.
    unknown: Vec<Text>,
    /// Pods that were let go and have not ended yet. Not the namespaces themselves: those must be able to go.
    leaving: Vec<Leaving>,
}

#[derive(Debug)]
struct Leaving {
    uid: Text,
    netns: Place,
    remove: Drain,
    task: Group,
}

#[derive(Debug)]
struct Kept {
    spec: PodSpec,
    /// The namespace behind the path: the same one may go by several names.
    netns: Place,
    remove: Drain,
    questions: mpsc::Sender<Question>,
    task: Group,
}

impl Pods {
    /// No pods yet.
    pub fn new(capturer: Arc<Capturer>, board: Arc<Board>) -> Self {
        Self { capturer, board, kept: HashMap::new(), unknown: Vec::new(), leaving: Vec::new() }
    }

    /// Makes the set what `specs` say. `ready` is held until each pod has had one attempt.
    pub fn apply(&mut self, specs: Vec<PodSpec>, ready: Option<&Arc<Pending>>) {
        let unwanted: Vec<Text> =
            self.kept.iter().filter(|(_, kept)| !specs.contains(&kept.spec)).map(|(uid, _)| uid.clone()).collect();
        // Where the namespace stays wanted under another entry its rules must not go, not even for a moment.
        let places: Vec<Place> = specs.iter().map(Place::of).collect();
        for uid in unwanted {
            let elsewhere = self.kept.get(&uid).is_some_and(|kept| places.contains(&kept.netns));
            self.let_go(&uid, elsewhere);
        }
        for spec in specs {
            if !self.kept.contains_key(&spec.uid) {
                self.start(spec, ready.cloned());
            }
        }
    }

    /// Adds a pod, or finds that it is there already; the answer comes when it is listened for, or cannot be.
    pub fn add(&mut self, spec: PodSpec) -> oneshot::Receiver<Result<(), String>> {
        let uid = spec.uid.clone();
        if self.kept.get(&uid).is_some_and(|kept| kept.spec != spec || kept.task.len() == 0) {
            // Its namespace, or who it is, has changed: what there was has no meaning any more. Nor has a task that died.
            self.let_go(&uid, true);
        }
        if !self.kept.contains_key(&uid) {
            self.start(spec, None);
        }
        let (answer, answered) = oneshot::channel();
        if let Some(kept) = self.kept.get(&uid) {
            // Where it cannot be asked the answer never comes, and whoever waits has a deadline.
            let _ = kept.questions.try_send(answer);
        }
        answered
    }

    /// Lets a pod go; one that is not there is gone already.
    pub fn remove(&mut self, uid: &Text) {
        self.let_go(uid, false);
    }

    /// Lets all pods go but these, and says which of these are not there.
    pub fn retain(&mut self, named: &HashSet<Text>) -> Vec<Text> {
        let others: Vec<Text> = self.kept.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        for uid in others {
            tracing::info!(uid = &*uid, "pod is no longer among those of this node");
            self.let_go(&uid, false);
        }
        named.iter().filter(|uid| !self.kept.contains_key(*uid)).cloned().collect()
    }

    /// Shows pods of which nothing but the uid is known, and that therefore cannot be served.
    pub fn show_unknown(&mut self, uids: Vec<Text>) {
        for gone in self.unknown.drain(..).filter(|uid| !self.kept.contains_key(uid)) {
            self.board.remove(&gone);
        }
        for uid in &uids {
            let unknown: Text = "(unknown)".into();
            let netns = NetnsRef::Path(PathBuf::new());
            let spec = PodSpec {
                name: unknown.clone(),
                namespace: unknown.clone(),
                service_account: unknown,
                uid: uid.clone(),
                netns,
                dns: None,
            };
            self.board.set(&spec, State::Failed(
                "the agent keeps this pod and has no namespace for it, and this daemon has not had it: its traffic is refused; \
                 restart the pod".into(),
            ));
        }
        self.unknown = uids;
    }

    fn let_go(&mut self, uid: &Text, at_once: bool) {
        if let Some(at) = self.unknown.iter().position(|unknown| unknown == uid) {
            self.board.remove(&self.unknown.swap_remove(at));
        }
        let Some(kept) = self.kept.remove(uid) else { return };
        if at_once {
            kept.remove.at_once();
        } else {
            kept.remove.gently();
        }
        let Kept { spec, netns, remove, task, .. } = kept;
        self.leaving.push(Leaving { uid: spec.uid, netns, remove, task });
    }

    fn start(&mut self, spec: PodSpec, ready: Option<Arc<Pending>>) {
        let netns = Place::of(&spec);
        // Whoever had the uid or the namespace has to be out of it first, and at once: it is wanted again.
        self.leaving.retain(|leaving| leaving.task.len() > 0);
        let had_it = |leaving: &&Leaving| leaving.uid == spec.uid || leaving.netns == netns;
        let earlier: Vec<Group> = self
            .leaving
            .iter()
            .filter(had_it)
            .map(|leaving| {
                leaving.remove.at_once();
                leaving.task.clone()
            })
            .collect();
        let (remove, task, (questions, asked)) = (Drain::default(), Group::default(), mpsc::channel(QUESTIONS));
        let mut work = Task::new(self.capturer.clone(), self.board.clone(), spec.clone(), remove.signal(), asked);
        work.first_attempt = ready;
        let (board, uid) = (self.board.clone(), spec.uid.clone());
        self.kept.insert(uid, Kept { spec: spec.clone(), netns, remove, questions, task: task.clone() });
        task.spawn(async move {
            for earlier in earlier {
                earlier.finished().await;
            }
            board.set(&spec, State::Pending("being captured".into()));
            pod::keep(work).await;
        });
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
        match &spec.netns {
            NetnsRef::Path(path) => Netns::open(path).map_or_else(|_| Self::Path(path.clone()), |n| Self::Id(n.id())),
            NetnsRef::Handle(netns) => Self::Id(netns.id()),
        }
    }
}
