//! Keeping one identity's certificate fresh: when to ask the CA, and what to present meanwhile.
//!
//! ```text
//!   ask ──signed──► present, wait for renewal ──► ask …
//!    │ ▲       └──by a root that is new──► present what is held until shortly before its end, then this
//!    │ └── wait: longer and longer, but sooner towards the end of what is held
//!    └──error──┘
//! ```
//! Peers renew at half life, so they know a root that is new before anybody presents a certificate of it.

use super::authority::AuthorityError;
use super::ca_queue::Urgency;
use super::credentials::{Credentials, CredentialsError};
use super::store::{State, Store};
use crate::mesh::SpiffeName;
use crate::task::backoff::Backoff;
use crate::telemetry::log::brief;
use futures_util::FutureExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::Instant;

/// First wait after a failed fetch; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest wait after a failed fetch.
const RETRY_MAX: Duration = Duration::from_secs(150);
/// How often the clock is looked at while waiting: it may be set, and the machine may have slept.
const CLOCK_LOOK: Duration = Duration::from_secs(10);
/// How far the clock may go otherwise than time does before everything is looked at again.
const CLOCK_JUMP: Duration = Duration::from_secs(20);
/// How long a CA may refuse a new identity before that is worth a warning: it hears of pods a moment after we do.
const NEW_FOR: Duration = Duration::from_secs(20);
/// How long before its end, as a part of its life, a certificate is given up for one of a root that is new.
const SWITCH_BEFORE_END: f64 = 0.04;
/// When a certificate is renewed, as a part of half its life: at random between these. The later end leaves who renews
/// last in a rotation time to do so before anybody presents a certificate of the new root.
const RENEWAL: std::ops::Range<f64> = 0.8..0.92;
/// Shortest time between renewals for the sake of a peer whose root we do not know; doubles while they bring nothing new.
const ROOTS_MIN: Duration = Duration::from_secs(30);
/// Longest such time: a stranger must not make us ask the CA for ever.
const ROOTS_MAX: Duration = Duration::from_secs(3600);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// One identity.
pub(super) struct Renewal {
    pub(super) store: Arc<Store>,
    pub(super) identity: SpiffeName,
    pub(super) out: watch::Sender<State>,
    pub(super) urgency: Arc<Urgency>,
}

/// Until when nothing needs to be done.
struct Wait {
    until: Instant,
    /// A peer's root that is not known is a reason to ask, but not before this.
    roots_at: Option<Instant>,
}

/// Why a wait is over.
#[derive(PartialEq, Eq)]
enum Why {
    Time,
    /// A peer's root is not known, or our own certificate has been revoked.
    Trust,
    /// A pod has come, and there is no certificate for it.
    Came,
}

