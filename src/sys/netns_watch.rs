//! Hearing of changes inside a network namespace: its nftables, its rules and routes, its addresses (sources: netlink(7),
//! rtnetlink(7), linux/netfilter/nfnetlink.h and nf_tables.h).

use super::netlink::header;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `NFNLGRP_NFTABLES` as a bit.
const NFTABLES: u32 = 1 << (7 - 1);
/// `RTNLGRP_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV6_RULE` as bits.
const ROUTING: u32 = 1 << (5 - 1) | 1 << (7 - 1) | 1 << (8 - 1) | 1 << (9 - 1) | 1 << (11 - 1) | 1 << (19 - 1);

const NEW_ADDRESS: u16 = 20;
const DELETED_ADDRESS: u16 = 21;
const DELETED_ROUTE: u16 = 25;
const DELETED_RULE: u16 = 33;

/// What has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetnsChange {
    /// Something in nftables; whose it is and what, is for a look at it.
    pub tables: bool,
    /// A rule or route has gone.
    pub routes: bool,
    /// An address has come or gone.
    pub addresses: bool,
}

/// Sockets on which the kernel announces changes of one namespace.
#[derive(Debug)]
pub struct Subscriptions {
    tables: OwnedFd,
    routing: OwnedFd,
}

/// Hears of changes in one namespace.
#[derive(Debug)]
pub struct NetnsWatch {
    tables: AsyncFd<OwnedFd>,
    routing: AsyncFd<OwnedFd>,
}

impl NetnsWatch {
    /// Opens the sockets in the namespace that the thread is in.
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

    /// Waits with the runtime of the calling task.
    pub fn new(subscriptions: Subscriptions) -> io::Result<Self> {
        let Subscriptions { tables, routing } = subscriptions;
        // SAFETY: the descriptor is owned by what it is registered in, never closed or replaced before that is dropped.
        let with = |fd| unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self { tables: with(tables)?, routing: with(routing)? })
    }

    /// Completes when something has changed; what came until then is told at once.
    pub async fn seen(&self) -> NetnsChange {
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
                    // The runtime ends.
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

/// Datagrams that are read at once: whoever makes changes faster than they are read must not hold the thread. The rest is read with
/// the next call; it must be, for the kernel tells nothing more to a socket that once was full until that is empty.
const READS_MAX: usize = 256;

/// Reads what there is and shows the kind of each message to `concerns`; whether one does, or some were lost, and whether that
/// was all.
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
            // More than the socket could hold.
            Err(Errno::ENOBUFS) => any = true,
            Err(_) => return (any, true),
        }
    }
    (any, false)
}
