//! A packet sniffer on one interface, with which the demonstration shows what crosses the wire.

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recv, socket,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A packet socket that is bound to one interface of the namespace in which it was opened.
#[derive(Debug)]
pub struct Sniffer {
    fd: OwnedFd,
}

impl Sniffer {
    /// Opens a packet socket on `interface` in the thread's current namespace. Needs `CAP_NET_RAW`.
    pub fn open(interface: &str) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )?;
        let index = nix::net::if_::if_nametoindex(interface)?;
        // SAFETY: sockaddr_ll is a plain C structure; all zeroes is a valid value.
        let mut address: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(nix::libc::AF_PACKET).unwrap_or_default();
        address.sll_protocol = u16::try_from(nix::libc::ETH_P_ALL).unwrap_or_default().to_be();
        address.sll_ifindex = index.cast_signed();
        let raw: *const nix::libc::sockaddr_ll = &raw const address;
        let length = u32::try_from(std::mem::size_of_val(&address)).ok();
        // SAFETY: `raw` points to a live sockaddr_ll, and `length` is its size.
        let link = unsafe { LinkAddr::from_raw(raw.cast(), length) };
        let link = link.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        bind(fd.as_raw_fd(), &link)?;
        let size = 64 << 20;
        // A larger buffer, so that no frames of a burst are lost. Best effort: the kernel counts lost frames.
        let _ = nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::RcvBufForce, &size);
        Ok(Self { fd })
    }

    /// Takes one frame and returns its length; `None` if none is waiting.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(length)),
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The number of frames dropped since the last call because they were not taken in time.
    pub fn dropped(&self) -> io::Result<u32> {
        let mut stats = nix::libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = nix::libc::socklen_t::try_from(std::mem::size_of_val(&stats)).unwrap_or(0);
        // SAFETY: the pointers are to a live tpacket_stats and its length, as PACKET_STATISTICS requires (packet(7)).
        let result = unsafe {
            nix::libc::getsockopt(
                self.fd.as_raw_fd(),
                nix::libc::SOL_PACKET,
                nix::libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stats.tp_drops)
    }
}
