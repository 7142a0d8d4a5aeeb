//! The life of one pod on this node, as one task: listen, identify, capture, keep captured, release.
//!
//! ```text
//!   pending ──listening, approved, checked───► captured ──removed──► releasing ──► (gone)
//!      ▲  └──error──► failed ─┐                    │
//!      └───── tried again ────┴────────────────────┘ namespace gone, or identity changed
//! ```
//! As long as a pod is enrolled, its rules stay, whatever fails: its traffic is captured or refused, never passed in
//! plaintext. A pod that is enrolled again while it is being released gets a new task, which captures it at once; its
//! open connections keep their time to end.

use super::capture::{Approved, Capturer, Certificate, Listening};
use super::error::CaptureError;
use super::preexisting::Uncaptured;
use super::spec::PodSpec;
use super::status::{Board, CaptureState};
use super::upkeep::Upkeep;
use super::{legs, redirect};
use crate::mesh::FactKey;
use crate::sys::netns::{Netns, NetnsError};
use crate::task::ready::Pending;
use crate::task::{Group, Signal};
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Time between attempts to capture, unless a relevant fact changes earlier.
const RETRY: Duration = Duration::from_secs(5);
/// The same if another pod still has the network namespace: usually it is about to be released.
const RETRY_TAKEN: Duration = Duration::from_millis(250);
/// Time between checks that the network namespace still exists.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How long to wait for further changes of facts.
const SETTLE: Duration = Duration::from_millis(50);
/// How long the daemon listens in a pod whose network namespace contradicts the mesh facts: they may describe the pod
/// before its restart.
const STALE_FACTS: Duration = Duration::from_secs(10);

/// Reason of a new pod's state while this daemon is on standby.
const ON_STANDBY: &str = "another daemon of this node is active: it writes and checks the pod's rules";

/// A caller that waits until the daemon listens in the pod. It is answered at once if it does, otherwise after the next
/// attempt.
pub type Waiter = oneshot::Sender<Result<(), String>>;

/// Signals between a task that releases its pod and the next task of the same pod.
#[derive(Clone, Debug, Default)]
pub struct HandOver {
    wanted: CancellationToken,
    free: CancellationToken,
    /// Tells the connections that the pod opened in the meantime from captured ones.
    uncaptured: Arc<OnceLock<Arc<Uncaptured>>>,
}

impl HandOver {
    /// The pod is enrolled again.
    pub fn want(&self) {
        self.wanted.cancel();
    }

    /// Completes when the network namespace is free for the next task; connections of this one may still be open.
    pub async fn is_free(&self) {
        self.free.cancelled().await;
    }
}

/// Why a pod is no longer carried.
enum TaskEnd {
    /// It is no longer enrolled: release it in order.
    Removed,
    /// Another entry has its network namespace: leave at once, and keep the rules.
    Replaced,
    /// The process ends.
    Process,
    /// It must be captured again.
    Lost(CaptureError),
}

/// The task of one pod.
pub struct PodTask {
    /// Captures the pod.
    pub capturer: Arc<Capturer>,
    /// Shows the pod's state.
    pub board: Arc<Board>,
    /// The pod.
    pub spec: PodSpec,
    /// Changes of the pod's settings.
    changes: watch::Receiver<PodSpec>,
    /// Gentle: release the pod in order. At once: another entry has its network namespace, or the namespace has gone.
    pub removed: Signal,
    /// Callers that wait until the daemon listens in the pod.
    pub waiters: mpsc::Receiver<Waiter>,
    /// Signals to the next task of this pod.
    pub hand_over: HandOver,
    /// Earlier tasks of this pod, whose last connections also need the rules, and the signals from them.
    pub predecessors: Vec<(Group, HandOver)>,
    /// Held until the first attempt to capture has ended.
    pub first_attempt: Option<Arc<Pending>>,
    /// Callers that the next attempt answers.
    waiting: Vec<Waiter>,
    /// The identified pod; kept while its last connections end.
    approved: Option<Approved>,
    /// The certificate that the pod will probably need; kept until it is identified.
    prefetched: Option<Certificate>,
    /// When the task began.
    begun: Instant,
}

impl PodTask {
    /// A task that has not begun.
    pub fn new(
        capturer: Arc<Capturer>,
        board: Arc<Board>,
        changes: watch::Receiver<PodSpec>,
        removed: Signal,
        waiters: mpsc::Receiver<Waiter>,
    ) -> Self {
        let (waiting, begun, spec) = (Vec::new(), Instant::now(), changes.borrow().clone());
        Self {
            capturer,
            board,
            spec,
            changes,
            removed,
            waiters,
            hand_over: HandOver::default(),
            predecessors: Vec::new(),
            first_attempt: None,
            waiting,
            approved: None,
            prefetched: None,
            begun,
        }
    }
}

