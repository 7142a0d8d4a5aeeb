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
use super::status::{Board, State};
use super::upkeep::Rules;
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
const OLD_FACTS: Duration = Duration::from_secs(10);

/// What is said of a pod that has come while this daemon does not write.
const ELSEWHERE: &str = "another daemon of this node writes the pod's rules, and verifies them";

/// Asks whether the pod is listened for; answered at once where it is, else after the next attempt.
pub type Question = oneshot::Sender<Result<(), String>>;

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
enum End {
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
pub struct Task {
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
    pub questions: mpsc::Receiver<Question>,
    /// What it tells the next task of this pod.
    pub hand_over: HandOver,
    /// Earlier tasks of this pod, whose last connections need the rules as well, and what they hand over.
    pub earlier: Vec<(Group, HandOver)>,
    /// Given up after the first attempt to capture.
    pub first_attempt: Option<Arc<Pending>>,
    /// Questions that the next attempt answers.
    asked: Vec<Question>,
    /// Who the pod has been found to be; kept while its last connections end.
    approved: Option<Approved>,
    /// The certificate that it will probably need; kept until it is known.
    foreseen: Option<Certificate>,
    /// When the pod was handed over.
    begun: Instant,
}

impl Task {
    /// A task that has not begun.
    pub fn new(
        capturer: Arc<Capturer>,
        board: Arc<Board>,
        changes: watch::Receiver<PodSpec>,
        removed: Signal,
        questions: mpsc::Receiver<Question>,
    ) -> Self {
        let (asked, begun, spec) = (Vec::new(), Instant::now(), changes.borrow().clone());
        Self {
            capturer,
            board,
            spec,
            changes,
            removed,
            questions,
            hand_over: HandOver::default(),
            earlier: Vec::new(),
            first_attempt: None,
            asked,
            approved: None,
            foreseen: None,
            begun,
        }
    }
}

/// Keeps a pod captured until it is removed, replaced, or the process ends.
pub async fn keep(mut task: Task) {
    let mut facts = task.capturer.mesh.subscribe();
    let process = task.capturer.drain.signal();
    loop {
        facts.mark_unchanged();
        task.spec = task.changes.borrow_and_update().clone();
        let mut listening = match task.capturer.listen(&task.spec) {
            Ok(listening) => {
                task.board.listening(&task.spec.uid, true);
                // Who it is need not be known for that: the facts may be those of its earlier life.
                task.answer(&Ok(()));
                listening
            }
            Err(error) => match task.wait_after(&error, &mut facts).await {
                None => continue,
                Some(End::Process) => return,
                Some(_) => break,
            },
        };
        let removed = task.removed.clone();
        let end = tokio::select! {
            biased;
            () = removed.now() => End::Replaced,
            () = removed.gentle() => End::Removed,
            () = process.gentle() => End::Process,
            lost = task.carry(&listening, &mut facts) => End::Lost(lost),
        };
        match end {
            // The rules stay: until the next daemon is there, the pod's traffic is refused and not passed in plaintext.
            End::Process => {
                listening.accepting.finished().await;
                // What was accepted last still needs the pod's certificate.
                process.now().await;
                return;
            }
            End::Removed => {
                task.board.set(&task.spec, State::Releasing);
                tokio::select! {
                    wanted_again = task.release(&mut listening) => match wanted_again {
                        // What is shown of the pod is its next task's affair.
                        true => return,
                        false => break,
                    },
                    () = removed.now() => {
                        give_up(listening).await;
                        // What is shown of a pod that was handed over is its next task's affair.
                        if task.hand_over.free.is_cancelled() {
                            return;
                        }
                        break;
                    }
                    () = process.now() => return,
                }
            }
            End::Replaced => {
                give_up(listening).await;
                break;
            }
            End::Lost(error @ CaptureError::IdentityChanged(..)) => {
                task.approved = None;
                task.board.listening(&task.spec.uid, false);
                task.board.held(&task.spec.uid, false);
                give_up(listening).await;
                task.report(&error);
            }
            End::Lost(error) => {
                task.approved = None;
                task.board.listening(&task.spec.uid, false);
                task.board.held(&task.spec.uid, false);
                give_up(listening).await;
                match task.wait_after(&error, &mut facts).await {
                    None => {}
                    Some(End::Process) => return,
                    Some(_) => break,
                }
            }
        }
    }
    task.board.remove(&task.spec.uid);
    let (namespace, name, uid) = (&*task.spec.namespace, &*task.spec.name, &*task.spec.uid);
    tracing::info!(namespace, name, uid, "pod released");
}

impl Task {
    /// Reports a failed attempt and waits for the next one: `None` when it is time.
    async fn wait_after(&mut self, error: &CaptureError, facts: &mut watch::Receiver<u64>) -> Option<End> {
        self.report(error);
        self.first_attempt = None;
        self.answer(&Err(error.to_string()));
        let (removed, process) = (self.removed.clone(), self.capturer.drain.signal());
        tokio::select! {
            () = process.gentle() => Some(End::Process),
            () = removed.now() => Some(End::Replaced),
            () = removed.gentle() => {
                tokio::select! {
                    () = self.earlier_ended() => self.capturer.clean(&self.spec).await,
                    () = self.hand_over.wanted.cancelled() => {}
                    () = removed.now() => {}
                }
                Some(End::Removed)
            }
            () = tokio::time::sleep(if matches!(error, CaptureError::Taken(..)) { RETRY_TAKEN } else { RETRY }) => None,
            () = hopeful(facts, error) => None,
            Some(question) = self.questions.recv() => {
                self.asked.push(question);
                None
            }
        }
    }

