//! Lets kubelet probes through. Connections from the node's own processes to a captured pod get a source address that
//! the pod's rules do not redirect, because a STRICT policy would refuse plaintext from the node. This takes one table
//! in the host's network namespace with a set of pod addresses. Forwarded traffic has no local socket and does not
//! match.
//!
//! The same table drops packets that arrive at the host with that source address: no other machine has it. Packets that
//! a bridge forwards between pods do not reach the host, so a table of the bridge family drops them there.

use super::active_daemon::ActiveRole;
use super::nft::{self, Listing, NftError};
use super::redirect::{PROBE_V4, PROBE_V6};
use crate::mesh::Text;
use crate::ports::{DOCTOR_SPOOF, HBONE, INBOUND_CHECK};
use crate::sys::netns::Netns;
use crate::sys::netns_watch::NetnsWatch;
use crate::sys::nftables::{self, Family};
use crate::task::Signal;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Name of our tables on the host.
pub const TABLE: &str = "culvert-probes";

/// Name of the counter of dropped packets.
const SPOOFED: &str = "spoofed";

/// Priority of the chain that drops packets with the probes' address, before all other chains; also in the bridge
/// family.
const DROPS: i32 = -300;

/// How long to wait for further changes: at a start, sixty pods may come at once.
const SETTLE: Duration = Duration::from_millis(100);
/// The table is checked this often, even without a notification.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// The pods whose kubelet probes are let through, with their addresses. A pod whose address is not visible right now
/// has none.
#[derive(Clone, Debug)]
pub struct ProbedPods {
    pods: Arc<watch::Sender<Option<ByPod>>>,
}

/// Addresses by pod uid.
type ByPod = BTreeMap<Text, Vec<IpAddr>>;

impl Default for ProbedPods {
    fn default() -> Self {
        Self { pods: Arc::new(watch::Sender::new(None)) }
    }
}

impl ProbedPods {
    /// Sets the pods. Before the first call, the host's table stays as an earlier daemon left it.
    pub fn set(&self, pods: ByPod) {
        self.pods.send_if_modified(|known| {
            let other = known.as_ref() != Some(&pods);
            *known = Some(pods);
            other
        });
    }
}

/// Maintains the host's tables.
#[derive(Debug)]
pub struct HostProbeRules {
    /// The host's network namespace.
    pub host: PathBuf,
    /// Whether IPv6 is used.
    pub ipv6: bool,
    /// 1 while the tables are as they should be.
    pub in_place: Gauge,
    /// Number of packets with the probes' address that did not come from this host.
    pub spoofed: Counter,
}