/// Keeps a pod captured until it is removed or replaced, or the process ends.
pub async fn run(mut task: PodTask) {
    let mut facts = task.capturer.mesh.subscribe();
    let process = task.capturer.drain.signal();
    loop {
        facts.mark_unchanged();
        task.spec = task.changes.borrow_and_update().clone();
        let mut listening = match task.capturer.listen(&task.spec) {
            Ok(listening) => {
                task.board.set_listening(&task.spec.uid, true);
                // The pod need not be identified for that: the facts may describe it before its restart.
                task.answer(&Ok(()));
                listening
            }
            Err(error) => match task.wait_after(&error, &mut facts).await {
                None => continue,
                Some(TaskEnd::Process) => return,
                Some(_) => break,
            },
        };
        let removed = task.removed.clone();
        let end = tokio::select! {
            biased;
            () = removed.now() => TaskEnd::Replaced,
            () = removed.gentle() => TaskEnd::Removed,
            () = process.gentle() => TaskEnd::Process,
            lost = task.carry(&listening, &mut facts) => TaskEnd::Lost(lost),
        };
        match end {
            // The rules stay: until the next daemon starts, the pod's traffic is refused, not passed in plaintext.
            TaskEnd::Process => {
                listening.accepting.finished().await;
                // The last accepted connections still need the pod's certificate.
                process.now().await;
                return;
            }
            TaskEnd::Removed => {
                task.board.set(&task.spec, CaptureState::Releasing);
                tokio::select! {
                    wanted_again = task.release(&mut listening) => match wanted_again {
                        // The next task shows the pod's state.
                        true => return,
                        false => break,
                    },
                    () = removed.now() => {
                        end_listening(listening).await;
                        // The next task shows the pod's state.
                        if task.hand_over.free.is_cancelled() {
                            return;
                        }
                        break;
                    }
                    () = process.now() => return,
                }
            }
            TaskEnd::Replaced => {
                end_listening(listening).await;
                break;
            }
            TaskEnd::Lost(error @ CaptureError::IdentityChanged(..)) => {
                task.approved = None;
                task.board.set_listening(&task.spec.uid, false);
                task.board.set_redirected(&task.spec.uid, false);
                end_listening(listening).await;
                task.report(&error);
            }
            TaskEnd::Lost(error) => {
                task.approved = None;
                task.board.set_listening(&task.spec.uid, false);
                task.board.set_redirected(&task.spec.uid, false);
                end_listening(listening).await;
                match task.wait_after(&error, &mut facts).await {
                    None => {}
                    Some(TaskEnd::Process) => return,
                    Some(_) => break,
                }
            }
        }
    }
    task.board.remove(&task.spec.uid);
    let (namespace, name, uid) = (&*task.spec.namespace, &*task.spec.name, &*task.spec.uid);
    tracing::info!(namespace, name, uid, "pod released");
}

impl PodTask {
    /// Reports a failed attempt and waits for the next one. Returns `None` when it is time, otherwise why the task must
    /// end.
    async fn wait_after(&mut self, error: &CaptureError, facts: &mut watch::Receiver<u64>) -> Option<TaskEnd> {
        self.report(error);
        self.first_attempt = None;
        self.answer(&Err(error.to_string()));
        let (removed, process) = (self.removed.clone(), self.capturer.drain.signal());
        tokio::select! {
            () = process.gentle() => Some(TaskEnd::Process),
            () = removed.now() => Some(TaskEnd::Replaced),
            () = removed.gentle() => {
                tokio::select! {
                    () = self.predecessors_ended() => self.capturer.remove_rules(&self.spec).await,
                    () = self.hand_over.wanted.cancelled() => {}
                    () = removed.now() => {}
                }
                Some(TaskEnd::Removed)
            }
            () = tokio::time::sleep(if matches!(error, CaptureError::NetnsTaken(..)) { RETRY_TAKEN } else { RETRY }) => None,
            () = facts_may_help(facts, error) => None,
            Some(waiter) = self.waiters.recv() => {
                self.waiting.push(waiter);
                None
            }
        }
    }

    /// Answers all callers that wait now.
    fn answer(&mut self, answer: &Result<(), String>) {
        let come_since = std::iter::from_fn(|| self.waiters.try_recv().ok());
        for waiter in self.waiting.drain(..).chain(come_since) {
            // If this fails, the caller no longer waits.
            let _ = waiter.send(answer.clone());
        }
    }

