//! Live permits, decided again whenever facts change; who is no longer allowed is told to stop.
//!
//! A connection registers before it asks for its permit, so that no change can fall between the two.

use super::POLICY_WAIT;
use super::decide::{self, Refusal, Subject, Verdict};
use crate::mesh::{self, Snapshot, Text, Workload};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Time between two looks at live connections, however fast facts change.
const PAUSE: Duration = Duration::from_millis(100);

/// All inbound connections and streams of this node that have, or ask for, a permit.
#[derive(Debug, Default)]
pub struct Registry {
    next: AtomicU64,
    live: Mutex<HashMap<u64, Arc<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    uid: Text,
    /// The workload as last known, for the case that it vanishes from the facts before its connections end.
    workload: Arc<Workload>,
    subject: Subject,
    stop: CancellationToken,
    why: Arc<OnceLock<Refusal>>,
    /// Whether it has been judged since it registered.
    seen: AtomicBool,
}

/// One registered connection; no longer live when dropped.
#[derive(Debug)]
pub struct Live {
    id: u64,
    registry: Arc<Registry>,
    stop: CancellationToken,
    why: Arc<OnceLock<Refusal>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.registry.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Live {
    /// Resolves when the connection is no longer allowed.
    pub async fn revoked(&self) {
        self.stop.cancelled().await;
    }

    /// Why it is no longer allowed, once it is not.
    pub fn reason(&self) -> Option<Refusal> {
        self.why.get().cloned()
    }
}

impl Registry {
    /// Registers a connection to the pod `workload`, before it asks for its permit.
    pub fn register(self: &Arc<Self>, workload: &Arc<Workload>, subject: &Subject) -> Live {
        let (stop, why) = (CancellationToken::new(), Arc::new(OnceLock::new()));
        let entry = Entry {
            uid: workload.uid.clone(),
            workload: workload.clone(),
            subject: subject.clone(),
            stop: stop.clone(),
            why: why.clone(),
            seen: AtomicBool::new(false),
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.live.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(entry));
        Live { id, registry: self.clone(), stop, why }
    }

    /// Decides live connections again when the mesh changes, for as long as it is awaited. At a thousand changes a second
    /// it looks ten times, and decides only what the changes can concern.
    pub async fn watch(&self, mesh: &mesh::Store) {
        let mut changes = mesh.subscribe();
        // Since when a live connection's verdict hangs on a policy that nobody knows.
        let mut waiting: HashMap<u64, Instant> = HashMap::new();
        let mut before = None;
        loop {
            changes.mark_unchanged();
            // In this order: whoever is listed has asked with facts that were no newer than those that are loaded now.
            let live = self.live();
            let snapshot = mesh.load();
            decide_again(live, &snapshot, before.as_deref(), &mut waiting);
            before = Some(snapshot);
            tokio::time::sleep(PAUSE).await;
            let soonest = waiting.values().min().map(|since| *since + POLICY_WAIT);
            let deadline = soonest.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }

    /// Taken out of the lock: deciding may take a while and connections must go on opening and closing.
    fn live(&self) -> Vec<(u64, Arc<Entry>)> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.iter().map(|(id, entry)| (*id, entry.clone())).collect()
    }
}

fn decide_again(
    live: Vec<(u64, Arc<Entry>)>,
    snapshot: &Snapshot,
    before: Option<&Snapshot>,
    waiting: &mut HashMap<u64, Instant>,
) {
    let same_policies = before.is_some_and(|before| before.policies_version == snapshot.policies_version);
    let mut still_waiting = HashMap::new();
    for (id, entry) in live {
        let workload = snapshot.workload(&entry.uid).unwrap_or(&entry.workload);
        let judged_with = before.map(|before| before.workload(&entry.uid).unwrap_or(&entry.workload));
        let same_workload = judged_with.is_some_and(|judged_with| Arc::ptr_eq(judged_with, workload));
        if same_policies && same_workload && !waiting.contains_key(&id) && entry.seen.swap(true, Ordering::Relaxed) {
            continue;
        }
        let refusal = match decide::decide(snapshot, workload, &entry.subject).verdict {
            Verdict::Allow(_) => continue,
            Verdict::Refuse(refusal) => refusal,
            Verdict::Unknown(policy) => {
                let since = waiting.get(&id).copied().unwrap_or_else(Instant::now);
                if since.elapsed() < POLICY_WAIT {
                    still_waiting.insert(id, since);
                    continue;
                }
                Refusal::PolicyUnknown(policy)
            }
        };
        // Set once; a second refusal of the same connection adds nothing.
        let _ = entry.why.set(refusal);
        entry.stop.cancel();
    }
    *waiting = still_waiting;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::{Action, Match, Policy, PolicyScope};
    use crate::mesh::snapshot::tests::workload;
    use crate::mesh::{Facts, Store};

    fn deny_port(port: u16) -> Policy {
        let mut test = Match::default();
        test.destination_ports.any_of = vec![port];
        Policy {
            name: "deny".into(),
            namespace: "a".into(),
            key: "a/deny".into(),
            scope: PolicyScope::WorkloadSelector,
            action: Action::Deny,
            dry_run: false,
            rules: vec![vec![vec![test]]],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn attaching_a_policy_cuts_exactly_the_connections_it_denies() {
        let (mesh, registry) = (Store::default(), Arc::new(Registry::default()));
        let server = workload("a", "server", "10.0.0.2");
        mesh.replace(Facts { workloads: vec![server.clone()], policies: vec![deny_port(80)], ..Facts::default() });
        let subject = |port| Subject {
            peer: None,
            source: "10.0.0.1".parse().unwrap(),
            destination: std::net::SocketAddr::new(server.ips[0], port),
        };
        let known = mesh.load().workload(&server.uid).cloned().unwrap();
        let denied = registry.register(&known, &subject(80));
        let allowed = registry.register(&known, &subject(81));
        let watch = async {
            let mut attached = server.clone();
            attached.policies = vec!["a/deny".into()];
            tokio::task::yield_now().await;
            mesh.replace(Facts { workloads: vec![attached], policies: vec![deny_port(80)], ..Facts::default() });
            denied.revoked().await;
        };
        tokio::select! { () = registry.watch(&mesh) => {}, () = watch => {} }
        assert!(matches!(denied.reason(), Some(Refusal::Denied(_))));
        assert!(allowed.reason().is_none());
        drop((denied, allowed));
        assert!(registry.live.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_that_never_becomes_known_ends_the_connection_after_the_wait() {
        let (mesh, registry) = (Store::default(), Arc::new(Registry::default()));
        let mut server = workload("a", "server", "10.0.0.2");
        server.policies = vec!["a/late".into()];
        mesh.replace(Facts { workloads: vec![server.clone()], ..Facts::default() });
        let known = mesh.load().workload(&server.uid).cloned().unwrap();
        let subject = Subject { peer: None, source: server.ips[0], destination: "10.0.0.2:80".parse().unwrap() };
        let live = registry.register(&known, &subject);
        let start = Instant::now();
        tokio::select! { () = registry.watch(&mesh) => {}, () = live.revoked() => {} }
        assert!(start.elapsed() >= POLICY_WAIT);
        assert_eq!(live.reason(), Some(Refusal::PolicyUnknown("a/late".into())));
    }
}
