//! Reads named counters and the ruleset generation of nftables directly from the kernel, without running `nft`
//! (sources: linux/netfilter/nfnetlink.h and nf_tables.h).

use super::netlink::{HEADER, attribute, find, header, request};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::os::fd::AsRawFd;

/// Message types: subsystem nftables, `NFT_MSG_NEWOBJ` and `NFT_MSG_GETOBJ`.
const NEW_OBJECT: u16 = 10 << 8 | 18;
const GET_OBJECT: u16 = 10 << 8 | 19;
/// `NLMSG_ERROR`, followed by the negative error number.
const ERROR: u16 = 2;
/// Message types: subsystem nftables, `NFT_MSG_NEWGEN` and `NFT_MSG_GETGEN`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const GET_GENERATION: u16 = 10 << 8 | 16;
/// Length of `struct nfgenmsg`.
const GENERAL: usize = 4;
/// `NFTA_OBJ_TABLE`, `NFTA_OBJ_NAME`, `NFTA_OBJ_TYPE`, `NFTA_OBJ_DATA`; `NFTA_COUNTER_PACKETS`.
const TABLE: u16 = 1;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const DATA: u16 = 4;
const PACKETS: u16 = 2;
/// `NFT_OBJECT_COUNTER`.
const COUNTER: u32 = 1;

/// The family of a table.
#[derive(Clone, Copy, Debug)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// Frames that cross a bridge.
    Bridge = 7,
}

/// The number of packets of a named counter, in the thread's current namespace; `NotFound` if there is no such counter or
/// table.
pub fn packets(family: Family, table: &str, name: &str) -> io::Result<u64> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    let mut body = vec![family as u8, 0, 0, 0];
    for (kind, value) in [(TABLE, table), (NAME, name)] {
        body.extend(attribute(kind, &[value.as_bytes(), &[0]].concat()));
    }
    body.extend(attribute(TYPE, &COUNTER.to_be_bytes()));
    send(fd.as_raw_fd(), &request(GET_OBJECT, 0, &body), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = answer.get(..length).unwrap_or_default();
    let kind = header(answer).map(|(_, kind)| kind);
    if kind == Some(ERROR) {
        let code = answer.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
        return Err(code.map_or_else(|| io::ErrorKind::InvalidData.into(), |code| io::Error::from_raw_os_error(-code)));
    }
    let attributes = answer.get(HEADER + GENERAL..).filter(|_| kind == Some(NEW_OBJECT));
    let count = attributes.and_then(|all| find(find(all, DATA)?, PACKETS)?.try_into().ok()).map(u64::from_be_bytes);
    count.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The generation of the ruleset in the thread's current namespace. Each transaction increases it by one.
pub fn generation() -> io::Result<u32> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    send(fd.as_raw_fd(), &request(GET_GENERATION, 0, &[0; GENERAL]), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // After both headers and the header of the first attribute: NFTA_GEN_ID, in network byte order.
    let id = answer.get(..length).and_then(|answer| answer.get(HEADER + 8..HEADER + 12)?.try_into().ok());
    let is_one = header(&answer).is_some_and(|(_, kind)| kind == NEW_GENERATION);
    id.filter(|_| is_one).map(u32::from_be_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_increases_the_generation_by_one() {
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

    #[test]
    fn a_counter_is_read_and_a_missing_one_is_an_error() {
        let read = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let run = |program: &str, what: &[&str]| {
                assert!(std::process::Command::new(program).args(what).status().unwrap().success());
            };
            run("ip", &["link", "set", "lo", "up"]);
            let table = "table inet a { counter c { }; chain o { type filter hook output priority 0; udp dport 9 counter name c; }; }";
            run("nft", &[table]);
            let before = packets(Family::Inet, "a", "c").unwrap();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for _ in 0..3 {
                socket.send_to(b"x", "127.0.0.1:9").unwrap();
            }
            let absent = |family, name| packets(family, "a", name).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
            let missing = absent(Family::Inet, "d") && absent(Family::Bridge, "c");
            (before, packets(Family::Inet, "a", "c").unwrap(), missing)
        });
        assert_eq!(read.join().unwrap(), (0, 3, true));
        assert_eq!(find(&[], 1), None);
        assert_eq!(find(&[0; 8], 1), None, "a length of 0 would never end");
    }
}
