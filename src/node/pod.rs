//! The life of one pod on this node, as one task: capture it, hold it, and let go of it.
//!
//! ```text
//!   pending ──captured, verified──► captured ──removed──► releasing ──► (gone)
//!      ▲  └──error──► failed ─┐         │
//!      └───── tried again ────┴─────────┘ namespace vanished, or the identity is another one now
//! ```
//! As long as a pod is wanted its rules stay, whatever fails: its traffic is captured or refused, never passed.

use super::capture::{Captured, Capturer};
use super::status::{Board, State};
use super::{CaptureError, PodSpec, redirect, verify};
use crate::sys::netns::{Netns, NetnsError};
use crate::task::Signal;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

/// Time between attempts to capture, where nothing that matters changes before.
const RETRY: Duration = Duration::from_secs(5);
/// Time between looks at whether the namespace is still there.
const LOOK: Duration = Duration::from_secs(1);
/// Time between verifications of a captured pod.
const VERIFY_EVERY: Duration = Duration::from_secs(30);
/// Time between rewritings of the rules: a probe does not see every rule.
const REWRITE_EVERY: Duration = Duration::from_secs(300);

/// Why a captured pod is held no longer.
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

/// Keeps a pod captured until it is removed (`removed` gently), replaced (`removed` at once), or the process ends.
/// `first_attempt` is dropped after the first attempt.
pub async fn keep<T>(capturer: Arc<Capturer>, board: Arc<Board>, spec: PodSpec, removed: Signal, first_attempt: T) {
    let process = capturer.drain.signal();
    let mut first_attempt = Some(first_attempt);
    let mut facts = capturer.mesh.subscribe();
    loop {
        facts.mark_unchanged();
        let attempt = tokio::select! {
            attempt = capturer.capture(&spec) => attempt,
            () = process.gentle() => return,
        };
        let captured = match attempt {
            Ok(captured) => captured,
            Err(error) => {
                board.failed(&error);
                board.set(&spec, state_of(&error));
                drop(first_attempt.take());
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => continue,
                    Ok(()) = facts.changed() => continue,
                    () = process.gentle() => return,
                    () = removed.now() => break,
                    () = removed.gentle() => {
                        capturer.clean(&spec).await;
                        break;
                    }
                }
            }
        };
        board.set(&spec, State::Captured);
        drop(first_attempt.take());
        let end = tokio::select! {
            biased;
            () = removed.now() => End::Replaced,
            () = removed.gentle() => End::Removed,
            () = process.gentle() => End::Process,
            lost = hold(&capturer, &board, &spec, &captured, &mut facts) => End::Lost(lost),
        };
        match end {
            // The rules stay: until the next daemon is there, the pod's traffic is refused and not passed in plaintext.
            End::Process => {
                captured.accepting.finished().await;
                // What was accepted last still needs the pod's certificate.
                process.now().await;
                return;
            }
            End::Removed => {
                board.set(&spec, State::Releasing);
                capturer.release(&captured).await;
                tokio::select! {
                    () = until_removed(&captured, &board, &spec) => break,
                    () = process.now() => return,
                }
            }
            End::Replaced => {
                give_up(captured).await;
                break;
            }
            End::Lost(error) => {
                board.failed(&error);
                board.set(&spec, state_of(&error));
                give_up(captured).await;
            }
        }
    }
    drop(first_attempt);
    board.remove(&spec.uid);
    tracing::info!(namespace = &*spec.namespace, name = &*spec.name, uid = &*spec.uid, "pod released");
}

fn state_of(error: &CaptureError) -> State {
    match error {
        CaptureError::NoFacts(_) => State::Pending(error.to_string()),
        _ => State::Failed(error.to_string()),
    }
}

/// Removes the rules, again and again where that fails: with rules and without listeners the pod is cut off, and must
/// stay on the list until it is not.
async fn until_removed(captured: &Captured, board: &Board, spec: &PodSpec) {
    let netns = &captured.pod.netns;
    while let Err(error) = redirect::remove(netns, captured.ipv6).await {
        if vanished(netns).is_some() {
            return;
        }
        board.set(spec, State::Failed(format!("released, but its rules could not be removed: {error}")));
        tokio::time::sleep(RETRY).await;
    }
}

/// Ends the pod's connections and listeners; the rules stay.
async fn give_up(captured: Captured) {
    captured.pod.drain.at_once();
    captured.accepting.finished().await;
}

/// Watches over a captured pod; returns when it must be captured anew. A pod that cannot be verified keeps its
/// connections and is reported, because what a probe meets need not have met them.
async fn hold(
    capturer: &Capturer,
    board: &Board,
    spec: &PodSpec,
    captured: &Captured,
    facts: &mut watch::Receiver<u64>,
) -> CaptureError {
    let (mut verify_at, mut rewrite_at) = (Instant::now() + VERIFY_EVERY, Instant::now() + REWRITE_EVERY);
    // Ticks on whatever else happens, so that changing facts cannot put off looking.
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let changed = tokio::select! {
            _ = looks.tick() => false,
            Ok(()) = facts.changed() => true,
        };
        // Facts may change a thousand times a second: a change costs a look at them and nothing else.
        if !changed && let Some(gone) = vanished(&captured.pod.netns) {
            return gone;
        }
        match capturer.still(spec, captured) {
            Ok(()) => {}
            Err(error @ CaptureError::NoFacts(_)) => {
                board.set(spec, state_of(&error));
                // Verified as soon as it is known again.
                verify_at = Instant::now();
                continue;
            }
            Err(error) => return error,
        }
        if Instant::now() < verify_at {
            continue;
        }
        let rewrite = Instant::now() >= rewrite_at;
        let verified = verified(capturer, captured, rewrite).await;
        verify_at = Instant::now() + if verified.is_ok() { VERIFY_EVERY } else { RETRY };
        if rewrite {
            rewrite_at = Instant::now() + REWRITE_EVERY;
        }
        match verified {
            Ok(()) => board.set(spec, State::Captured),
            Err(error) => {
                board.failed(&error);
                board.set(spec, state_of(&error));
            }
        }
    }
}

/// Whether the namespace is no longer where it was. That it cannot be looked at now (no descriptors left, say) is no
/// sign of that.
fn vanished(netns: &Netns) -> Option<CaptureError> {
    let gone = match Netns::open(netns.path()) {
        Ok(now) => now.id() != netns.id(),
        Err(NetnsError::NotNetns(_)) => true,
        Err(NetnsError::Open { source, .. }) => source.kind() == io::ErrorKind::NotFound,
        Err(NetnsError::Enter { .. }) => false,
    };
    gone.then(|| CaptureError::Vanished(netns.path().to_owned()))
}

async fn verified(capturer: &Capturer, captured: &Captured, rewrite: bool) -> Result<(), CaptureError> {
    let (pod, mark, ipv6) = (&captured.pod, capturer.config.mark, captured.ipv6);
    if rewrite {
        redirect::install(&pod.netns, mark, ipv6).await?;
    }
    if let Err(error) = verify::verify(pod, ipv6).await {
        tracing::warn!(namespace = &*pod.namespace, name = &*pod.name, %error, "a probe was lost; writing the rules again");
        redirect::install(&pod.netns, mark, ipv6).await?;
        verify::verify(pod, ipv6).await?;
    }
    Ok(())
}
