//! The redirection of the network namespace that this process runs in. `culvert redirect` writes it before a daemon
//! starts there that has no rights itself.

use super::error::CaptureError;
use super::nft::{self, NftError};
use super::redirect::{self, OwnPackets, RedirectError, Redirection};
use super::{preexisting, table_owner};
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::nftables::{self, Family};
use serde_json::Value;
use std::io;
use std::path::Path;

/// Attempts if other programs write rules at the same time.
const ATTEMPTS: usize = 5;

/// What the rules are to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnRules {
    /// User id of the daemon, whose own traffic is not redirected.
    pub user: u32,
    /// Whether IPv6 is used.
    pub ipv6: bool,
    /// Whether DNS is captured.
    pub dns: bool,
    /// Ports of which inbound plaintext is not redirected.
    pub plaintext_ports: Vec<u16>,
}

/// Why the rules could not be written or removed.
#[derive(Debug, thiserror::Error)]
pub enum OwnRulesError {
    /// The network namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The rules cannot be written.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// The rules cannot be read or removed.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The open connections cannot be listed.
    #[error("cannot list the connections that are open already, which the rules must let through: {0}")]
    Open(String),
    /// A daemon of a node captures this network namespace.
    #[error(
        "this network namespace is captured by the daemon of a node already (table inet {table}, written for {0}); a workload is \
         captured by its node or by itself, not by both",
        table = redirect::TABLE
    )]
    OfNode(String),
}

/// Writes the rules; writing them again replaces them. Connections that are open already go on as they began. Returns
/// what else there is to say.
pub async fn write(rules: &OwnRules) -> Result<Vec<String>, OwnRulesError> {
    let netns = Netns::open(Path::new("/proc/self/ns/net"))?;
    let table = own_table(&netns).await?;
    let spared = preexisting::to_spare(&netns, &table).map_err(OwnRulesError::Open)?;
    let mut said = Vec::new();
    if !spared.is_empty() {
        said.push(format!("connections that were open before go on without the mesh: {}", spared.len()));
    }
    let rules = Redirection {
        node_tag: table_owner::WORKLOAD.into(),
        own: OwnPackets::User(rules.user),
        ipv6: rules.ipv6 && netns.has_ipv6()?,
        dns: rules.dns,
        bypass_inbound: false,
        plaintext_ports: rules.plaintext_ports.clone(),
        virtual_interfaces: Vec::new(),
        probes: false,
        addresses: Vec::new(),
        recreate_chains: false,
        spared,
    };
    let mut attempts = 1..ATTEMPTS;
    let written = loop {
        match redirect::install(&netns, &rules, false).await {
            Err(RedirectError::ConcurrentChange) if attempts.next().is_some() => {}
            written => break written?,
        }
    };
    let removed = written.istio.names.into_iter().map(|name| format!("removed {name}, which istio-cni had left"));
    let others = written.hooks.into_iter().map(|rule| format!("other rules may take traffic first: {rule}"));
    let unread = written.unread.map(|why| format!("other rules cannot be read: {why}"));
    said.extend(removed.chain(others).chain(unread));
    Ok(said)
}

/// Removes the rules. Returns whether there were any.
pub async fn remove() -> Result<bool, OwnRulesError> {
    let netns = Netns::open(Path::new("/proc/self/ns/net"))?;
    let there = !own_table(&netns).await?.is_null();
    if there {
        redirect::remove_table(&netns).await?;
    }
    Ok(there)
}

/// Whether the workload of a network namespace carries its own traffic. An error says that this is not known.
pub fn are_in(netns: &Netns) -> io::Result<bool> {
    let counter = || nftables::packets(Family::Inet, redirect::TABLE, redirect::OWN_COUNTER);
    match netns.enter(counter).map_err(io::Error::other)? {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Refuses to capture a pod that carries its own traffic.
pub fn refuse(netns: &Netns) -> Result<(), CaptureError> {
    match are_in(netns) {
        Ok(false) => Ok(()),
        Ok(true) => Err(CaptureError::CarriesItself),
        // Without the right to read rules, none are written either, and that says which right is missing.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(CaptureError::RulesUnknown(error)),
    }
}

/// Our table as `nft` prints it; null if there is none. A node's table is refused.
async fn own_table(netns: &Netns) -> Result<Value, OwnRulesError> {
    let table = nft::table(netns, "inet", redirect::TABLE).await?;
    match table_owner::owner(&table) {
        Some(table_owner::WORKLOAD) => Ok(table),
        None if table.is_null() => Ok(table),
        other => Err(OwnRulesError::OfNode(other.unwrap_or("an unknown node").to_owned())),
    }
}