impl Renewal {
    /// Runs until dropped.
    pub(super) async fn keep(self) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        let (begun, mut roots_wait, mut why) = (Instant::now(), ROOTS_MIN, Why::Time);
        // A certificate of a root that is new, and when it is presented.
        let mut next = None;
        loop {
            self.urgency.held.store(self.valid().is_some(), Ordering::Relaxed);
            let slot = self.store.queue.enter(&self.urgency).await;
            let fetched = self.fetch().await;
            drop(slot);
            let wait = match fetched {
                Ok((new, renewal, news)) => {
                    backoff.reset();
                    self.store.metrics.fetched.inc();
                    roots_wait = if why == Why::Trust && !news { (roots_wait * 2).min(ROOTS_MAX) } else { ROOTS_MIN };
                    let until = Instant::now() + renewal;
                    next = self.present(new);
                    Wait { until, roots_at: Some(Instant::now() + roots_wait) }
                }
                Err(error) => {
                    // One that came while the CA was asked counts as well.
                    if why == Why::Came || self.urgency.came.notified().now_or_never().is_some() {
                        backoff.reset();
                    }
                    // Sooner and sooner towards the end of what is held.
                    let left = self.valid().map(|held| held.time_left() / 4);
                    let wait = backoff.next().min(left.unwrap_or(RETRY_MAX)).max(RETRY_MIN / 2);
                    self.failed(&error, wait, begun.elapsed() < NEW_FOR);
                    let (text, retry_at) = (error.to_string(), Instant::now() + wait);
                    self.out.send_modify(|state| (state.error, state.retry_at) = (Some(text), Some(retry_at)));
                    Wait { until: retry_at, roots_at: None }
                }
            };
            why = self.wait(&wait, &mut next).await;
        }
    }

    fn valid(&self) -> Option<Arc<Credentials>> {
        self.out.borrow().valid()
    }

    /// Asks the CA: the certificate, time until it is to be renewed, and whether it brought a root that was not known.
    async fn fetch(&self) -> Result<(Credentials, Duration, bool), FetchError> {
        let signed = self.store.authority.sign(&self.identity).await?;
        let life = signed.life;
        // Judged by its own roots alone first: what others brought must not vouch for it.
        let trust = self.store.trust(&self.identity, &signed.roots);
        let credentials = Credentials::build(self.identity.clone(), self.store.next_generation(), signed, trust)?;
        let changed = self.store.roots.learn(&credentials);
        let news = changed.contains(&self.identity.trust_domain);
        self.store.rebuild(|identity| changed.contains(&identity.trust_domain));
        let credentials = credentials.trusting(self.store.known_trust(&self.identity))?;
        // By the length of its life, whatever the clocks say; but not beyond its end by ours.
        let renewal = renewal_wait(life, rand::random_range(RENEWAL)).min(credentials.time_left() / 2);
        Ok((credentials, renewal.max(Duration::from_secs(1)), news))
    }

    /// Presents new credentials; or gives them back with the time to do so, where they are of a root that peers may not
    /// know yet and what is held is still good.
    fn present(&self, new: Credentials) -> Option<(Credentials, Instant)> {
        let good = |held: &Arc<Credentials>| !self.store.revocations.lists(held.chain()) && !held.would_vouch_for(&new);
        let Some(held) = self.valid().filter(good) else {
            self.publish(new);
            return None;
        };
        let wait = held.time_left().saturating_sub(held.life().mul_f64(SWITCH_BEFORE_END));
        tracing::info!(identity = %self.identity, wait = %brief(wait), "the CA's root is a new one; presenting the certificate of the old one so long");
        match held.trusting(self.store.known_trust(&self.identity)) {
            Ok(trusting) => self.publish(trusting),
            Err(error) => tracing::warn!(identity = %self.identity, %error, "the new root cannot be used yet"),
        }
        Some((new, Instant::now() + wait))
    }

    pub(super) fn publish(&self, credentials: Credentials) {
        let ends = credentials.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.store.metrics.end_of(&self.identity).set(ends.as_secs().cast_signed());
        let credentials = Arc::new(credentials);
        self.out.send_replace(State { credentials: Some(credentials.clone()), error: None, retry_at: None });
        // Whoever made all settings anew for another list of revoked certificates did not see these.
        if !credentials.is_current() {
            self.store.rebuild(|identity| *identity == self.identity);
        }
    }

    /// Counts and says that there is no new certificate. That a CA refuses a pod it has not heard of yet, or does not have
    /// any more, is no news.
    fn failed(&self, error: &FetchError, retry: Duration, new: bool) {
        self.store.metrics.failures.inc();
        let refused = matches!(error, FetchError::Authority(error) if error.is_refusal());
        let fresh = new && self.out.borrow().credentials.is_none();
        if refused && (fresh || !self.store.is_wanted(&self.identity)) {
            tracing::debug!(identity = %self.identity, %error, retry = %brief(retry), "the CA does not know the pod");
        } else {
            tracing::warn!(identity = %self.identity, %error, retry = %brief(retry), "no new certificate; what is held stays in use");
        }
    }

    /// Waits until the CA is to be asked again.
    async fn wait(&self, wait: &Wait, next: &mut Option<(Credentials, Instant)>) -> Why {
        let (begun, mut came) = (Instant::now(), false);
        let (mut time, mut clock, mut distrust) = (begun, SystemTime::now(), false);
        loop {
            let now = Instant::now();
            if let Some((next, _)) = next.take_if(|(_, at)| *at <= now || self.valid().is_none()) {
                match next.trusting(self.store.known_trust(&self.identity)) {
                    Ok(next) => self.publish(next),
                    // It has ended before it was presented: another one is needed now.
                    Err(_) => return Why::Time,
                }
            }
            let went_off = clock_jump(time.elapsed(), clock);
            let held = self.out.borrow().credentials.clone();
            let ended = held.as_ref().is_some_and(|held| !held.is_valid()) && wait.roots_at.is_some();
            if wait.until <= now || ended || went_off {
                return if came { Why::Came } else { Why::Time };
            }
            if came && begun + RETRY_MIN <= now {
                return Why::Came;
            }
            (time, clock) = (now, SystemTime::now());
            let step = (wait.until - now).min(CLOCK_LOOK);
            let mut step = next.as_ref().map_or(step, |(_, at)| step.min(at.saturating_duration_since(now)));
            if came {
                step = step.min(begun + RETRY_MIN - now);
            }
            if let Some(at) = wait.roots_at.filter(|_| distrust) {
                if at <= now {
                    tracing::info!(identity = %self.identity, "a peer's root is not known, or our certificate is revoked; renewing");
                    return Why::Trust;
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
                // Not at once, so that many pods that come do not ask the CA as often.
                () = self.urgency.came.notified(), if !came && self.valid().is_none() => {
                    came = true;
                    self.out.send_modify(|state| state.retry_at = None);
                }
            }
        }
    }
}

/// Whether the clock has gone otherwise than time.
fn clock_jump(passed: Duration, since: SystemTime) -> bool {
    match since.elapsed() {
        Ok(by_clock) => by_clock.abs_diff(passed) > CLOCK_JUMP,
        Err(backwards) => backwards.duration() > CLOCK_JUMP,
    }
}

/// Time until renewal: half of the certificate's life, times a jitter.
fn renewal_wait(life: Duration, jitter: f64) -> Duration {
    (life / 2).mul_f64(jitter)
}
