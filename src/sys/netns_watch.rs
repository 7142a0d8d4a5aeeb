//! Detects changes inside a network namespace: of nftables, of ip rules and routes, of addresses (sources: netlink(7),
//! rtnetlink(7), linux/netfilter/nfnetlink.h and nf_tables.h).
//!
//! It reports that something has changed, not what. If the kernel had to drop messages, that counts as a change.

use super::netlink::header;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The multicast group `NFNLGRP_NFTABLES`, as a bit.
const NFTABLES: u32 = 1 << (7 - 1);
/// The multicast groups `RTNLGRP_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`,
/// `_IPV6_RULE`, as bits.
const ROUTING: u32 = 1 << (5 - 1) | 1 << (7 - 1) | 1 << (8 - 1) | 1 << (9 - 1) | 1 << (11 - 1) | 1 << (19 - 1);

/// Message types `RTM_NEWADDR`, `RTM_DELADDR`, `RTM_DELROUTE`, `RTM_DELRULE`.
const NEW_ADDRESS: u16 = 20;
const DELETED_ADDRESS: u16 = 21;
const DELETED_ROUTE: u16 = 25;
const DELETED_RULE: u16 = 33;

/// What kinds of things have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetnsChange {
    /// Something in nftables; the ruleset must be listed to find out what.
    pub tables: bool,
    /// An ip rule or a route has been deleted.
    pub routes: bool,
    /// An address has been added or deleted.
    pub addresses: bool,
}

/// The sockets on which the kernel announces changes in one namespace.
#[derive(Debug)]
pub struct Subscriptions {
    tables: OwnedFd,
    routing: OwnedFd,
}

/// Watches one namespace.
#[derive(Debug)]
pub struct NetnsWatch {
    tables: AsyncFd<OwnedFd>,
    routing: AsyncFd<OwnedFd>,
}

impl NetnsWatch {
    /// Opens the sockets in the thread's current namespace.
    pub fn open() -> io::Result<Subscriptions> {
        let subscribe = |protocol, groups| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
            Ok::<_, io::Error>(fd)
        };
        let tables = subscribe(SockProtocol::NetlinkNetFilter, NFTABLES)?;
        Ok(Subscriptions { tables, routing: subscribe(SockProtocol::NetlinkRoute, ROUTING)? })
    }

    /// Registers the sockets with the runtime of the calling task.
    pub fn new(subscriptions: Subscriptions) -> io::Result<Self> {
        let Subscriptions { tables, routing } = subscriptions;
        // SAFETY: the AsyncFd owns the descriptor, which is neither closed nor replaced before the AsyncFd is dropped.
        let with = |fd| unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self { tables: with(tables)?, routing: with(routing)? })
    }

    /// Completes when something has changed. Changes since the last call are reported at once, together.
    pub async fn changed(&self) -> NetnsChange {
        loop {
            let seen = tokio::select! {
                ready = self.tables.readable() => match ready {
                    Ok(mut guard) => {
                        let (tables, dry) = drain(self.tables.get_ref(), |_| true);
                        if dry {
                            guard.clear_ready();
                        }
                        NetnsChange { tables, ..NetnsChange::default() }
                    }
                    // The runtime is shutting down.
                    Err(_) => std::future::pending().await,
                },
                ready = self.routing.readable() => match ready {
                    Ok(mut guard) => {
                        let (mut routes, mut addresses) = (false, false);
                        let (lost, dry) = drain(self.routing.get_ref(), |kind| {
                            routes |= matches!(kind, DELETED_ROUTE | DELETED_RULE);
                            addresses |= matches!(kind, NEW_ADDRESS | DELETED_ADDRESS);
                            false
                        });
                        if dry {
                            guard.clear_ready();
                        }
                        NetnsChange { tables: false, routes: routes || lost, addresses: addresses || lost }
                    }
                    Err(_) => std::future::pending().await,
                },
            };
            if seen != NetnsChange::default() {
                return seen;
            }
        }
    }
}

/// Maximum number of datagrams read at once, so that a pod that makes changes faster than they are read cannot occupy
/// the thread. The next call reads the rest, which is necessary: once a socket was full, the kernel sends nothing more
/// to it until it is empty.
const READS_MAX: usize = 256;

/// Reads the waiting messages and calls `concerns` with the type of each. Returns whether `concerns` was true for any
/// or messages were lost, and whether the socket is empty now.
fn drain(fd: &OwnedFd, mut concerns: impl FnMut(u16) -> bool) -> (bool, bool) {
    let (mut buffer, mut any) = ([0; 16 * 1024], false);
    for _ in 0..READS_MAX {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return (any, true),
            Ok(length) => {
                let mut rest = buffer.get(..length).unwrap_or_default();
                while let Some((length, kind)) = header(rest) {
                    any |= concerns(kind);
                    rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                }
            }
            Err(Errno::EINTR) => {}
            // The socket was full, so messages are lost.
            Err(Errno::ENOBUFS) => any = true,
            Err(_) => return (any, true),
        }
    }
    (any, false)
}
