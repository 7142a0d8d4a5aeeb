//! `/status`: the state of this node in one answer. `culvert status`, the live page and the report show it, so that
//! what is wrong is decided here and nowhere else.

use super::dump::time;
use super::parts::Parts;
use super::version;
use crate::config::MeshSource;
use crate::connection::report::recent::{FailureCount, WINDOW};
use crate::identity::store::HeldCertificate;
use crate::node::status::PodStatus;
use crate::task::Ready;
use crate::telemetry::log::brief;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// Pods that are not captured are named up to this number, the rest is counted.
const NAMED_MAX: usize = 200;

/// Facts that are older than this are wrong rather than late: a stream to the control plane is opened again within
/// seconds.
const FACTS_AGE_MAX: Duration = Duration::from_secs(60);

/// A certificate that could not be renewed and has less than this left is about to cause an outage.
const CERTIFICATE_LEFT_MIN: Duration = Duration::from_secs(3600);

/// Open connections above this share of their limit are worth a note, in percent.
const NEARLY_FULL: usize = 80;

/// What is wrong, and what is only worth knowing.
#[derive(Default)]
struct Verdict {
    red: Vec<String>,
    notes: Vec<String>,
}

/// The page.
pub(super) fn status(parts: &Parts, ready: &Ready) -> Value {
    let (now, mut verdict) = (SystemTime::now(), Verdict::default());
    let pending = ready.pending();
    if !pending.is_empty() {
        verdict.red.push(format!("the daemon is not ready, pending: {}", pending.join(", ")));
    }
    let (pods, facts) = (pods(parts, &mut verdict), facts(parts, &mut verdict));
    let certificates = certificates(&parts.identities.list(), now, &mut verdict);
    let connections = connections(parts, &mut verdict);
    if let Some(error) = parts.revocations.error() {
        verdict.red.push(format!("the revocation list cannot be read, the last good one stays in force: {error}"));
    }
    let about = version::shown(&parts.config);
    json!({
        "node": parts.config.node_name,
        "now": time(now),
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": about.get("gitRevision"),
        "started": time(parts.started),
        "ready": pending.is_empty(),
        "pending": pending,
        "green": verdict.red.is_empty(),
        "red": verdict.red,
        "notes": verdict.notes,
        "pods": pods,
        "facts": facts,
        "certificates": certificates,
        "connections": connections,
        "failures": failures(&parts.reporter.recent.list()),
    })
}

/// Pods by state, and those that are not captured.
fn pods(parts: &Parts, verdict: &mut Verdict) -> Value {
    let all = parts.board.list();
    let count = |word: &str| all.iter().filter(|pod| pod.state.word() == word).count();
    let name = |pod: &PodStatus| format!("{}/{}", pod.spec.namespace, pod.spec.name);
    // A pod that is being released is not meant to be captured any more.
    let mut others: Vec<&PodStatus> =
        all.iter().filter(|pod| !matches!(pod.state.word(), "captured" | "releasing")).collect();
    others.sort_by_key(|pod| name(pod));
    if !others.is_empty() {
        verdict.red.push(format!("{} of {} pods are not captured", others.len(), all.len()));
    }
    let older: usize = all.iter().map(|pod| pod.preexisting).sum();
    if older > 0 {
        verdict.notes.push(format!(
            "{older} connections are older than the capture of their pods and continue in plaintext; `/pods` says which \
             pods have them"
        ));
    }
    let bypass: Vec<String> = all.iter().filter(|pod| pod.spec.settings.bypass_inbound).map(name).take(8).collect();
    if !bypass.is_empty() {
        verdict.notes.push(format!("inbound plaintext is not captured, as annotated: {}", bypass.join(", ")));
    }
    let one = |pod: &&PodStatus| {
        json!({
            "pod": name(pod),
            "state": pod.state.word(),
            "reason": pod.state.reason(),
            "since": time(pod.since),
        })
    };
    json!({
        "total": all.len(),
        "captured": count("captured"),
        "pending": count("pending"),
        "failed": count("failed"),
        "releasing": count("releasing"),
        "notCaptured": others.iter().take(NAMED_MAX).map(one).collect::<Vec<_>>(),
    })
}

