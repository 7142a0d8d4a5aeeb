//! Keeping a pod's rules in place: written, verified from inside, verified again every 30 s, and looked at whenever the
//! kernel tells of a change in the namespace.

use super::capture::{Capturer, Listening};
use super::error::CaptureError;
use super::nft::{self, Listing};
use super::preexisting::{Connections, Uncaptured};
use super::redirect;
use super::spec::PodSpec;
use super::status::{Board, Noted};
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

/// Time between verifications of a captured pod.
const VERIFY_EVERY: Duration = Duration::from_secs(30);
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
pub struct Rules {
    changes: Option<Changes>,
    /// What has been heard and not been heeded.
    heard: Mutex<Seen>,
    /// A repair is due already.
    repairing: bool,
    /// A look at the tables is worth it again.
    look_at: Instant,
    write_at: Instant,
    verify_at: Instant,
    /// What the kernel listed after our last writing.
    written: Option<Listing>,
    verified: bool,
    /// Connections from before the rules are still to be ended.
    end_earlier: bool,
    /// Connections from before the rules.
    earlier: Connections,
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
    noted: Noted,
    counted_at: Option<Instant>,
    /// When rules of others were logged last.
    said_at: Option<Instant>,
}

/// Completes when our rules are no longer as they were written.
async fn foreign_change(rules: &Rules, netns: &Netns) {
    if let (Some(changes), Some(written)) = (&rules.changes, &rules.written) {
        loop {
            let seen = changes.seen().await;
            rules.hear(seen);
            if seen.tables && !redirect::is_alone_with(netns, written).await.is_ok_and(|(alone, _)| alone) {
                return;
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
    std::future::pending().await
}

impl Rules {
    /// Nothing written yet.
    pub fn new(capturer: &Capturer, listening: &Listening) -> Self {
        let netns = &listening.pod.netns;
        let opened = netns.enter(Changes::open).map_err(CaptureError::from);
        let changes = opened.and_then(|opened| opened.and_then(Changes::new).map_err(CaptureError::Deaf));
        if let Err(error) = &changes {
            let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
            tracing::warn!(namespace, name, %error, "the pod is looked at every 30 s only");
        }
        let now = Instant::now();
        let write_at = if capturer.config.redirect { now } else { now + REWRITE_EVERY };
        Self {
            changes: changes.ok(),
            heard: Mutex::default(),
            repairing: false,
            look_at: now,
            write_at,
            verify_at: now,
            written: None,
            verified: false,
            end_earlier: false,
            earlier: Connections::default(),
            between: None,
            legs: false,
            taken_over: false,
            legacy: None,
            ahead: false,
            hold_off: now,
            repairs: Backoff::new(REPAIRS.0, REPAIRS.1),
            repaired: now,
            noted: Noted::default(),
            counted_at: None,
            said_at: None,
        }
    }

    /// Leaves connections alone that were opened while the pod was not captured.
    pub fn spare(&mut self, between: Arc<Uncaptured>) {
        self.between = Some(between);
    }

    /// Completes when something has changed in the namespace, and has settled. What was heard is kept until it is heeded,
    /// also where nobody waits any more.
    pub async fn changes(&self) {
        let Some(changes) = &self.changes else { return std::future::pending().await };
        if self.heard() == Seen::default() {
            self.hear(changes.seen().await);
        }
        tokio::time::sleep(SETTLE).await;
        for _ in 0..MORE_MAX {
            let Ok(more) = tokio::time::timeout(Duration::ZERO, changes.seen()).await else { break };
            self.hear(more);
        }
        tokio::time::sleep_until(self.look_at).await;
    }

    fn heard(&self) -> Seen {
        *self.heard.lock()
    }

    fn hear(&self, more: Seen) {
        let mut heard = self.heard.lock();
        *heard = Seen {
            tables: heard.tables || more.tables,
            routes: heard.routes || more.routes,
            addresses: heard.addresses || more.addresses,
        };
    }

    /// Does what a change asks for: addresses are learned anew, rules that are not as we left them are due.
    pub async fn heed(&mut self, capturer: &Capturer, listening: &Listening) {
        let seen = std::mem::take(&mut *self.heard.lock());
        if seen.addresses {
            let before = listening.pod.addresses.load_full();
            capturer.look_at_addresses(listening).await;
            // What guests of the pod open is translated to one of its addresses, which may be the one that has gone.
            if capturer.config.redirect && *listening.pod.addresses.load_full() != *before {
                self.write_at = Instant::now().max(self.hold_off);
                self.hold_off = self.write_at + RETRY;
            }
        }
        if !capturer.turn.is_ours() {
            return;
        }
        if !capturer.config.redirect {
            self.verify_at = Instant::now().max(self.hold_off);
            self.hold_off = Instant::now() + RETRY;
            return;
        }
        let Some(written) = self.written.as_ref().filter(|_| !self.repairing) else { return };
        self.look_at = Instant::now() + LOOK_AGAIN;
        let netns = &listening.pod.netns;
        // What cannot be listed is written anew; so is what somebody else's rules have joined, who is then named.
        let whole = match seen.tables {
            true => match redirect::is_alone_with(netns, written).await {
                Ok((alone, others)) => {
                    if others.hooks != self.noted.other_rules {
                        self.verify_at = Instant::now();
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
        let news = !other_rules.is_empty() && other_rules != self.noted.other_rules
            || unread.is_some() && unread != self.noted.unread;
        (self.noted.other_rules, self.noted.unread) = (other_rules, unread);
        if !news || self.said_at.is_some_and(|at| at.elapsed() < SAY_EVERY) {
            return;
        }
        self.said_at = Some(Instant::now());
        let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
        match &self.noted.unread {
            Some(why) => tracing::warn!(
                namespace,
                name,
                why,
                "what other rules the pod has cannot be read; ours are written, and whether others come before them is not known"
            ),
            None => {
                let rules = self.noted.other_rules.join("; ");
                tracing::warn!(namespace, name, rules, "other rules in the pod may take traffic before ours do");
            }
        }
    }

    /// What is known of the pod beside its state.
    pub fn noted(&mut self, capturer: &Capturer, listening: &Listening) -> &Noted {
        if capturer.gives_probes_an_address() && self.counted_at.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted_at = Some(Instant::now());
            let count = || counter::packets(Family::Inet, redirect::TABLE, redirect::PROBED);
            if let Ok(Ok(packets)) = listening.pod.netns.enter(count) {
                self.noted.probe_connections = packets;
            }
        }
        &self.noted
    }

    /// What the rules should be has changed: they are written and verified at the next occasion.
    pub fn change_soon(&mut self) {
        self.write_at = Instant::now();
        self.verify_at = self.write_at;
    }

    /// A verification is due at the next occasion.
    pub fn verify_soon(&mut self) {
        self.verified = false;
        self.verify_at = Instant::now();
    }

    /// Whether the last look found everything in place.
    pub fn verified(&self) -> bool {
        self.verified
    }

    /// When something is due.
    pub fn due(&self) -> Instant {
        self.write_at.min(self.verify_at)
    }

    /// Does what is due; whether the pod has been verified now.
    pub async fn see_to(
        &mut self,
        capturer: &Capturer,
        board: &Board,
        spec: &PodSpec,
        listening: &Listening,
    ) -> Result<bool, CaptureError> {
        if capturer.config.redirect {
            self.look_for_legacy(&listening.pod.netns);
        }
        let now = Instant::now();
        if now >= self.verify_at && capturer.take_dns(spec, listening) {
            self.write_at = now;
            self.legs = false;
        }
        if now < self.due() {
            return Ok(false);
        }
        let mut result = self.write_and_verify(capturer, board, spec, listening).await;
        if result.is_err() && !capturer.turn.is_ours() {
            // Another daemon of the node writes the rules, and verifies them.
            return Ok(false);
        }
        if let Err(CaptureError::Verify(_)) = result {
            let legacy = redirect::legacy_of_istio(&listening.pod.netns);
            if !legacy.is_empty() {
                result = Err(redirect::RedirectError::Legacy(legacy.join(", ")).into());
            }
        }
        self.verified = result.is_ok();
        board.earlier(&spec.uid, self.earlier.left(&listening.pod));
        let raced = matches!(&result, Err(CaptureError::Redirect(redirect::RedirectError::Raced)));
        self.verify_at = Instant::now()
            + match &result {
                Ok(()) => VERIFY_EVERY,
                Err(_) if raced => self.repairs.next(),
                Err(_) => RETRY,
            };
        if raced {
            self.write_at = self.verify_at;
        }
        result.map(|()| true)
    }

    /// Rules are due again where a legacy table has come: it is asked before ours until ours are written anew.
    fn look_for_legacy(&mut self, netns: &Netns) {
        let Some(now) = redirect::legacy_tables(netns) else { return };
        if self.legacy.as_ref().is_some_and(|before| now.iter().any(|table| !before.contains(table))) {
            self.ahead = true;
            self.change_soon();
        }
        self.legacy = Some(now);
    }

    async fn write_and_verify(
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
            let _permit = capturer.turn.permit().ok_or(redirect::RedirectError::NotOurTurn)?;
            let dns = listening.names.get().is_some();
            self.legs = legs::write(&listening.pod.netns, &capturer.whose, capturer.config.mark, dns).await;
        }
        let verified = tokio::select! {
            verified = capturer.verify(spec, listening) => verified,
            // A probe that is lost takes two seconds; somebody changes the rules now.
            () = foreign_change(self, &listening.pod.netns) => {
                Err(redirect::RedirectError::Raced.into())
            }
        };
        match verified {
            Err(error) if capturer.config.redirect && capturer.turn.is_ours() => {
                let (namespace, name) = (&*spec.namespace, &*spec.name);
                tracing::warn!(namespace, name, %error, "a probe was lost; writing the rules again");
                // A legacy table may have come while nobody looked. Without one the chains stay: what they count is not lost.
                self.ahead = self.legacy.as_ref().is_some_and(|tables| !tables.is_empty());
                self.write(capturer, board, spec, listening).await?;
                self.noted.inbound_unverified = capturer.verify(spec, listening).await?;
            }
            verified => self.noted.inbound_unverified = verified?,
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
                self.earlier = Connections::spared_by(pod, table);
                if let Some(between) = &self.between {
                    let between = between.now(pod);
                    self.end_earlier |= capturer.config.end_earlier && between.spared().next().is_some();
                    self.earlier.extend(between);
                }
            }
            Some(_) => self.earlier = Connections::open_now(pod),
            None => {}
        }
        self.end_earlier |= first && capturer.config.end_earlier;
        let spared = if capturer.config.end_earlier { Vec::new() } else { self.earlier.spared().collect() };
        let written =
            capturer.redirect(spec, listening, spared, self.taken_over, std::mem::take(&mut self.ahead)).await?;
        let redirect::Written { foreign, listing, hooks, unread } = written;
        self.between = None;
        self.note(listening, hooks, unread);
        if std::mem::take(&mut self.end_earlier) {
            self.earlier.end(pod);
        }
        if !foreign.names.is_empty() {
            let (namespace, name) = (&*spec.namespace, &*spec.name);
            let names = foreign.names.into_iter().collect::<Vec<_>>().join(", ");
            tracing::info!(namespace, name, removed = names, "the pod was captured by istio-cni; taken over");
        }
        self.taken_over = true;
        self.written = Some(listing);
        self.write_at = Instant::now() + REWRITE_EVERY;
        self.repairing = false;
        board.written(again);
        Ok(())
    }
}
