//! The set of pods of this node: one task per pod, so that no pod waits for another.

use super::capture::Capturer;
use super::pod::{self, HandOver, PodTask, Waiter};
use super::spec::{NetnsRef, PodSpec, Settings};
use super::status::{Board, CaptureState, Observations};
use crate::mesh::Text;
use crate::sys::netns::Netns;
use crate::task::ready::Pending;
use crate::task::{Drain, Group};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Callers of [`Pods::add`] that may wait for one pod.
const WAITERS: usize = 4;

/// Keeps one task per pod.
#[derive(Debug)]
pub struct Pods {
    capturer: Arc<Capturer>,
    board: Arc<Board>,
    kept: HashMap<Text, PodEntry>,
    /// Uids of pods that are shown although there is no task for them: they cannot be captured yet.
    shown: Vec<Text>,
    /// Released pods whose tasks have not ended. Their network namespaces are not kept open: those must be able to go.
    leaving: Vec<Leaving>,
}

#[derive(Debug)]
struct Leaving {
    spec: PodSpec,
    netns: NetnsKey,
    /// Whether its connections have time to end.
    gently: bool,
    remove: Drain,
    hand_over: HandOver,
    task: Group,
}

#[derive(Debug)]
struct PodEntry {
    spec: watch::Sender<PodSpec>,
    /// The network namespace itself: the same one may have several paths.
    netns: NetnsKey,
    remove: Drain,
    hand_over: HandOver,
    waiters: mpsc::Sender<Waiter>,
    task: Group,
}

impl Pods {
    /// An empty set.
    pub fn new(capturer: Arc<Capturer>, board: Arc<Board>) -> Self {
        Self { capturer, board, kept: HashMap::new(), shown: Vec::new(), leaving: Vec::new() }
    }

    /// Makes the set equal to `specs`. `ready` is held until each pod has had one attempt.
    pub fn apply(&mut self, specs: Vec<PodSpec>, ready: Option<&Arc<Pending>>) {
        let stays = |kept: &PodEntry| specs.iter().any(|spec| spec.is_same_pod(&kept.spec.borrow()));
        let unwanted: Vec<Text> =
            self.kept.iter().filter(|(_, kept)| !stays(kept)).map(|(uid, _)| uid.clone()).collect();
        // If the network namespace is wanted by another entry, its rules must stay, without any gap.
        let wanted_netns: Vec<NetnsKey> = specs.iter().map(NetnsKey::of).collect();
        for uid in unwanted {
            let elsewhere = self.kept.get(&uid).is_some_and(|kept| wanted_netns.contains(&kept.netns));
            self.release(&uid, elsewhere);
        }
        for spec in specs {
            match self.kept.get(&spec.uid) {
                Some(kept) => kept.take(spec),
                None => self.start(spec, ready.cloned()),
            }
        }
    }

    /// Adds a pod, or finds it. The answer comes once the daemon listens in it, or cannot.
    pub fn add(&mut self, spec: PodSpec) -> oneshot::Receiver<Result<(), String>> {
        let uid = spec.uid.clone();
        let stays = |kept: &PodEntry| kept.spec.borrow().is_same_pod(&spec) && kept.task.len() > 0;
        if self.kept.get(&uid).is_some_and(|kept| !stays(kept)) {
            // The pod's network namespace or identity has changed, or its task has died: start again.
            self.release(&uid, true);
        }
        match self.kept.get(&uid) {
            Some(kept) => kept.take(spec),
            None => self.start(spec, None),
        }
        let (answer, answered) = oneshot::channel();
        if let Some(kept) = self.kept.get(&uid) {
            // If the task takes no more callers, the answer never comes, and the caller reaches its deadline.
            let _ = kept.waiters.try_send(answer);
        }
        answered
    }

    /// Releases a pod. A pod that is not in the set is ignored.
    pub fn remove(&mut self, uid: &Text) {
        self.release(uid, false);
    }

    /// Releases all pods except `named`. Returns which of those are not in the set.
    pub fn retain(&mut self, named: &HashSet<Text>) -> Vec<Text> {
        let others: Vec<Text> = self.kept.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        for uid in others {
            tracing::info!(uid = &*uid, "the pod is no longer on this node");
            self.release(&uid, false);
        }
        named.iter().filter(|uid| !self.kept.contains_key(*uid)).cloned().collect()
    }

