//! The life of one pod on this node, as one task: listen, find out who it is, capture it, hold it, and let go of it.
//!
//! ```text
//!   pending ──listening, approved, verified──► captured ──removed──► releasing ──► (gone)
//!      ▲  └──error──► failed ─┐                    │
//!      └───── tried again ────┴────────────────────┘ namespace vanished, or the identity is another one now
//! ```
//! As long as a pod is wanted its rules stay, whatever fails: its traffic is captured or refused, never passed. One that is wanted
//! again while it is being released is captured by a task of its own at once; what is open keeps the time that it had.

use super::capture::{Approved, Capturer, Certificate, Listening};
use super::error::CaptureError;
use super::preexisting::Uncaptured;
use super::spec::PodSpec;
use super::status::{Board, CaptureState};
use super::upkeep::Upkeep;
use super::{legs, redirect};
use crate::mesh::Wanted;
use crate::sys::netns::{Netns, NetnsError};
use crate::task::ready::Pending;
use crate::task::{Group, Signal};
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Time between attempts to capture, where nothing that matters changes before.
const RETRY: Duration = Duration::from_secs(5);
/// The same where somebody else still has the namespace: mostly one who is about to leave it.
const RETRY_TAKEN: Duration = Duration::from_millis(250);
/// Time between looks at whether the namespace is still there.
const LOOK: Duration = Duration::from_secs(1);
/// How long changing facts are let settle before they are looked at.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a pod is listened for whose namespace is not what the facts say: they may be of its earlier life.
const STALE_FACTS: Duration = Duration::from_secs(10);

/// What is said of a pod that has come while this daemon does not write.
const ON_STANDBY: &str = "another daemon of this node writes the pod's rules, and verifies them";

/// Asks whether the pod is listened for; answered at once where it is, else after the next attempt.
pub type Waiter = oneshot::Sender<Result<(), String>>;

/// What a task that releases its pod and the next one of the same pod tell each other.
#[derive(Clone, Debug, Default)]
pub struct HandOver {
    wanted: CancellationToken,
    free: CancellationToken,
    /// How what the pod has opened meanwhile is told from what was captured.
    uncaptured: Arc<OnceLock<Arc<Uncaptured>>>,
}

impl HandOver {
    /// The pod is wanted again.
    pub fn want(&self) {
        self.wanted.cancel();
    }

    /// Completes when the namespace is free for the next one, though connections of the last one may be open still.
    pub async fn is_free(&self) {
        self.free.cancelled().await;
    }
}

/// Why a pod is held no longer.
enum TaskEnd {
    /// It is no longer wanted: released in order.
    Removed,
    /// Another entry has its namespace now: given up without touching the rules.
    Replaced,
    /// The process ends.
    Process,
    /// It must be captured anew.
    Lost(CaptureError),
}

