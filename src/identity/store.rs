//! Certificates by identity: fetched when first wanted, renewed at half life, kept while valid whatever fails.
//!
//! ```text
//!   want() ──► Fetching ──signed──► Held ──half life──► Held (renewing) ──signed──► Held
//!                 │ error: back off, ask again            │ error: back off, keep what is held until it ends
//! ```
//! One task per identity does the asking, eight ask at once, the most urgent first; readers only wait for the first
//! answer, and never longer than a deadline. Roots that any answer has brought are trusted until the certificates that
//! came with them have ended, so that in a rotation old and new peers know each other whoever was renewed first.

use super::authority::{Authority, AuthorityError};
use super::credentials::{Credentials, CredentialsError, Trust};
use super::revoked::Revocations;
use super::turns::{Turns, Urgency};
use crate::mesh::{SpiffeName, Text};
use crate::task::Group;
use crate::task::backoff::Backoff;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// First wait after a failed fetch; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest wait after a failed fetch.
const RETRY_MAX: Duration = Duration::from_secs(150);
/// How often the clock is looked at while waiting.
const CLOCK_LOOK: Duration = Duration::from_secs(60);
/// How long a connection waits for an identity's first certificate.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// Requests at the CA at once.
const AT_ONCE: usize = 8;
/// How long a certificate is kept after its last pod has gone: a restarted pod finds it there.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// How long a CA may refuse a new identity before that is worth a warning: it hears of pods a moment after we do.
const NEW_FOR: Duration = Duration::from_secs(20);
/// How long before its end, as a part of its life, a certificate is given up for one of a root that is new.
const SWITCH_BEFORE_END: f64 = 0.04;
/// When a certificate is renewed, as a part of half its life: at random between these. The later end leaves who renews
/// last in a rotation time to do so before anybody presents a certificate of the new root.
const RENEWAL: std::ops::Range<f64> = 0.8..0.92;
/// Shortest time between renewals for the sake of a peer whose root we do not know.
const ROOTS_EVERY: Duration = Duration::from_secs(30);

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

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Metrics of certificates.
#[derive(Debug, Default)]
pub struct Metrics {
    failures: Counter,
    fetched: Counter,
    ends: Family<IdentityLabel, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabel {
    identity: String,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("culvert_certificates_fetched", "Certificates received", self.fetched.clone());
        registry.register("culvert_certificate_failures", "Certificate requests that failed", self.failures.clone());
        let help = "When the certificate in use ends, in seconds since 1970";
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

#[derive(Clone, Debug, Default)]
struct State {
    credentials: Option<Arc<Credentials>>,
    error: Option<String>,
    /// When the CA is asked next, after an error.
    retry_at: Option<Instant>,
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

/// A root, and how long it is trusted at least.
#[derive(Debug)]
struct Root {
    trust_domain: Text,
    der: CertificateDer<'static>,
    until: SystemTime,
}

/// All certificates of this node.
#[derive(Debug)]
pub struct Store {
    authority: Authority,
    aliases: Vec<Text>,
    revocations: Arc<Revocations>,
    generation: AtomicU64,
    entries: Mutex<HashMap<SpiffeName, Entry>>,
    /// Told when an identity becomes wanted.
    wanted: Notify,
    roots: Mutex<Vec<Root>>,
    turns: Arc<Turns>,
    tasks: Group,
    metrics: Arc<Metrics>,
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
            roots: Mutex::default(),
            turns: Turns::new(AT_ONCE),
            tasks,
            metrics,
        })
    }

