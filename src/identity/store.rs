//! Certificates by identity: wanted by pods, fetched when first wanted, kept while valid whatever fails.
//!
//! One task per identity (`renewal.rs`) does the asking, eight ask at once, the most urgent first; readers only wait for the
//! first answer, and never longer than a deadline.

use super::authority::Authority;
use super::ca_queue::{CaQueue, Urgency};
use super::credentials::{Credentials, Trust};
use super::renewal::Renewal;
use super::revoked::Revocations;
use super::roots::Roots;
use crate::mesh::{SpiffeName, Text};
use crate::task::Group;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a connection waits for an identity's first certificate.
pub const FIRST_WAIT: Duration = Duration::from_secs(5);
/// Requests at the CA at once.
const AT_ONCE: usize = 8;
/// How long a certificate is kept after its last pod has gone: a restarted pod finds it there.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Nobody asked for this identity to be held.
    #[error("no certificate is held for {0}: no pod of this node has this identity")]
    NotWanted(SpiffeName),
    /// The CA has not given one yet.
    #[error("no certificate for {identity} yet: {reason}")]
    Unavailable {
        /// For whom.
        identity: SpiffeName,
        /// The last error, or that the first answer is outstanding.
        reason: String,
    },
}

/// Metrics of certificates.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) failures: Counter,
    pub(super) fetched: Counter,
    ends: Family<IdentityLabel, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabel {
    identity: String,
}

impl Metrics {
    /// When the certificate of an identity ends.
    pub(super) fn end_of(&self, identity: &SpiffeName) -> Gauge {
        self.ends.get_or_create_owned(&IdentityLabel { identity: identity.to_string() })
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.ends.get_or_create(&IdentityLabel { identity: String::new() }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "culvert_certificates_fetched",
            "Certificates that the CA issued to this node",
            self.fetched.clone(),
        );
        registry.register(
            "culvert_certificate_failures",
            "Certificate requests to the CA that failed",
            self.failures.clone(),
        );
        let help = "When the certificate in use expires, in seconds since 1970";
        registry.register("culvert_certificate_expiry_seconds", help, self.ends.clone());
    }
}

/// What is known of one identity's certificate, for the admin port.
#[derive(Debug)]
pub struct Held {
    /// Whose.
    pub identity: SpiffeName,
    /// The certificate, if there is one.
    pub credentials: Option<Arc<Credentials>>,
    /// The last error, if the last attempt failed.
    pub error: Option<String>,
}

/// What is known of one identity's certificate.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) credentials: Option<Arc<Credentials>>,
    pub(super) error: Option<String>,
    /// When the CA is asked next, after an error.
    pub(super) retry_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    /// How many pods of this node have the identity; at zero it will be forgotten.
    holders: usize,
    /// Rises with each pod, so that who wanted to forget sees that somebody came.
    came: u64,
    state: watch::Sender<State>,
    urgency: Arc<Urgency>,
    stop: CancellationToken,
}

/// All certificates of this node.
#[derive(Debug)]
pub struct Store {
    pub(super) authority: Authority,
    aliases: Vec<Text>,
    pub(super) revocations: Arc<Revocations>,
    generation: AtomicU64,
    entries: Mutex<HashMap<SpiffeName, Entry>>,
    /// Told when an identity becomes wanted.
    wanted: Notify,
    pub(super) roots: Roots,
    pub(super) queue: Arc<CaQueue>,
    tasks: Group,
    pub(super) metrics: Arc<Metrics>,
}

