//! The kubelet's probes: what the node's own processes send to a captured pod gets a source address that the pod's rules
//! leave alone, because under a STRICT policy plaintext from the node would be refused. One table in the host's network
//! namespace, a set of addresses in it; forwarded traffic has no local socket and does not match.
//!
//! The same table drops what comes to the host from anywhere with that source: nobody else has it. What a bridge passes on between
//! pods does not come to the host, so that a table of the bridge's own drops it there.

use super::active_daemon::ActiveRole;
use super::capture_check::{CHECK_PORT, TUNNEL_PORT};
use super::nft::{self, Listing, NftError};
use super::redirect::{PROBE_V4, PROBE_V6};
use crate::mesh::Text;
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

/// Name of our table on the host.
pub const TABLE: &str = "culvert-probes";

/// Port of a pod to which `culvert doctor` sends what it tries with the probes' address: dropped as well, and nobody's attempt to get
/// past policies. Nobody need listen there.
pub const DOCTOR_PORT: u16 = 15092;
/// Counts what has been dropped.
const SPOOFED: &str = "spoofed";

/// Packets with the probes' address are dropped before anything else looks at them. In a family of bridges, too.
const DROPS: i32 = -300;

/// How long a change is let settle: at a start sixty pods come at once.
const SETTLE: Duration = Duration::from_millis(100);
/// The table is looked at this often, whatever is heard.
const LOOK: Duration = Duration::from_secs(10);

/// Whose probes are let through: pods with their addresses, and pods whose address is not visible just now.
#[derive(Clone, Debug)]
pub struct ProbedPods {
    pods: Arc<watch::Sender<Option<ByPod>>>,
}

/// Addresses by pod.
type ByPod = BTreeMap<Text, Vec<IpAddr>>;

impl Default for ProbedPods {
    fn default() -> Self {
        Self { pods: Arc::new(watch::Sender::new(None)) }
    }
}

impl ProbedPods {
    /// Says whose. Before it is said for the first time the host's table stays as an earlier daemon left it.
    pub fn set(&self, pods: ByPod) {
        self.pods.send_if_modified(|known| {
            let other = known.as_ref() != Some(&pods);
            *known = Some(pods);
            other
        });
    }
}

/// Keeps the host's table.
#[derive(Debug)]
pub struct HostProbeRules {
    /// The host's network namespace.
    pub host: PathBuf,
    /// Whether IPv6 is used.
    pub ipv6: bool,
    /// 1 while the table is as it should be.
    pub in_place: Gauge,
    /// Packets that came with the probes' address and not from this host.
    pub spoofed: Counter,
}

impl HostProbeRules {
    /// Registers its metric.
    pub fn register(&self, registry: &mut Registry) {
        let help = "1 while the host's rules for kubelet probes are in place, else 0. Alert on 0";
        registry.register("culvert_probe_rules_in_place", help, self.in_place.clone());
        let help = "Packets dropped because they reached the host with the source address of kubelet probes. Above 0, something tries to bypass \
                    policies. Alert above 0";
        registry.register("culvert_probe_spoofs_dropped", help, self.spoofed.clone());
    }

    /// Keeps the table what `probed` says while it is this daemon's turn, until it is told to end: what another one knows by then is newer.
    pub async fn keep(self, probed: ProbedPods, role: ActiveRole, drain: Signal) {
        let (mut pods, mut role_changes) = (probed.pods.subscribe(), role.subscribe());
        let (mut written, mut said) = ((None::<Listing>, None::<Listing>), None::<String>);
        let (mut bridges, mut counted) = (None::<String>, [None; 2]);
        let changes = Netns::open(&self.host).and_then(|host| host.enter(NetnsWatch::open));
        let changes = changes.ok().and_then(|opened| opened.and_then(NetnsWatch::new).ok());
        // What is in force, by address. An address belongs to one pod.
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
                // What another daemon has written meanwhile is looked at anew.
                changed = role_changes.changed() => {
                    if changed.is_err() { return }
                    (known, written) = (None, (None, None));
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            tokio::time::sleep(SETTLE).await;
            let Some(wanted) = pods.borrow_and_update().clone() else { continue };
            self.count(&mut counted);
            let Some(_permit) = role.permit() else { continue };
            let result = self.maintain(&wanted, &mut known, &mut written.0).await;
            let on_bridges = self.maintain_bridges(&mut written.1).await.err().map(|error| error.to_string());
            if let Some(error) = on_bridges.as_ref().filter(|error| bridges.as_ref() != Some(error)) {
                tracing::warn!(
                    error,
                    "pods on one bridge of this node can pose as the kubelet's probes: the kernel lacks nf_tables_bridge; load it, or \
                     br_netfilter with net.bridge.bridge-nf-call-iptables=1"
                );
            }
            bridges = on_bridges;
            self.in_place.set(i64::from(result.is_ok() && bridges.is_none()));
            let error = result.err().map(|error| error.to_string());
            if let Some(error) = error.as_ref().filter(|error| said.as_ref() != Some(error)) {
                tracing::error!(error, "kubelet probes of captured pods may fail: the host's rules cannot be written");
            }
            said = error;
        }
    }

