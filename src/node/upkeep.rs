//! Keeps a pod's redirection in place: writes it, checks it regularly, and repairs it when the kernel announces that
//! another program has changed the rules, routes or addresses in the pod.

use super::capture::{Capturer, Listening};
use super::capture_check::CHECK_EVERY;
use super::config::PodSource;
use super::error::CaptureError;
use super::nft::{self, Listing};
use super::preexisting::{Preexisting, Uncaptured};
use super::redirect;
use super::spec::PodSpec;
use super::status::{Board, Observations};
use super::{legs, routes};
use crate::sys::netns::Netns;
use crate::sys::netns_watch::{NetnsChange, NetnsWatch};
use crate::sys::nftables::{self, Family};
use crate::task::backoff::Backoff;
use parking_lot::Mutex;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Time between rewrites of the rules: a capture check does not depend on every rule.
const REWRITE_EVERY: Duration = Duration::from_secs(300);
/// Time between failed attempts, and between checks in dedicated mode.
const RETRY: Duration = Duration::from_secs(5);
/// How long to wait for further changes: transactions come in bursts.
const SETTLE: Duration = Duration::from_millis(100);
/// How many further changes are collected before they are handled: a pod may make changes without end.
const MORE_MAX: usize = 16;
/// First and longest wait between repairs, if another program undoes them again and again.
const REPAIRS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Time between comparisons that found no change: other programs may change their own rules all the time.
const COMPARE_AGAIN: Duration = Duration::from_millis(500);
/// Time between reads of the counter of kubelet probes.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// Shortest time between two log lines about other rules in one pod.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Why the rules beside ours are unknown in the daemon's own network namespace.
const NO_RIGHTS: &str =
    "in dedicated mode the daemon has no rights over its network namespace: it neither reads nor repairs the rules";
/// Time without a repair after which the next one is made at once.
const QUIET: Duration = Duration::from_secs(60);

/// State of a pod's redirection.
#[derive(Debug)]
pub struct Upkeep {
    changes: Option<NetnsWatch>,
    /// Changes that have been announced and not handled yet.
    recorded: Mutex<NetnsChange>,
    /// A repair is scheduled.
    repairing: bool,
    /// No comparison of the tables before this.
    next_comparison: Instant,
    write_at: Instant,
    check_at: Instant,
    /// The table as the kernel listed it after the last write.
    written: Option<Listing>,
    verified: bool,
    /// Pre-existing connections are still to be ended.
    end_preexisting: bool,
    /// Pre-existing connections.
    preexisting: Preexisting,
    /// Connections that an earlier task of the pod released, until they are in the rules.
    uncaptured: Option<Arc<Uncaptured>>,
    /// Whether the table for the daemon's own connections has been written.
    legs: bool,
    /// Whether the rules of an earlier istio-cni have been removed, or there were none.
    taken_over: bool,
    /// Legacy iptables tables at the last check.
    legacy: Option<Vec<String>>,
    /// A chain of the same priority may precede ours, so the next write creates ours again.
    recreate_chains: bool,
    /// No repair before this.
    hold_off: Instant,
    repairs: Backoff,
    repaired: Instant,
    observations: Observations,
    counted_at: Option<Instant>,
    /// When other rules were logged last.
    logged_at: Option<Instant>,
}

