//! Preexisting that were open before a pod was captured: they go on as they began, are counted until they end, or are ended.
//!
//! The kernel does not track connections in a namespace that has no rules. From the first rule on it does, and takes the next
//! packet of an open connection for the first one, which would be redirected, and the connection reset. So the rules know
//! these connections by their addresses and ports, and nothing else is spared: a stray packet is not passed in plaintext.

use super::routes::MASK;
use crate::connection::Pod;
use crate::sys::tcp_sockets::{self, TcpSocket};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

/// Preexisting that rules can name at most; more are not spared.
const MAX: usize = 10_000;

/// Preexisting of one pod that are older than its rules, by their cookies: own address and peer.
#[derive(Clone, Debug, Default)]
pub struct Preexisting {
    open: HashMap<u64, (SocketAddr, SocketAddr)>,
}

impl Preexisting {
    /// Those that are open now, when the first rules are about to be written.
    pub fn open_now(pod: &Pod) -> Self {
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        match sockets(pod) {
            Ok(found) => {
                if !found.is_empty() {
                    tracing::warn!(namespace, name, open = found.len(), "connections are older than the pod's capture");
                }
                let pair = |socket: TcpSocket| (socket.cookie, (socket.local, socket.peer));
                Self { open: found.into_iter().take(MAX).map(pair).collect() }
            }
            Err(error) => {
                tracing::warn!(namespace, name, error, "connections from before the capture cannot be counted");
                Self::default()
            }
        }
    }

    /// Those that an earlier daemon's rules spare, by what `nft` prints of them, and that are still open.
    pub fn spared_by(pod: &Pod, listing: &Value) -> Self {
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
        let spared: HashSet<(SocketAddr, SocketAddr)> = elements.filter_map(pair).take(MAX).collect();
        if spared.is_empty() {
            return Self::default();
        }
        let open =
            sockets(pod).unwrap_or_default().into_iter().map(|socket| (socket.cookie, (socket.local, socket.peer)));
        Self { open: open.filter(|(_, pair)| spared.contains(pair)).collect() }
    }

    /// Of those that a pod has when it is captured no more: these, and what it opens from then on.
    pub fn at_release(self, pod: &Pod) -> Uncaptured {
        let cookies = |all: Vec<TcpSocket>| all.iter().map(|socket| socket.cookie).collect();
        Uncaptured { older: self, captured: sockets(pod).map(cookies).ok() }
    }

    /// Adds others.
    pub fn extend(&mut self, others: Self) {
        self.open.extend(others.open);
    }

    /// Their addresses, own and peer, for rules that spare them.
    pub fn spared(&self) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
        self.open.values().copied()
    }

    /// Ends them.
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
                "connections from before the capture could not be ended, or had ended"
            );
        }
        tracing::info!(namespace, name, ended, "connections from before the capture ended");
    }

    /// How many of them are still open.
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

/// The connections of a pod whose capture has ended, while what was captured ends.
#[derive(Debug, Default)]
pub struct Uncaptured {
    /// Older than the capture that has ended.
    older: Preexisting,
    /// What was open at its end, where that could be seen.
    captured: Option<HashSet<u64>>,
}

impl Uncaptured {
    /// Those that the next capture of the pod must leave alone: looked for at the last moment before its rules, because the
    /// kernel never gives those rules a connection that it knows.
    pub fn now(&self, pod: &Pod) -> Preexisting {
        // What was captured is never taken for plaintext.
        let (Some(captured), Ok(open)) = (&self.captured, sockets(pod)) else { return self.older.clone() };
        let goes_on = |cookie: &u64| self.older.open.contains_key(cookie) || !captured.contains(cookie);
        let open = open.into_iter().filter(|socket| goes_on(&socket.cookie));
        Preexisting { open: open.take(MAX).map(|socket| (socket.cookie, (socket.local, socket.peer))).collect() }
    }
}

/// The pod's connections with others; what it says to itself is never captured. Those of a daemon are left out, of one that has ended
/// too: what it has sent and nobody has acknowledged stays in the kernel for a while, and is no plaintext.
fn sockets(pod: &Pod) -> Result<Vec<TcpSocket>, String> {
    let all = pod.netns.enter(tcp_sockets::open).map_err(|error| error.to_string())?;
    let mut all = all.map_err(|error| error.to_string())?;
    let own = pod.addresses.load();
    let (mark, ports) = (pod.sockets.mark & MASK, pod.own_ports());
    let of_daemon = |socket: &TcpSocket| socket.mark & MASK == mark || ports.contains(&socket.local.port());
    all.retain(|socket| !socket.peer.ip().is_loopback() && !own.contains(&socket.peer.ip()) && !of_daemon(socket));
    Ok(all)
}
