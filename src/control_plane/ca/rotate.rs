//! What `culvert control rotate-root` does: begins to replace our own root, or says how far that is.
//!
//! The steps are taken by the control plane itself, whichever replica comes first, and all that is known about them is in
//! the Secret. So the command can be interrupted and repeated, and nothing depends on the terminal it runs in.

use super::kept::{Kept, KeptError, Rotation};
use super::own_root::{State, Step, seconds};
use super::secrets::Secrets;
use super::{Config, Source};
use kube::Client;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Why the root cannot be replaced.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The root is not ours.
    #[error(
        "the root is not culvert's own: it comes from {0}. Replace it there; docs/standalone.md says how without an interruption"
    )]
    NotOwn(String),
    /// There is none yet.
    #[error("there is no root yet: the control plane makes it when it starts")]
    None,
    /// The Secret.
    #[error(transparent)]
    Kept(#[from] KeptError),
}

/// Begins to replace the root, or says how far that is. After a replacement it begins another one only if `again` is set.
pub async fn run(client: Client, config: &Config, again: bool) -> Result<String, RotateError> {
    match &config.source {
        Source::Secrets => {}
        Source::Folder(folder) => return Err(RotateError::NotOwn(format!("the directory {}", folder.display()))),
        Source::CertManager(issuer) => {
            return Err(RotateError::NotOwn(format!("cert-manager ({} {})", issuer.kind, issuer.name)));
        }
    }
    let secrets = Secrets::new(client, &config.namespace);
    let now = SystemTime::now();
    let report = |state: &State| report(state, config.max_life, now);
    match Kept::new(secrets, config.max_life).rotate(again, now).await {
        Ok(Rotation::Begun(state)) => Ok(format!("The rotation has begun.\n{}", report(&state))),
        Ok(Rotation::Stands(state)) => Ok(report(&state)),
        Err(KeptError::NotOwn(secret)) => Err(RotateError::NotOwn(format!("the Secret {secret}"))),
        Err(KeptError::None(_)) => Err(RotateError::None),
        Err(error) => Err(error.into()),
    }
}

/// How far a rotation is, in words.
fn report(state: &State, max_life: Duration, now: SystemTime) -> String {
    let time = |seconds: u64| {
        let at = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH);
        humantime::format_rfc3339_seconds(at)
    };
    let life = humantime::format_duration(Duration::from_secs(state.longest_life));
    let next_at = state.next_at(max_life).map(time);
    let next = next_at.map(|at| at.to_string()).unwrap_or_default();
    let is_due = state.next_at(max_life).is_some_and(|at| at <= seconds(now));
    let late = match is_due {
        true => {
            "\nThat time is over: the step waits until the roots are in every namespace, except those that have refused them for ten minutes and run no daemons; see the metric culvert_control_namespaces_without_roots and the log of the control plane."
        }
        false => "",
    };
    match state.step {
        Step::Settled { finished: None } => "There has been no rotation.".into(),
        Step::Settled { finished: Some(at) } => format!(
            "Done: the new root has replaced the old one, which was given out for the last time at {}. To replace it once more: culvert control rotate-root --again",
            time(at)
        ),
        Step::Announced { since } => format!(
            "Step 1 of 3, since {}: both roots are given out, the old one signs.\nStep 2 follows at {next} by itself: certificates live {life}, and by then every valid one has come together with both roots.{late}",
            time(since)
        ),
        Step::Signing { since } => format!(
            "Step 2 of 3, since {}: both roots are given out, the new one signs.\nStep 3 follows at {next} by itself: certificates live {life}, and by then none of the old root is valid any more. Then the old root is no longer given out, and its key is gone already.{late}",
            time(since)
        ),
    }
}
