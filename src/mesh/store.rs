//! The store of the mesh facts. Writers replace the current snapshot one at a time; readers load it without waiting.
//!
//! If the control plane announces facts only on demand, the store also keeps the open questions: connections and DNS
//! ask here, and `control` takes the questions from here and applies the answers. The number of open questions is
//! bounded, in all and for each pod.

use super::address::NetworkAddress;
use super::fact_key::FactKey;
use super::name::Text;
use super::snapshot::{Facts, Snapshot};
use super::update::Update;
use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How long a connection waits for facts that had to be asked for.
const ASK_WAIT: Duration = Duration::from_secs(5);

/// Minimum time between two refreshes of the same fact.
const REFRESH_EVERY: Duration = Duration::from_secs(5);

/// How long a connection waits for the answer to a refresh.
const REFRESH_WAIT: Duration = Duration::from_secs(1);

/// Maximum number of open questions, so that pods that scan addresses cannot make the list grow without bound.
const QUESTIONS_MAX: usize = 10_000;

/// Maximum number of open questions of one pod, so that a pod that scans leaves room for the others.
const QUESTIONS_OF_ONE: usize = 500;

/// Each pod may have this many open questions even when other pods have used up the total. It is enough for the ranges
/// around one address, which are up to 55.
const QUESTIONS_OF_ANYONE: usize = 64;

/// Holds the current snapshot of the mesh facts and notifies subscribers of changes.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    /// Locked while a new snapshot is made, so that two writers cannot lose each other's changes.
    writing: Mutex<()>,
    changed: watch::Sender<u64>,
    /// Told when egress policies have changed.
    egress_changed: watch::Sender<()>,
    questions: Mutex<Questions>,
    asked: Notify,
}

#[derive(Debug, Default)]
struct Questions {
    /// Questions without an answer.
    open: HashMap<FactKey, Question>,
    /// How many open questions each pod has asked first.
    by_asker: HashMap<Text, usize>,
    /// Questions that `control` has not taken yet.
    unsent: Vec<FactKey>,
    /// When facts were last refreshed.
    refreshed: HashMap<FactKey, Instant>,
    /// How many questions have been opened since the start.
    begun: u64,
}

#[derive(Debug)]
struct Question {
    /// The pod that asked first; the question counts as this pod's.
    asker: Text,
    /// Unique number, which tells this question from a later one for the same key.
    number: u64,
    /// How many tasks wait for the answer.
    waiting: usize,
}

impl Questions {
    /// Whether this pod may open another question.
    fn has_room(&self, asker: &Text) -> bool {
        match self.by_asker.get(asker).copied().unwrap_or(0) {
            few if few < QUESTIONS_OF_ANYONE => true,
            own => own < QUESTIONS_OF_ONE && self.open.len() < QUESTIONS_MAX,
        }
    }

    /// Closes a question.
    fn close(&mut self, wanted: &FactKey) {
        let Some(Question { asker, .. }) = self.open.remove(wanted) else { return };
        if let Some(own) = self.by_asker.get_mut(&asker) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                self.by_asker.remove(&asker);
            }
        }
    }
}

/// Why a fact that had to be asked for is not available.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The control plane did not answer in time.
    #[error("the control plane has not said within {wait} s whether {0} exists", wait = ASK_WAIT.as_secs())]
    NoAnswer(String),
    /// Too many questions are open.
    #[error(
        "the control plane was not asked about {0}: too many questions about addresses and names have no answer yet (at most \
         {QUESTIONS_OF_ONE} for one pod and {QUESTIONS_MAX} for the node)"
    )]
    TooMany(String),
}

/// A task that waits for an answer. Dropping it ends the wait.
struct Waiting<'a> {
    store: &'a Store,
    wanted: &'a FactKey,
    number: u64,
}

impl Waiting<'_> {
    /// Changes the number of waiting tasks, and closes the question if none is left. Does nothing if the question has
    /// been closed in the meantime, also if a later one for the same key is open.
    fn leave(&self, left: impl FnOnce(&mut usize)) {
        let mut questions = self.store.questions.lock();
        let Some(open) = questions.open.get_mut(self.wanted).filter(|open| open.number == self.number) else { return };
        left(&mut open.waiting);
        if open.waiting == 0 {
            questions.close(self.wanted);
            let Questions { unsent, refreshed, .. } = &mut *questions;
            unsent.retain(|wanted| wanted != self.wanted || refreshed.contains_key(wanted));
        }
    }

    /// Closes the question although other tasks may still wait: the question or its answer may be lost, so the next
    /// task that asks opens a new one.
    fn give_up(&self) {
        self.leave(|waiting| *waiting = 0);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.leave(|waiting| *waiting = waiting.saturating_sub(1));
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new("".into(), "".into(), false)
    }
}

