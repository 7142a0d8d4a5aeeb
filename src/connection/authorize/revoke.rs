//! Live permits: they are re-evaluated whenever facts change, and a connection that is no longer allowed is told to
//! stop.
//!
//! A connection registers before it asks for its permit. It has to ask again if the facts change meanwhile, so no
//! change can be missed in between. All connections to a workload share what applies to it ([`Applicable`]). As long as
//! that stays the same, none of them is evaluated; when it changes, each is evaluated by the difference only. The work is
//! done in turns of limited size, and other tasks of the thread run between them.

use super::decide::{Applicable, Permit, PolicyChanges, Refusal, RuleName, Verdict};
use super::matcher::Subject;
use crate::hbone::Stopper;
use crate::mesh::{self, Policy, Snapshot, Text, Update, Workload};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::Instant;

/// How long a connection waits for a policy that its workload names but that is not known yet.
pub const POLICY_WAIT: Duration = Duration::from_secs(5);

/// Pause between two rounds of judging, however fast the facts change.
const ROUND_PAUSE: Duration = Duration::from_millis(100);

/// Policies evaluated in one turn; they take about a tenth of a millisecond.
const TURN_POLICIES: usize = 1024;

/// All inbound connections and streams of this node that have a permit or are asking for one.
#[derive(Debug, Default)]
pub struct Permits {
    next: AtomicU64,
    by_workload: Mutex<HashMap<Text, WorkloadEntry>>,
    /// The last ones that have ended or were refused, the oldest first.
    recent: Mutex<VecDeque<Recent>>,
}

/// A connection that has ended or was refused.
#[derive(Clone, Debug)]
struct Recent {
    uid: Text,
    subject: Subject,
}

/// Connections that are remembered after their end.
const RECENT_MAX: usize = 1000;

/// What policies would change for one connection.
#[derive(Clone, Debug)]
pub struct Previewed {
    /// Uid of the destination workload.
    pub uid: Text,
    /// The connection as policies see it.
    pub subject: Subject,
    /// Whether it is still open.
    pub is_open: bool,
    /// Why it would be refused; `None` if it would be allowed, and is refused now.
    pub refusal: Option<Refusal>,
}

/// What policies would change.
#[derive(Debug, Default)]
pub struct Preview {
    /// Connections that are open.
    pub open: usize,
    /// Connections that have ended and are remembered.
    pub recent: usize,
    /// Those for which the answer would be another one.
    pub changes: Vec<Previewed>,
}

/// The connections to one workload. The entry exists as long as there are any.
#[derive(Debug)]
struct WorkloadEntry {
    /// The workload as last known. It is used if the workload disappears from the facts before its connections end.
    workload: Arc<Workload>,
    /// What applies to the workload, by the newest facts for which this was computed.
    newest: Option<NewestRules>,
    /// What all connections that have a permit were evaluated by. Some may have been evaluated by something newer.
    evaluated: Option<Arc<Applicable>>,
    live: HashMap<u64, Arc<ConnectionEntry>>,
}

/// What applies to a workload, and the facts that it was computed from.
#[derive(Debug)]
struct NewestRules {
    /// Version of the snapshot.
    version: u64,
    policies_version: u64,
    workload: Arc<Workload>,
    applicable: Arc<Applicable>,
}

/// One registered connection, as the round of judging sees it.
#[derive(Debug)]
struct ConnectionEntry {
    subject: Subject,
    /// Why it is no longer allowed. Nearly all connections never have a reason, so it is only a pointer.
    refusal: OnceLock<Box<Refusal>>,
    state: Mutex<EntryState>,
}

/// What changes about a registered connection.
#[derive(Debug, Default)]
struct EntryState {
    /// What its permit is based on, once it has one.
    basis: Option<PermitBasis>,
    waiting: Waiting,
}

/// Who has to learn that a connection is no longer allowed.
#[derive(Debug, Default)]
enum Waiting {
    /// Nobody yet.
    #[default]
    Nobody,
    /// The task that carries it.
    Task(Waker),
    /// The engine that carries it.
    Engine(Stopper),
}

impl Waiting {
    fn tell(self) {
        match self {
            Self::Nobody => {}
            Self::Task(waker) => waker.wake(),
            Self::Engine(stopper) => stopper.stop(),
        }
    }
}

