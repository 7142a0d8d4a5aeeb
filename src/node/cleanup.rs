//! What of culvert is on a node: found, and removed. By whoever cleans up a node, and by a daemon after which none comes.

use super::config::Config;
use super::nft::{self, NftError};
use super::{kubelet_probes, legs, redirect, table_owner};
use crate::sys::netns::Netns;
use crate::task::files::was_there;
use crate::task::thread;
use futures_util::{StreamExt, stream};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Where named namespaces are, as the node's first process sees it.
const NAMED: [&str; 2] = ["1/root/run/netns", "1/root/var/run/netns"];

/// Namespaces that are looked into at once.
const AT_ONCE: usize = 8;

/// What has become of one thing: whether it was there, or why it could not be removed.
pub type CleanupOutcome = (String, Result<bool, String>);

/// A node, as its daemon sees it.
#[derive(Clone, Debug)]
pub struct NodeCleanup {
    /// Whose it is, as its tables say.
    pub tag: String,
    /// The host's procfs.
    pub proc: PathBuf,
    /// The host's network namespace.
    pub host_netns: PathBuf,
}

/// What was found in network namespaces.
#[derive(Debug, Default)]
pub struct Removed {
    /// What was ours.
    pub ours: Vec<CleanupOutcome>,
    /// Namespaces whose rules are another node's, or do not say whose they are.
    pub others: usize,
    /// Namespaces whose rules are too many to be read, so that nobody can tell whose they are.
    pub unreadable: usize,
}

/// What was in a namespace.
enum RulesFound {
    Nothing,
    Ours,
    Others,
    Unreadable,
}

impl Config {
    /// The node, for whoever looks for what has been left on it.
    pub fn cleanup(&self) -> NodeCleanup {
        NodeCleanup { tag: self.node_tag(), proc: self.proc.clone(), host_netns: self.host_netns.clone() }
    }
}

impl NodeCleanup {
    /// Removes our rules from every namespace of the node that this node's daemon has captured, or, with `all`, any daemon.
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
                Ok(RulesFound::Nothing) => {}
                Ok(RulesFound::Ours) => removed.ours.push((format!("rules in {}", netns.path().display()), Ok(true))),
                Err(error) => removed.ours.push((format!("rules in {}", netns.path().display()), Err(error))),
            }
        }
        removed
    }

    /// Removes what is ours; gives what there was.
    async fn remove_from(&self, netns: Netns, all: bool) -> (Netns, Result<RulesFound, String>) {
        let outcome = async {
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

    /// Removes the host's tables for probes.
    pub async fn remove_probe_rules(&self) -> Vec<CleanupOutcome> {
        let mut outcomes = Vec::new();
        for family in ["inet", "bridge"] {
            let removed = match Netns::open(&self.host_netns) {
                Ok(host) => remove_table(&host, family, kubelet_probes::TABLE).await,
                Err(error) => Err(error.to_string()),
            };
            outcomes.push((format!("the host's rules for probes ({family})"), removed));
        }
        outcomes
    }

    /// Every network namespace of the node but the host's and our own: of all processes, and all that have a name.
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

/// Removes a file; one that is not there is removed already.
pub fn remove_file(path: &Path) -> CleanupOutcome {
    let removed = was_there(std::fs::remove_file(path)).map_err(|error| error.to_string());
    (path.display().to_string(), removed)
}
