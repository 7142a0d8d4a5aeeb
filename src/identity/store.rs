//! The store of certificates, by identity. Pods want identities; connections ask for an identity's current credentials.
//!
//! Each wanted identity has one task (`renewal.rs`) that asks the CA. A connection only waits for the first
//! certificate, and never longer than a deadline. A valid certificate is kept whatever fails, and forgotten a while
//! after its last pod.

use super::authority::CertificateAuthority;
use super::ca_queue::Urgency;
use super::certificates::{CertificateState, Certificates, IdentityEntry};
use super::credentials::Credentials;
use super::metrics::Metrics;
use super::renewal::Renewal;
use super::revoked::Revocations;
use crate::mesh::{SpiffeName, Text};
use crate::task::Group;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a connection waits for an identity's first certificate.
pub const FIRST_WAIT: Duration = Duration::from_secs(5);
/// How long a certificate is kept after its last pod has gone, so that a restarted pod finds it.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No pod has asked for this identity to be held.
    #[error("no certificate is held for {0}: no pod of this node has this identity")]
    NotWanted(SpiffeName),
    /// The CA has not issued one yet.
    #[error("no certificate for {identity} yet: {reason}")]
    Unavailable {
        /// The identity.
        identity: SpiffeName,
        /// The last error, or that the first answer is outstanding.
        reason: String,
    },
}

/// One identity's certificate, for the admin port.
#[derive(Debug)]
pub struct HeldCertificate {
    /// The identity.
    pub identity: SpiffeName,
    /// The certificate, if there is one.
    pub credentials: Option<Arc<Credentials>>,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

/// All certificates of this node.
#[derive(Debug)]
pub struct CertificateStore {
    certificates: Arc<Certificates>,
    /// Notified when an identity becomes wanted.
    wanted: Notify,
    tasks: Group,
}

impl CertificateStore {
    /// An empty store that asks `authority`. `aliases` are trust domains accepted beside each identity's own.
    pub fn new(
        authority: CertificateAuthority,
        aliases: Vec<Text>,
        revocations: Arc<Revocations>,
        tasks: Group,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let certificates = Arc::new(Certificates::new(authority, aliases, revocations, metrics));
        Arc::new(Self { certificates, wanted: Notify::new(), tasks })
    }

