//! The certificates of this node's identities, and everything that the store and the renewal tasks share: the CA, its
//! queue, the known roots and the revocation list.
//!
//! The store adds and removes entries and waits on them; each renewal task writes the state of its own entry.

use super::authority::CertificateAuthority;
use super::ca_queue::{CaQueue, Urgency};
use super::credentials::{Credentials, Trust};
use super::metrics::Metrics;
use super::revoked::Revocations;
use super::roots::Roots;
use crate::mesh::{SpiffeName, Text};
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Signing requests that are open at the CA at the same time.
const CA_REQUESTS_MAX: usize = 8;

/// One identity's certificate, or why there is none.
#[derive(Clone, Debug, Default)]
pub(super) struct CertificateState {
    /// The certificate in use. It may have expired.
    pub(super) credentials: Option<Arc<Credentials>>,
    /// Why the last attempt failed, if it did.
    pub(super) error: Option<String>,
    /// When the CA is asked again, after an error.
    pub(super) retry_at: Option<Instant>,
}

impl CertificateState {
    /// The certificate, if it is valid now.
    pub(super) fn valid(&self) -> Option<Arc<Credentials>> {
        self.credentials.clone().filter(|held| held.is_valid())
    }
}

/// An identity that pods of this node have, or had a moment ago.
#[derive(Debug)]
pub(super) struct IdentityEntry {
    /// How many pods of this node have the identity. At zero the entry is removed after a while.
    pub(super) holders: usize,
    /// Counts the pods that have come, so that a pending removal notices a pod that came meanwhile.
    pub(super) arrivals: u64,
    pub(super) state: watch::Sender<CertificateState>,
    pub(super) urgency: Arc<Urgency>,
    /// Ends the renewal task.
    pub(super) stop: CancellationToken,
}

/// All identities of this node with their certificates.
#[derive(Debug)]
pub(super) struct Certificates {
    pub(super) authority: CertificateAuthority,
    /// Trust domains that are accepted beside each identity's own.
    aliases: Vec<Text>,
    pub(super) revocations: Arc<Revocations>,
    generation: AtomicU64,
    pub(super) entries: Mutex<HashMap<SpiffeName, IdentityEntry>>,
    pub(super) roots: Roots,
    pub(super) queue: Arc<CaQueue>,
    pub(super) metrics: Arc<Metrics>,
}

impl Certificates {
    /// No identities yet; certificates will come from `authority`.
    pub(super) fn new(
        authority: CertificateAuthority,
        aliases: Vec<Text>,
        revocations: Arc<Revocations>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            authority,
            aliases,
            revocations,
            generation: AtomicU64::new(1),
            entries: Mutex::default(),
            roots: Roots::default(),
            queue: CaQueue::new(CA_REQUESTS_MAX),
            metrics,
        }
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

    /// Trust in exactly these roots.
    pub(super) fn trust_in(&self, identity: &SpiffeName, roots: &[CertificateDer<'static>]) -> Trust {
        let mut trust_domains = vec![identity.trust_domain.clone()];
        trust_domains.extend(self.aliases.iter().cloned());
        let unknown_root = Arc::default();
        Trust { roots: roots.to_vec(), trust_domains, revocations: self.revocations.clone(), unknown_root }
    }

    /// Trust in all known roots of the identity's trust domain.
    pub(super) fn current_trust(&self, identity: &SpiffeName) -> Trust {
        self.trust_in(identity, &self.roots.of(&identity.trust_domain))
    }

    /// Rebuilds the TLS settings of the selected identities with the roots and revocations of now.
    pub(super) fn rebuild(&self, is_selected: impl Fn(&SpiffeName) -> bool) {
        let selected: Vec<(SpiffeName, watch::Sender<CertificateState>)> = {
            let entries = self.entries.lock();
            let selected = entries.iter().filter(|(identity, _)| is_selected(identity));
            selected.map(|(identity, entry)| (identity.clone(), entry.state.clone())).collect()
        };
        // Outside the lock, which connections wait for.
        for (identity, state) in selected {
            let Some(held) = state.borrow().credentials.clone() else { continue };
            match held.with_trust(self.current_trust(&identity)) {
                Ok(rebuilt) => drop(state.send_if_modified(|now| {
                    let is_same = now.credentials.as_ref().is_some_and(|now| Arc::ptr_eq(now, &held));
                    if is_same {
                        now.credentials = Some(Arc::new(rebuilt));
                    }
                    is_same
                })),
                Err(error) => tracing::warn!(
                    %identity, %error,
                    "the changed roots or revocations cannot be used for this identity; its previous TLS settings stay in use"
                ),
            }
        }
    }
}