    /// Shows pods that should be captured but of which only the uid is known.
    pub fn show_unknown(&mut self, uids: Vec<Text>) {
        let unknown = |uid| {
            let name: Text = "(unknown)".into();
            let netns = NetnsRef::Path(PathBuf::new());
            let (namespace, service_account) = (name.clone(), name.clone());
            let spec = PodSpec {
                name,
                namespace,
                service_account,
                uid,
                netns,
                ips: Vec::new(),
                settings: Settings::default(),
                powers: None,
            };
            (spec, CaptureState::Failed(
                "the agent reports this pod without a network namespace, and this daemon never received one: its traffic is refused; \
                 restart the pod".into(),
            ))
        };
        self.show(uids.into_iter().map(unknown).collect());
    }

    /// Shows pods that should be captured and cannot be yet, with the reason. Replaces the pods shown before.
    pub fn show(&mut self, pods: Vec<(PodSpec, CaptureState)>) {
        let now: Vec<Text> = pods.iter().map(|(spec, _)| spec.uid.clone()).collect();
        // A pod that is still being released shows that state, and is removed afterwards.
        self.leaving.retain(|leaving| leaving.task.len() > 0);
        let others: HashSet<&Text> =
            self.kept.keys().chain(self.leaving.iter().map(|leaving| &leaving.spec.uid)).collect();
        for gone in self.shown.drain(..).filter(|uid| !others.contains(uid) && !now.contains(uid)) {
            self.board.remove(&gone);
        }
        for (spec, state) in pods.into_iter().filter(|(spec, _)| !others.contains(&spec.uid)) {
            self.board.set(&spec, state);
        }
        self.shown = now;
    }

    fn release(&mut self, uid: &Text, at_once: bool) {
        if let Some(at) = self.shown.iter().position(|shown| shown == uid) {
            self.board.remove(&self.shown.swap_remove(at));
        }
        let Some(kept) = self.kept.remove(uid) else { return };
        // Facts about the old network namespace do not apply to a later one.
        self.board.set_redirected(uid, false);
        self.board.set_listening(uid, false);
        self.board.set_observations(uid, &Observations::default());
        if at_once {
            kept.remove.at_once();
        } else {
            kept.remove.gently();
        }
        let PodEntry { spec, netns, remove, hand_over, task, .. } = kept;
        let spec = spec.borrow().clone();
        self.leaving.push(Leaving { spec, netns, gently: !at_once, remove, hand_over, task });
    }

    fn start(&mut self, spec: PodSpec, ready: Option<Arc<Pending>>) {
        let netns = NetnsKey::of(&spec);
        // Earlier tasks with this uid or network namespace must leave the namespace first. If one has the same pod, its
        // connections keep their time to end and it only frees the namespace; otherwise it ends at once.
        self.leaving.retain(|leaving| leaving.task.len() > 0);
        let had_it = |leaving: &&Leaving| leaving.spec.uid == spec.uid || leaving.netns == netns;
        let (mut before, mut earlier) = (Vec::new(), Vec::new());
        for leaving in self.leaving.iter().filter(had_it) {
            if leaving.gently && leaving.spec.is_same_pod(&spec) {
                leaving.hand_over.want();
                earlier.push((leaving.task.clone(), leaving.hand_over.clone()));
            } else {
                leaving.remove.at_once();
            }
            before.push((leaving.task.clone(), leaving.hand_over.clone()));
        }
        let (remove, task, (waiters, asked)) = (Drain::default(), Group::default(), mpsc::channel(WAITERS));
        let (said, hears) = watch::channel(spec.clone());
        let mut work = PodTask::new(self.capturer.clone(), self.board.clone(), hears, remove.signal(), asked);
        (work.first_attempt, work.predecessors) = (ready, earlier);
        let (board, uid, hand_over) = (self.board.clone(), spec.uid.clone(), work.hand_over.clone());
        self.kept.insert(uid, PodEntry { spec: said, netns, remove, hand_over, waiters, task: task.clone() });
        task.spawn(async move {
            for (task, hand_over) in before {
                tokio::select! {
                    () = task.finished() => {}
                    () = hand_over.is_free() => {}
                }
            }
            board.set(&spec, CaptureState::Pending("being captured".into()));
            pod::run(work).await;
        });
    }
}

impl PodEntry {
    /// Updates the settings of the pod; its identity is unchanged.
    fn take(&self, spec: PodSpec) {
        self.spec.send_if_modified(|known| {
            let other = *known != spec;
            *known = spec;
            other
        });
    }
}

/// Identifies a network namespace by device and inode, or by its path if it cannot be opened.
#[derive(Debug, PartialEq, Eq)]
enum NetnsKey {
    Id((u64, u64)),
    Path(PathBuf),
}

impl NetnsKey {
    fn of(spec: &PodSpec) -> Self {
        match &spec.netns {
            NetnsRef::Path(path) => Netns::open(path).map_or_else(|_| Self::Path(path.clone()), |n| Self::Id(n.id())),
            NetnsRef::Handle(netns) => Self::Id(netns.id()),
        }
    }
}
