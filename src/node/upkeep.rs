//! Keeping a pod's rules in place: written, verified from inside, verified again every 30 s, and looked at whenever the
//! kernel tells of a change in the namespace.

use super::capture::{Capturer, Listening};
use super::capture_check::CHECK_EVERY;
use super::error::CaptureError;
use super::nft::{self, Listing};
use super::preexisting::{Preexisting, Uncaptured};
use super::redirect;
use super::spec::PodSpec;
use super::status::{Board, Observations};
use super::{legs, routes};
use crate::sys::changes::{Changes, Seen};
use crate::sys::counter::{self, Family};
use crate::sys::netns::Netns;
use crate::task::backoff::Backoff;
use parking_lot::Mutex;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Time between rewritings of the rules: a probe does not see every rule.
const REWRITE_EVERY: Duration = Duration::from_secs(300);
/// Time between attempts that fail.
const RETRY: Duration = Duration::from_secs(5);
/// How long what changes is let settle before it is looked at: transactions come in bursts.
const SETTLE: Duration = Duration::from_millis(100);
/// How often more is heard before what was heard is heeded: a pod may make changes without end.
const MORE_MAX: usize = 16;
/// Waits between repairs where somebody undoes them again and again.
const REPAIRS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Time between looks that found nothing: others may change their own rules all the time.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Time between looks at how many connections have come from the address of probes.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// The shortest time between two lines about rules of others in a pod.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Quiet after which the next repair is made at once again.
const QUIET: Duration = Duration::from_secs(60);

/// The state of a pod's rules.
#[derive(Debug)]
pub struct Upkeep {
    changes: Option<Changes>,
    /// What has been heard and not been heeded.
    recorded: Mutex<Seen>,
    /// A repair is due already.
    repairing: bool,
    /// A look at the tables is worth it again.
    next_look: Instant,
    write_at: Instant,
    check_at: Instant,
    /// What the kernel listed after our last writing.
    written: Option<Listing>,
    verified: bool,
    /// Preexisting from before the rules are still to be ended.
    end_preexisting: bool,
    /// Preexisting from before the rules.
    preexisting: Preexisting,
    /// What an earlier task of the pod knows of the time between, until it is in rules.
    between: Option<Arc<Uncaptured>>,
    /// Whether the rules for what we open ourselves are there.
    legs: bool,
    /// Whether what an earlier agent left has been removed, or was not there.
    taken_over: bool,
    /// Legacy tables that were there at the last look.
    legacy: Option<Vec<String>>,
    /// Something of the same priority may have come before ours: they are to come before it.
    ahead: bool,
    /// No repair before this.
    hold_off: Instant,
    repairs: Backoff,
    repaired: Instant,
    observations: Observations,
    counted_at: Option<Instant>,
    /// When rules of others were logged last.
    said_at: Option<Instant>,
}

