//! Unix sockets of type `SOCK_SEQPACKET`: one message per packet, optionally with descriptors.

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, listen, recvmsg, send, sendmsg, socket,
};
use std::fs::Permissions;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Maximum number of descriptors in one packet (Linux, `SCM_MAX_FD`). There is always room for all, so none is lost.
const DESCRIPTORS_MAX: usize = 253;

/// Connections that may wait to be accepted.
const WAITING: i32 = 128;

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes. Empty if the other end has closed the connection.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether bytes or descriptors are missing because they did not fit.
    pub truncated: bool,
}

/// A connected socket.
#[derive(Debug)]
pub struct Seqpacket {
    socket: AsyncFd<OwnedFd>,
}

impl Seqpacket {
    /// Connects without waiting. A full queue at the other end is an error.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::of(fd)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd owns its descriptor, returns the same one for all its life and closes it only when
        // dropped.
        let socket = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) };
        Ok(Self { socket: socket.map_err(io::Error::from)? })
    }

    /// Sends one packet with a descriptor.
    pub async fn send_with(&self, bytes: &[u8], descriptor: impl AsFd) -> io::Result<()> {
        let beside = [descriptor.as_fd().as_raw_fd()];
        let write = |fd: &OwnedFd| {
            let control = [ControlMessage::ScmRights(&beside)];
            Ok(sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)?)
        };
        let sent = self.socket.async_io(Interest::WRITABLE, write).await?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a packet was sent only in part")) }
    }

    /// Sends one packet.
    pub async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let write = |fd: &OwnedFd| Ok(send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?);
        let sent = self.socket.async_io(Interest::WRITABLE, write).await?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a packet was sent only in part")) }
    }

    /// Receives one packet of up to `size` bytes.
    pub async fn receive(&self, size: usize) -> io::Result<Packet> {
        self.socket.async_io(Interest::READABLE, |fd| read(fd.as_raw_fd(), size)).await
    }
}

/// A socket that accepts connections.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens at `path`, replacing an earlier listener. Only root may connect. `new` is a unique temporary path in the
    /// same folder, because two processes may replace the listener at the same moment.
    pub fn bind(path: &Path, new: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        // Under the temporary name first, so that `path` leads to a listening socket at every moment.
        bind(fd.as_raw_fd(), &UnixAddr::new(new)?)?;
        let ready = || {
            std::fs::set_permissions(new, Permissions::from_mode(0o600))?;
            listen(&fd, Backlog::new(WAITING)?)?;
            std::fs::rename(new, path)
        };
        if let Err(error) = ready() {
            // Best effort: a file that stays only takes room.
            let _ = std::fs::remove_file(new);
            return Err(error);
        }
        // SAFETY: an OwnedFd owns its descriptor, returns the same one for all its life and closes it only when
        // dropped.
        let socket = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self { socket: socket.map_err(io::Error::from)? })
    }

    /// Accepts the next connection.
    pub async fn accept(&self) -> io::Result<Seqpacket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accepted = self.socket.async_io(Interest::READABLE, |fd| Ok(accept4(fd.as_raw_fd(), flags)?)).await?;
        // SAFETY: the kernel has just made this descriptor for this call, so nothing else owns it.
        Seqpacket::of(unsafe { OwnedFd::from_raw_fd(accepted) })
    }
}

fn read(fd: RawFd, size: usize) -> io::Result<Packet> {
    let mut bytes = vec![0; size];
    let mut control = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(fd, &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let (length, flags) = (message.bytes, message.flags);
    let mut descriptors = Vec::new();
    // An error means that control data is missing, because this process had no room for further descriptors.
    for control in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for this call, so nothing else owns them.
            descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    bytes.truncate(length);
    Ok(Packet { bytes, descriptors, truncated: flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) })
}
