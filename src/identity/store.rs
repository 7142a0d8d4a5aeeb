//! Certificates by identity: fetched when first wanted, renewed at half life, kept while valid whatever fails.
//!
//! ```text
//!   want() ──► Fetching ──signed──► Held ──half life──► Held (renewing) ──signed──► Held
//!                 │ error: back off, ask again            │ error: back off, keep what is held until it ends
//! ```
//! One task per identity does the asking; readers only wait for the first answer, and never longer than a deadline.

use super::authority::{Authority, AuthorityError};
use super::credentials::{Credentials, CredentialsError};
use crate::mesh::{SpiffeName, Text};
use crate::task::Group;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// First wait after a failed fetch; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest wait after a failed fetch.
const RETRY_MAX: Duration = Duration::from_secs(150);
/// How often the clock is looked at while waiting.
const CLOCK_LOOK: Duration = Duration::from_secs(60);
/// How long a connection waits for an identity's first certificate.
const FIRST_WAIT: Duration = Duration::from_secs(5);

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
}

#[derive(Debug)]
struct Entry {
    /// How many pods of this node have the identity; at zero it is forgotten.
    holders: usize,
    state: watch::Receiver<State>,
    stop: CancellationToken,
}

/// All certificates of this node.
#[derive(Debug)]
pub struct Store {
    authority: Authority,
    aliases: Vec<Text>,
    generation: AtomicU64,
    entries: Mutex<HashMap<SpiffeName, Entry>>,
    tasks: Group,
    metrics: Arc<Metrics>,
}

impl Store {
    /// A store that asks `authority`. `aliases` are trust domains accepted beside each identity's own.
    pub fn new(authority: Authority, aliases: Vec<Text>, tasks: Group, metrics: Arc<Metrics>) -> Arc<Self> {
        let (generation, entries) = (AtomicU64::new(1), Mutex::default());
        Arc::new(Self { authority, aliases, generation, entries, tasks, metrics })
    }

    /// Holds a certificate for `identity` from now on. Called once per pod, on the control runtime.
    pub fn want(self: &Arc<Self>, identity: &SpiffeName) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(identity) {
            entry.holders += 1;
            return;
        }
        let (send, state) = watch::channel(State::default());
        let stop = CancellationToken::new();
        entries.insert(identity.clone(), Entry { holders: 1, state, stop: stop.clone() });
        let (store, identity) = (self.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = store.keep_fresh(&identity, &send) => {}
            }
        });
    }

    /// Ends one [`Store::want`]; with the last one the certificate is forgotten.
    pub fn forget(&self, identity: &SpiffeName) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(identity) {
            entry.holders -= 1;
            if entry.holders == 0 {
                entry.stop.cancel();
                entries.remove(identity);
                self.metrics.ends.remove(&IdentityLabel { identity: identity.to_string() });
            }
        }
    }

    /// The current credentials of `identity`; waits up to 5 s for the first ones.
    pub async fn get(&self, identity: &SpiffeName) -> Result<Arc<Credentials>, StoreError> {
        let mut state = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = entries.get(identity).ok_or_else(|| StoreError::NotWanted(identity.clone()))?;
            entry.state.clone()
        };
        let unavailable = |reason: &str| StoreError::Unavailable { identity: identity.clone(), reason: reason.into() };
        let settled = |s: &State| s.credentials.is_some() || s.error.is_some();
        let found = match tokio::time::timeout(FIRST_WAIT, state.wait_for(settled)).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => return Err(unavailable("it is no longer needed")),
            Err(_) => return Err(unavailable("the CA has not answered within 5 s")),
        };
        match found.credentials {
            Some(held) if held.not_after > SystemTime::now() => Ok(held),
            Some(_) => Err(unavailable(&format!("the last one has expired; {}", found.error.unwrap_or_default()))),
            None => Err(unavailable(&found.error.unwrap_or_default())),
        }
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

    async fn keep_fresh(&self, identity: &SpiffeName, out: &watch::Sender<State>) {
        let mut retry = RETRY_MIN;
        loop {
            let wait = match self.fetch(identity) {
                Ok(credentials) => {
                    retry = RETRY_MIN;
                    self.metrics.fetched.inc();
                    let wait = renewal_wait(&credentials, rand::random_range(0.9..=1.0));
                    let label = IdentityLabel { identity: identity.to_string() };
                    let ends = credentials.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                    self.metrics.ends.get_or_create(&label).set(ends.as_secs().cast_signed());
                    out.send_replace(State { credentials: Some(Arc::new(credentials)), error: None });
                    wait
                }
                Err(error) => {
                    self.metrics.failures.inc();
                    tracing::warn!(%identity, %error, retry = ?retry, "no new certificate; what is held stays in use");
                    out.send_modify(|state| state.error = Some(error.to_string()));
                    let wait = retry.mul_f64(rand::random_range(0.8..=1.2));
                    retry = (retry * 2).min(RETRY_MAX);
                    wait
                }
            };
            self.wait(wait, out).await;
        }
    }

    /// Waits, but not beyond the end of the certificate in use: the clock may be set while we wait.
    async fn wait(&self, wait: Duration, out: &watch::Sender<State>) {
        let until = tokio::time::Instant::now() + wait;
        while tokio::time::Instant::now() < until {
            let step = until.saturating_duration_since(tokio::time::Instant::now()).min(CLOCK_LOOK);
            tokio::time::sleep(step).await;
            let held = out.borrow();
            let expired = held.credentials.as_ref().is_some_and(|held| held.not_after <= SystemTime::now());
            if expired && held.error.is_none() {
                return;
            }
        }
    }

    fn fetch(&self, identity: &SpiffeName) -> Result<Credentials, FetchError> {
        let signed = self.authority.sign(identity)?;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        Ok(Credentials::build(identity.clone(), generation, signed, &self.aliases)?)
    }
}

/// Time until renewal: half of the certificate's life, times a jitter of 0.9 to 1.
fn renewal_wait(credentials: &Credentials, jitter: f64) -> Duration {
    let life = credentials.not_after.duration_since(credentials.issued).unwrap_or_default();
    (life / 2).mul_f64(jitter).max(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn ca(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-store-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        Authority::init(&folder).unwrap();
        folder
    }

    #[tokio::test(start_paused = true)]
    async fn a_certificate_is_renewed_at_half_life_and_survives_a_dead_ca() {
        let folder = ca("renew");
        let authority = Authority::new(&folder, Duration::from_secs(3600));
        let store = Store::new(authority, Vec::new(), Group::default(), Arc::default());
        let identity = SpiffeName::new("cluster.local", "a", "b").unwrap();
        assert!(matches!(store.get(&identity).await, Err(StoreError::NotWanted(_))));
        store.want(&identity);
        let first = store.get(&identity).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1500)).await;
        assert_eq!(store.get(&identity).await.unwrap().generation, first.generation, "before half life");
        tokio::time::sleep(Duration::from_secs(400)).await;
        let second = store.get(&identity).await.unwrap();
        assert_ne!(second.generation, first.generation, "after half life");
        std::fs::remove_dir_all(&folder).unwrap();
        tokio::time::sleep(Duration::from_secs(1900)).await;
        assert_eq!(store.get(&identity).await.unwrap().generation, second.generation, "the CA is gone, it is kept");
        assert!(store.list()[0].error.as_deref().is_some_and(|e| e.contains("ca.key")));
        store.forget(&identity);
        assert!(store.list().is_empty());
    }
}
