//! Hearing of changes inside a network namespace: its nftables, its rules and routes, its addresses (sources: netlink(7),
//! rtnetlink(7), linux/netfilter/nfnetlink.h and nf_tables.h).

use super::netlink::{HEADER, REQUEST, header};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `NFNLGRP_NFTABLES` as a bit.
const NFTABLES: u32 = 1 << (7 - 1);
/// `RTNLGRP_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV6_RULE` as bits.
const ROUTING: u32 = 1 << (5 - 1) | 1 << (7 - 1) | 1 << (8 - 1) | 1 << (9 - 1) | 1 << (11 - 1) | 1 << (19 - 1);

/// Subsystem nftables, `NFT_MSG_NEWGEN` and `NFT_MSG_GETGEN`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const GET_GENERATION: u16 = 10 << 8 | 16;

const NEW_ADDRESS: u16 = 20;
const DELETED_ADDRESS: u16 = 21;
const DELETED_ROUTE: u16 = 25;
const DELETED_RULE: u16 = 33;

/// What has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Something in nftables; whose it is and what, is for a look at it.
    pub tables: bool,
    /// A rule or route has gone.
    pub routes: bool,
    /// An address has come or gone.
    pub addresses: bool,
}

/// Hears of changes in one namespace.
#[derive(Debug)]
pub struct Changes {
    tables: AsyncFd<OwnedFd>,
    routing: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Opens the sockets in the namespace that the thread is in.
    pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
        let subscribe = |protocol, groups| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
            Ok::<_, io::Error>(fd)
        };
        Ok((subscribe(SockProtocol::NetlinkNetFilter, NFTABLES)?, subscribe(SockProtocol::NetlinkRoute, ROUTING)?))
    }

    /// Waits with the runtime of the calling task.
    pub fn new((tables, routing): (OwnedFd, OwnedFd)) -> io::Result<Self> {
        // SAFETY: the descriptor is owned by what it is registered in, never closed or replaced before that is dropped.
        let with = |fd| unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self { tables: with(tables)?, routing: with(routing)? })
    }

    /// Completes when something has changed; what came until then is told at once.
    pub async fn seen(&self) -> Seen {
        loop {
            let seen = tokio::select! {
                ready = self.tables.readable() => match ready {
                    Ok(mut guard) => {
                        let (tables, dry) = drain(self.tables.get_ref(), |_| true);
                        if dry {
                            guard.clear_ready();
                        }
                        Seen { tables, ..Seen::default() }
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
                        Seen { tables: false, routes: routes || lost, addresses: addresses || lost }
                    }
                    Err(_) => std::future::pending().await,
                },
            };
            if seen != Seen::default() {
                return seen;
            }
        }
    }
}

/// The generation of the nftables of the namespace that the thread is in: each transaction makes it one more.
pub fn generation() -> io::Result<u32> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    let mut message = 20u32.to_ne_bytes().to_vec();
    message.extend([GET_GENERATION.to_ne_bytes(), REQUEST.to_ne_bytes()].concat());
    message.extend([0; 12]);
    send(fd.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // Behind both headers: the first attribute is NFTA_GEN_ID, in network order.
    let id = answer.get(..length).and_then(|answer| answer.get(HEADER + 8..HEADER + 12)?.try_into().ok());
    let is_one = header(&answer).is_some_and(|(_, kind)| kind == NEW_GENERATION);
    id.filter(|_| is_one).map(u32::from_be_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_makes_the_generation_one_more() {
        let seen = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let nft = |what: &[&str]| assert!(std::process::Command::new("nft").args(what).status().unwrap().success());
            let before = generation().unwrap();
            nft(&["add", "table", "inet", "a"]);
            let after = generation().unwrap();
            nft(&["-j", "list", "ruleset"]);
            (after.wrapping_sub(before), generation().unwrap().wrapping_sub(after))
        });
        assert_eq!(seen.join().unwrap(), (1, 0));
    }
}
