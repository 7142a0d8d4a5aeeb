//! Datagrams with the local address at which they arrived, because an answer must come from that address (sources:
//! ip(7) `IP_PKTINFO`, ipv6(7) `IPV6_PKTINFO`).

use nix::cmsg_space;
use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

/// The sender of a datagram, and the address at which the datagram arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The sender.
    pub address: SocketAddr,
    /// The local address at which the datagram arrived.
    pub local: IpAddr,
}

/// Makes a socket report the local address of each datagram.
pub fn tell_local(socket: &impl AsFd, v4: bool) -> io::Result<()> {
    if v4 {
        Ok(setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?)
    } else {
        Ok(setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?)
    }
}

/// Receives one datagram without waiting, and returns its length. A datagram without a local address is an error.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Client)> {
    let mut control = cmsg_space!(in6_pktinfo);
    let mut into = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let missing = || io::Error::from(io::ErrorKind::InvalidData);
    let from = received.address.ok_or_else(missing)?;
    let v4 = from.as_sockaddr_in().map(|from| SocketAddrV4::from(*from).into());
    let address: SocketAddr =
        v4.or_else(|| Some(SocketAddrV6::from(*from.as_sockaddr_in6()?).into())).ok_or_else(missing)?;
    let local = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into()),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
        _ => None,
    });
    Ok((received.bytes, Client { address, local: local.ok_or_else(missing)? }))
}

/// Sends one datagram to a client, from the address at which the client's own datagram arrived.
pub fn send(socket: &impl AsRawFd, bytes: &[u8], to: Client) -> io::Result<()> {
    let nowhere = in_addr { s_addr: 0 };
    let (fd, bytes, to_address) = (socket.as_raw_fd(), [IoSlice::new(bytes)], SockaddrStorage::from(to.address));
    let flags = MsgFlags::MSG_DONTWAIT;
    match to.local {
        IpAddr::V4(ip) => {
            let from = in_addr { s_addr: u32::from(ip).to_be() };
            let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: from, ipi_addr: nowhere };
            sendmsg(fd, &bytes, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to_address))?;
        }
        IpAddr::V6(ip) => {
            // A link-local address is valid only with its interface.
            let interface = if let SocketAddr::V6(to) = to.address { to.scope_id() } else { 0 };
            let info = in6_pktinfo { ipi6_addr: in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: interface };
            sendmsg(fd, &bytes, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to_address))?;
        }
    }
    Ok(())
}

/// Binds a datagram socket to a port on all addresses of one family in the thread's current namespace. The socket
/// reports the local address of each datagram.
pub fn bind(port: u16, v4: bool, reuse_port: bool) -> io::Result<UdpSocket> {
    let socket = super::socket::bind_datagram(port, v4, reuse_port)?;
    tell_local(&socket, v4)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_from_the_address_that_was_asked() {
        for (v4, asked) in [(true, "127.0.0.7"), (false, "::1")] {
            let server = bind(0, v4, false).unwrap();
            let to = SocketAddr::new(asked.parse().unwrap(), server.local_addr().unwrap().port());
            let client = UdpSocket::bind(if v4 { "127.0.0.1:0" } else { "[::1]:0" }).unwrap();
            client.connect(to).unwrap();
            client.send(b"question").unwrap();
            let mut buffer = [0; 100];
            let (length, from) = receive(&server, &mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"question");
            assert_eq!((from.address, from.local), (client.local_addr().unwrap(), to.ip()));
            send(&server, b"answer", from).unwrap();
            // The client's socket is connected, so it receives the answer only if it comes from the right address.
            let length = client.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"answer");
        }
    }
}