    fn report(&self, error: &CaptureError) {
        self.board.count_failure(error);
        self.board.set(&self.spec, state_of(error));
    }

    /// Carries the pod's traffic: identifies the pod, captures it, and keeps checking both. Returns when it must be
    /// captured again. If a check fails, the pod keeps its connections and is reported, because the fault need not
    /// affect them. Faults in an agent's rules are no reason to stop listening.
    async fn carry(&mut self, listening: &Listening, facts: &mut watch::Receiver<u64>) -> CaptureError {
        let mut upkeep = Upkeep::new(&self.capturer, listening);
        // The last task also knows the connections of those before it.
        if let Some(between) = self.predecessors.iter().rev().find_map(|(_, handed)| handed.uncaptured.get()) {
            upkeep.keep_uncaptured(between.clone());
        }
        // This timer ticks whatever else happens, so that frequent changes of facts cannot delay the check.
        let mut checks = tokio::time::interval(CHECK_EVERY);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut role = self.capturer.role.subscribe();
        loop {
            facts.mark_unchanged();
            let waiting = match self.identify(listening) {
                Ok(()) => None,
                Err(error @ (CaptureError::NoFacts(_) | CaptureError::FactsIncomplete(_))) => Some(error),
                // For a moment, the facts may describe the pod before its restart.
                Err(error) if self.approved.is_none() && self.begun.elapsed() < STALE_FACTS => Some(error),
                Err(error) => return error,
            };
            let ours = waiting.is_none() || !self.spec.ips.is_empty();
            // If the enrolment source supplied the pod's addresses, it is redirected now; its connections wait until it
            // is identified.
            let is_active = *role.borrow_and_update();
            let seen_to = match ours && is_active {
                true => upkeep.maintain(&self.capturer, &self.board, &self.spec, listening).await,
                false => Ok(false),
            };
            self.board.set_redirected(&self.spec.uid, upkeep.verified());
            self.board.set_observations(&self.spec.uid, upkeep.observations(&self.capturer, listening));
            match (waiting, seen_to) {
                (_, Err(error)) => self.report(&error),
                (None, Ok(verified)) if verified || upkeep.verified() => {
                    self.board.set(&self.spec, CaptureState::Captured)
                }
                // A pod that was captured before stays so: its rules are in place.
                (None, Ok(_)) if !is_active && !upkeep.verified() => {
                    self.board.set(&self.spec, CaptureState::Pending(ON_STANDBY.into()));
                }
                (None, Ok(_)) => {}
                (Some(error), Ok(_)) => {
                    self.board.set(&self.spec, state_of(&error));
                    if !ours {
                        // Check as soon as the pod is identified.
                        upkeep.check_soon();
                    }
                }
            }
            if self.capturer.role.is_active() {
                self.first_attempt = None;
            }
            // An on-demand control plane announces the workload only when it is asked.
            let unknown = self.approved.is_none().then(|| FactKey::Workload(listening.pod.mesh_uid.clone()));
            let ask = async {
                match unknown {
                    Some(wanted) => drop(self.capturer.mesh.ask(&listening.pod.uid, wanted).await),
                    None => std::future::pending().await,
                }
            };
            tokio::pin!(ask);
            let mut asking = true;
            loop {
                tokio::select! {
                    _ = &mut ask, if asking => asking = false,
                    Some(waiter) = self.waiters.recv() => drop(waiter.send(Ok(()))),
                    () = settled(facts) => break,
                    _ = checks.tick() => match vanished(&listening.pod.netns) {
                        Some(gone) => return gone,
                        None => break,
                    },
                    () = tokio::time::sleep_until(upkeep.due()), if ours && self.capturer.role.is_active() => break,
                    Ok(()) = role.changed() => {
                        // The other daemon may have written rules of other settings, or of another version.
                        upkeep.rewrite_soon();
                        break;
                    }
                    () = upkeep.changes() => {
                        upkeep.handle_changes(&self.capturer, listening).await;
                        break;
                    }
                    Ok(()) = self.changes.changed() => {
                        self.spec = self.changes.borrow_and_update().clone();
                        upkeep.rewrite_soon();
                        break;
                    }
                }
            }
        }
    }

    /// Identifies the pod, or checks that its identification still stands.
    fn identify(&mut self, listening: &Listening) -> Result<(), CaptureError> {
        match &self.approved {
            Some(approved) => self.capturer.recheck(&self.spec, approved),
            None => {
                if self.prefetched.is_none() {
                    self.prefetched = self.capturer.prefetch_certificate(&self.spec);
                }
                self.approved = Some(self.capturer.approve(&self.spec, listening)?);
                self.prefetched = None;
                Ok(())
            }
        }
    }