impl Store {
    /// A store that asks `authority`. `aliases` are trust domains accepted beside each identity's own.
    pub fn new(
        authority: Authority,
        aliases: Vec<Text>,
        revocations: Arc<Revocations>,
        tasks: Group,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            authority,
            aliases,
            revocations,
            generation: AtomicU64::new(1),
            entries: Mutex::default(),
            wanted: Notify::new(),
            roots: Roots::default(),
            queue: CaQueue::new(AT_ONCE),
            tasks,
            metrics,
        })
    }

    /// Holds a certificate for `identity` from now on; where there is none yet the CA is asked soon, however long it has
    /// failed. Called once per pod, on the control runtime.
    pub fn want(self: &Arc<Self>, identity: &SpiffeName) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(identity) {
            entry.holders += 1;
            entry.came += 1;
            if entry.state.borrow().valid().is_none() {
                entry.state.send_modify(|state| state.retry_at = None);
                entry.urgency.came.notify_one();
            }
            return;
        }
        let (state, urgency, stop) = (watch::Sender::default(), Arc::<Urgency>::default(), CancellationToken::new());
        let entry = Entry { holders: 1, came: 1, state: state.clone(), urgency: urgency.clone(), stop: stop.clone() };
        entries.insert(identity.clone(), entry);
        self.wanted.notify_waiters();
        let fresh = Renewal { store: self.clone(), identity: identity.clone(), out: state, urgency };
        self.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = fresh.keep() => {} }
        });
    }

    /// Ends one [`Store::want`]; a minute after the last one the certificate is forgotten.
    pub fn forget(self: &Arc<Self>, identity: &SpiffeName) {
        let mut entries = self.entries.lock();
        let Some(entry) = entries.get_mut(identity) else { return };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        let (came, store, identity) = (entry.came, self.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::time::sleep(FORGET_AFTER).await;
            let mut entries = store.entries.lock();
            if let Some(entry) = entries.get(&identity).filter(|entry| entry.came == came) {
                entry.stop.cancel();
                entries.remove(&identity);
                store.metrics.ends.remove(&IdentityLabel { identity: identity.to_string() });
            }
        });
    }

    /// The current credentials of `identity`; waits up to 5 s for the first ones, unless the CA will not be asked so soon.
    pub async fn get(&self, identity: &SpiffeName) -> Result<Arc<Credentials>, StoreError> {
        let deadline = Instant::now() + FIRST_WAIT;
        let (mut state, urgency) = self.entry(identity, deadline).await?;
        let unavailable = |reason: &str| StoreError::Unavailable { identity: identity.clone(), reason: reason.into() };
        let _waiting = Waiting::new(&urgency);
        let hopeless = |s: &State| s.retry_at.is_some_and(|at| at > deadline);
        let settled = |s: &State| s.valid().is_some() || hopeless(s);
        let latest = state.clone();
        let found = match tokio::time::timeout_at(deadline, state.wait_for(settled)).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => return Err(unavailable("it is no longer needed")),
            Err(_) => latest.borrow().clone(),
        };
        match (found.valid(), found.credentials, found.error) {
            (Some(valid), _, _) => Ok(valid),
            (None, Some(_), error) => {
                Err(unavailable(&format!("the last one has expired; {}", error.unwrap_or_default())))
            }
            (None, None, Some(error)) => Err(unavailable(&error)),
            (None, None, None) => Err(unavailable("the CA has not answered within 5 s")),
        }
    }

    /// The entry of an identity; a pod's connections may come a moment before its identity is wanted.
    async fn entry(
        &self,
        identity: &SpiffeName,
        deadline: Instant,
    ) -> Result<(watch::Receiver<State>, Arc<Urgency>), StoreError> {
        let find = || {
            let entries = self.entries.lock();
            entries.get(identity).map(|entry| (entry.state.subscribe(), entry.urgency.clone()))
        };
        let wait = async {
            loop {
                let wanted = self.wanted.notified();
                if let Some(found) = find() {
                    return found;
                }
                wanted.await;
            }
        };
        tokio::time::timeout_at(deadline, wait).await.map_err(|_| StoreError::NotWanted(identity.clone()))
    }

    /// What is held, for the admin port.
    pub fn list(&self) -> Vec<Held> {
        let entries = self.entries.lock();
        let mut all: Vec<Held> = entries
            .iter()
            .map(|(identity, entry)| {
                let state = entry.state.borrow().clone();
                Held { identity: identity.clone(), credentials: state.credentials, error: state.error }
            })
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Time until the first identity is without a valid certificate if no renewal succeeds; `None` without identities.
    pub fn time_to_outage(&self) -> Option<Duration> {
        let left = |held: &Held| match (&held.credentials, &held.error) {
            (Some(held), _) => Some(held.not_after.duration_since(SystemTime::now()).unwrap_or_default()),
            (None, Some(_)) => Some(Duration::ZERO),
            (None, None) => None,
        };
        self.list().iter().filter_map(left).min()
    }

    /// A number that no other certificate of this process has.
    pub(super) fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether a pod of this node has the identity now.
    pub(super) fn is_wanted(&self, identity: &SpiffeName) -> bool {
        let entries = self.entries.lock();
        entries.get(identity).is_some_and(|entry| entry.holders > 0)
    }

    /// Trust in these roots alone.
    pub(super) fn trust(&self, identity: &SpiffeName, roots: &[CertificateDer<'static>]) -> Trust {
        let mut trust_domains = vec![identity.trust_domain.clone()];
        trust_domains.extend(self.aliases.iter().cloned());
        let unknown_root = Arc::default();
        Trust { roots: roots.to_vec(), trust_domains, revocations: self.revocations.clone(), unknown_root }
    }

    /// Trust in all roots that are known.
    pub(super) fn known_trust(&self, identity: &SpiffeName) -> Trust {
        self.trust(identity, &self.roots.of(&identity.trust_domain))
    }

    /// Makes the settings of these identities anew, with what is trusted now.
    pub(super) fn rebuild(&self, concerned: impl Fn(&SpiffeName) -> bool) {
        let all: Vec<(SpiffeName, watch::Sender<State>)> = {
            let entries = self.entries.lock();
            let concerned = entries.iter().filter(|(identity, _)| concerned(identity));
            concerned.map(|(identity, entry)| (identity.clone(), entry.state.clone())).collect()
        };
        // Outside of the lock: connections wait for it.
        for (identity, state) in all {
            let Some(held) = state.borrow().credentials.clone() else { continue };
            match held.trusting(self.known_trust(&identity)) {
                Ok(rebuilt) => drop(state.send_if_modified(|now| {
                    let same = now.credentials.as_ref().is_some_and(|now| Arc::ptr_eq(now, &held));
                    if same {
                        now.credentials = Some(Arc::new(rebuilt));
                    }
                    same
                })),
                Err(error) => tracing::warn!(%identity, %error, "what is trusted now cannot be used; what was stays"),
            }
        }
    }

    /// Makes all settings anew when the list of revoked certificates changes, for as long as it is awaited: a root may be
    /// on it.
    pub async fn follow_revocations(self: Arc<Self>) {
        let mut changes = self.revocations.changes();
        while changes.changed().await.is_ok() {
            self.rebuild(|_| true);
        }
    }
}

impl State {
    pub(super) fn valid(&self) -> Option<Arc<Credentials>> {
        self.credentials.clone().filter(|held| held.is_valid())
    }
}

/// Counts a connection that waits for a certificate, for as long as it does.
struct Waiting<'a>(&'a Urgency);

