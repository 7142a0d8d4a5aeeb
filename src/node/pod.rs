//! The life of one pod on this node, as one task: listen, find out who it is, capture it, hold it, and let go of it.
//!
//! ```text
//!   pending ──listening, approved, verified──► captured ──removed──► releasing ──► (gone)
//!      ▲  └──error──► failed ─┐                    │
//!      └───── tried again ────┴────────────────────┘ namespace vanished, or the identity is another one now
//! ```
//! As long as a pod is wanted its rules stay, whatever fails: its traffic is captured or refused, never passed.

use super::capture::{Approved, Capturer, Listening};
use super::status::{Board, State};
use super::{CaptureError, PodSpec, redirect};
use crate::mesh::Wanted;
use crate::sys::netns::{Netns, NetnsError};
use crate::task::Signal;
use crate::task::ready::Pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

/// Time between attempts to capture, where nothing that matters changes before.
const RETRY: Duration = Duration::from_secs(5);
/// Time between looks at whether the namespace is still there.
const LOOK: Duration = Duration::from_secs(1);
/// How long changing facts are let settle before they are looked at.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a pod is listened for whose namespace is not what the facts say: they may be of its earlier life.
const OLD_FACTS: Duration = Duration::from_secs(10);
/// Time between verifications of a captured pod.
const VERIFY_EVERY: Duration = Duration::from_secs(30);
/// Time between rewritings of the rules: a probe does not see every rule.
const REWRITE_EVERY: Duration = Duration::from_secs(300);

/// Asks whether the pod is listened for; answered at once where it is, else after the next attempt.
pub type Question = oneshot::Sender<Result<(), String>>;

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
    /// Gently: let go of it in order. At once: another entry has its namespace, or the namespace is gone.
    pub removed: Signal,
    /// Questions of whoever handed the pod over.
    pub questions: mpsc::Receiver<Question>,
    /// Given up after the first attempt to capture.
    pub first_attempt: Option<Arc<Pending>>,
    /// Questions that the next attempt answers.
    asked: Vec<Question>,
    /// Who the pod has been found to be; kept while its last connections end.
    approved: Option<Approved>,
    /// When the pod was handed over.
    begun: Instant,
}

impl Task {
    /// A task that has not begun.
    pub fn new(
        capturer: Arc<Capturer>,
        board: Arc<Board>,
        spec: PodSpec,
        removed: Signal,
        questions: mpsc::Receiver<Question>,
    ) -> Self {
        let (asked, begun) = (Vec::new(), Instant::now());
        Self { capturer, board, spec, removed, questions, first_attempt: None, asked, approved: None, begun }
    }
}