/// What a pod's task works with.
pub struct PodTask {
    /// Captures.
    pub capturer: Arc<Capturer>,
    /// Where its state is shown.
    pub board: Arc<Board>,
    /// The pod.
    pub spec: PodSpec,
    /// What is said of it now.
    changes: watch::Receiver<PodSpec>,
    /// Gently: let go of it in order. At once: another entry has its namespace, or the namespace is gone.
    pub removed: Signal,
    /// Questions of whoever handed the pod over.
    pub waiters: mpsc::Receiver<Waiter>,
    /// What it tells the next task of this pod.
    pub hand_over: HandOver,
    /// Earlier tasks of this pod, whose last connections need the rules as well, and what they hand over.
    pub predecessors: Vec<(Group, HandOver)>,
    /// Given up after the first attempt to capture.
    pub first_attempt: Option<Arc<Pending>>,
    /// Questions that the next attempt answers.
    waiting: Vec<Waiter>,
    /// Who the pod has been found to be; kept while its last connections end.
    approved: Option<Approved>,
    /// The certificate that it will probably need; kept until it is known.
    prefetched: Option<Certificate>,
    /// When the pod was handed over.
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

/// Keeps a pod captured until it is removed, replaced, or the process ends.
pub async fn run(mut task: PodTask) {
    let mut facts = task.capturer.mesh.subscribe();
    let process = task.capturer.drain.signal();
    loop {
        facts.mark_unchanged();
        task.spec = task.changes.borrow_and_update().clone();
        let mut listening = match task.capturer.listen(&task.spec) {
            Ok(listening) => {
                task.board.set_listening(&task.spec.uid, true);
                // Who it is need not be known for that: the facts may be those of its earlier life.
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
            // The rules stay: until the next daemon is there, the pod's traffic is refused and not passed in plaintext.
            TaskEnd::Process => {
                listening.accepting.finished().await;
                // What was accepted last still needs the pod's certificate.
                process.now().await;
                return;
            }
            TaskEnd::Removed => {
                task.board.set(&task.spec, CaptureState::Releasing);
                tokio::select! {
                    wanted_again = task.release(&mut listening) => match wanted_again {
                        // What is shown of the pod is its next task's affair.
                        true => return,
                        false => break,
                    },
                    () = removed.now() => {
                        end_listening(listening).await;
                        // What is shown of a pod that was handed over is its next task's affair.
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
    /// Reports a failed attempt and waits for the next one: `None` when it is time.
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

    /// Answers every question there is by now.
    fn answer(&mut self, answer: &Result<(), String>) {
        let come_since = std::iter::from_fn(|| self.waiters.try_recv().ok());
        for waiter in self.waiting.drain(..).chain(come_since) {
            // Whoever asked has gone where this fails.
            let _ = waiter.send(answer.clone());
        }
    }

    fn report(&self, error: &CaptureError) {
        self.board.count_failure(error);
        self.board.set(&self.spec, state_of(error));
    }

    /// Carries the pod's traffic: finds out who it is, captures it, and watches over both. Returns when it must be captured
    /// anew. One that cannot be verified keeps its connections and is reported, because what a probe meets need not have
    /// met them; rules that are an agent's affair are no reason to stop listening.
    async fn carry(&mut self, listening: &Listening, facts: &mut watch::Receiver<u64>) -> CaptureError {
        let mut upkeep = Upkeep::new(&self.capturer, listening);
        // The last one knows what those before it have told.
        if let Some(between) = self.predecessors.iter().rev().find_map(|(_, handed)| handed.uncaptured.get()) {
            upkeep.keep_uncaptured(between.clone());
        }
        // Ticks on whatever else happens, so that changing facts cannot put off looking.
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut role = self.capturer.role.subscribe();
        loop {
            facts.mark_unchanged();
            let waiting = match self.identify(listening) {
                Ok(()) => None,
                Err(error @ (CaptureError::NoFacts(_) | CaptureError::FactsIncomplete(_))) => Some(error),
                // The facts may be those of the pod's earlier life, for a moment.
                Err(error) if self.approved.is_none() && self.begun.elapsed() < STALE_FACTS => Some(error),
                Err(error) => return error,
            };
            let ours = waiting.is_none() || !self.spec.ips.is_empty();
            // Where whoever enrolled the pod has vouched for the namespace, its traffic is held until it is known who it is.
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
                // Of what has been captured before that is still true.
                (None, Ok(_)) if !is_active && !upkeep.verified() => {
                    self.board.set(&self.spec, CaptureState::Pending(ON_STANDBY.into()));
                }
                (None, Ok(_)) => {}
                (Some(error), Ok(_)) => {
                    self.board.set(&self.spec, state_of(&error));
                    if !ours {
                        // Verified as soon as it is known.
                        upkeep.check_soon();
                    }
                }
            }
            if self.capturer.role.is_active() {
                self.first_attempt = None;
            }
            // Where facts are told only when asked for, this asks.
            let unknown = self.approved.is_none().then(|| Wanted::Workload(listening.pod.mesh_uid.clone()));
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
                    _ = looks.tick() => match vanished(&listening.pod.netns) {
                        Some(gone) => return gone,
                        None => break,
                    },
                    () = tokio::time::sleep_until(upkeep.due()), if ours && self.capturer.role.is_active() => break,
                    Ok(()) = role.changed() => {
                        // What another daemon has written may be another's rules, or another version's.
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

    /// Finds out who the pod is, or whether that is still so.
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

    /// Lets go of a pod, and removes the rules, again and again where that fails: with rules and without listeners the
    /// pod is cut off, and must stay on the list until it is not. Whether the pod is wanted again meanwhile: then the rules
    /// are its next task's, which listens while the last connections of this one end.
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
            // Set once: a task releases its pod once.
            let _ = self.hand_over.uncaptured.set(uncaptured);
            self.hand_over.free.cancel();
            self.capturer.end_by(deadline, listening).await;
        }
        wanted_again
    }

    /// Removes the rules, again and again; whether they are gone, or another's to remove. Not so where the pod is wanted again
    /// before that.
    async fn remove_rules(&self, listening: &Listening) -> bool {
        let netns = &listening.pod.netns;
        let ours = self.capturer.config.redirect;
        // The redirection that an agent has written is the agent's to remove.
        loop {
            // Another daemon of the node that has the turn has let go of the pod as well, or wants it still.
            let Some(permit) = self.capturer.role.permit() else { return true };
            let removed = if ours {
                redirect::remove(netns, listening.ipv6).await
            } else {
                legs::remove(netns).await.map_err(Into::into)
            };
            drop(permit);
            let Err(error) = removed else { return true };
            if vanished(netns).is_some() {
                return true;
            }
            let reason = format!("released, but its rules could not be removed: {error}");
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

/// Completes a moment after facts have changed: they may do so a thousand times a second, for each of a hundred pods.
async fn settled(facts: &mut watch::Receiver<u64>) {
    if facts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(SETTLE).await;
}

/// Completes when facts have changed and an attempt that failed for want of others may succeed; not for what has nothing
/// to do with facts, and never at once.
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
            tokio::time::sleep(LOOK).await;
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

/// Whether the namespace is no longer where it was. That it cannot be looked at now (no descriptors left, say) is no
/// sign of that; and of one that was handed over, whoever handed it over says when it is gone.
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
