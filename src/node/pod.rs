//! The life of one pod on this node, as one task: capture it, hold it, and let go of it.
//!
//! ```text
//!   pending ──captured, verified──► captured ──removed──► releasing ──► (gone)
//!      ▲  └──error──► failed ─┐         │
//!      └───── tried again ────┴─────────┘ namespace vanished, or a later verification failed
//! ```

use super::capture::{Captured, Capturer};
use super::status::{Board, State};
use super::{CaptureError, PodSpec, redirect, verify};
use crate::sys::netns::Netns;
use crate::task::{Signal, files::FileWatch};
use std::sync::Arc;
use std::time::Duration;

/// Time between attempts to capture, where nothing that matters changes before.
const RETRY: Duration = Duration::from_secs(5);
/// Time between verifications of a captured pod.
const VERIFY_AGAIN: Duration = Duration::from_secs(30);

/// Why a captured pod is held no longer.
enum End {
    Removed,
    Process,
    Lost(CaptureError),
}

/// Keeps a pod captured until it is removed or the process ends. `first_attempt` is dropped after the first attempt.
pub async fn keep<T>(capturer: Arc<Capturer>, board: Arc<Board>, spec: PodSpec, removed: Signal, first_attempt: T) {
    let process = capturer.drain.signal();
    let mut first_attempt = Some(first_attempt);
    let mut watch = FileWatch::new(&spec.netns);
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
                let reason = error.to_string();
                let waits = matches!(error, CaptureError::NoFacts(_));
                board.set(&spec, if waits { State::Pending(reason) } else { State::Failed(reason) });
                drop(first_attempt.take());
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => continue,
                    () = watch.changed() => continue,
                    Ok(()) = facts.changed() => continue,
                    () = process.gentle() => return,
                    () = removed.gentle() => break,
                }
            }
        };
        board.set(&spec, State::Captured);
        drop(first_attempt.take());
        let end = tokio::select! {
            lost = hold(&capturer, &captured, &mut watch) => End::Lost(lost),
            () = process.gentle() => End::Process,
            () = removed.gentle() => End::Removed,
        };
        match end {
            // The rules stay: until the next daemon is there, the pod's traffic is refused and not passed in plaintext.
            End::Process => {
                captured.accepting.finished().await;
                return;
            }
            End::Removed => {
                board.set(&spec, State::Releasing);
                capturer.release(captured).await;
                break;
            }
            End::Lost(error) => {
                board.failed(&error);
                board.set(&spec, State::Failed(error.to_string()));
                captured.pod.drain.at_once();
                captured.accepting.finished().await;
            }
        }
    }
    drop(first_attempt);
    board.remove(&spec.uid);
    tracing::info!(namespace = &*spec.namespace, name = &*spec.name, uid = &*spec.uid, "pod released");
}

/// Verifies a captured pod again and again; returns when it is lost.
async fn hold(capturer: &Capturer, captured: &Captured, watch: &mut FileWatch) -> CaptureError {
    let pod = &captured.pod;
    loop {
        tokio::select! {
            () = tokio::time::sleep(VERIFY_AGAIN) => {}
            () = watch.changed() => {}
        }
        let path = pod.netns.path();
        if !Netns::open(path).is_ok_and(|now| now.id() == pod.netns.id()) {
            return CaptureError::Vanished(path.to_owned());
        }
        if let Err(error) = verify::verify(pod).await {
            tracing::warn!(namespace = &*pod.namespace, name = &*pod.name, %error, "capture lost; writing the rules again");
            if let Err(error) = redirect::install(&pod.netns, capturer.config.mark, captured.ipv6).await {
                return error.into();
            }
            if let Err(error) = verify::verify(pod).await {
                return error.into();
            }
        }
    }
}