impl Store {
    /// An empty store for a node and cluster. `on_demand`: the control plane announces facts only when asked for them.
    pub fn new(node: Text, cluster: Text, on_demand: bool) -> Self {
        Self {
            current: ArcSwap::from_pointee(Snapshot::empty(node, cluster, on_demand)),
            writing: Mutex::default(),
            changed: watch::Sender::new(0),
            egress_changed: watch::Sender::new(()),
            questions: Mutex::default(),
            asked: Notify::new(),
        }
    }

    /// Sets the trust domains that are equivalent to each workload's own.
    pub fn with_trust_domain_aliases(self, aliases: impl IntoIterator<Item = Text>) -> Self {
        let now = self.load();
        let aliases = aliases.into_iter().collect();
        self.current.store(Arc::new(Snapshot { trust_domain_aliases: aliases, ..(*now).clone() }));
        self
    }

    /// The current snapshot. Hold it for one decision, not for the life of a connection.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Replaces all facts at once and returns the new version.
    pub fn replace(&self, facts: Facts) -> u64 {
        let base = |current: &Snapshot| Snapshot {
            trust_domain_aliases: current.trust_domain_aliases.clone(),
            ..Snapshot::empty(current.node.clone(), current.cluster.clone(), current.absent.is_some())
        };
        self.write(base, facts.into())
    }

    /// Applies an update and returns the new version.
    pub fn update(&self, update: Update) -> u64 {
        self.write(Snapshot::clone, update)
    }

    fn write(&self, base: impl FnOnce(&Snapshot) -> Snapshot, update: Update) -> u64 {
        let _writing = self.writing.lock();
        let current = self.current.load();
        let mut next = base(&current);
        let version = current.version + 1;
        drop(current);
        next.apply(version, update);
        let next = Arc::new(next);
        let egress_differs = next.egress != self.current.load().egress;
        {
            let mut questions = self.questions.lock();
            let answered = questions.open.keys().filter(|wanted| next.unasked((*wanted).clone()).is_none());
            for wanted in answered.cloned().collect::<Vec<_>>() {
                questions.close(&wanted);
            }
            let Questions { open, unsent, refreshed, .. } = &mut *questions;
            unsent.retain(|wanted| open.contains_key(wanted) || refreshed.contains_key(wanted));
            // Under the same lock, because a task that asked in between would reopen a question that has just been
            // answered.
            self.current.store(next);
        }
        self.changed.send_replace(version);
        if egress_differs {
            self.egress_changed.send_replace(());
        }
        version
    }

    /// A receiver that is told when egress policies have changed.
    pub fn subscribe_egress(&self) -> watch::Receiver<()> {
        self.egress_changed.subscribe()
    }

    /// A receiver of the version, which changes with every update.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Asks the control plane for a fact that is not known, on behalf of the pod `asker`, and waits for the answer up
    /// to [`ASK_WAIT`]. Tasks that ask for the same fact at the same time share one question.
    pub async fn ask(&self, asker: &Text, wanted: FactKey) -> Result<(), AskError> {
        let mut changes = self.subscribe();
        let name = match &wanted {
            FactKey::Range(first) => format!("a range that begins at {first}"),
            FactKey::Address(_) | FactKey::Service(_) | FactKey::Workload(_) => wanted.to_string(),
        };
        let number = {
            let mut questions = self.questions.lock();
            if self.load().unasked(wanted.clone()).is_none() {
                return Ok(());
            }
            if let Some(question) = questions.open.get_mut(&wanted) {
                question.waiting += 1;
                question.number
            } else if questions.has_room(asker) {
                questions.begun += 1;
                let number = questions.begun;
                questions.open.insert(wanted.clone(), Question { asker: asker.clone(), number, waiting: 1 });
                *questions.by_asker.entry(asker.clone()).or_default() += 1;
                questions.unsent.push(wanted.clone());
                self.asked.notify_one();
                number
            } else {
                return Err(AskError::TooMany(name));
            }
        };
        // Dropped if this task stops waiting for any reason; the last one to do so closes the question.
        let waiting = Waiting { store: self, wanted: &wanted, number };
        let answered =
            async { while self.load().unasked(wanted.clone()).is_some() && changes.changed().await.is_ok() {} };
        if tokio::time::timeout(ASK_WAIT, answered).await.is_ok() {
            return Ok(());
        }
        waiting.give_up();
        Err(AskError::NoAnswer(name))
    }