impl<'a> Waiting<'a> {
    fn new(urgency: &'a Urgency) -> Self {
        urgency.waiting.fetch_add(1, Ordering::Relaxed);
        Self(urgency)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::builtin::Builtin;
    use super::*;
    use std::path::{Path, PathBuf};

    fn ca(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-store-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        Builtin::init(&folder).unwrap();
        folder
    }

    fn store(folder: &Path) -> Arc<Store> {
        let authority = Authority::Builtin(Builtin::new(folder, Duration::from_secs(3600)));
        Store::new(authority, Vec::new(), Arc::default(), Group::default(), Arc::default())
    }

    fn identity(account: &str) -> SpiffeName {
        SpiffeName::new("cluster.local", "a", account).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_certificate_is_renewed_at_half_life_and_survives_a_dead_ca() {
        let folder = ca("renew");
        let store = store(&folder);
        let identity = identity("b");
        assert!(matches!(store.get(&identity).await, Err(StoreError::NotWanted(_))));
        store.want(&identity);
        let first = store.get(&identity).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1400)).await;
        assert_eq!(store.get(&identity).await.unwrap().generation, first.generation, "before half life");
        tokio::time::sleep(Duration::from_secs(400)).await;
        let second = store.get(&identity).await.unwrap();
        assert_ne!(second.generation, first.generation, "after half life");
        std::fs::remove_dir_all(&folder).unwrap();
        tokio::time::sleep(Duration::from_secs(1900)).await;
        assert_eq!(store.get(&identity).await.unwrap().generation, second.generation, "the CA is gone, it is kept");
        assert!(store.list()[0].error.as_deref().is_some_and(|e| e.contains("ca.key")));
        store.forget(&identity);
        tokio::time::sleep(FORGET_AFTER / 2).await;
        assert_eq!(store.list().len(), 1, "a pod that comes back finds it there");
        store.want(&identity);
        tokio::time::sleep(FORGET_AFTER).await;
        assert_eq!(store.list().len(), 1, "it came back");
        store.forget(&identity);
        tokio::time::sleep(FORGET_AFTER * 2).await;
        assert!(store.list().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn roots_of_a_rotation_are_trusted_by_who_was_not_renewed_yet() {
        let (folder, other) = (ca("rotate"), ca("rotate-new"));
        let store = store(&folder);
        store.want(&identity("old"));
        let old = store.get(&identity("old")).await.unwrap();
        for file in ["ca.key", "ca.pem"] {
            std::fs::copy(other.join(file), folder.join(file)).unwrap();
        }
        store.want(&identity("new"));
        let new = store.get(&identity("new")).await.unwrap();
        assert_eq!((old.roots().len(), new.roots().len()), (1, 2), "who comes later trusts both");
        let rebuilt = store.get(&identity("old")).await.unwrap();
        let life = Duration::from_secs(3600);
        assert_eq!((rebuilt.roots().len(), rebuilt.generation), (2, old.generation), "so does who was there before");
        // Renewed, it goes on presenting the old root's certificate: others may not know the new root yet. Half life has
        // passed when both certificates have been renewed; the clock of certificates is the real one, and has not moved.
        tokio::time::sleep(life / 2).await;
        let renewed = store.get(&identity("old")).await.unwrap();
        assert_eq!((renewed.generation, renewed.chain()), (old.generation, old.chain()));
        for folder in [folder, other] {
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_built_before_a_list_of_revoked_certificates_came_is_built_again_when_presented() {
        let folder = ca("list");
        let store = store(&folder);
        let identity = identity("b");
        store.want(&identity);
        store.get(&identity).await.unwrap();
        let out = store.entries.lock()[&identity].state.clone();
        let fresh =
            Renewal { store: store.clone(), identity: identity.clone(), out: out.clone(), urgency: Arc::default() };
        let signed = store.authority.sign(&identity).await.unwrap();
        let built = Credentials::build(identity.clone(), 7, signed, store.known_trust(&identity)).unwrap();
        store.revocations.put(Default::default());
        fresh.publish(built);
        let presented = out.borrow().credentials.clone().unwrap();
        assert!(presented.generation == 7 && presented.is_current());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_dead_ca_is_told_why_and_not_kept_waiting_beyond_the_next_attempt() {
        let folder = ca("dead");
        let store = store(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        store.want(&identity("b"));
        let start = Instant::now();
        let error = store.get(&identity("b")).await.unwrap_err().to_string();
        assert!(error.contains("ca.key"), "{error}");
        assert!(start.elapsed() <= FIRST_WAIT);
        tokio::time::sleep(Duration::from_secs(600)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(store.time_to_outage(), Some(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_approved_after_an_outage_does_not_wait_for_what_its_identity_failed_in_it() {
        let (folder, kept) = (ca("outage"), ca("outage-kept"));
        let store = store(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        store.want(&identity("b"));
        let retry_in = || {
            let at = store.entries.lock()[&identity("b")].state.borrow().retry_at;
            at.map(|at| at.saturating_duration_since(Instant::now())).unwrap_or_default()
        };
        let come_to_a_long_wait = async || {
            while retry_in() < FIRST_WAIT * 4 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        come_to_a_long_wait().await;
        // Still away: one more attempt, and the waits begin anew.
        store.want(&identity("b"));
        store.get(&identity("b")).await.unwrap_err();
        assert!(retry_in() < FIRST_WAIT * 2, "{:?}", retry_in());
        come_to_a_long_wait().await;
        std::fs::rename(&kept, &folder).unwrap();
        store.want(&identity("b"));
        store.get(&identity("b")).await.unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
