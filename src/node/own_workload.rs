//! Enrolment without a node: the daemon serves the one workload in whose network namespace it runs. It has no rights
//! over that namespace: `culvert redirect` has written the rules before (`own_rules.rs`), and this daemon finds out by
//! connections whether they are in force.

use super::capture::Capturer;
use super::config::OwnWorkload;
use super::pods::Pods;
use super::spec::{NetnsRef, PodSpec, Settings};
use super::status::{Board, CaptureState};
use crate::task::Ready;
use crate::task::ready::Pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The condition of readiness in this mode.
const CAPTURE: &str = "capture";
/// Time between two looks at the workload's certificate.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The workload, as enrolment describes any pod.
fn spec(own: &OwnWorkload) -> PodSpec {
    PodSpec {
        name: own.name.clone(),
        namespace: own.namespace.clone(),
        service_account: own.service_account.clone(),
        uid: format!("{}/{}", own.namespace, own.name).into(),
        netns: NetnsRef::Path(PathBuf::from("/proc/self/ns/net")),
        ips: Vec::new(),
        settings: Settings::default(),
        powers: None,
    }
}

/// Serves the workload until cancelled. The process is ready while the workload is captured and has a certificate.
pub async fn serve(
    own: OwnWorkload,
    mut pods: Pods,
    capturer: Arc<Capturer>,
    board: Arc<Board>,
    ready: Ready,
    begin: Pending,
) {
    let mut pending = Some(ready.wait_for(CAPTURE));
    drop(begin);
    let spec = spec(&own);
    let uid = spec.uid.clone();
    tracing::info!(
        namespace = &*own.namespace,
        name = &*own.name,
        serviceAccount = &*own.service_account,
        "dedicated mode: serving this workload only, in the daemon's own network namespace. Its applications see the \
         workload's own address instead of the client's, and its rules are neither read nor repaired"
    );
    // Nobody waits for this; the board shows the outcome.
    drop(pods.add(spec));
    let mut changes = board.subscribe();
    loop {
        changes.mark_unchanged();
        let captured = board.get(&uid).is_some_and(|status| status.state == CaptureState::Captured);
        if captured && has_certificate(&own, &capturer).await {
            pending = None;
        } else if pending.is_none() {
            pending = Some(ready.wait_for(CAPTURE));
        }
        // Whichever comes first, it is time to look again.
        let _ = tokio::time::timeout(LOOK_EVERY, changes.changed()).await;
    }
}

async fn has_certificate(own: &OwnWorkload, capturer: &Capturer) -> bool {
    let snapshot = capturer.mesh.load();
    let workload = snapshot.workload_of_pod(&own.namespace, &own.name);
    match workload.and_then(|workload| workload.identity().ok()) {
        Some(identity) => capturer.identities.get(&identity).await.is_ok(),
        None => false,
    }
}