/// What a permit is based on.
#[derive(Clone, Debug)]
struct PermitBasis {
    /// Version of the snapshot.
    version: u64,
    applicable: Arc<Applicable>,
    by: Option<RuleName>,
}

/// The registration of one connection. Dropping it ends the registration.
#[derive(Debug)]
pub struct Registration {
    id: u64,
    uid: Text,
    permits: Arc<Permits>,
    entry: Arc<ConnectionEntry>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut by_workload = self.permits.by_workload();
        if let Some(of_workload) = by_workload.get_mut(&self.uid) {
            of_workload.live.remove(&self.id);
            if of_workload.live.is_empty() {
                by_workload.remove(&self.uid);
            }
        }
        drop(by_workload);
        let mut recent = self.permits.recent.lock();
        if recent.len() >= RECENT_MAX {
            recent.pop_front();
        }
        recent.push_back(Recent { uid: self.uid.clone(), subject: self.entry.subject.clone() });
    }
}

impl Registration {
    /// Resolves when the connection is no longer allowed.
    pub async fn revoked(&self) {
        poll_fn(|context| self.entry.poll_refused(context)).await;
    }

    /// The moment when the connection is no longer allowed, for a connection that no task waits for.
    pub fn revocation(&self) -> Revocation {
        Revocation { entry: self.entry.clone() }
    }

    /// The reason why the connection is no longer allowed; `None` while it is.
    pub fn reason(&self) -> Option<Refusal> {
        self.entry.refusal.get().map(|refusal| Refusal::clone(refusal))
    }

    /// Uid of the destination workload.
    pub(super) fn uid(&self) -> &Text {
        &self.uid
    }

    /// The connection as policies see it.
    pub(super) fn subject(&self) -> &Subject {
        &self.entry.subject
    }

    /// What applies to the destination workload, by these facts.
    pub(super) fn applicable(&self, snapshot: &Snapshot, workload: &Arc<Workload>) -> Arc<Applicable> {
        self.permits.applicable(&self.uid, snapshot, workload).0
    }

    /// Takes a permit that was granted by these facts. `false` means that something else applies by newer facts: the
    /// connection has to ask again, because the round that evaluated the others by them did not include it.
    pub(super) fn take_permit(&self, version: u64, applicable: &Arc<Applicable>, permit: &Permit) -> bool {
        let by_workload = self.permits.by_workload();
        let newest = by_workload.get(&self.uid).and_then(|of_workload| of_workload.newest.as_ref());
        if newest.is_some_and(|newest| newest.version > version && !Arc::ptr_eq(&newest.applicable, applicable)) {
            return false;
        }
        self.entry.set_basis(Some(PermitBasis { version, applicable: applicable.clone(), by: permit.rule().cloned() }));
        true
    }
}

/// The moment when a connection is no longer allowed.
#[derive(Debug)]
pub struct Revocation {
    entry: Arc<ConnectionEntry>,
}

impl Revocation {
    /// Stops the connection as soon as it is no longer allowed.
    pub fn stops(self, stopper: Stopper) {
        self.entry.wait(Waiting::Engine(stopper));
        if self.entry.refusal.get().is_some() {
            self.entry.tell();
        }
    }
}

impl ConnectionEntry {
    fn basis(&self) -> Option<PermitBasis> {
        self.state.lock().basis.clone()
    }

    fn set_basis(&self, basis: Option<PermitBasis>) {
        self.state.lock().basis = basis;
    }

    fn refuse(&self, refusal: Refusal) {
        // Fails if it was refused before; the first reason stays.
        let _ = self.refusal.set(Box::new(refusal));
        self.tell();
    }

    /// Notes who has to learn of a refusal. The caller then looks whether there is one already: whoever refuses tells
    /// those who are noted after that, and the lock puts one of both first.
    fn wait(&self, waiting: Waiting) {
        self.state.lock().waiting = waiting;
    }

    fn tell(&self) {
        let waiting = std::mem::take(&mut self.state.lock().waiting);
        waiting.tell();
    }