    /// Releases the pod and removes its rules. If removing fails, it is repeated: rules without listeners cut the pod
    /// off, so it stays listed until they are gone. Returns whether the pod is enrolled again in the meantime; its next
    /// task then owns the rules, and listens while the last connections of this one end.
    async fn release(&self, listening: &mut Listening) -> bool {
        let uncaptured = Arc::new(self.capturer.stop_capturing(&self.spec, listening).await);
        let deadline = Instant::now() + self.capturer.config.release_deadline;
        let ended = async {
            self.capturer.end_by(deadline, listening).await;
            self.predecessors_ended().await;
        };
        let wanted_again = tokio::select! {
            biased;
            () = ended => !self.remove_rules(listening).await,
            () = self.hand_over.wanted.cancelled() => true,
        };
        if wanted_again {
            listening.make_room().await;
            // This cannot be set already: a task releases its pod once.
            let _ = self.hand_over.uncaptured.set(uncaptured);
            self.hand_over.free.cancel();
            self.capturer.end_by(deadline, listening).await;
        }
        wanted_again
    }

    /// Removes the rules, and repeats it until they are gone or belong to another daemon. Returns false if the pod is
    /// enrolled again before that.
    async fn remove_rules(&self, listening: &Listening) -> bool {
        let netns = &listening.pod.netns;
        let ours = self.capturer.config.redirect;
        // The redirection that an agent has written is the agent's to remove.
        loop {
            // The active daemon of the node has released the pod as well, or still needs the rules.
            let Some(guard) = self.capturer.role.write_guard() else { return true };
            let removed = if ours {
                redirect::remove(netns, listening.ipv6).await
            } else {
                legs::remove(netns).await.map_err(Into::into)
            };
            drop(guard);
            let Err(error) = removed else { return true };
            if vanished(netns).is_some() {
                return true;
            }
            let reason = format!("released, but its rules cannot be removed: {error}");
            self.board.set(&self.spec, CaptureState::Failed(reason));
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = self.hand_over.wanted.cancelled() => return false,
            }
        }
    }

    /// Waits for the last connections of earlier tasks of this pod; each has a deadline.
    async fn predecessors_ended(&self) {
        for (earlier, _) in &self.predecessors {
            earlier.finished().await;
        }
    }
}

fn state_of(error: &CaptureError) -> CaptureState {
    match error {
        CaptureError::NoFacts(_) | CaptureError::FactsIncomplete(_) | CaptureError::NoNetwork(_) => {
            CaptureState::Pending(error.to_string())
        }
        _ => CaptureState::Failed(error.to_string()),
    }
}

/// Completes a moment after facts have changed: they may change a thousand times a second, for each of a hundred pods.
async fn settled(facts: &mut watch::Receiver<u64>) {
    if facts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(SETTLE).await;
}

/// Completes when facts have changed and might make a failed attempt succeed. Never completes for errors that have
/// nothing to do with facts, and never at once.
async fn facts_may_help(facts: &mut watch::Receiver<u64>, error: &CaptureError) {
    use CaptureError::{
        FactsIncomplete, Identity, IdentityChanged, NoFacts, NoNetwork, NoOwnAddress, NotThePod, ServiceAccount,
    };
    match error {
        NoFacts(_)
        | FactsIncomplete(_)
        | NotThePod { .. }
        | NoNetwork(_)
        | NoOwnAddress(_)
        | ServiceAccount { .. }
        | Identity(_)
        | IdentityChanged(..) => {
            tokio::time::sleep(CHECK_EVERY).await;
            settled(facts).await;
        }
        _ => std::future::pending().await,
    }
}

/// Ends the pod's connections and listeners; the rules stay.
async fn end_listening(mut listening: Listening) {
    listening.pod.drain.at_once();
    listening.accepting.finished().await;
    if let Some(dns) = listening.dns.take() {
        dns.end().await;
    }
}

/// Whether the network namespace no longer exists at its path. An error such as too few file descriptors does not mean
/// that. For a namespace that an agent has handed over, the agent says when it is gone.
fn vanished(netns: &Netns) -> Option<CaptureError> {
    if !netns.has_path() {
        return None;
    }
    let gone = match Netns::open(netns.path()) {
        Ok(now) => now.id() != netns.id(),
        Err(NetnsError::NotNetns(_)) => true,
        Err(NetnsError::Open { source, .. }) => source.kind() == io::ErrorKind::NotFound,
        Err(NetnsError::Enter { .. }) => false,
    };
    gone.then(|| CaptureError::Vanished(netns.path().to_owned()))
}