    /// Holds a certificate for `identity` from now on. Called once per pod, on the control runtime.
    pub fn want(self: &Arc<Self>, identity: &SpiffeName) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(identity) {
            entry.holders += 1;
            entry.came += 1;
            return;
        }
        let (state, urgency, stop) = (watch::Sender::default(), Arc::<Urgency>::default(), CancellationToken::new());
        let entry = Entry { holders: 1, came: 1, state: state.clone(), urgency: urgency.clone(), stop: stop.clone() };
        entries.insert(identity.clone(), entry);
        self.wanted.notify_waiters();
        let (store, identity) = (self.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = store.keep_fresh(&identity, &state, &urgency) => {}
            }
        });
    }

    /// Ends one [`Store::want`]; a minute after the last one the certificate is forgotten.
    pub fn forget(self: &Arc<Self>, identity: &SpiffeName) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = entries.get_mut(identity) else { return };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        let (came, store, identity) = (entry.came, self.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::time::sleep(FORGET_AFTER).await;
            let mut entries = store.entries.lock().unwrap_or_else(PoisonError::into_inner);
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
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
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
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
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

    async fn keep_fresh(self: &Arc<Self>, identity: &SpiffeName, out: &watch::Sender<State>, urgency: &Arc<Urgency>) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        let begun = Instant::now();
        loop {
            let turn = self.turns.take(urgency).await;
            let fetched = self.fetch(identity).await;
            drop(turn);
            let wait = match fetched {
                Ok((credentials, wait)) => {
                    backoff.reset();
                    self.metrics.fetched.inc();
                    urgency.held.store(true, Ordering::Relaxed);
                    let renew_at = Instant::now() + wait;
                    self.present(credentials, out).await;
                    renew_at.saturating_duration_since(Instant::now())
                }
                Err(error) => {
                    // Sooner and sooner towards the end of what is held.
                    let left = out.borrow().valid().map(|held| held.time_left() / 4);
                    let wait = backoff.next().min(left.unwrap_or(RETRY_MAX)).max(RETRY_MIN / 2);
                    self.failed(
                        identity,
                        &error,
                        wait,
                        begun.elapsed() < NEW_FOR && out.borrow().credentials.is_none(),
                    );
                    let (text, retry_at) = (error.to_string(), Instant::now() + wait);
                    out.send_modify(|state| (state.error, state.retry_at) = (Some(text), Some(retry_at)));
                    wait
                }
            };
            self.wait(wait, out).await;
        }
    }

    /// Uses new credentials. Where they are of a root that came with them, peers may not know that root yet: then what is
    /// held is presented until shortly before its end. Peers renew at half life and have learned of the root by then.
    async fn present(&self, new: Credentials, out: &watch::Sender<State>) {
        let held = out.borrow().valid().filter(|held| !held.would_vouch_for(&new));
        if let Some(held) = held {
            let wait = held.time_left().saturating_sub(held.life().mul_f64(SWITCH_BEFORE_END));
            tracing::info!(identity = %new.identity, ?wait, "the CA's root is a new one; presenting the certificate of the old one so long");
            match held.trusting(new.trust.clone()) {
                Ok(trusting) => self.publish(trusting, out),
                Err(error) => tracing::warn!(identity = %new.identity, %error, "the new root cannot be used yet"),
            }
            let until = Instant::now() + wait;
            while Instant::now() < until && out.borrow().valid().is_some() {
                tokio::time::sleep(until.saturating_duration_since(Instant::now()).min(CLOCK_LOOK)).await;
            }
        }
        // Others may have learned of roots meanwhile.
        let trust = self.trust(&new.identity, &self.known_roots(&new.identity.trust_domain));
        let new = new.trusting(trust).unwrap_or(new);
        self.publish(new, out);
    }

    fn publish(&self, credentials: Credentials, out: &watch::Sender<State>) {
        let label = IdentityLabel { identity: credentials.identity.to_string() };
        let ends = credentials.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.ends.get_or_create(&label).set(ends.as_secs().cast_signed());
        out.send_replace(State { credentials: Some(Arc::new(credentials)), error: None, retry_at: None });
    }

    /// Counts and says that there is no new certificate. That a CA refuses a pod it has not heard of yet is no news.
    fn failed(&self, identity: &SpiffeName, error: &FetchError, retry: Duration, new: bool) {
        self.metrics.failures.inc();
        let refused = matches!(error, FetchError::Authority(error) if error.is_refusal());
        if refused && new {
            tracing::debug!(%identity, %error, ?retry, "the CA does not know the pod yet");
        } else {
            tracing::warn!(%identity, %error, ?retry, "no new certificate; what is held stays in use");
        }
    }

    /// Waits, but not beyond the end of the certificate in use: the clock may be set while we wait. Where a peer's root is
    /// not known, a renewal may bring it.
    async fn wait(&self, wait: Duration, out: &watch::Sender<State>) {
        let begun = Instant::now();
        let until = begun + wait;
        while Instant::now() < until {
            let held = out.borrow().clone();
            let Some(credentials) = held.credentials else {
                return tokio::time::sleep_until(until).await;
            };
            if credentials.not_after <= SystemTime::now() && held.error.is_none() {
                return;
            }
            let step = until.saturating_duration_since(Instant::now()).min(CLOCK_LOOK);
            tokio::select! {
                () = tokio::time::sleep(step) => {}
                () = credentials.unknown_root(), if held.error.is_none() => {
                    tracing::info!(identity = %credentials.identity, "a peer's root is not known; renewing to learn of it");
                    return tokio::time::sleep_until((begun + ROOTS_EVERY).min(until)).await;
                }
            }
        }
    }

    async fn fetch(self: &Arc<Self>, identity: &SpiffeName) -> Result<(Credentials, Duration), FetchError> {
        let signed = self.authority.sign(identity).await?;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        let wait = renewal_wait(signed.life, rand::random_range(RENEWAL));
        // Judged by its own roots alone first: what others brought must not vouch for it.
        let trust = self.trust(identity, &signed.roots);
        let credentials = Credentials::build(identity.clone(), generation, signed, trust)?;
        if self.learn(&credentials) {
            self.rebuild(identity);
        }
        let trust = self.trust(identity, &self.known_roots(&identity.trust_domain));
        Ok((credentials.trusting(trust)?, wait))
    }

    fn trust(&self, identity: &SpiffeName, roots: &[CertificateDer<'static>]) -> Trust {
        let mut trust_domains = vec![identity.trust_domain.clone()];
        trust_domains.extend(self.aliases.iter().cloned());
        let unknown_root = Arc::default();
        Trust { roots: roots.to_vec(), trust_domains, revocations: self.revocations.clone(), unknown_root }
    }

    /// Remembers the roots that came with a certificate; whether the set has changed.
    fn learn(&self, new: &Credentials) -> bool {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        let before = roots.len();
        roots.retain(|root| root.until > SystemTime::now());
        let mut changed = roots.len() != before;
        for der in &new.signed.roots {
            match roots.iter_mut().find(|r| r.trust_domain == new.identity.trust_domain && r.der == *der) {
                Some(known) => known.until = known.until.max(new.not_after),
                None => {
                    changed = true;
                    let (trust_domain, until) = (new.identity.trust_domain.clone(), new.not_after);
                    roots.push(Root { trust_domain, der: der.clone(), until });
                }
            }
        }
        changed
    }

    fn known_roots(&self, trust_domain: &Text) -> Vec<CertificateDer<'static>> {
        let roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        roots.iter().filter(|root| root.trust_domain == *trust_domain).map(|root| root.der.clone()).collect()
    }

    /// Gives the other identities of the trust domain settings with the roots that are known now.
    fn rebuild(&self, but: &SpiffeName) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let others = entries.iter().filter(|(other, _)| *other != but && other.trust_domain == but.trust_domain);
        for (identity, entry) in others {
            let trust = self.trust(identity, &self.known_roots(&identity.trust_domain));
            entry.state.send_modify(|state| {
                let Some(held) = &state.credentials else { return };
                match held.trusting(trust) {
                    Ok(rebuilt) => state.credentials = Some(Arc::new(rebuilt)),
                    Err(error) => tracing::warn!(%identity, %error, "new roots cannot be used; the old ones stay"),
                }
            });
        }
    }
}

impl State {
    fn valid(&self) -> Option<Arc<Credentials>> {
        self.credentials.clone().filter(|held| held.not_after > SystemTime::now())
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

/// Time until renewal: half of the certificate's life, times a jitter.
fn renewal_wait(life: Duration, jitter: f64) -> Duration {
    (life / 2).mul_f64(jitter).max(Duration::from_secs(1))
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
        tokio::time::sleep(life).await;
        let switched = store.get(&identity("old")).await.unwrap();
        assert_ne!(switched.chain(), old.chain(), "shortly before the end of the old one");
        assert!(switched.roots().len() == 2, "peers may still have certificates of the old root");
        for folder in [folder, other] {
            std::fs::remove_dir_all(&folder).unwrap();
        }
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
}
