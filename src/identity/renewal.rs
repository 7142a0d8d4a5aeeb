//! Renews one identity's certificate: when to ask the CA, and which certificate to present meanwhile.
//!
//! ```text
//!   ask ──signed──────────────► present it, wait for renewal ──► ask …
//!    │ ▲  └──by a new root────► present the old certificate until shortly before its end, then the new one
//!    │ └── wait: longer after each failure, but shorter as the held certificate nears its end
//!    └──error──┘
//! ```
//! During a CA rotation peers must know the new root before anyone presents a certificate signed by it. Every node
//! renews at about half of the certificate's life and learns the roots then, so a certificate of a new root is held
//! back until the old one is nearly over. A valid certificate is never given up because a renewal failed.

use super::authority::AuthorityError;
use super::ca_queue::Urgency;
use super::certificates::{CertificateState, Certificates};
use super::credentials::{Credentials, CredentialsError};
use crate::mesh::SpiffeName;
use crate::task::backoff::Backoff;
use crate::telemetry::log::brief;
use futures_util::FutureExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::Instant;

/// First wait after a failed request; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest wait after a failed request.
const RETRY_MAX: Duration = Duration::from_secs(150);
/// How often the clock is checked while waiting: it may be set, or the machine may have slept.
const CLOCK_CHECK: Duration = Duration::from_secs(10);
/// Difference between the clock and elapsed time beyond which the clock counts as set, and the CA is asked at once.
const CLOCK_JUMP: Duration = Duration::from_secs(20);
/// For how long a CA may refuse a new identity before that is logged as a warning. CAs learn of a pod a little later
/// than this node does.
const NEW_IDENTITY: Duration = Duration::from_secs(20);
/// How long before its end the old certificate is replaced by one of a new root, as a fraction of its life.
const SWITCH_BEFORE_END: f64 = 0.04;
/// When a certificate is renewed, as a fraction of half its life; chosen at random from this range. The upper end
/// leaves the last node to renew in a rotation enough time before anyone presents a certificate of the new root.
const RENEWAL: std::ops::Range<f64> = 0.8..0.92;
/// Shortest time between renewals caused by a peer whose root is unknown. It doubles while they bring no new root.
const ROOTS_RETRY_MIN: Duration = Duration::from_secs(30);
/// Longest such time, so that a stranger cannot make this node ask the CA again and again.
const ROOTS_RETRY_MAX: Duration = Duration::from_secs(3600);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// The renewal of one identity's certificate.
pub(super) struct Renewal {
    pub(super) certificates: Arc<Certificates>,
    pub(super) identity: SpiffeName,
    pub(super) state: watch::Sender<CertificateState>,
    pub(super) urgency: Arc<Urgency>,
}

/// A certificate that the CA has just signed.
struct Fetched {
    credentials: Credentials,
    /// Time until it should be renewed.
    renew_in: Duration,
    /// Whether it brought a root of its trust domain that was not known before.
    has_new_roots: bool,
}

/// A certificate of a new root, held back until peers know that root.
struct Successor {
    credentials: Credentials,
    present_at: Instant,
}

/// How long to wait before the CA is asked again.
struct Wait {
    until: Instant,
    /// When an unknown root of a peer, or a revocation of our own certificate, is reason enough to ask earlier. `None`
    /// while the last request has failed.
    roots_at: Option<Instant>,
}

/// Why a wait is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// The time has come, or the clock was set.
    Time,
    /// A peer's root is unknown, or our own certificate is revoked.
    Trust,
    /// A pod has come that has no valid certificate.
    PodArrived,
}