/// Completes when our table is no longer as it was written.
async fn redirection_changed(upkeep: &Upkeep, netns: &Netns) {
    if let (Some(changes), Some(written)) = (&upkeep.changes, &upkeep.written) {
        loop {
            let seen = changes.changed().await;
            upkeep.record(seen);
            if seen.tables && !redirect::unchanged_since(netns, written).await.is_ok_and(|(unchanged, _)| unchanged) {
                return;
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
    std::future::pending().await
}

/// Watches the pod's network namespace, if the kernel allows it.
fn watch(listening: &Listening) -> Option<NetnsWatch> {
    let opened = listening.pod.netns.enter(NetnsWatch::open).map_err(CaptureError::from);
    let changes = opened.and_then(|opened| opened.and_then(NetnsWatch::new).map_err(CaptureError::ChangesUnavailable));
    let complain = |error: &CaptureError| {
        let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
        tracing::warn!(namespace, name, %error, "changes in the pod's network namespace are not detected at once");
    };
    changes.inspect_err(complain).ok()
}

impl Upkeep {
    /// A redirection that has not been written yet.
    pub fn new(capturer: &Capturer, listening: &Listening) -> Self {
        let unread = match &capturer.config.source {
            PodSource::Own(_) => Some(NO_RIGHTS.to_owned()),
            _ => None,
        };
        // Without rights the kernel announces nothing.
        let changes = if unread.is_none() { watch(listening) } else { None };
        let now = Instant::now();
        let write_at = if capturer.config.redirect { now } else { now + REWRITE_EVERY };
        Self {
            changes,
            recorded: Mutex::default(),
            repairing: false,
            next_comparison: now,
            write_at,
            check_at: now,
            written: None,
            verified: false,
            end_preexisting: false,
            preexisting: Preexisting::default(),
            uncaptured: None,
            legs: false,
            taken_over: false,
            legacy: None,
            recreate_chains: false,
            hold_off: now,
            repairs: Backoff::new(REPAIRS.0, REPAIRS.1),
            repaired: now,
            observations: Observations { unread, ..Observations::default() },
            counted_at: None,
            logged_at: None,
        }
    }

    /// Lets connections through that were opened while the pod was not captured.
    pub fn keep_uncaptured(&mut self, uncaptured: Arc<Uncaptured>) {
        self.uncaptured = Some(uncaptured);
    }

    /// Completes when something in the network namespace has changed and no further change follows. The change stays
    /// recorded until [`Self::handle_changes`], also if this is cancelled.
    pub async fn changes(&self) {
        let Some(changes) = &self.changes else { return std::future::pending().await };
        if self.recorded() == NetnsChange::default() {
            self.record(changes.changed().await);
        }
        tokio::time::sleep(SETTLE).await;
        for _ in 0..MORE_MAX {
            let Ok(more) = tokio::time::timeout(Duration::ZERO, changes.changed()).await else { break };
            self.record(more);
        }
        tokio::time::sleep_until(self.next_comparison).await;
    }

    fn recorded(&self) -> NetnsChange {
        *self.recorded.lock()
    }

    fn record(&self, more: NetnsChange) {
        let mut recorded = self.recorded.lock();
        *recorded = NetnsChange {
            tables: recorded.tables || more.tables,
            routes: recorded.routes || more.routes,
            addresses: recorded.addresses || more.addresses,
        };
    }

    /// Handles the recorded changes: reads the addresses again, and schedules a repair if the rules or routes are not
    /// as they were written.
    pub async fn handle_changes(&mut self, capturer: &Capturer, listening: &Listening) {
        let seen = std::mem::take(&mut *self.recorded.lock());
        if seen.addresses {
            let before = listening.pod.addresses.load_full();
            capturer.refresh_addresses(listening).await;
            // Connections from virtual interfaces are translated to one of the pod's addresses, which may be the one
            // that has gone.
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
        self.next_comparison = Instant::now() + COMPARE_AGAIN;
        let netns = &listening.pod.netns;
        // A table that cannot be listed is written again. So is ours if rules of another agent are beside it; the write
        // then reports that agent.
        let tables_intact = match seen.tables {
            true => match redirect::unchanged_since(netns, written).await {
                Ok((unchanged, others)) => {
                    if others.hooks != self.observations.other_rules {
                        self.check_at = Instant::now();
                    }
                    self.record_other_rules(listening, others.hooks, others.unread);
                    unchanged
                }
                Err(_) => false,
            },
            false => true,
        };
        let routes_intact = !seen.routes || routes::restore(netns, listening.ipv6).await.unwrap_or(false);
        if tables_intact && routes_intact {
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
        tracing::warn!(
            namespace,
            name,
            in_ms,
            "the pod's redirection was changed by another program; writing it again"
        );
    }

    /// Records the other rules in the pod, and logs them if they are new.
    fn record_other_rules(&mut self, listening: &Listening, other_rules: Vec<String>, unread: Option<String>) {
        let news = !other_rules.is_empty() && other_rules != self.observations.other_rules
            || unread.is_some() && unread != self.observations.unread;
        (self.observations.other_rules, self.observations.unread) = (other_rules, unread);
        if !news || self.logged_at.is_some_and(|at| at.elapsed() < LOG_EVERY) {
            return;
        }
        self.logged_at = Some(Instant::now());
        let (namespace, name) = (&*listening.pod.namespace, &*listening.pod.name);
        match &self.observations.unread {
            Some(why) => tracing::warn!(
                namespace,
                name,
                why,
                "other rules in the pod cannot be read; ours are written, but others may precede them"
            ),
            None => {
                let rules = self.observations.other_rules.join("; ");
                tracing::warn!(namespace, name, rules, "other rules in the pod may take traffic before ours");
            }
        }
    }

    /// What is known about the pod beside its state.
    pub fn observations(&mut self, capturer: &Capturer, listening: &Listening) -> &Observations {
        if self.counted_at.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted_at = Some(Instant::now());
            let counters = [redirect::PROBE_COUNTER, redirect::UDP_COUNTER, redirect::OTHER_COUNTER];
            let count = |name| nftables::packets(Family::Inet, redirect::TABLE, name).ok();
            if let Ok([probed, udp, other]) = listening.pod.netns.enter(|| counters.map(count)) {
                if let Some(packets) = probed.filter(|_| capturer.marks_kubelet_probes()) {
                    self.observations.probe_connections = packets;
                }
                (self.observations.untunnelled_udp, self.observations.untunnelled_other) = (udp, other);
            }
        }
        &self.observations
    }

    /// Schedules a rewrite and a check at the next call of [`Self::maintain`], because the redirection should change.
    pub fn rewrite_soon(&mut self) {
        self.write_at = Instant::now();
        self.check_at = self.write_at;
    }

    /// Schedules a check at the next call of [`Self::maintain`].
    pub fn check_soon(&mut self) {
        self.verified = false;
        self.check_at = Instant::now();
    }

    /// Whether the last check succeeded.
    pub fn verified(&self) -> bool {
        self.verified
    }

    /// When the next work is due.
    pub fn due(&self) -> Instant {
        self.write_at.min(self.check_at)
    }

    /// Does the work that is due. Returns whether the pod has been checked now.
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
            // Another daemon of the node writes the rules and checks them.
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
                // Where nothing announces changes, a check is all that notices them.
                Ok(()) if matches!(capturer.config.source, PodSource::Own(_)) => RETRY,
                Ok(()) => CHECK_EVERY,
                Err(_) if raced => self.repairs.next(),
                Err(_) => RETRY,
            };
        if raced {
            self.write_at = self.check_at;
        }
        result.map(|()| true)
    }

    /// Schedules a rewrite if a legacy iptables table has appeared: the kernel calls it before ours until ours is
    /// created again.
    fn watch_legacy_tables(&mut self, netns: &Netns) {
        let Some(now) = redirect::legacy_tables(netns) else { return };
        if self.legacy.as_ref().is_some_and(|before| now.iter().any(|table| !before.contains(table))) {
            self.recreate_chains = true;
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
        if let PodSource::Own(_) = capturer.config.source {
            capturer.refresh_addresses(listening).await;
        } else if rewrite || !self.legs {
            let _guard = capturer.role.write_guard().ok_or(redirect::RedirectError::OnStandby)?;
            let dns = listening.dns.get().is_some();
            self.legs = legs::write(&listening.pod.netns, &capturer.node_tag, capturer.config.mark, dns).await;
        }
        let verified = tokio::select! {
            verified = capturer.check(spec, listening) => verified,
            // A lost check connection takes two seconds; this notices a change of the rules at once.
            () = redirection_changed(self, &listening.pod.netns) => {
                Err(redirect::RedirectError::ConcurrentChange.into())
            }
        };
        match verified {
            Err(error) if capturer.config.redirect && capturer.role.is_active() => {
                let (namespace, name) = (&*spec.namespace, &*spec.name);
                tracing::warn!(namespace, name, %error, "the capture check failed; writing the rules again");
                // A legacy table may have come in between. Without one the chains stay, and their counters with them.
                self.recreate_chains = self.legacy.as_ref().is_some_and(|tables| !tables.is_empty());
                self.repairing |= matches!(error, CaptureError::Redirect(redirect::RedirectError::ConcurrentChange));
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
                // There is a table, but its pre-existing connections cannot be read: none are let through.
                Err(nft::NftError::Unreadable(_)) => Some(Value::Array(Vec::new())),
                listed => Some(listed.map_err(redirect::RedirectError::from)?),
            },
        };
        let first = table.as_ref().is_some_and(Value::is_null);
        match &table {
            Some(table) if !first => {
                self.preexisting = Preexisting::spared_by(pod, table);
                if let Some(uncaptured) = &self.uncaptured {
                    let uncaptured = uncaptured.now(pod);
                    self.end_preexisting |= capturer.config.end_preexisting && uncaptured.spared().next().is_some();
                    self.preexisting.extend(uncaptured);
                }
            }
            Some(_) => self.preexisting = Preexisting::open_now(pod),
            None => {}
        }
        self.end_preexisting |= first && capturer.config.end_preexisting;
        let spared = if capturer.config.end_preexisting { Vec::new() } else { self.preexisting.spared().collect() };
        let written = capturer
            .redirect(spec, listening, spared, self.taken_over, std::mem::take(&mut self.recreate_chains))
            .await?;
        let redirect::Installed { istio, listing, hooks, unread } = written;
        self.uncaptured = None;
        self.record_other_rules(listening, hooks, unread);
        if std::mem::take(&mut self.end_preexisting) {
            self.preexisting.end(pod);
        }
        if !istio.names.is_empty() {
            let (namespace, name) = (&*spec.namespace, &*spec.name);
            let names = istio.names.into_iter().collect::<Vec<_>>().join(", ");
            tracing::info!(namespace, name, removed = names, "took over the pod from istio-cni");
        }
        self.taken_over = true;
        self.written = Some(listing);
        self.write_at = Instant::now() + REWRITE_EVERY;
        let repair = std::mem::take(&mut self.repairing);
        if again {
            board.count_rewrite(repair);
        }
        Ok(())
    }
}
