//! Authorizing a new connection.

use super::decide::{Decision, Permit, Refusal, Verdict};
use super::matcher::Subject;
use super::revoke::{POLICY_WAIT, Registration};
use crate::mesh;
use crate::telemetry::limit::LogLimit;

/// Decides on a registered connection by the current facts. If the workload names a policy that is not known yet, waits
/// up to [`POLICY_WAIT`] for it.
pub async fn authorize(mesh: &mesh::Store, registration: &Registration) -> Result<Permit, Refusal> {
    let subject = registration.subject();
    let mut changes = mesh.subscribe();
    let deadline = tokio::time::sleep(POLICY_WAIT);
    tokio::pin!(deadline);
    loop {
        changes.mark_unchanged();
        let snapshot = mesh.load();
        let workload = snapshot.workload(registration.uid()).ok_or(Refusal::WorkloadUnknown)?;
        let applicable = registration.applicable(&snapshot, workload);
        let Decision { verdict, dry_run } = applicable.decide(subject);
        let missing = match verdict {
            Verdict::Allow(permit) => {
                // False: the facts have changed meanwhile, so decide again.
                if !registration.take_permit(snapshot.version, &applicable, &permit) {
                    continue;
                }
                log_dry_run(subject, &dry_run);
                return Ok(permit);
            }
            Verdict::Refuse(refusal) => {
                log_dry_run(subject, &dry_run);
                return Err(refusal);
            }
            Verdict::Unknown(policy) => policy,
        };
        tokio::select! {
            // An error means that the store is gone, which happens only when the daemon ends; then the deadline
            // applies.
            Ok(()) = changes.changed() => {}
            () = &mut deadline => return Err(Refusal::PolicyUnknown(missing)),
        }
    }
}

fn log_dry_run(subject: &Subject, notes: &[String]) {
    static LIMIT: std::sync::LazyLock<LogLimit> = std::sync::LazyLock::new(LogLimit::default);
    for note in notes {
        if let Some(suppressed) = LIMIT.allow() {
            let peer = subject.peer.as_ref().map(tracing::field::display);
            tracing::event!(target: "authorize", tracing::Level::INFO, src.identity = peer, src.addr = %subject.source,
                dst.addr = %subject.destination, suppressed, "dry-run policy: {note}");
        }
    }
}
