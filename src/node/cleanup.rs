//! Finds and removes what culvert has left on a node. `culvert cleanup` does this, and a daemon that no other one
//! follows.

use super::config::Config;
use super::nft::{self, NftError};
use super::{kubelet_probes, legs, own_rules, redirect, table_owner};
use crate::sys::netns::Netns;
use crate::task::files::was_there;
use crate::task::thread;
use futures_util::{StreamExt, stream};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Folders of named network namespaces, as the node's first process sees them.
const NAMED: [&str; 2] = ["1/root/run/netns", "1/root/var/run/netns"];

/// Network namespaces that are cleaned up at once.
const AT_ONCE: usize = 8;

/// Name of one thing to remove, and whether it existed, or why it could not be removed.
pub type CleanupOutcome = (String, Result<bool, String>);

/// A node that is cleaned up.
#[derive(Clone, Debug)]
pub struct NodeCleanup {
    /// Tag of the node in its tables.
    pub tag: String,
    /// The host's procfs.
    pub proc: PathBuf,
    /// The host's network namespace.
    pub host_netns: PathBuf,
}

/// Result of cleaning up network namespaces.
#[derive(Debug, Default)]
pub struct Removed {
    /// Rules of this node, removed or not.
    pub ours: Vec<CleanupOutcome>,
    /// Number of namespaces with rules of another node, or of an unknown one.
    pub others: usize,
    /// Number of namespaces with too many rules to read, so that their node is unknown.
    pub unreadable: usize,
    /// Number of namespaces of workloads that carry their own traffic. Their rules stay.
    pub workloads: usize,
}

/// What a network namespace contained.
enum RulesFound {
    Nothing,
    Ours,
    Others,
    Unreadable,
    Workload,
}

impl Config {
    /// This node, for cleaning it up.
    pub fn cleanup(&self) -> NodeCleanup {
        NodeCleanup { tag: self.node_tag(), proc: self.proc.clone(), host_netns: self.host_netns.clone() }
    }
}

impl NodeCleanup {
    /// Removes our rules from every network namespace that this node's daemons have captured, or with `all`, any
    /// daemon.
    pub async fn remove_rules(&self, all: bool) -> Removed {
        let own = self.clone();
        let found = thread::run_blocking(move || own.namespaces()).await.unwrap_or_default();
        let each = stream::iter(found.into_values()).map(|netns| self.remove_from(netns, all));
        let mut removed = Removed::default();
        let mut each = std::pin::pin!(each.buffer_unordered(AT_ONCE));
        while let Some((netns, outcome)) = each.next().await {
            match outcome {
                Ok(RulesFound::Others) => removed.others += 1,
                Ok(RulesFound::Unreadable) => removed.unreadable += 1,
                Ok(RulesFound::Workload) => removed.workloads += 1,
                Ok(RulesFound::Nothing) => {}
                Ok(RulesFound::Ours) => removed.ours.push((format!("rules in {}", netns.path().display()), Ok(true))),
                Err(error) => removed.ours.push((format!("rules in {}", netns.path().display()), Err(error))),
            }
        }
        removed
    }

    /// Removes our rules from one network namespace. Returns what it contained.
    async fn remove_from(&self, netns: Netns, all: bool) -> (Netns, Result<RulesFound, String>) {
        let outcome = async {
            if own_rules::are_in(&netns).map_err(|error| error.to_string())? {
                return Ok(RulesFound::Workload);
            }
            let mut there = Vec::new();
            for table in [redirect::TABLE, legs::TABLE] {
                match nft::table(&netns, "inet", table).await {
                    Ok(listed) if listed.is_null() => {}
                    Ok(listed) if all || table_owner::owner(&listed) == Some(&*self.tag) => there.push(table),
                    Err(NftError::Unreadable(_)) if all => there.push(table),
                    Err(NftError::Unreadable(_)) => return Ok(RulesFound::Unreadable),
                    Ok(_) => return Ok(RulesFound::Others),
                    Err(error) => return Err(error.to_string()),
                }
            }
            // With an agent the routes are the agent's.
            match there.contains(&redirect::TABLE) {
                true => redirect::remove(&netns, true).await,
                false if !there.is_empty() => legs::remove(&netns).await.map_err(Into::into),
                false => return Ok(RulesFound::Nothing),
            }
            .map_err(|error| error.to_string())?;
            Ok(RulesFound::Ours)
        };
        let outcome = outcome.await;
        (netns, outcome)
    }

    /// Removes the host's tables for kubelet probes.
    pub async fn remove_probe_rules(&self) -> Vec<CleanupOutcome> {
        let mut outcomes = Vec::new();
        for family in ["inet", "bridge"] {
            let removed = match Netns::open(&self.host_netns) {
                Ok(host) => remove_table(&host, family, kubelet_probes::TABLE).await,
                Err(error) => Err(error.to_string()),
            };
            outcomes.push((format!("the host's rules for kubelet probes ({family})"), removed));
        }
        outcomes
    }

    /// All network namespaces of the node, of every process and by every name, except the host's and the daemon's own.
    fn namespaces(&self) -> HashMap<(u64, u64), Netns> {
        let mut found = HashMap::new();
        let folders = NAMED.map(|folder| self.proc.join(folder)).into_iter().chain([self.proc.clone()]);
        for entry in folders.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
            let process = entry.path().parent() == Some(&self.proc);
            let path = if process { entry.path().join("ns/net") } else { entry.path() };
            if let Ok(netns) = Netns::open(&path) {
                found.entry(netns.id()).or_insert(netns);
            }
        }
        for own in [Path::new("/proc/self/ns/net"), &self.proc.join("1/ns/net"), &self.host_netns] {
            if let Ok(own) = Netns::open(own) {
                found.remove(&own.id());
            }
        }
        found
    }
}

async fn remove_table(netns: &Netns, family: &str, name: &str) -> Result<bool, String> {
    let listed = nft::table(netns, family, name).await.map_err(|error| error.to_string())?;
    if listed.is_null() {
        return Ok(false);
    }
    let removed = nft::apply(netns, &format!("delete table {family} {name}\n")).await;
    removed.map(|()| true).map_err(|error| error.to_string())
}

/// Removes a file. A file that does not exist counts as removed.
pub fn remove_file(path: &Path) -> CleanupOutcome {
    let removed = was_there(std::fs::remove_file(path)).map_err(|error| error.to_string());
    (path.display().to_string(), removed)
}