    /// Answers every question there is by now.
    fn answer(&mut self, answer: &Result<(), String>) {
        let come_since = std::iter::from_fn(|| self.questions.try_recv().ok());
        for question in self.asked.drain(..).chain(come_since) {
            // Whoever asked has gone where this fails.
            let _ = question.send(answer.clone());
        }
    }

    fn report(&self, error: &CaptureError) {
        self.board.failed(error);
        self.board.set(&self.spec, state_of(error));
    }

    /// Carries the pod's traffic: finds out who it is, captures it, and watches over both. Returns when it must be captured
    /// anew. One that cannot be verified keeps its connections and is reported, because what a probe meets need not have
    /// met them; rules that are an agent's affair are no reason to stop listening.
    async fn carry(&mut self, listening: &Listening, facts: &mut watch::Receiver<u64>) -> CaptureError {
        let mut rules = Rules::new(&self.capturer, listening);
        // The last one knows what those before it have told.
        if let Some(between) = self.earlier.iter().rev().find_map(|(_, handed)| handed.uncaptured.get()) {
            rules.spare(between.clone());
        }
        // Ticks on whatever else happens, so that changing facts cannot put off looking.
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut turn = self.capturer.turn.subscribe();
        loop {
            facts.mark_unchanged();
            let waiting = match self.know(listening) {
                Ok(()) => None,
                Err(error @ (CaptureError::NoFacts(_) | CaptureError::NotTold(_))) => Some(error),
                // The facts may be those of the pod's earlier life, for a moment.
                Err(error) if self.approved.is_none() && self.begun.elapsed() < OLD_FACTS => Some(error),
                Err(error) => return error,
            };
            let ours = waiting.is_none() || !self.spec.ips.is_empty();
            // Where whoever enrolled the pod has vouched for the namespace, its traffic is held until it is known who it is.
            let our_turn = *turn.borrow_and_update();
            let seen_to = match ours && our_turn {
                true => rules.see_to(&self.capturer, &self.board, &self.spec, listening).await,
                false => Ok(false),
            };
            self.board.held(&self.spec.uid, rules.verified());
            self.board.note(&self.spec.uid, rules.noted(&self.capturer, listening));
            match (waiting, seen_to) {
                (_, Err(error)) => self.report(&error),
                (None, Ok(verified)) if verified || rules.verified() => self.board.set(&self.spec, State::Captured),
                // Of what has been captured before that is still true.
                (None, Ok(_)) if !our_turn && !rules.verified() => {
                    self.board.set(&self.spec, State::Pending(ELSEWHERE.into()));
                }
                (None, Ok(_)) => {}
                (Some(error), Ok(_)) => {
                    self.board.set(&self.spec, state_of(&error));
                    if !ours {
                        // Verified as soon as it is known.
                        rules.verify_soon();
                    }
                }
            }
            if self.capturer.turn.is_ours() {
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
                    Some(question) = self.questions.recv() => drop(question.send(Ok(()))),
                    () = settled(facts) => break,
                    _ = looks.tick() => match vanished(&listening.pod.netns) {
                        Some(gone) => return gone,
                        None => break,
                    },
                    () = tokio::time::sleep_until(rules.due()), if ours && self.capturer.turn.is_ours() => break,
                    Ok(()) = turn.changed() => {
                        // What another daemon has written may be another's rules, or another version's.
                        rules.change_soon();
                        break;
                    }
                    () = rules.changes() => {
                        rules.heed(&self.capturer, listening).await;
                        break;
                    }
                    Ok(()) = self.changes.changed() => {
                        self.spec = self.changes.borrow_and_update().clone();
                        rules.change_soon();
                        break;
                    }
                }
            }
        }
    }

    /// Finds out who the pod is, or whether that is still so.
    fn know(&mut self, listening: &Listening) -> Result<(), CaptureError> {
        match &self.approved {
            Some(approved) => self.capturer.still(&self.spec, approved),
            None => {
                if self.foreseen.is_none() {
                    self.foreseen = self.capturer.foresee(&self.spec);
                }
                self.approved = Some(self.capturer.approve(&self.spec, listening)?);
                self.foreseen = None;
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
            self.earlier_ended().await;
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
            let Some(permit) = self.capturer.turn.permit() else { return true };
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
            self.board.set(&self.spec, State::Failed(reason));
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = self.hand_over.wanted.cancelled() => return false,
            }
        }
    }

    /// Waits for the last connections of earlier tasks of this pod; each has a deadline.
    async fn earlier_ended(&self) {
        for (earlier, _) in &self.earlier {
            earlier.finished().await;
        }
    }
}

fn state_of(error: &CaptureError) -> State {
    match error {
        CaptureError::NoFacts(_) | CaptureError::NotTold(_) | CaptureError::NoNetwork(_) => {
            State::Pending(error.to_string())
        }
        _ => State::Failed(error.to_string()),
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
async fn hopeful(facts: &mut watch::Receiver<u64>, error: &CaptureError) {
    use CaptureError::{
        Identity, IdentityChanged, NoFacts, NoNetwork, NoOwnAddress, NotThePod, NotTold, ServiceAccount,
    };
    match error {
        NoFacts(_)
        | NotTold(_)
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
async fn give_up(mut listening: Listening) {
    listening.pod.drain.at_once();
    listening.accepting.finished().await;
    if let Some(names) = listening.names.take() {
        names.end().await;
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