/// Where the mesh facts come from, and how old they are.
fn facts(parts: &Parts, verdict: &mut Verdict) -> Value {
    if parts.egress_file.stale.get() != 0 {
        let text =
            "the file of egress policies on disk is not valid, and older policies are in force; the log says why";
        verdict.red.push(text.to_owned());
    }
    let MeshSource::Xds(xds) = &parts.config.mesh else {
        let stale = parts.mesh_file.stale.get() != 0;
        if stale {
            verdict
                .red
                .push("the mesh file on disk is not valid, and older facts are in force; the log says why".into());
        }
        let path =
            if let MeshSource::File(path) = &parts.config.mesh { path.display().to_string() } else { String::new() };
        return json!({"source": "mesh file", "from": path, "current": !stale, "ageSeconds": null, "error": null});
    };
    let report = parts.freshness.report();
    let because = report.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
    match report.age {
        Some(age) if !report.live && age > FACTS_AGE_MAX => verdict.red.push(format!(
            "the mesh facts are {} old, because there is no stream to the control plane{because}",
            brief(Duration::from_secs(age.as_secs()))
        )),
        _ if !report.live => verdict.notes.push(format!("there is no stream to the control plane{because}")),
        _ => {}
    }
    json!({
        "source": if report.from_file { "state file" } else { "control plane" },
        "from": xds.rpc.address.to_string(),
        "current": report.live,
        "ageSeconds": report.age.map(|age| age.as_secs()),
        "error": report.error,
    })
}

/// How many certificates there are, which are missing, and which one ends next.
fn certificates(held: &[HeldCertificate], now: SystemTime, verdict: &mut Verdict) -> Value {
    let left = |one: &HeldCertificate| {
        let credentials = one.credentials.as_ref()?;
        Some(credentials.not_after.duration_since(now).unwrap_or_default())
    };
    let mut missing = Vec::new();
    for one in held {
        let left = left(one).filter(|left| !left.is_zero());
        let error = one.error.as_deref();
        let identity = one.identity.to_string();
        match (left, error) {
            (None, error) => {
                let error = error.unwrap_or("the CA has not answered yet");
                missing.push(json!({"identity": identity, "error": error}));
                if missing.len() <= 4 {
                    verdict.red.push(format!("there is no valid certificate for {identity}: {error}"));
                }
            }
            (Some(left), Some(error)) => {
                let left_text = brief(Duration::from_secs(left.as_secs()));
                let text = format!("the certificate of {identity} ends in {left_text} and cannot be renewed: {error}");
                let list = if left < CERTIFICATE_LEFT_MIN { &mut verdict.red } else { &mut verdict.notes };
                if list.len() < NAMED_MAX {
                    list.push(text);
                }
            }
            (Some(_), None) => {}
        }
    }
    if missing.len() > 4 {
        verdict.red.push(format!("{} identities have no valid certificate", missing.len()));
    }
    let next = held.iter().filter_map(|one| Some((left(one)?, one))).min_by_key(|(left, _)| *left);
    missing.truncate(NAMED_MAX);
    json!({
        "total": held.len(),
        "missing": missing,
        "next": next.map(|(left, one)| json!({
            "identity": one.identity.to_string(),
            "ends": one.credentials.as_ref().map(|credentials| time(credentials.not_after)),
            "secondsLeft": left.as_secs(),
        })),
    })
}

/// Open connections, and how many there may be.
fn connections(parts: &Parts, verdict: &mut Verdict) -> Value {
    let (open, max) = (parts.reporter.live.len(), parts.config.connection.max_connections);
    if open.saturating_mul(100) > max.saturating_mul(NEARLY_FULL) {
        verdict.notes.push(format!("{open} connections are open, and there may be {max} (CULVERT_MAX_CONNECTIONS)"));
    }
    json!({"open": open, "max": max})
}

/// Failures of the last minutes by reason.
fn failures(recent: &[FailureCount]) -> Value {
    let one = |one: &FailureCount| {
        json!({
            "reason": one.reason.word(),
            "direction": one.direction.word(),
            "count": one.count,
            "nextStep": one.reason.advice(),
        })
    };
    json!({
        "windowSeconds": WINDOW.as_secs(),
        "total": recent.iter().map(|one| one.count).sum::<u64>(),
        "byReason": recent.iter().map(one).collect::<Vec<_>>(),
    })
}