/// Keeps a pod captured until it is removed, replaced, or the process ends.
pub async fn keep(mut task: Task) {
    let mut facts = task.capturer.mesh.subscribe();
    let process = task.capturer.drain.signal();
    loop {
        facts.mark_unchanged();
        let listening = match task.capturer.listen(&task.spec) {
            Ok(listening) => {
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
                    () = task.release(&listening) => break,
                    () = removed.now() => {
                        give_up(listening).await;
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
                give_up(listening).await;
                task.report(&error);
            }
            End::Lost(error) => {
                task.approved = None;
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
                self.capturer.clean(&self.spec).await;
                Some(End::Removed)
            }
            () = tokio::time::sleep(RETRY) => None,
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

    /// Carries the pod's traffic: approves it, captures it, and watches over it. Returns when it must be captured anew.
    async fn carry(&mut self, listening: &Listening, facts: &mut watch::Receiver<u64>) -> CaptureError {
        match self.until_approved(listening, facts).await {
            Ok(approved) => self.approved = Some(approved),
            Err(error) => return error,
        }
        if self.capturer.config.redirect {
            let captured = async {
                self.capturer.redirect(listening).await?;
                self.capturer.verify(listening).await
            };
            if let Err(error) = captured.await {
                return error;
            }
            self.board.set(&self.spec, State::Captured);
            self.first_attempt = None;
            return self.hold(listening, facts, Instant::now() + VERIFY_EVERY).await;
        }
        // The rules are the agent's affair: that they are not there (yet) is no reason to stop listening.
        self.hold(listening, facts, Instant::now()).await
    }

    /// Waits until it is known who the pod is. What comes meanwhile waits as well.
    async fn until_approved(
        &mut self,
        listening: &Listening,
        facts: &mut watch::Receiver<u64>,
    ) -> Result<Approved, CaptureError> {
        let mut looks = tokio::time::interval(LOOK);
        loop {
            facts.mark_unchanged();
            match self.capturer.approve(&self.spec, listening) {
                Ok(approved) => return Ok(approved),
                // The facts may be those of the pod's earlier life, for a moment.
                Err(error) if matches!(error, CaptureError::NoFacts(_)) || self.begun.elapsed() < OLD_FACTS => {
                    self.board.set(&self.spec, state_of(&error));
                    self.first_attempt = None;
                }
                Err(error) => return Err(error),
            }
            // Where facts are told only when asked for, this asks.
            let ask = self.capturer.mesh.ask(Wanted::Workload(listening.pod.mesh_uid.clone()));
            tokio::pin!(ask);
            let mut asking = true;
            loop {
                tokio::select! {
                    () = settled(facts) => break,
                    _ = &mut ask, if asking => asking = false,
                    Some(question) = self.questions.recv() => drop(question.send(Ok(()))),
                    _ = looks.tick() => match vanished(&listening.pod.netns) {
                        Some(gone) => return Err(gone),
                        None => break,
                    },
                }
            }
        }
    }

    /// Watches over a pod; returns when it must be captured anew. One that cannot be verified keeps its connections and is
    /// reported, because what a probe meets need not have met them.
    async fn hold(
        &mut self,
        listening: &Listening,
        facts: &mut watch::Receiver<u64>,
        mut verify_at: Instant,
    ) -> CaptureError {
        let mut rewrite_at = Instant::now() + REWRITE_EVERY;
        // Ticks on whatever else happens, so that changing facts cannot put off looking.
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => if let Some(gone) = vanished(&listening.pod.netns) { return gone },
                Some(question) = self.questions.recv() => drop(question.send(Ok(()))),
                () = settled(facts) => {}
            }
            let still = self.approved.as_ref().map_or(Ok(()), |approved| self.capturer.still(&self.spec, approved));
            match still {
                Ok(()) => {}
                Err(error @ CaptureError::NoFacts(_)) => {
                    self.board.set(&self.spec, state_of(&error));
                    // Verified as soon as it is known again.
                    verify_at = Instant::now();
                    continue;
                }
                Err(error) => return error,
            }
            if Instant::now() < verify_at {
                continue;
            }
            let rewrite = self.capturer.take_dns(&self.spec, listening) || Instant::now() >= rewrite_at;
            if rewrite {
                rewrite_at = Instant::now() + REWRITE_EVERY;
            }
            let verified = async {
                if rewrite {
                    self.capturer.redirect(listening).await?;
                }
                self.capturer.verify(listening).await
            };
            match verified.await {
                Ok(()) => {
                    self.board.set(&self.spec, State::Captured);
                    verify_at = Instant::now() + VERIFY_EVERY;
                }
                Err(error) => {
                    self.report(&error);
                    verify_at = Instant::now() + RETRY;
                }
            }
            self.first_attempt = None;
        }
    }

    /// Lets go of a pod, and removes the rules, again and again where that fails: with rules and without listeners the
    /// pod is cut off, and must stay on the list until it is not.
    async fn release(&self, listening: &Listening) {
        self.capturer.release(listening).await;
        let netns = &listening.pod.netns;
        while self.capturer.config.redirect
            && let Err(error) = redirect::remove(netns, listening.ipv6).await
        {
            if vanished(netns).is_some() {
                return;
            }
            let reason = format!("released, but its rules could not be removed: {error}");
            self.board.set(&self.spec, State::Failed(reason));
            tokio::time::sleep(RETRY).await;
        }
    }
}

fn state_of(error: &CaptureError) -> State {
    match error {
        CaptureError::NoFacts(_) => State::Pending(error.to_string()),
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
    use CaptureError::{Identity, IdentityChanged, NoFacts, NoOwnAddress, NotThePod, ServiceAccount};
    match error {
        NoFacts(_) | NotThePod { .. } | NoOwnAddress(_) | ServiceAccount { .. } | Identity(_) | IdentityChanged(..) => {
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