    /// Drops on bridges what has the probes' address: what the host itself sends does not come in there.
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

    /// Counts what has been dropped since the last time.
    fn count(&self, counted: &mut [Option<u64>; 2]) {
        let Ok(host) = Netns::open(&self.host) else { return };
        for (family, before) in [Family::Inet, Family::Bridge].into_iter().zip(counted) {
            let Ok(Ok(now)) = host.enter(|| nftables::packets(family, TABLE, SPOOFED)) else { continue };
            // What an earlier daemon has counted is its own; what somebody has removed with the table begins anew.
            let news = before.map_or(0, |before| now.checked_sub(before).unwrap_or(now));
            *before = Some(now);
            if news > 0 {
                self.spoofed.inc_by(news);
                tracing::warn!(
                    packets = news,
                    "packets came with the source address of the kubelet's probes ({PROBE_V4}, {PROBE_V6}) and not from this host; \
                     dropped: somebody on this node's network tries to get past policies"
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

    /// The whole table, as one transaction that takes no chain away for a moment.
    fn table(&self, entries: &BTreeMap<IpAddr, Text>) -> String {
        let mut script = drops("inet");
        let families = [("v4", "ipv4_addr", "ip", PROBE_V4, true), ("v6", "ipv6_addr", "ip6", PROBE_V6, self.ipv6)];
        // Before masquerading of other CNIs, at 100: the first translation of a connection stays.
        script += &format!(
            "add chain inet {TABLE} postrouting {{ type nat hook postrouting priority 90; policy accept; }}\n\
             flush chain inet {TABLE} postrouting\n"
        );
        for (set, kind, family, source, _) in families.into_iter().filter(|family| family.4) {
            script += &format!("add set inet {TABLE} {set} {{ type {kind}; }}\nflush set inet {TABLE} {set}\n");
            for (ip, uid) in entries.iter().filter(|(ip, _)| ip.is_ipv4() == (set == "v4")) {
                script += &format!("add element inet {TABLE} {set} {{ {ip} comment \"{uid}\" }}\n");
            }
            // What verifies that others' connections come to us must come as others' do.
            // Without a socket there is no uid, and the rule does not match: what is forwarded is never let through.
            script += &format!(
                "add rule inet {TABLE} postrouting {family} daddr @{set} tcp dport != {{ {TUNNEL_PORT}, {CHECK_PORT} }} \
                 meta skuid != 4294967295 snat {family} to {source}\n"
            );
        }
        script
    }
}

/// The part of a table that drops what comes in with the probes' address.
fn drops(family: &str) -> String {
    let from_elsewhere = if family == "inet" { "iifname != lo " } else { "" };
    let mut script = format!(
        "add table {family} {TABLE}\nadd counter {family} {TABLE} {SPOOFED}\n\
         add chain {family} {TABLE} drops {{ type filter hook prerouting priority {DROPS}; policy accept; }}\n\
         flush chain {family} {TABLE} drops\n"
    );
    if family == "bridge" {
        // A bridge looks behind one VLAN tag. The pod's kernel looks behind any number of tags with id 0 (IEEE 802.1Q
        // priority tags); more than one of them has no use but to hide what is behind.
        script += &format!(
            "add rule bridge {TABLE} drops meta protocol {{ 8021q, 8021ad }} @nh,4,12 0 counter name {SPOOFED} drop\n"
        );
    }
    for (protocol, source) in [("ip", PROBE_V4), ("ip6", PROBE_V6)] {
        let drops = format!("add rule {family} {TABLE} drops {from_elsewhere}{protocol} saddr {source}");
        script += &format!("{drops} tcp dport {DOCTOR_PORT} drop\n{drops} counter name {SPOOFED} drop\n");
    }
    script
}

/// What should be in the sets. A pod whose address is not visible just now (as after a reboot of its kubelet) keeps what it
/// had, unless another pod has that now.
fn merged(wanted: &ByPod, before: &BTreeMap<IpAddr, Text>) -> BTreeMap<IpAddr, Text> {
    let unseen: BTreeSet<&Text> = wanted.iter().filter(|(_, ips)| ips.is_empty()).map(|(uid, _)| uid).collect();
    let kept = before.iter().filter(|(_, uid)| unseen.contains(uid)).map(|(ip, uid)| (*ip, uid.clone()));
    let seen = wanted.iter().flat_map(|(uid, ips)| ips.iter().map(move |ip| (*ip, uid.clone())));
    // Uids stand in comments of an nft script; those of Kubernetes are letters, digits and dashes.
    let plain = |uid: &Text| uid.len() <= 64 && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    kept.chain(seen).filter(|(_, uid)| plain(uid)).collect()
}

/// What an earlier daemon has left in the sets.
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
    fn a_pod_without_visible_address_keeps_its_own_and_no_other() {
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
