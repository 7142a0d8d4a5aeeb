//! A unix socket of type SOCK_SEQPACKET: one message per packet, with descriptors beside it.

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

/// Descriptors that one packet can bring (Linux, `SCM_MAX_FD`): with room for all, none is ever lost on the way.
const DESCRIPTORS_MAX: usize = 253;

/// Connections that may wait to be taken.
const WAITING: i32 = 128;

/// One packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes; none: the other end has closed.
    pub bytes: Vec<u8>,
    /// The descriptors beside it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether it, or its descriptors, did not fit.
    pub truncated: bool,
}

/// A connected socket.
#[derive(Debug)]
pub struct Seqpacket {
    socket: AsyncFd<OwnedFd>,
}

impl Seqpacket {
    /// Connects; never waits: a full queue at the other end is an error like any other.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::of(fd)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd owns its descriptor, gives the same one for all its life and closes it only when dropped.
        let socket = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) };
        Ok(Self { socket: socket.map_err(io::Error::from)? })
    }

    /// Sends one packet with a descriptor beside it.
    pub async fn send_with(&self, bytes: &[u8], descriptor: impl AsFd) -> io::Result<()> {
        let beside = [descriptor.as_fd().as_raw_fd()];
        let write = |fd: &OwnedFd| {
            let control = [ControlMessage::ScmRights(&beside)];
            Ok(sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)?)
        };
        let sent = self.socket.async_io(Interest::WRITABLE, write).await?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a packet was sent in part")) }
    }

    /// Sends one packet.
    pub async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let write = |fd: &OwnedFd| Ok(send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?);
        let sent = self.socket.async_io(Interest::WRITABLE, write).await?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a packet was sent in part")) }
    }

    /// Receives one packet of up to `size` bytes.
    pub async fn receive(&self, size: usize) -> io::Result<Packet> {
        self.socket.async_io(Interest::READABLE, |fd| read(fd.as_raw_fd(), size)).await
    }
}

/// A socket that takes connections.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens at `path`, in the place of whoever did before; root alone may connect. `new` is a name beside it that nobody else
    /// uses: two may take the path at the same moment.
    pub fn bind(path: &Path, new: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        // Under another name first: at no moment is there a path at which nobody listens.
        bind(fd.as_raw_fd(), &UnixAddr::new(new)?)?;
        let ready = || {
            std::fs::set_permissions(new, Permissions::from_mode(0o600))?;
            listen(&fd, Backlog::new(WAITING)?)?;
            std::fs::rename(new, path)
        };
        if let Err(error) = ready() {
            // It only takes room.
            let _ = std::fs::remove_file(new);
            return Err(error);
        }
        // SAFETY: an OwnedFd owns its descriptor, gives the same one for all its life and closes it only when dropped.
        let socket = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self { socket: socket.map_err(io::Error::from)? })
    }

    /// Takes the next connection.
    pub async fn accept(&self) -> io::Result<Seqpacket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accepted = self.socket.async_io(Interest::READABLE, |fd| Ok(accept4(fd.as_raw_fd(), flags)?)).await?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows of it.
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
    // An error says that control data is missing: no descriptors were left to receive them in.
    for control in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows of them.
            descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    bytes.truncate(length);
    Ok(Packet { bytes, descriptors, truncated: flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) })
}