    fn poll_refused(&self, context: &mut Context<'_>) -> Poll<()> {
        self.wait(Waiting::Task(context.waker().clone()));
        if self.refusal.get().is_some() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Connections with a permit whose verdict now depends on a policy that is not known, and since when; by workload.
type WaitingForPolicy = HashMap<Text, HashMap<u64, Instant>>;

/// The rest of the current turn.
#[derive(Debug)]
struct TurnBudget {
    left: usize,
    stats: RoundStats,
}

/// The work of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RoundStats {
    /// Policies evaluated.
    policies: usize,
    /// Connections evaluated.
    connections: usize,
}

impl TurnBudget {
    async fn spend(&mut self, cost: usize) {
        self.stats.policies += cost;
        if cost >= self.left {
            tokio::task::yield_now().await;
            self.left = TURN_POLICIES;
        } else {
            self.left -= cost;
        }
    }
}

impl Permits {
    /// Registers a connection to `workload`. Call this before asking for the connection's permit.
    pub fn register(self: &Arc<Self>, workload: &Arc<Workload>, subject: &Subject) -> Registration {
        let entry =
            Arc::new(ConnectionEntry { subject: subject.clone(), refusal: OnceLock::new(), state: Mutex::default() });
        let (id, uid) = (self.next.fetch_add(1, Ordering::Relaxed), workload.uid.clone());
        let of_workload =
            || WorkloadEntry { workload: workload.clone(), newest: None, evaluated: None, live: HashMap::new() };
        self.by_workload().entry(uid.clone()).or_insert_with(of_workload).live.insert(id, entry.clone());
        Registration { id, uid, permits: self.clone(), entry }
    }

    /// What would change if these policies were in force too, or instead of those with the same keys: for connections
    /// that are open, and for the last ones that have ended. Takes a while if there are many.
    pub fn preview(&self, snapshot: &Snapshot, policies: Vec<Policy>) -> Preview {
        let mut then = snapshot.clone();
        then.apply(snapshot.version + 1, Update { policies, ..Update::default() });
        let all_of = |entry: &WorkloadEntry| entry.live.values().map(|live| live.subject.clone()).collect::<Vec<_>>();
        let (mut workloads, mut all) = (HashMap::new(), HashMap::<Text, Vec<(bool, Subject)>>::new());
        for (uid, entry) in self.by_workload().iter() {
            all.insert(uid.clone(), all_of(entry).into_iter().map(|subject| (true, subject)).collect());
            workloads.insert(uid.clone(), entry.workload.clone());
        }
        for Recent { uid, subject } in self.recent.lock().iter() {
            all.entry(uid.clone()).or_default().push((false, subject.clone()));
        }
        let mut preview = Preview::default();
        for (uid, subjects) in all {
            let open = subjects.iter().filter(|(is_open, _)| *is_open).count();
            (preview.open, preview.recent) = (preview.open + open, preview.recent + subjects.len() - open);
            // Nothing can be said about connections to a workload that is gone.
            let Some(workload) = snapshot.workload(&uid).or(workloads.get(&uid)) else { continue };
            let [now, later] = [snapshot, &then].map(|facts| Applicable::for_workload(facts, workload));
            for (is_open, subject) in subjects {
                let refusal = match (now.verdict(&subject), later.verdict(&subject)) {
                    (Verdict::Allow(_), Verdict::Refuse(why)) => Some(why),
                    (Verdict::Refuse(_), Verdict::Allow(_)) => None,
                    _ => continue,
                };
                preview.changes.push(Previewed { uid: uid.clone(), subject, is_open, refusal });
            }
        }
        preview
    }