    /// Holds a certificate for `identity` from now on. If there is none yet, the CA is asked soon, however long it has
    /// been failing. Called once per pod, on the control runtime.
    pub fn want(&self, identity: &SpiffeName) {
        let mut entries = self.certificates.entries.lock();
        if let Some(entry) = entries.get_mut(identity) {
            entry.holders += 1;
            entry.arrivals += 1;
            if entry.state.borrow().valid().is_none() {
                entry.state.send_modify(|state| state.retry_at = None);
                entry.urgency.pod_arrived.notify_one();
            }
            return;
        }
        let (state, urgency, stop) = (watch::Sender::default(), Arc::<Urgency>::default(), CancellationToken::new());
        let (entry_state, entry_urgency) = (state.clone(), urgency.clone());
        let entry =
            IdentityEntry { holders: 1, arrivals: 1, state: entry_state, urgency: entry_urgency, stop: stop.clone() };
        entries.insert(identity.clone(), entry);
        self.wanted.notify_waiters();
        let renewal = Renewal { certificates: self.certificates.clone(), identity: identity.clone(), state, urgency };
        self.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = renewal.run() => {} }
        });
    }

    /// Ends one [`CertificateStore::want`]. The certificate is forgotten [`FORGET_AFTER`] after the last one.
    pub fn forget(&self, identity: &SpiffeName) {
        let mut entries = self.certificates.entries.lock();
        let Some(entry) = entries.get_mut(identity) else { return };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        let (arrivals, certificates, identity) = (entry.arrivals, self.certificates.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::time::sleep(FORGET_AFTER).await;
            let mut entries = certificates.entries.lock();
            if let Some(entry) = entries.get(&identity).filter(|entry| entry.arrivals == arrivals) {
                entry.stop.cancel();
                entries.remove(&identity);
                certificates.metrics.remove_expiry(&identity);
            }
        });
    }

    /// The current credentials of `identity`. Waits up to [`FIRST_WAIT`] for the first ones, but not if the next
    /// request to the CA comes later than that.
    pub async fn get(&self, identity: &SpiffeName) -> Result<Arc<Credentials>, StoreError> {
        let deadline = Instant::now() + FIRST_WAIT;
        let (mut state, urgency) = self.entry(identity, deadline).await?;
        let unavailable = |reason: &str| StoreError::Unavailable { identity: identity.clone(), reason: reason.into() };
        let _waiting = WaitingConnection::new(&urgency);
        let is_hopeless = |state: &CertificateState| state.retry_at.is_some_and(|at| at > deadline);
        let is_settled = |state: &CertificateState| state.valid().is_some() || is_hopeless(state);
        let latest = state.clone();
        let found = match tokio::time::timeout_at(deadline, state.wait_for(is_settled)).await {
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
            (None, None, None) => {
                Err(unavailable(&format!("the CA has not answered within {} s", FIRST_WAIT.as_secs())))
            }
        }
    }

    /// The entry of an identity. A pod's connections may come a moment before its identity is wanted, so this waits.
    async fn entry(
        &self,
        identity: &SpiffeName,
        deadline: Instant,
    ) -> Result<(watch::Receiver<CertificateState>, Arc<Urgency>), StoreError> {
        let find = || {
            let entries = self.certificates.entries.lock();
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

    /// All held certificates, for the admin port.
    pub fn list(&self) -> Vec<HeldCertificate> {
        let entries = self.certificates.entries.lock();
        let mut all: Vec<HeldCertificate> = entries
            .iter()
            .map(|(identity, entry)| {
                let state = entry.state.borrow().clone();
                HeldCertificate { identity: identity.clone(), credentials: state.credentials, error: state.error }
            })
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Time until the first identity is without a valid certificate if no renewal succeeds; `None` without identities.
    pub fn time_to_outage(&self) -> Option<Duration> {
        let left = |held: &HeldCertificate| match (&held.credentials, &held.error) {
            (Some(held), _) => Some(held.not_after.duration_since(SystemTime::now()).unwrap_or_default()),
            (None, Some(_)) => Some(Duration::ZERO),
            (None, None) => None,
        };
        self.list().iter().filter_map(left).min()
    }

    /// Rebuilds all TLS settings whenever the revocation list changes, for as long as it is awaited: roots may be
    /// listed too.
    pub async fn follow_revocations(self: Arc<Self>) {
        let mut changes = self.certificates.revocations.changes();
        while changes.changed().await.is_ok() {
            self.certificates.rebuild(|_| true);
        }
    }
}

/// Counts a connection that waits for a certificate, for as long as it waits.
struct WaitingConnection<'a>(&'a Urgency);

impl<'a> WaitingConnection<'a> {
    fn new(urgency: &'a Urgency) -> Self {
        urgency.waiting_connections.fetch_add(1, Ordering::Relaxed);
        Self(urgency)
    }
}

impl Drop for WaitingConnection<'_> {
    fn drop(&mut self) {
        self.0.waiting_connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::builtin::Builtin;
    use super::*;
    use crate::identity::Signer;
    use std::path::{Path, PathBuf};

    fn ca(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-store-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        Builtin::init(&folder).unwrap();
        folder
    }

    fn store(folder: &Path) -> Arc<CertificateStore> {
        let signer = Signer::Builtin(Builtin::new(folder, Duration::from_secs(3600)));
        let authority = CertificateAuthority { signer, only: None };
        CertificateStore::new(authority, Vec::new(), Arc::default(), Group::default(), Arc::default())
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
        assert_eq!(store.list().len(), 1, "a pod that comes back finds it");
        store.want(&identity);
        tokio::time::sleep(FORGET_AFTER).await;
        assert_eq!(store.list().len(), 1, "the pod came back");
        store.forget(&identity);
        tokio::time::sleep(FORGET_AFTER * 2).await;
        assert!(store.list().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn new_roots_are_trusted_by_identities_that_were_not_renewed_yet() {
        let (folder, other) = (ca("rotate"), ca("rotate-new"));
        let store = store(&folder);
        store.want(&identity("old"));
        let old = store.get(&identity("old")).await.unwrap();
        for file in ["ca.key", "ca.pem"] {
            std::fs::copy(other.join(file), folder.join(file)).unwrap();
        }
        store.want(&identity("new"));
        let new = store.get(&identity("new")).await.unwrap();
        assert_eq!((old.roots().len(), new.roots().len()), (1, 2), "an identity that comes later trusts both");
        let rebuilt = store.get(&identity("old")).await.unwrap();
        let life = Duration::from_secs(3600);
        assert_eq!(
            (rebuilt.roots().len(), rebuilt.generation),
            (2, old.generation),
            "so does one that was there before"
        );
        // After its renewal it still presents the old root's certificate, because peers may not know the new root yet.
        // Half life has passed, so both certificates have been renewed; the validity is checked against the real clock, which
        // has not moved.
        tokio::time::sleep(life / 2).await;
        let renewed = store.get(&identity("old")).await.unwrap();
        assert_eq!((renewed.generation, renewed.chain()), (old.generation, old.chain()));
        for folder in [folder, other] {
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }

    #[tokio::test]
    async fn settings_built_before_a_new_revocation_list_are_rebuilt_when_published() {
        let folder = ca("list");
        let store = store(&folder);
        let identity = identity("b");
        store.want(&identity);
        store.get(&identity).await.unwrap();
        let state = store.certificates.entries.lock()[&identity].state.clone();
        let renewal = Renewal {
            certificates: store.certificates.clone(),
            identity: identity.clone(),
            state: state.clone(),
            urgency: Arc::default(),
        };
        let signed = store.certificates.authority.sign(&identity).await.unwrap();
        let built =
            Credentials::build(identity.clone(), 7, signed, store.certificates.current_trust(&identity)).unwrap();
        store.certificates.revocations.put(Default::default());
        renewal.publish(built);
        let published = state.borrow().credentials.clone().unwrap();
        assert!(published.generation == 7 && published.is_current());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_learns_why_the_ca_fails_and_does_not_wait_beyond_the_next_attempt() {
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
    async fn a_pod_that_comes_after_an_outage_does_not_wait_out_the_earlier_failures() {
        let (folder, kept) = (ca("outage"), ca("outage-kept"));
        let store = store(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        store.want(&identity("b"));
        let retry_in = || {
            let at = store.certificates.entries.lock()[&identity("b")].state.borrow().retry_at;
            at.map(|at| at.saturating_duration_since(Instant::now())).unwrap_or_default()
        };
        let reach_a_long_wait = async || {
            while retry_in() < FIRST_WAIT * 4 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        reach_a_long_wait().await;
        // The CA is still away: one more attempt, and the waits start short again.
        store.want(&identity("b"));
        store.get(&identity("b")).await.unwrap_err();
        assert!(retry_in() < FIRST_WAIT * 2, "{:?}", retry_in());
        reach_a_long_wait().await;
        std::fs::rename(&kept, &folder).unwrap();
        store.want(&identity("b"));
        store.get(&identity("b")).await.unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
