//! The original destination of a redirected datagram. There is no `SO_ORIGINAL_DST` for datagrams, but the connection
//! tracking table has it (source: linux/netfilter/nfnetlink_conntrack.h and nfnetlink.h).

use super::netlink::{self, ERROR, HEADER, attribute, find, header};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

/// Message type: subsystem conntrack, message `IPCTNL_MSG_CT_GET`.
const GET: u16 = 0x0101;
/// Flag of an attribute that contains attributes (`NLA_F_NESTED`).
const NESTED: u16 = 0x8000;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// Length of the netlink header and the netfilter header that follows it.
const HEADERS: usize = HEADER + 4;

/// The connection tracking table of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: OwnedFd,
}

impl Conntrack {
    /// Opens the table of the thread's current namespace.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Self { socket: socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)? })
    }

    /// The address to which `client` sent a datagram that arrived at `ours`; `None` if it was not redirected. The
    /// kernel answers at once, so this does not block.
    pub fn original_destination(&self, client: SocketAddr, ours: SocketAddr) -> io::Result<Option<SocketAddr>> {
        // An earlier call that failed may have left its answer in the socket.
        let mut answer = [0; 4096];
        while recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty()).is_ok() {}
        send(self.socket.as_raw_fd(), &question(client, ours), MsgFlags::empty())?;
        let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        read(answer.get(..length).unwrap_or_default())
    }
}

/// A request for the entry whose replies go from `ours` to `client`.
fn question(client: SocketAddr, ours: SocketAddr) -> Vec<u8> {
    let (family, addresses) = match (ours.ip(), client.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            (nix::libc::AF_INET, [attribute(1, &from.octets()), attribute(2, &to.octets())].concat())
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            (nix::libc::AF_INET6, [attribute(3, &octets(from)), attribute(4, &octets(to))].concat())
        }
    };
    let udp = u8::try_from(nix::libc::IPPROTO_UDP).unwrap_or_default();
    let ports = [
        attribute(PROTO_NUM, &[udp]),
        attribute(PROTO_SRC_PORT, &ours.port().to_be_bytes()),
        attribute(PROTO_DST_PORT, &client.port().to_be_bytes()),
    ];
    let tuple = [attribute(TUPLE_IP | NESTED, &addresses), attribute(TUPLE_PROTO | NESTED, &ports.concat())].concat();
    let body = attribute(TUPLE_REPLY | NESTED, &tuple);
    let general = [u8::try_from(family).unwrap_or_default(), 0, 0, 0];
    netlink::request(GET, 0, &[&general[..], &body].concat())
}

fn read(answer: &[u8]) -> io::Result<Option<SocketAddr>> {
    let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let (_, kind) = header(answer).ok_or_else(short)?;
    if kind == ERROR {
        return match Errno::from_raw(netlink::error(answer).ok_or_else(short)?) {
            Errno::ENOENT => Ok(None),
            other => Err(other.into()),
        };
    }
    let original = find(answer.get(HEADERS..).unwrap_or_default(), TUPLE_ORIG).ok_or_else(short)?;
    let addresses = find(original, TUPLE_IP).ok_or_else(short)?;
    let v4 = find(addresses, 2).and_then(|octets| <[u8; 4]>::try_from(octets).ok()).map(IpAddr::from);
    let v6 = || find(addresses, 4).and_then(|octets| <[u8; 16]>::try_from(octets).ok()).map(IpAddr::from);
    let port = find(original, TUPLE_PROTO).and_then(|ports| find(ports, PROTO_DST_PORT)?.try_into().ok());
    let (ip, port) = v4.or_else(v6).zip(port.map(u16::from_be_bytes)).ok_or_else(short)?;
    Ok(Some(SocketAddr::new(ip, port)))
}