/// Completes when our rules are no longer as they were written.
async fn redirection_changed(upkeep: &Upkeep, netns: &Netns) {
    if let (Some(changes), Some(written)) = (&upkeep.changes, &upkeep.written) {
        loop {
            let seen = changes.seen().await;
            upkeep.record(seen);
            if seen.tables && !redirect::unchanged_since(netns, written).await.is_ok_and(|(alone, _)| alone) {
                return;
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
    std::future::pending().await
}

impl Upkeep {
    /// Nothing written yet.
    pub fn new(capturer: &Capturer, listening: &Listening) -> Self {
        let netns = &listening.pod.netns;
        let opened = netns.enter(Changes::open).map_err(CaptureError::from);
        let changes = opened.and_then(|opened| opened.and_then(Changes::new).map_err(CaptureError::ChangesUnavailable));
        if let Err(error) = &changes {
            let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
            tracing::warn!(namespace, name, %error, "the pod is looked at every 30 s only");
        }
        let now = Instant::now();
        let write_at = if capturer.config.redirect { now } else { now + REWRITE_EVERY };
        Self {
            changes: changes.ok(),
            recorded: Mutex::default(),
            repairing: false,
            next_look: now,
            write_at,
            check_at: now,
            written: None,
            verified: false,
            end_preexisting: false,
            preexisting: Preexisting::default(),
            between: None,
            legs: false,
            taken_over: false,
            legacy: None,
            ahead: false,
            hold_off: now,
            repairs: Backoff::new(REPAIRS.0, REPAIRS.1),
            repaired: now,
            observations: Observations::default(),
            counted_at: None,
            said_at: None,
        }
    }

    /// Leaves connections alone that were opened while the pod was not captured.
    pub fn keep_uncaptured(&mut self, between: Arc<Uncaptured>) {
        self.between = Some(between);
    }

    /// Completes when something has changed in the namespace, and has settled. What was heard is kept until it is heeded,
    /// also where nobody waits any more.
    pub async fn changes(&self) {
        let Some(changes) = &self.changes else { return std::future::pending().await };
        if self.recorded() == Seen::default() {
            self.record(changes.seen().await);
        }
        tokio::time::sleep(SETTLE).await;
        for _ in 0..MORE_MAX {
            let Ok(more) = tokio::time::timeout(Duration::ZERO, changes.seen()).await else { break };
            self.record(more);
        }
        tokio::time::sleep_until(self.next_look).await;
    }

    fn recorded(&self) -> Seen {
        *self.recorded.lock()
    }

    fn record(&self, more: Seen) {
        let mut heard = self.recorded.lock();
        *heard = Seen {
            tables: heard.tables || more.tables,
            routes: heard.routes || more.routes,
            addresses: heard.addresses || more.addresses,
        };
    }

    /// Does what a change asks for: addresses are learned anew, rules that are not as we left them are due.
    pub async fn handle_changes(&mut self, capturer: &Capturer, listening: &Listening) {
        let seen = std::mem::take(&mut *self.recorded.lock());
        if seen.addresses {
            let before = listening.pod.addresses.load_full();
            capturer.refresh_addresses(listening).await;
            // What guests of the pod open is translated to one of its addresses, which may be the one that has gone.
            if capturer.config.redirect && *listening.pod.addresses.load_full() != *before {
                self.write_at = Instant::now().max(self.hold_off);
                self.hold_off = self.write_at + RETRY;
            }
        }
        if !capturer.role.is_active() {
            return;
        }
        if !capturer.config.redirect {
            self.check_at = Instant::now().max(self.hold_off);
            self.hold_off = Instant::now() + RETRY;
            return;
        }
        let Some(written) = self.written.as_ref().filter(|_| !self.repairing) else { return };
        self.next_look = Instant::now() + LOOK_AGAIN;
        let netns = &listening.pod.netns;
        // What cannot be listed is written anew; so is what somebody else's rules have joined, who is then named.
        let whole = match seen.tables {
            true => match redirect::unchanged_since(netns, written).await {
                Ok((alone, others)) => {
                    if others.hooks != self.observations.other_rules {
                        self.check_at = Instant::now();
                    }
                    self.note(listening, others.hooks, others.unread);
                    alone
                }
                Err(_) => false,
            },
            false => true,
        };
        let routed = !seen.routes || routes::restore(netns, listening.ipv6).await.unwrap_or(false);
        if whole && routed {
            return;
        }
        self.repairing = true;
        let now = Instant::now();
        if now.duration_since(self.repaired) > QUIET {
            self.repairs.reset();
            self.hold_off = now;
        }
        self.write_at = now.max(self.hold_off);
        self.hold_off = self.write_at + self.repairs.next();
        self.repaired = now;
        let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
        let in_ms = self.write_at.duration_since(now).as_millis();
        tracing::warn!(namespace, name, in_ms, "somebody has changed the pod's redirection; it is written again");
    }

    /// Takes note of what others have in the pod.
    fn note(&mut self, listening: &Listening, other_rules: Vec<String>, unread: Option<String>) {
        let news = !other_rules.is_empty() && other_rules != self.observations.other_rules
            || unread.is_some() && unread != self.observations.unread;
        (self.observations.other_rules, self.observations.unread) = (other_rules, unread);
        if !news || self.said_at.is_some_and(|at| at.elapsed() < SAY_EVERY) {
            return;
        }
        self.said_at = Some(Instant::now());
        let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
        match &self.observations.unread {
            Some(why) => tracing::warn!(
                namespace,
                name,
                why,
                "what other rules the pod has cannot be read; ours are written, and whether others come before them is not known"
            ),
            None => {
                let rules = self.observations.other_rules.join("; ");
                tracing::warn!(namespace, name, rules, "other rules in the pod may take traffic before ours do");
            }
        }
    }

    /// What is known of the pod beside its state.
    pub fn observations(&mut self, capturer: &Capturer, listening: &Listening) -> &Observations {
        if capturer.marks_kubelet_probes() && self.counted_at.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted_at = Some(Instant::now());
            let count = || counter::packets(Family::Inet, redirect::TABLE, redirect::PROBE_COUNTER);
            if let Ok(Ok(packets)) = listening.pod.netns.enter(count) {
                self.observations.probe_connections = packets;
            }
        }
        &self.observations
    }

    /// What the rules should be has changed: they are written and verified at the next occasion.
    pub fn rewrite_soon(&mut self) {
        self.write_at = Instant::now();
        self.check_at = self.write_at;
    }

    /// A verification is due at the next occasion.
    pub fn check_soon(&mut self) {
        self.verified = false;
        self.check_at = Instant::now();
    }

    /// Whether the last look found everything in place.
    pub fn verified(&self) -> bool {
        self.verified
    }

    /// When something is due.
    pub fn due(&self) -> Instant {
        self.write_at.min(self.check_at)
    }

    /// Does what is due; whether the pod has been verified now.
    pub async fn maintain(
        &mut self,
        capturer: &Capturer,
        board: &Board,
        spec: &PodSpec,
        listening: &Listening,
    ) -> Result<bool, CaptureError> {
        if capturer.config.redirect {
            self.watch_legacy_tables(&listening.pod.netns);
        }
        let now = Instant::now();
        if now >= self.check_at && capturer.serve_dns(spec, listening) {
            self.write_at = now;
            self.legs = false;
        }
        if now < self.due() {
            return Ok(false);
        }
        let mut result = self.write_and_check(capturer, board, spec, listening).await;
        if result.is_err() && !capturer.role.is_active() {
            // Another daemon of the node writes the rules, and verifies them.
            return Ok(false);
        }
        if let Err(CaptureError::CheckFailed(_)) = result {
            let legacy = redirect::legacy_of_istio(&listening.pod.netns);
            if !legacy.is_empty() {
                result = Err(redirect::RedirectError::Legacy(legacy.join(", ")).into());
            }
        }
        self.verified = result.is_ok();
        board.set_preexisting(&spec.uid, self.preexisting.count_open(&listening.pod));
        let raced = matches!(&result, Err(CaptureError::Redirect(redirect::RedirectError::ConcurrentChange)));
        self.check_at = Instant::now()
            + match &result {
                Ok(()) => CHECK_EVERY,
                Err(_) if raced => self.repairs.next(),
                Err(_) => RETRY,
            };
        if raced {
            self.write_at = self.check_at;
        }
        result.map(|()| true)
    }

    /// Upkeep are due again where a legacy table has come: it is asked before ours until ours are written anew.
    fn watch_legacy_tables(&mut self, netns: &Netns) {
        let Some(now) = redirect::legacy_tables(netns) else { return };
        if self.legacy.as_ref().is_some_and(|before| now.iter().any(|table| !before.contains(table))) {
            self.ahead = true;
            self.rewrite_soon();
        }
        self.legacy = Some(now);
    }

    async fn write_and_check(
        &mut self,
        capturer: &Capturer,
        board: &Board,
        spec: &PodSpec,
        listening: &Listening,
    ) -> Result<(), CaptureError> {
        let rewrite = capturer.config.redirect && Instant::now() >= self.write_at;
        if rewrite {
            self.write(capturer, board, spec, listening).await?;
        }
        if rewrite || !self.legs {
            let _permit = capturer.role.permit().ok_or(redirect::RedirectError::OnStandby)?;
            let dns = listening.dns.get().is_some();
            self.legs = legs::write(&listening.pod.netns, &capturer.node_tag, capturer.config.mark, dns).await;
        }
        let verified = tokio::select! {
            verified = capturer.check(spec, listening) => verified,
            // A probe that is lost takes two seconds; somebody changes the rules now.
            () = redirection_changed(self, &listening.pod.netns) => {
                Err(redirect::RedirectError::ConcurrentChange.into())
            }
        };
        match verified {
            Err(error) if capturer.config.redirect && capturer.role.is_active() => {
                let (namespace, name) = (&*spec.namespace, &*spec.name);
                tracing::warn!(namespace, name, %error, "a probe was lost; writing the rules again");
                // A legacy table may have come while nobody looked. Without one the chains stay: what they count is not lost.
                self.ahead = self.legacy.as_ref().is_some_and(|tables| !tables.is_empty());
                self.write(capturer, board, spec, listening).await?;
                self.observations.inbound_unverified = capturer.check(spec, listening).await?;
            }
            verified => self.observations.inbound_unverified = verified?,
        }
        Ok(())
    }

    async fn write(
        &mut self,
        capturer: &Capturer,
        board: &Board,
        spec: &PodSpec,
        listening: &Listening,
    ) -> Result<(), CaptureError> {
        let again = self.taken_over;
        self.written = None;
        self.write_at = Instant::now() + RETRY;
        let pod = &listening.pod;
        let table = match self.taken_over {
            true => None,
            false => match nft::table(&pod.netns, "inet", redirect::TABLE).await {
                // There is one, and what it spares cannot be read: nothing is spared.
                Err(nft::NftError::Unreadable(_)) => Some(Value::Array(Vec::new())),
                listed => Some(listed.map_err(redirect::RedirectError::from)?),
            },
        };
        let first = table.as_ref().is_some_and(Value::is_null);
        match &table {
            Some(table) if !first => {
                self.preexisting = Preexisting::spared_by(pod, table);
                if let Some(between) = &self.between {
                    let between = between.now(pod);
                    self.end_preexisting |= capturer.config.end_preexisting && between.spared().next().is_some();
                    self.preexisting.extend(between);
                }
            }
            Some(_) => self.preexisting = Preexisting::open_now(pod),
            None => {}
        }
        self.end_preexisting |= first && capturer.config.end_preexisting;
        let spared = if capturer.config.end_preexisting { Vec::new() } else { self.preexisting.spared().collect() };
        let written =
            capturer.redirect(spec, listening, spared, self.taken_over, std::mem::take(&mut self.ahead)).await?;
        let redirect::Installed { istio, listing, hooks, unread } = written;
        self.between = None;
        self.note(listening, hooks, unread);
        if std::mem::take(&mut self.end_preexisting) {
            self.preexisting.end(pod);
        }
        if !istio.names.is_empty() {
            let (namespace, name) = (&*spec.namespace, &*spec.name);
            let names = istio.names.into_iter().collect::<Vec<_>>().join(", ");
            tracing::info!(namespace, name, removed = names, "the pod was captured by istio-cni; taken over");
        }
        self.taken_over = true;
        self.written = Some(listing);
        self.write_at = Instant::now() + REWRITE_EVERY;
        self.repairing = false;
        board.count_rewrite(again);
        Ok(())
    }
}