    /// Judges live connections again whenever the facts change, for as long as this is awaited. However many changes
    /// there are, there are at most ten rounds per second.
    pub async fn watch(&self, mesh: &mesh::Store) {
        let mut changes = mesh.subscribe();
        let mut waiting = WaitingForPolicy::new();
        loop {
            changes.mark_unchanged();
            let RoundStats { policies, connections } = self.evaluate_all(mesh, &mut waiting).await;
            if connections > 0 {
                tracing::debug!(connections, policies, "live connections re-evaluated");
            }
            tokio::time::sleep(ROUND_PAUSE).await;
            let soonest = waiting.values().flat_map(HashMap::values).min().map(|since| *since + POLICY_WAIT);
            let deadline = soonest.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }

    /// One round: evaluates every connection that has a permit by the current facts.
    async fn evaluate_all(&self, mesh: &mesh::Store, waiting: &mut WaitingForPolicy) -> RoundStats {
        let uids: Vec<Text> = self.by_workload().keys().cloned().collect();
        waiting.retain(|uid, _| uids.contains(uid));
        let mut turn = TurnBudget { left: TURN_POLICIES, stats: RoundStats::default() };
        for uid in uids {
            let Some(known) = self.by_workload().get(&uid).map(|of_workload| of_workload.workload.clone()) else {
                continue;
            };
            let snapshot = mesh.load();
            let workload = snapshot.workload(&uid).cloned().unwrap_or(known);
            let (now, cost) = self.applicable(&uid, &snapshot, &workload);
            turn.spend(cost).await;
            // The order matters. `applicable` has noted these facts already, so a connection that takes a permit by
            // older ones from now on has to ask again; and one that took it before is in the list that is made here.
            let live = {
                let mut by_workload = self.by_workload();
                let Some(of_workload) = by_workload.get_mut(&uid) else { continue };
                of_workload.workload = workload;
                let same = of_workload.evaluated.as_ref().is_some_and(|evaluated| Arc::ptr_eq(evaluated, &now));
                if same && !waiting.contains_key(&uid) {
                    continue;
                }
                of_workload.evaluated = Some(now.clone());
                of_workload.live.iter().map(|(id, entry)| (*id, entry.clone())).collect()
            };
            let since = waiting.remove(&uid).unwrap_or_default();
            let still = evaluate(live, snapshot.version, &now, &since, &mut turn).await;
            if !still.is_empty() {
                waiting.insert(uid, still);
            }
        }
        turn.stats
    }

    /// What applies to a workload by these facts, and how many policies it cost to find out. As long as the value is
    /// equal, the same object is returned, so that callers can compare pointers.
    fn applicable(&self, uid: &Text, snapshot: &Snapshot, workload: &Arc<Workload>) -> (Arc<Applicable>, usize) {
        let is_as = |newest: &NewestRules| {
            let before = &newest.workload;
            newest.policies_version == snapshot.policies_version
                && (Arc::ptr_eq(before, workload)
                    || (before.namespace == workload.namespace
                        && before.policies == workload.policies
                        && before.trust_domain == workload.trust_domain))
        };
        let last = {
            let by_workload = self.by_workload();
            let newest = by_workload.get(uid).and_then(|of_workload| of_workload.newest.as_ref());
            if let Some(newest) = newest.filter(|newest| newest.version <= snapshot.version && is_as(newest)) {
                return (newest.applicable.clone(), 0);
            }
            newest.map(|newest| newest.applicable.clone())
        };
        // Without the lock: with two thousand policies this takes a while.
        let found = Applicable::for_workload(snapshot, workload);
        let cost = found.cost();
        let applicable = last.filter(|last| **last == found).unwrap_or_else(|| Arc::new(found));
        let (version, policies_version, workload) = (snapshot.version, snapshot.policies_version, workload.clone());
        let mut by_workload = self.by_workload();
        if let Some(of_workload) = by_workload.get_mut(uid)
            && of_workload.newest.as_ref().is_none_or(|newest| newest.version <= version)
        {
            of_workload.newest =
                Some(NewestRules { version, policies_version, workload, applicable: applicable.clone() });
        }
        (applicable, cost)
    }

    fn by_workload(&self) -> MutexGuard<'_, HashMap<Text, WorkloadEntry>> {
        self.by_workload.lock()
    }
}

/// Judges connections of one workload by what applies `now`. `waiting` are those that were waiting for an unknown
/// policy before; the result are those that still wait.
async fn evaluate(
    live: Vec<(u64, Arc<ConnectionEntry>)>,
    version: u64,
    now: &Arc<Applicable>,
    waiting: &HashMap<u64, Instant>,
    turn: &mut TurnBudget,
) -> HashMap<u64, Instant> {
    // Most connections were evaluated by the same value before, so each difference is computed once.
    let mut changes: Vec<(Arc<Applicable>, PolicyChanges)> = Vec::new();
    let mut still = HashMap::new();
    for (id, entry) in live {
        // A connection without a permit is asking for it itself. One with a permit by newer facts is evaluated in the
        // round for those. One that has been refused is about to end.
        let Some(basis) = entry.basis().filter(|basis| basis.version <= version) else { continue };
        if entry.refusal.get().is_some() {
            continue;
        }
        let since = waiting.get(&id);
        let verdict = if since.is_some() {
            turn.spend(now.cost()).await;
            now.verdict(&entry.subject)
        } else if Arc::ptr_eq(&basis.applicable, now) {
            continue;
        } else {
            let before = &basis.applicable;
            let known = changes.iter().position(|(known, _)| Arc::ptr_eq(known, before));
            let at = known.unwrap_or(changes.len());
            if known.is_none() {
                turn.spend(now.cost()).await;
                changes.push((before.clone(), PolicyChanges::between(before, now)));
            }
            let Some((_, changes)) = changes.get(at) else { continue };
            turn.spend(changes.cost(basis.by.as_ref()).max(1)).await;
            changes.verdict(&entry.subject, basis.by.as_ref())
        };
        turn.stats.connections += 1;
        match verdict {
            Verdict::Allow(permit) => {
                entry.set_basis(Some(PermitBasis { version, applicable: now.clone(), by: permit.rule().cloned() }));
            }
            Verdict::Refuse(refusal) => entry.refuse(refusal),
            Verdict::Unknown(policy) => {
                let since = since.copied().unwrap_or_else(Instant::now);
                if since.elapsed() < POLICY_WAIT {
                    still.insert(id, since);
                } else {
                    entry.refuse(Refusal::PolicyUnknown(policy));
                }
            }
        }
    }
    still
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::authorize::authorize;
    use crate::mesh::policy::{Action, Match, Policy, PolicyScope};
    use crate::mesh::snapshot::tests::workload;
    use crate::mesh::{Facts, Store, Update};
    use crate::task::Group;
    use proptest::prelude::*;

    #[test]
    fn what_is_kept_for_each_connection_is_small() {
        let (entry, registration) = (size_of::<ConnectionEntry>(), size_of::<Registration>());
        assert!(entry <= 176 && registration <= 40, "{entry} and {registration} bytes");
    }

    fn deny_port(name: &str, scope: PolicyScope, port: u16) -> Policy {
        let mut test = Match::default();
        test.destination_ports.any_of = vec![port];
        Policy {
            name: name.into(),
            namespace: "a".into(),
            key: format!("a/{name}").into(),
            scope,
            action: Action::Deny,
            dry_run: false,
            rules: vec![vec![vec![test]]],
        }
    }

    fn subject(server: &Workload, port: u16) -> Subject {
        let source = "10.0.0.1".parse().unwrap();
        Subject { peer: None, source, destination: std::net::SocketAddr::new(server.ips[0], port) }
    }

    /// A connection that has its permit.
    async fn permitted(mesh: &Store, permits: &Arc<Permits>, server: &Workload, port: u16) -> Registration {
        let known = mesh.load().workload(&server.uid).cloned().unwrap();
        let live = permits.register(&known, &subject(server, port));
        authorize(mesh, &live).await.unwrap();
        live
    }

    #[tokio::test(start_paused = true)]
    async fn attaching_a_policy_cuts_exactly_the_connections_it_denies() {
        let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
        let server = workload("a", "server", "10.0.0.2");
        let policies = vec![deny_port("deny", PolicyScope::WorkloadSelector, 80)];
        mesh.replace(Facts { workloads: vec![server.clone()], policies, ..Facts::default() });
        let denied = permitted(&mesh, &permits, &server, 80).await;
        let allowed = permitted(&mesh, &permits, &server, 81).await;
        let watch = async {
            let mut attached = server.clone();
            attached.policies = vec!["a/deny".into()];
            tokio::task::yield_now().await;
            mesh.update(Update { workloads: vec![attached], ..Update::default() });
            denied.revoked().await;
        };
        let both = async {
            tokio::select! { () = permits.watch(&mesh) => {}, () = watch => {} }
        };
        tokio::time::timeout(Duration::from_secs(1), both).await.unwrap();
        assert!(matches!(denied.reason(), Some(Refusal::Denied(_))));
        assert!(allowed.reason().is_none());
        drop((denied, allowed));
        assert!(permits.by_workload().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_wakes_the_task_of_its_connection_and_one_that_comes_later_sees_it() {
        let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
        let server = workload("a", "server", "10.0.0.2");
        mesh.replace(Facts { workloads: vec![server.clone()], ..Facts::default() });
        let [waits, comes_later] =
            [permitted(&mesh, &permits, &server, 80).await, permitted(&mesh, &permits, &server, 80).await];
        let tasks = Group::default();
        tasks.spawn(async move { waits.revoked().await });
        tokio::task::yield_now().await;
        assert_eq!(tasks.len(), 1);
        mesh.update(Update { policies: vec![deny_port("deny", PolicyScope::Global, 80)], ..Update::default() });
        permits.evaluate_all(&mesh, &mut WaitingForPolicy::new()).await;
        tokio::time::timeout(POLICY_WAIT, tasks.finished()).await.unwrap();
        tokio::time::timeout(POLICY_WAIT, comes_later.revoked()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_that_never_becomes_known_ends_the_connection_after_the_wait() {
        let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
        let mut server = workload("a", "server", "10.0.0.2");
        mesh.replace(Facts { workloads: vec![server.clone()], ..Facts::default() });
        let live = permitted(&mesh, &permits, &server, 80).await;
        server.policies = vec!["a/late".into()];
        mesh.update(Update { workloads: vec![server], ..Update::default() });
        let start = Instant::now();
        let both = async {
            tokio::select! { () = permits.watch(&mesh) => {}, () = live.revoked() => {} }
        };
        tokio::time::timeout(2 * POLICY_WAIT, both).await.unwrap();
        assert!(start.elapsed() >= POLICY_WAIT);
        assert_eq!(live.reason(), Some(Refusal::PolicyUnknown("a/late".into())));
    }

    /// A connection that is about to take its permit during a round is not missed.
    #[tokio::test(start_paused = true)]
    async fn a_permit_by_facts_that_have_been_overtaken_is_not_taken() {
        let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
        let server = workload("a", "server", "10.0.0.2");
        mesh.replace(Facts { workloads: vec![server.clone()], ..Facts::default() });
        let old = mesh.load();
        let known = old.workload(&server.uid).cloned().unwrap();
        let live = permits.register(&known, &subject(&server, 80));
        let applicable = live.applicable(&old, &known);
        let Verdict::Allow(permit) = applicable.verdict(live.subject()) else { panic!("nothing forbids it") };
        mesh.update(Update { policies: vec![deny_port("deny", PolicyScope::Global, 80)], ..Update::default() });
        permits.evaluate_all(&mesh, &mut WaitingForPolicy::new()).await;
        assert!(!live.take_permit(old.version, &applicable, &permit), "it has to ask again");
        assert!(matches!(authorize(&mesh, &live).await, Err(Refusal::Denied(_))));
        // A change that does not affect what applies does not make a connection ask again.
        let other = permitted(&mesh, &permits, &server, 81).await;
        let (old, uid) = (mesh.load(), other.uid().clone());
        let applicable = other.applicable(&old, old.workload(&uid).unwrap());
        mesh.update(Update { workloads: vec![workload("b", "other", "10.0.0.9")], ..Update::default() });
        permits.evaluate_all(&mesh, &mut WaitingForPolicy::new()).await;
        assert!(other.take_permit(old.version, &applicable, &permit));
    }

    /// 3,000 connections to 60 workloads, with 2,000 policies. The test counts evaluations of a policy for a
    /// connection, because they take the time: judging every connection by every policy would be six million.
    #[tokio::test(start_paused = true)]
    async fn what_is_judged_is_what_changes_concern_in_turns_that_have_a_bound() {
        const POLICIES: usize = 2000;
        let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
        let servers: Vec<Workload> =
            (1..=60).map(|n| workload("a", &format!("s{n}"), &format!("10.0.1.{n}"))).collect();
        let policies: Vec<Policy> = (0..POLICIES)
            .map(|n| Policy { rules: Vec::new(), ..deny_port(&format!("p{n}"), PolicyScope::Namespace, 1) })
            .collect();
        mesh.replace(Facts { workloads: servers.clone(), policies, ..Facts::default() });
        let mut live = Vec::new();
        for server in &servers {
            for port in 0..50 {
                live.push(permitted(&mesh, &permits, server, 1000 + port).await);
            }
        }
        let mut waiting = WaitingForPolicy::new();
        assert_eq!(
            permits.evaluate_all(&mesh, &mut waiting).await,
            RoundStats::default(),
            "all have just been evaluated"
        );

        // When a workload names another policy, its 50 connections are evaluated.
        let mut one = servers[0].clone();
        one.policies = vec!["a/one".into()];
        let policy = deny_port("one", PolicyScope::WorkloadSelector, 1000);
        mesh.update(Update { workloads: vec![one], policies: vec![policy], ..Update::default() });
        let stats = permits.evaluate_all(&mesh, &mut waiting).await;
        assert_eq!(stats.connections, 50);
        assert!(stats.policies <= 61 * (POLICIES + 1) + 50, "{stats:?}");
        assert_eq!(live.iter().filter(|live| live.reason().is_some()).count(), 1);

        // A change that does not affect what applies evaluates none, even if the facts are announced again.
        let mut healthy = servers[1].clone();
        healthy.node = "another".into();
        mesh.update(Update { workloads: vec![healthy], ..Update::default() });
        assert_eq!(permits.evaluate_all(&mesh, &mut waiting).await, RoundStats::default());
        mesh.update(Update {
            policies: vec![Policy { namespace: "b".into(), ..deny_port("b", PolicyScope::Namespace, 1) }],
            ..Update::default()
        });
        assert_eq!(permits.evaluate_all(&mesh, &mut waiting).await.connections, 0, "a policy of another namespace");

        // A policy for the whole mesh evaluates all, and other tasks run in between.
        let policy = deny_port("all", PolicyScope::Global, 1001);
        mesh.update(Update { policies: vec![policy], ..Update::default() });
        let looking = async { Some(permits.evaluate_all(&mesh, &mut waiting).await) };
        let mut turns = 0;
        let others = async {
            loop {
                turns += 1;
                tokio::task::yield_now().await;
            }
        };
        let stats = tokio::select! { biased; stats = looking => stats, () = others => None }.unwrap();
        // All but the one that was refused before.
        assert_eq!(stats.connections, 2999);
        assert!(stats.policies <= 2 * 60 * (POLICIES + 2) + 3000, "{stats:?}");
        assert!(turns >= stats.policies / (TURN_POLICIES + POLICIES + 2), "{turns} turns for {stats:?}");
        assert!(turns >= 60, "{turns}");
        assert_eq!(live.iter().filter(|live| live.reason().is_some()).count(), 61);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// After each change, exactly those connections are cut that the current facts do not allow.
        #[test]
        fn looking_again_is_judging_everything(
            steps in prop::collection::vec((0..3usize, 0..4u16, 0..3usize, any::<bool>(), any::<bool>()), 1..8),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let (mesh, permits) = (Store::default(), Arc::new(Permits::default()));
                let servers: Vec<Workload> =
                    (0..3).map(|n| workload(["a", "a", "b"][n], &format!("s{n}"), &format!("10.0.1.{n}"))).collect();
                mesh.replace(Facts { workloads: servers.clone(), ..Facts::default() });
                let mut live = Vec::new();
                for server in &servers {
                    for port in 0..4 {
                        live.push((server.uid.clone(), permitted(&mesh, &permits, server, port).await));
                    }
                }
                let mut waiting = WaitingForPolicy::new();
                for (name, port, scope, gone, named) in steps {
                    let scope = [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector][scope];
                    let policy = deny_port(&format!("p{name}"), scope, port);
                    let mut server = servers[name].clone();
                    server.policies = if named { vec![policy.key.clone()] } else { Vec::new() };
                    let mut update = Update { workloads: vec![server], ..Update::default() };
                    if gone { update.gone_policies.push(policy.key) } else { update.policies.push(policy) }
                    mesh.update(update);
                    permits.evaluate_all(&mesh, &mut waiting).await;
                    let snapshot = mesh.load();
                    live.retain(|(uid, live)| {
                        let server = snapshot.workload(uid).unwrap();
                        let refused = match Applicable::for_workload(&snapshot, server).verdict(live.subject()) {
                            Verdict::Refuse(refusal) => Some(refusal),
                            _ => None,
                        };
                        assert_eq!(live.reason(), refused);
                        refused.is_none()
                    });
                }
            });
        }
    }
}