    /// Asks for an address and, if no service or workload has it, for the ranges that may contain it, because istiod
    /// finds a range only by its first address. The questions about ranges count separately from the pod's other
    /// questions. If any of them gets no answer, this fails, because that range may exist.
    pub async fn ask_address(&self, asker: &Text, at: &NetworkAddress) -> Result<(), AskError> {
        let wanted = FactKey::Address(at.clone());
        self.ask(asker, wanted.clone()).await?;
        let now = self.load();
        if now.holds(&wanted) {
            return Ok(());
        }
        let asker = Text::from(format!("ranges/{asker}"));
        let around: FuturesUnordered<_> =
            now.unasked_around(at).into_iter().map(|range| self.ask(&asker, range)).collect();
        around.try_collect().await
    }

    /// Asks again for facts that may be outdated, unless that was done less than [`REFRESH_EVERY`] ago, and waits for
    /// the next change up to [`REFRESH_WAIT`]. On-demand control planes do not announce new endpoints, so they must be
    /// asked.
    pub async fn refresh(&self, wanted: Vec<FactKey>) {
        let mut changes = self.subscribe();
        {
            let mut questions = self.questions.lock();
            questions.refreshed.retain(|_, at| at.elapsed() < REFRESH_EVERY);
            let room = QUESTIONS_MAX.saturating_sub(questions.refreshed.len());
            let due: Vec<FactKey> =
                wanted.into_iter().filter(|w| !questions.refreshed.contains_key(w)).take(room).collect();
            if due.is_empty() {
                return;
            }
            questions.refreshed.extend(due.iter().map(|wanted| (wanted.clone(), Instant::now())));
            questions.unsent.extend(due);
            self.asked.notify_one();
        }
        // A timeout is no error: the caller uses the facts that are known by then.
        let _ = tokio::time::timeout(REFRESH_WAIT, changes.changed()).await;
    }