impl HostProbeRules {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "1 while the host's rules for kubelet probes are in place, else 0. Alert on 0";
        registry.register("culvert_probe_rules_in_place", help, self.in_place.clone());
        let help = "Packets dropped because they reached the host with the source address of kubelet probes. Above 0, something \
                    tries to bypass policies. Alert above 0";
        registry.register("culvert_probe_spoofs_dropped", help, self.spoofed.clone());
    }

    /// Keeps the tables in accordance with `probed` while this daemon is active, until the process begins to end. After
    /// that, a newer daemon knows better.
    pub async fn keep(self, probed: ProbedPods, role: ActiveRole, drain: Signal) {
        let (mut pods, mut role_changes) = (probed.pods.subscribe(), role.subscribe());
        let (mut written, mut said) = ((None::<Listing>, None::<Listing>), None::<String>);
        let (mut bridges, mut counted) = (None::<String>, [None; 2]);
        let changes = Netns::open(&self.host).and_then(|host| host.enter(NetnsWatch::open));
        let changes = changes.ok().and_then(|opened| opened.and_then(NetnsWatch::new).ok());
        // The entries in force, by address. An address belongs to one pod.
        let mut known: Option<BTreeMap<IpAddr, Text>> = None;
        loop {
            let heard = async {
                match &changes {
                    Some(changes) => while !changes.changed().await.tables {},
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = drain.gentle() => return,
                changed = pods.changed() => if changed.is_err() { return },
                () = heard => {}
                // Another daemon may have changed the tables in the meantime.
                changed = role_changes.changed() => {
                    if changed.is_err() { return }
                    (known, written) = (None, (None, None));
                }
                () = tokio::time::sleep(CHECK_EVERY) => {}
            }
            tokio::time::sleep(SETTLE).await;
            let Some(wanted) = pods.borrow_and_update().clone() else { continue };
            self.count(&mut counted);
            let Some(_guard) = role.write_guard() else { continue };
            let result = self.maintain(&wanted, &mut known, &mut written.0).await;
            let on_bridges = self.maintain_bridges(&mut written.1).await.err().map(|error| error.to_string());
            if let Some(error) = on_bridges.as_ref().filter(|error| bridges.as_ref() != Some(error)) {
                tracing::warn!(
                    error,
                    "pods on one bridge of this node can pretend to be the kubelet: the kernel lacks nf_tables_bridge; load it, or \
                     br_netfilter with net.bridge.bridge-nf-call-iptables=1"
                );
            }
            bridges = on_bridges;
            self.in_place.set(i64::from(result.is_ok() && bridges.is_none()));
            let error = result.err().map(|error| error.to_string());
            if let Some(error) = error.as_ref().filter(|error| said.as_ref() != Some(error)) {
                tracing::error!(
                    error,
                    "cannot write the host's rules for kubelet probes: probes of captured pods may fail"
                );
            }
            said = error;
        }
    }

    /// Drops packets with the probes' address on bridges. The host's own packets do not come in there.
    async fn maintain_bridges(&self, written: &mut Option<Listing>) -> Result<(), NftError> {
        const FAMILY: &str = "bridge";
        let host = Netns::open(&self.host)?;
        if written.is_some() && nft::listing(&host, FAMILY, TABLE).await.ok() == *written {
            return Ok(());
        }
        *written = None;
        nft::apply(&host, &drops(FAMILY)).await?;
        *written = Some(nft::listing(&host, FAMILY, TABLE).await?);
        Ok(())
    }

    /// Counts the packets that were dropped since the last call.
    fn count(&self, counted: &mut [Option<u64>; 2]) {
        let Ok(host) = Netns::open(&self.host) else { return };
        for (family, before) in [Family::Inet, Family::Bridge].into_iter().zip(counted) {
            let Ok(Ok(now)) = host.enter(|| nftables::packets(family, TABLE, SPOOFED)) else { continue };
            // The count of an earlier daemon is its own. A counter that went down was removed with its table, and began
            // anew.
            let news = before.map_or(0, |before| now.checked_sub(before).unwrap_or(now));
            *before = Some(now);
            if news > 0 {
                self.spoofed.inc_by(news);
                tracing::warn!(
                    packets = news,
                    "dropped packets with the source address of kubelet probes ({PROBE_V4}, {PROBE_V6}) that were not from this host: \
                     a machine or pod on this node's network tries to bypass policies"
                );
            }
        }
    }

    async fn maintain(
        &self,
        wanted: &ByPod,
        known: &mut Option<BTreeMap<IpAddr, Text>>,
        written: &mut Option<Listing>,
    ) -> Result<(), NftError> {
        let host = Netns::open(&self.host)?;
        let before = match known.take() {
            Some(known) => known,
            None => entries(&nft::table(&host, "inet", TABLE).await?),
        };
        let entries = merged(wanted, &before);
        let same = entries == before;
        *known = Some(entries.clone());
        let same = same && written.is_some() && nft::listing(&host, "inet", TABLE).await.ok() == *written;
        if same {
            return Ok(());
        }
        *written = None;
        nft::apply(&host, &self.table(&entries)).await?;
        *written = Some(nft::listing(&host, "inet", TABLE).await?);
        Ok(())
    }

    /// The whole table as one transaction, in which no chain is missing at any moment.
    fn table(&self, entries: &BTreeMap<IpAddr, Text>) -> String {
        let mut script = drops("inet");
        let families = [("v4", "ipv4_addr", "ip", PROBE_V4, true), ("v6", "ipv6_addr", "ip6", PROBE_V6, self.ipv6)];
        // Before the masquerading of other CNI plugins, at priority 100: the first translation of a connection stays.
        script += &format!(
            "add chain inet {TABLE} postrouting {{ type nat hook postrouting priority 90; policy accept; }}\n\
             flush chain inet {TABLE} postrouting\n"
        );
        for (set, kind, family, source, _) in families.into_iter().filter(|family| family.4) {
            script += &format!("add set inet {TABLE} {set} {{ type {kind}; }}\nflush set inet {TABLE} {set}\n");
            for (ip, uid) in entries.iter().filter(|(ip, _)| ip.is_ipv4() == (set == "v4")) {
                script += &format!("add element inet {TABLE} {set} {{ {ip} comment \"{uid}\" }}\n");
            }
            // Capture checks must arrive with the source address that clients have, so their ports are left out. A
            // packet without a socket has no uid, and the rule does not match: forwarded packets are never let through.
            script += &format!(
                "add rule inet {TABLE} postrouting {family} daddr @{set} tcp dport != {{ {HBONE}, {INBOUND_CHECK} }} \
                 meta skuid != 4294967295 snat {family} to {source}\n"
            );
        }
        script
    }
}