impl Renewal {
    /// Runs until it is dropped.
    pub(super) async fn run(self) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        let (started, mut roots_wait, mut wake) = (Instant::now(), ROOTS_RETRY_MIN, Wake::Time);
        let mut successor = None;
        loop {
            self.urgency.has_certificate.store(self.valid().is_some(), Ordering::Relaxed);
            let slot = self.certificates.queue.enter(&self.urgency).await;
            let fetched = self.fetch().await;
            drop(slot);
            let wait = match fetched {
                Ok(fetched) => {
                    backoff.reset();
                    self.certificates.metrics.fetched.inc();
                    roots_wait = match wake {
                        Wake::Trust if !fetched.has_new_roots => (roots_wait * 2).min(ROOTS_RETRY_MAX),
                        _ => ROOTS_RETRY_MIN,
                    };
                    let until = Instant::now() + fetched.renew_in;
                    let valid_until = humantime::format_rfc3339_seconds(fetched.credentials.not_after);
                    successor = self.present(fetched.credentials);
                    let but =
                        if successor.is_some() { "; the old one stays in use until peers know its root" } else { "" };
                    let text = format!("The CA issued a certificate that is valid until {valid_until}{but}.");
                    self.certificates.metrics.note(&self.identity, text);
                    Wait { until, roots_at: Some(Instant::now() + roots_wait) }
                }
                Err(error) => {
                    // A pod that came during the request counts as well.
                    if wake == Wake::PodArrived || self.urgency.pod_arrived.notified().now_or_never().is_some() {
                        backoff.reset();
                    }
                    // The closer the held certificate is to its end, the shorter the wait.
                    let left = self.valid().map(|held| held.time_left() / 4);
                    let wait = backoff.next().min(left.unwrap_or(RETRY_MAX)).max(RETRY_MIN / 2);
                    self.report_failure(&error, wait, started.elapsed() < NEW_IDENTITY);
                    let (text, retry_at) = (error.to_string(), Instant::now() + wait);
                    self.state.send_modify(|state| (state.error, state.retry_at) = (Some(text), Some(retry_at)));
                    Wait { until: retry_at, roots_at: None }
                }
            };
            wake = self.wait(&wait, &mut successor).await;
        }
    }

    fn valid(&self) -> Option<Arc<Credentials>> {
        self.state.borrow().valid()
    }

    /// Asks the CA for a certificate.
    async fn fetch(&self) -> Result<Fetched, FetchError> {
        let certificates = &self.certificates;
        let signed = certificates.authority.sign(&self.identity).await?;
        let life = signed.life;
        // First verified by the roots in the same answer alone: roots from other answers must not verify it.
        let trust = certificates.trust_in(&self.identity, &signed.roots);
        let credentials = Credentials::build(self.identity.clone(), certificates.next_generation(), signed, trust)?;
        let changed = certificates.roots.learn(&credentials);
        let has_new_roots = changed.contains(&self.identity.trust_domain);
        certificates.rebuild(|identity| changed.contains(&identity.trust_domain));
        let credentials = credentials.with_trust(certificates.current_trust(&self.identity))?;
        // Derived from the length of its life, whatever the clocks say, but never beyond its end by this node's clock.
        let renewal = renewal_wait(life, rand::random_range(RENEWAL)).min(credentials.time_left() / 2);
        Ok(Fetched { credentials, renew_in: renewal.max(Duration::from_secs(1)), has_new_roots })
    }

    /// Presents a new certificate. If its root is new to peers and the held certificate is still good, the new one is
    /// returned as the successor instead.
    fn present(&self, new: Credentials) -> Option<Successor> {
        let certificates = &self.certificates;
        let is_good = |held: &Arc<Credentials>| {
            !certificates.revocations.is_revoked(held.chain()) && !held.own_roots_verify(&new)
        };
        let Some(held) = self.valid().filter(is_good) else {
            self.publish(new);
            return None;
        };
        let wait = held.time_left().saturating_sub(held.life().mul_f64(SWITCH_BEFORE_END));
        tracing::info!(
            identity = %self.identity, wait = %brief(wait),
            "CA root rotated; keeping the old-root certificate until the switch"
        );
        match held.with_trust(certificates.current_trust(&self.identity)) {
            Ok(updated) => self.publish(updated),
            Err(error) => tracing::warn!(identity = %self.identity, %error, "the new root cannot be trusted yet"),
        }
        Some(Successor { credentials: new, present_at: Instant::now() + wait })
    }

    /// Makes this certificate the one in use.
    pub(super) fn publish(&self, credentials: Credentials) {
        self.certificates.metrics.set_expiry(&self.identity, credentials.not_after);
        let credentials = Arc::new(credentials);
        self.state.send_replace(CertificateState {
            credentials: Some(credentials.clone()),
            error: None,
            retry_at: None,
        });
        // If the revocation list changed while these were built, the rebuild for that change did not include them.
        if !credentials.is_current() {
            self.certificates.rebuild(|identity| *identity == self.identity);
        }
    }

    /// Counts and logs a failed request. A CA refuses identities of pods that it has not learned of yet, or no longer
    /// has; that is not worth a warning.
    fn report_failure(&self, error: &FetchError, retry: Duration, is_new_identity: bool) {
        self.certificates.metrics.failures.inc();
        let text = error.to_string();
        // Repeated failures are one change.
        if self.state.borrow().error.as_ref() != Some(&text) {
            let text = format!("The CA issued no certificate; one that is held stays in use: {text}.");
            self.certificates.metrics.note(&self.identity, text);
        }
        let is_refused = matches!(error, FetchError::Authority(error) if error.is_refusal());
        let is_first = is_new_identity && self.state.borrow().credentials.is_none();
        if is_refused && (is_first || !self.certificates.is_wanted(&self.identity)) {
            tracing::debug!(identity = %self.identity, %error, retry = %brief(retry), "the CA does not know the pod");
        } else {
            tracing::warn!(
                identity = %self.identity, %error, retry = %brief(retry),
                "certificate request failed; a certificate that is held stays in use"
            );
        }
    }

    /// Waits until the CA should be asked again. Presents the successor when its time comes.
    async fn wait(&self, wait: &Wait, successor: &mut Option<Successor>) -> Wake {
        let (started, mut pod_arrived) = (Instant::now(), false);
        let (mut time, mut clock, mut distrust) = (started, SystemTime::now(), false);
        loop {
            let now = Instant::now();
            let due = successor.take_if(|successor| successor.present_at <= now || self.valid().is_none());
            if let Some(Successor { credentials, .. }) = due {
                match credentials.with_trust(self.certificates.current_trust(&self.identity)) {
                    Ok(credentials) => self.publish(credentials),
                    // It expired before it was presented, so another one is needed now.
                    Err(_) => return Wake::Time,
                }
            }
            let clock_was_set = clock_jumped(time.elapsed(), clock);
            let held = self.state.borrow().credentials.clone();
            let has_ended = held.as_ref().is_some_and(|held| !held.is_valid()) && wait.roots_at.is_some();
            if wait.until <= now || has_ended || clock_was_set {
                return if pod_arrived { Wake::PodArrived } else { Wake::Time };
            }
            if pod_arrived && started + RETRY_MIN <= now {
                return Wake::PodArrived;
            }
            (time, clock) = (now, SystemTime::now());
            let mut step = (wait.until - now).min(CLOCK_CHECK);
            if let Some(Successor { present_at, .. }) = successor {
                step = step.min(present_at.saturating_duration_since(now));
            }
            if pod_arrived {
                step = step.min(started + RETRY_MIN - now);
            }
            if let Some(at) = wait.roots_at.filter(|_| distrust) {
                if at <= now {
                    self.certificates.metrics.note(
                        &self.identity,
                        "A peer's root is unknown, or the certificate is revoked: it is renewed early.".to_owned(),
                    );
                    tracing::info!(
                        identity = %self.identity,
                        "a peer's root is unknown, or this certificate is revoked; renewing early"
                    );
                    return Wake::Trust;
                }
                step = step.min(at - now);
            }
            let distrusted = async {
                match &held {
                    Some(held) => tokio::select! { () = held.unknown_root() => {}, () = held.own_revoked() => {} },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = tokio::time::sleep(step) => {}
                () = distrusted, if !distrust => distrust = true,
                // With a short delay, so that many pods that come together cause one request.
                () = self.urgency.pod_arrived.notified(), if !pod_arrived && self.valid().is_none() => {
                    pod_arrived = true;
                    self.state.send_modify(|state| state.retry_at = None);
                }
            }
        }
    }
}

/// Whether the clock has moved differently from elapsed time: it was set, or the machine slept.
fn clock_jumped(elapsed: Duration, since: SystemTime) -> bool {
    match since.elapsed() {
        Ok(by_clock) => by_clock.abs_diff(elapsed) > CLOCK_JUMP,
        Err(backwards) => backwards.duration() > CLOCK_JUMP,
    }
}

/// Time until renewal: half of the certificate's life, times a jitter.
fn renewal_wait(life: Duration, jitter: f64) -> Duration {
    (life / 2).mul_f64(jitter)
}