    /// Waits for questions and takes them. Called by `control` only.
    pub async fn questions(&self) -> Vec<FactKey> {
        loop {
            {
                let mut questions = self.questions.lock();
                if !questions.unsent.is_empty() {
                    return std::mem::take(&mut questions.unsent);
                }
            }
            self.asked.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::tests::workload;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_question_serves_all_and_has_a_deadline() {
        let store = Arc::new(Store::new("".into(), "".into(), true));
        let asker = Text::from("pod");
        let there = FactKey::Address(super::super::address::parse_network_address("/10.0.0.1").unwrap());
        let absent = FactKey::Service(super::super::ServiceKey::parse("a/b").unwrap());
        let answer = async {
            assert_eq!(store.questions().await, [there.clone(), absent.clone()], "each is asked once");
            let workloads = vec![workload("a", "w", "10.0.0.1")];
            store.update(Update { workloads, absent: vec![absent.clone()], ..Update::default() });
        };
        let all = tokio::join!(
            store.ask(&asker, there.clone()),
            store.ask(&asker, there.clone()),
            store.ask(&asker, absent.clone()),
            store.ask(&asker, absent.clone()),
            answer
        );
        assert_eq!((all.0, all.1, all.2, all.3), (Ok(()), Ok(()), Ok(()), Ok(())));
        assert!(store.load().holds(&there) && !store.load().holds(&absent));
        let never = FactKey::Workload("uid".into());
        assert!(matches!(store.ask(&asker, never.clone()).await, Err(AskError::NoAnswer(_))));
        // When all waiting tasks have given up, the next one asks again. When one of two gives up, the other still
        // waits.
        let patient = |wait: u64| tokio::time::timeout(Duration::from_millis(wait), store.ask(&asker, never.clone()));
        let (one, two, asked) = tokio::join!(patient(10), patient(20), store.questions());
        assert!(one.is_err() && two.is_err());
        assert_eq!(asked, std::slice::from_ref(&never));
        let (_, asked) = tokio::join!(patient(10), store.questions());
        assert_eq!(asked, std::slice::from_ref(&never), "asked again");
        // A question that is never taken is not kept for ever.
        assert!(patient(10).await.is_err());
        assert!(tokio::time::timeout(Duration::from_millis(10), store.questions()).await.is_err());
        let always = Store::default();
        assert_eq!(always.ask(&asker, never).await, Ok(()), "without on-demand mode, nothing need be asked for");
    }

    /// Lets every spawned task run as far as it can.
    async fn settle() {
        for _ in 0..2000 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_scans_leaves_room_for_the_questions_of_others() {
        let store = Arc::new(Store::new("".into(), "".into(), true));
        let address = |n: u32| {
            let ip = std::net::Ipv4Addr::from(0x0a00_0000 + n);
            FactKey::Address(super::super::address::parse_network_address(&format!("/{ip}")).unwrap())
        };
        let (mut asked, mut refused) = (tokio::task::JoinSet::new(), 0);
        // 30 scanning pods fill the list, each up to its share.
        for n in 0..30_000u32 {
            let (store, asker) = (store.clone(), Text::from(format!("scanner-{}", n % 30).as_str()));
            asked.spawn(async move { store.ask(&asker, address(n)).await });
        }
        settle().await;
        while let Some(done) = asked.try_join_next() {
            assert!(matches!(done.unwrap(), Err(AskError::TooMany(_))));
            refused += 1;
        }
        let open = |asker: &str| store.questions.lock().by_asker.get(asker).copied().unwrap_or(0);
        assert_eq!(refused, 30_000 - QUESTIONS_MAX);
        // Another pod can still ask, and gets an answer.
        let (own, innocent) = (FactKey::Workload("own".into()), Text::from("innocent"));
        let answer = async {
            tokio::task::yield_now().await;
            assert!(store.questions().await.contains(&own));
            store.update(Update { absent: vec![own.clone()], ..Update::default() });
        };
        let (asked_for, ()) = tokio::join!(store.ask(&innocent, own.clone()), answer);
        assert_eq!(asked_for, Ok(()));
        while asked.join_next().await.is_some() {}
        assert!(store.questions.lock().by_asker.is_empty(), "nothing is left");
        // A single pod has no more than its share.
        let one = Text::from("one");
        let mut all = tokio::task::JoinSet::new();
        for n in 0..1000 {
            let (store, one) = (store.clone(), one.clone());
            all.spawn(async move { store.ask(&one, address(n)).await });
        }
        settle().await;
        assert_eq!(open("one"), QUESTIONS_OF_ONE);
    }

    #[tokio::test(start_paused = true)]
    async fn ranges_around_an_address_without_owner_are_asked_for_and_must_be_answered() {
        let store = Arc::new(Store::new("".into(), "".into(), true));
        let at = |ip: &str| super::super::address::parse_network_address(&format!("/{ip}")).unwrap();
        let (own, pod) = (at("10.97.3.4"), Text::from("pod"));
        let tell = |absent: Vec<FactKey>| store.update(Update { absent, ..Update::default() });
        let names = |asked: &[FactKey]| {
            let mut names: Vec<String> = asked.iter().map(ToString::to_string).collect();
            names.sort();
            names
        };
        let first = ["/10.0.0.0", "/10.64.0.0", "/10.96.0.0", "/10.97.0.0", "/10.97.2.0", "/10.97.3.0"];
        // Without an answer about the ranges, asking for the address fails.
        let silent = async {
            let asked = store.questions().await;
            assert_eq!(names(&asked), ["/10.97.3.4"], "the address before its ranges");
            tell(asked);
            assert_eq!(names(&store.questions().await), first);
        };
        let (asked, ()) = tokio::join!(store.ask_address(&pod, &own), silent);
        assert!(matches!(asked, Err(AskError::NoAnswer(_))));
        // A scanning pod uses up its own share of questions about ranges, and no other pod's.
        let scanned = move |n: u32| at(&std::net::Ipv4Addr::from(0x0b00_0001 + 0x1003 * n).to_string());
        tell((0..500).map(|n| FactKey::Address(scanned(n))).collect());
        let mut scan = tokio::task::JoinSet::new();
        for n in 0..500 {
            let store = store.clone();
            scan.spawn(async move { store.ask_address(&"scanner".into(), &scanned(n)).await });
        }
        settle().await;
        let refused = scan.try_join_next().unwrap().unwrap();
        assert!(matches!(refused, Err(AskError::TooMany(_))), "{refused:?}");
        drop(store.questions().await);
        let answer = async {
            let asked = store.questions().await;
            assert_eq!(names(&asked), first);
            tell(asked);
        };
        let (asked, ()) = tokio::join!(store.ask_address(&pod, &own), answer);
        assert_eq!(asked, Ok(()));
        // An address with an owner: nothing else is asked for.
        let there = at("10.98.0.1");
        let answer = async {
            assert_eq!(store.questions().await.len(), 1);
            store.update(Update { workloads: vec![workload("a", "w", "10.98.0.1")], ..Update::default() });
        };
        let (asked, ()) = tokio::join!(store.ask_address(&pod, &there), answer);
        assert_eq!(asked, Ok(()));
        scan.abort_all();
        while scan.join_next().await.is_some() {}
        assert!(store.questions.lock().open.is_empty(), "nothing is left");
    }
}
