//! Lists the open TCP connections of a network namespace, and ends single ones (sources: sock_diag(7),
//! linux/inet_diag.h, linux/sock_diag.h).

use super::netlink::{self, ERROR, HEADER, find, header};
use super::tcp_info::TcpInfo;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

/// `SOCK_DIAG_BY_FAMILY`, `SOCK_DESTROY`, `NLM_F_ACK`, `NLM_F_DUMP`, `NLMSG_DONE`.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const DONE: u16 = 3;

/// Offset of the `inet_diag_sockid` in an answer (`struct inet_diag_msg`), and its length.
const ID_AT: usize = HEADER + 4;
const ID: usize = 48;
/// Offset of the attributes in an answer, and the attribute with the socket's mark (`INET_DIAG_MARK`), which the kernel
/// sends only to processes with CAP_NET_ADMIN.
const ATTRIBUTES_AT: usize = HEADER + 72;
const MARK: u16 = 15;
/// The attribute with the `struct tcp_info` (`INET_DIAG_INFO`), and the bit that asks for it.
const INFO: u16 = 2;
const WITH_INFO: u8 = 1 << (INFO - 1);
/// The states of open connections: established, SYN sent, FIN wait 1 and 2, close wait.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;

/// One open connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// The local address.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
    /// Unique number, which tells the socket from a later one with the same addresses.
    pub cookie: u64,
    /// The `SO_MARK`; 0 if the socket has none.
    pub mark: u32,
    /// How it does, if that was asked for.
    pub info: Option<TcpInfo>,
    family: u8,
    id: [u8; ID],
}

/// The open connections of the thread's current namespace.
pub fn open() -> io::Result<Vec<TcpSocket>> {
    list(0)
}

/// The same, and how each of them does.
pub fn open_with_info() -> io::Result<Vec<TcpSocket>> {
    list(WITH_INFO)
}

fn list(extensions: u8) -> io::Result<Vec<TcpSocket>> {
    let diag = diag()?;
    let mut all = Vec::new();
    for family in [nix::libc::AF_INET, nix::libc::AF_INET6] {
        let family = u8::try_from(family).unwrap_or_default();
        send(diag.as_raw_fd(), &request(BY_FAMILY, DUMP, [family, extensions], &[0; ID]), MsgFlags::empty())?;
        let mut buffer = vec![0; 64 * 1024];
        'answers: loop {
            let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((length, kind)) = header(rest) {
                match kind {
                    DONE => break 'answers,
                    ERROR => return Err(error(rest)),
                    _ => all.extend(read(rest.get(..length).unwrap_or_default())),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
            if length == 0 {
                break;
            }
        }
    }
    Ok(all)
}

/// Ends a connection: both ends see a reset. A connection that has ended already is no error.
pub fn end(which: &TcpSocket) -> io::Result<()> {
    let diag = diag()?;
    send(diag.as_raw_fd(), &request(DESTROY, ACK, [which.family, 0], &which.id), MsgFlags::empty())?;
    let mut buffer = [0; 1024];
    let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let answer = buffer.get(..length).unwrap_or_default();
    match error(answer) {
        error if error.raw_os_error() == Some(0) || error.kind() == io::ErrorKind::NotFound => Ok(()),
        error => Err(error),
    }
}

fn diag() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?)
}

fn request(kind: u16, flags: u16, [family, extensions]: [u8; 2], id: &[u8; ID]) -> Vec<u8> {
    let tcp = u8::try_from(nix::libc::IPPROTO_TCP).unwrap_or_default();
    netlink::request(kind, flags, &[&[family, tcp, extensions, 0], &STATES.to_ne_bytes()[..], id].concat())
}

fn error(answer: &[u8]) -> io::Error {
    netlink::error(answer).map_or_else(|| io::ErrorKind::UnexpectedEof.into(), io::Error::from_raw_os_error)
}

fn read(message: &[u8]) -> Option<TcpSocket> {
    let family = *message.get(HEADER)?;
    let id: [u8; ID] = message.get(ID_AT..ID_AT + ID)?.try_into().ok()?;
    let address = |port_at: usize, ip_at: usize| {
        let port = u16::from_be_bytes(id.get(port_at..port_at + 2)?.try_into().ok()?);
        let ip = if i32::from(family) == nix::libc::AF_INET {
            IpAddr::from(<[u8; 4]>::try_from(id.get(ip_at..ip_at + 4)?).ok()?)
        } else {
            IpAddr::from(<[u8; 16]>::try_from(id.get(ip_at..ip_at + 16)?).ok()?)
        };
        Some(SocketAddr::new(ip.to_canonical(), port))
    };
    let (local, peer) = (address(0, 4)?, address(2, 20)?);
    let cookie = u64::from_ne_bytes(id.get(40..48)?.try_into().ok()?);
    let attributes = message.get(ATTRIBUTES_AT..).unwrap_or_default();
    let info = find(attributes, INFO).map(TcpInfo::read);
    let mark = find(attributes, MARK);
    let mark = mark.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
    Some(TcpSocket { local, peer, cookie, mark, info, family, id })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn an_open_connection_is_found_and_ended() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_server, _) = listener.accept().unwrap();
            let ours = |all: &[TcpSocket]| all.iter().find(|s| s.peer == listener.local_addr().unwrap()).cloned();
            let all = open().unwrap();
            assert_eq!(all.len(), 2, "both ends but not the listener: {all:?}");
            assert!(all.iter().all(|socket| socket.mark == 0 && socket.info.is_none()));
            let info = ours(&open_with_info().unwrap()).unwrap().info.unwrap();
            assert!(info.rtt_us > 0 && info.rtt_us < 1_000_000 && info.cwnd > 0 && info.retransmits == 0, "{info:?}");
            socket2::SockRef::from(&client).set_mark(0x539).unwrap();
            assert_eq!(ours(&open().unwrap()).unwrap().mark, 0x539);
            let found = ours(&all).unwrap();
            end(&found).unwrap();
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
            assert_eq!(ours(&open().unwrap()), None);
            end(&found).unwrap();
        })
        .join()
        .unwrap();
    }
}
