//! Pre-existing connections: those that were open before a pod was captured. They continue as they began and are
//! counted until they end, or are ended at the capture.
//!
//! The kernel does not track connections in a network namespace without rules. Once there are rules it does, and takes
//! the next packet of an open connection for its first one; it would be redirected, and the connection reset. So the
//! rules list these connections by addresses and ports. Nothing else is let through: a stray packet is never passed in
//! plaintext.

use super::routes::MASK;
use crate::connection::Pod;
use crate::ports;
use crate::sys::netns::Netns;
use crate::sys::tcp_sockets::{self, TcpSocket};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

/// Most connections that the rules can list; further ones are not let through.
const LISTED_MAX: usize = 10_000;

/// Pre-existing connections of one pod: own address and peer, by socket cookie.
#[derive(Clone, Debug, Default)]
pub struct Preexisting {
    open: HashMap<u64, (SocketAddr, SocketAddr)>,
}

impl Preexisting {
    /// The connections that are open now, before the first rules are written.
    pub fn open_now(pod: &Pod) -> Self {
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        match sockets(pod) {
            Ok(found) => {
                if !found.is_empty() {
                    tracing::warn!(
                        namespace,
                        name,
                        open = found.len(),
                        "the pod has connections that were opened before its capture, without the mesh"
                    );
                }
                let pair = |socket: TcpSocket| (socket.cookie, (socket.local, socket.peer));
                Self { open: found.into_iter().take(LISTED_MAX).map(pair).collect() }
            }
            Err(error) => {
                tracing::warn!(namespace, name, error, "cannot list the pod's pre-existing connections");
                Self::default()
            }
        }
    }

    /// The connections that an earlier daemon's rules let through, by what `nft` prints of them, as far as they are
    /// still open.
    pub fn spared_by(pod: &Pod, listing: &Value) -> Self {
        let spared = listed(listing);
        if spared.is_empty() {
            return Self::default();
        }
        let open =
            sockets(pod).unwrap_or_default().into_iter().map(|socket| (socket.cookie, (socket.local, socket.peer)));
        Self { open: open.filter(|(_, pair)| spared.contains(pair)).collect() }
    }

    /// Called when the capture ends: these connections, and the ones that the pod opens from now on, must not be
    /// captured later.
    pub fn at_release(self, pod: &Pod) -> Uncaptured {
        let cookies = |all: Vec<TcpSocket>| all.iter().map(|socket| socket.cookie).collect();
        Uncaptured { older: self, captured: sockets(pod).map(cookies).ok() }
    }

    /// Adds further connections.
    pub fn extend(&mut self, others: Self) {
        self.open.extend(others.open);
    }

    /// Addresses of the connections, own and peer, for the rules that let them through.
    pub fn spared(&self) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
        self.open.values().copied()
    }

    /// Ends the connections.
    pub fn end(&mut self, pod: &Pod) {
        let found = if self.open.is_empty() { Vec::new() } else { sockets(pod).unwrap_or_default() };
        let ours = found.iter().filter(|socket| self.open.contains_key(&socket.cookie));
        let ended = pod.netns.enter(|| ours.filter(|socket| tcp_sockets::end(socket).is_ok()).count()).unwrap_or(0);
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        if ended < self.open.len() {
            let left = self.open.len() - ended;
            tracing::warn!(
                namespace,
                name,
                left,
                "some pre-existing connections could not be ended, or had ended already"
            );
        }
        tracing::info!(namespace, name, ended, "pre-existing connections ended");
    }

    /// Number of the connections that are still open.
    pub fn count_open(&mut self, pod: &Pod) -> usize {
        if !self.open.is_empty()
            && let Ok(now) = sockets(pod)
        {
            let now: HashSet<u64> = now.iter().map(|socket| socket.cookie).collect();
            self.open.retain(|cookie, _| now.contains(cookie));
        }
        self.open.len()
    }
}

/// The connections that a table lets through, by what `nft` prints of it.
fn listed(listing: &Value) -> HashSet<(SocketAddr, SocketAddr)> {
    let sets = listing.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let elements = sets.filter_map(|object| object.get("set")?.get("elem")?.as_array()).flatten();
    let pair = |element: &Value| {
        let parts = element.get("concat")?.as_array()?;
        let address = |at: usize| {
            let port = parts.get(at + 1)?.as_u64().and_then(|port| u16::try_from(port).ok())?;
            Some(SocketAddr::new(parts.get(at)?.as_str()?.parse().ok()?, port))
        };
        Some((address(0)?, address(2)?))
    };
    elements.filter_map(pair).take(LISTED_MAX).collect()
}

/// The connections that new rules of a network namespace without a running daemon let through: those that are open, or,
/// where `table` has been written before, those of them that it lets through.
pub fn to_spare(netns: &Netns, table: &Value) -> Result<Vec<(SocketAddr, SocketAddr)>, String> {
    let own: Vec<IpAddr> =
        netns.addresses().map_err(|error| error.to_string())?.into_iter().map(|(ip, _)| ip).collect();
    let open = connections(netns, &own, ports::in_pod(true))?;
    let before = (!table.is_null()).then(|| listed(table));
    let pairs = open.into_iter().map(|socket| (socket.local, socket.peer));
    Ok(pairs.filter(|pair| before.as_ref().is_none_or(|before| before.contains(pair))).take(LISTED_MAX).collect())
}

/// Connections of a pod whose capture has ended, while the last captured connections end.
#[derive(Debug, Default)]
pub struct Uncaptured {
    /// Pre-existing connections of the capture that has ended.
    older: Preexisting,
    /// Connections that were captured when it ended; `None` if they could not be listed.
    captured: Option<HashSet<u64>>,
}

impl Uncaptured {
    /// The connections that the next capture must not redirect. Call this at the last moment before the rules are
    /// written, because a connection that the kernel tracks already never reaches the new rules.
    pub fn now(&self, pod: &Pod) -> Preexisting {
        // Captured connections are never taken for plaintext.
        let (Some(captured), Ok(open)) = (&self.captured, sockets(pod)) else { return self.older.clone() };
        let goes_on = |cookie: &u64| self.older.open.contains_key(cookie) || !captured.contains(cookie);
        let open = open.into_iter().filter(|socket| goes_on(&socket.cookie));
        Preexisting { open: open.take(LISTED_MAX).map(|socket| (socket.cookie, (socket.local, socket.peer))).collect() }
    }
}

/// The pod's connections with others; its connections with itself are never captured. The daemon's sockets are left
/// out, also those of an ended daemon: the kernel keeps unacknowledged data for a while, and it is not plaintext.
fn sockets(pod: &Pod) -> Result<Vec<TcpSocket>, String> {
    let mut all = connections(&pod.netns, &pod.addresses.load(), pod.own_ports())?;
    let mark = pod.sockets.mark & MASK;
    all.retain(|socket| socket.mark & MASK != mark);
    Ok(all)
}

/// The connections of a network namespace with others, except those of these ports.
fn connections(netns: &Netns, own: &[IpAddr], ports: &[u16]) -> Result<Vec<TcpSocket>, String> {
    let all = netns.enter(tcp_sockets::open).map_err(|error| error.to_string())?;
    let mut all = all.map_err(|error| error.to_string())?;
    let with_itself = |ip: IpAddr| ip.is_loopback() || own.contains(&ip);
    all.retain(|socket| !with_itself(socket.peer.ip()) && !ports.contains(&socket.local.port()));
    Ok(all)
}