/// The part of a table that drops packets with the probes' address.
fn drops(family: &str) -> String {
    let from_elsewhere = if family == "inet" { "iifname != lo " } else { "" };
    let mut script = format!(
        "add table {family} {TABLE}\nadd counter {family} {TABLE} {SPOOFED}\n\
         add chain {family} {TABLE} drops {{ type filter hook prerouting priority {DROPS}; policy accept; }}\n\
         flush chain {family} {TABLE} drops\n"
    );
    if family == "bridge" {
        // A bridge looks behind one VLAN tag. The pod's kernel looks behind any number of tags with id 0 (IEEE 802.1Q
        // priority tags). The only use of a second one is to hide the packet from this rule.
        script += &format!(
            "add rule bridge {TABLE} drops meta protocol {{ 8021q, 8021ad }} @nh,4,12 0 counter name {SPOOFED} drop\n"
        );
    }
    for (protocol, source) in [("ip", PROBE_V4), ("ip6", PROBE_V6)] {
        let drops = format!("add rule {family} {TABLE} drops {from_elsewhere}{protocol} saddr {source}");
        script += &format!("{drops} tcp dport {DOCTOR_SPOOF} drop\n{drops} counter name {SPOOFED} drop\n");
    }
    script
}

/// The entries that the sets should have. A pod whose address is not visible right now (as after a restart of its
/// kubelet) keeps its entries, unless another pod has the address now.
fn merged(wanted: &ByPod, before: &BTreeMap<IpAddr, Text>) -> BTreeMap<IpAddr, Text> {
    let unseen: BTreeSet<&Text> = wanted.iter().filter(|(_, ips)| ips.is_empty()).map(|(uid, _)| uid).collect();
    let kept = before.iter().filter(|(_, uid)| unseen.contains(uid)).map(|(ip, uid)| (*ip, uid.clone()));
    let seen = wanted.iter().flat_map(|(uid, ips)| ips.iter().map(move |ip| (*ip, uid.clone())));
    // Uids are written into comments of an nft script. Those of Kubernetes consist of letters, digits and dashes.
    let plain = |uid: &Text| uid.len() <= 64 && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    kept.chain(seen).filter(|(_, uid)| plain(uid)).collect()
}

/// The entries that an earlier daemon has left in the sets.
fn entries(listing: &Value) -> BTreeMap<IpAddr, Text> {
    let sets = listing["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|object| object.get("set")?.get("elem")?.as_array());
    let entry = |element: &Value| {
        let element = &element["elem"];
        Some((element["val"].as_str()?.parse().ok()?, element["comment"].as_str()?.into()))
    };
    sets.flatten().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_visible_address_keeps_its_entries() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let listing = serde_json::json!({"nftables": [{"set": {"name": "v4", "elem": [
            {"elem": {"val": "10.0.0.1", "comment": "a"}},
            {"elem": {"val": "10.0.0.2", "comment": "b"}},
            {"elem": {"val": "10.0.0.3", "comment": "gone"}},
            {"elem": {"val": "nonsense", "comment": "a"}},
            "10.0.0.9",
        ]}}]});
        let before = entries(&listing);
        assert_eq!(before.len(), 3);
        let wanted = BTreeMap::from([
            ("a".into(), vec![]),
            ("b".into(), vec![]),
            ("c".into(), vec![ip("10.0.0.2"), ip("fd00::1")]),
            ("bad\" }".into(), vec![ip("10.0.0.7")]),
        ]);
        let merged: Vec<(IpAddr, Text)> = merged(&wanted, &before).into_iter().collect();
        assert_eq!(merged, [(ip("10.0.0.1"), "a".into()), (ip("10.0.0.2"), "c".into()), (ip("fd00::1"), "c".into())]);
    }
}
