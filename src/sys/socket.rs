//! Makes all TCP and UDP sockets of the daemon, with the options that a transparent proxy needs.

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Length of a listener's accept queue.
const BACKLOG: i32 = 1024;

/// Size of the send buffers of [`connected_pair`].
const PAIR_BYTES: usize = 256 * 1024;

/// TCP keepalive settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first keepalive packet.
    pub time: Duration,
    /// Time between keepalive packets.
    pub interval: Duration,
    /// Unanswered keepalive packets after which the connection is given up.
    pub retries: u32,
    /// Whether data that stays unacknowledged for the same total time also ends the connection (`TCP_USER_TIMEOUT`).
    pub user_timeout: bool,
}

impl Keepalive {
    /// The time after which a silent connection is given up.
    fn bound(&self) -> Duration {
        self.time.saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// Options that are set on every leg.
#[derive(Clone, Copy, Debug)]
pub struct LegOptions {
    /// Keepalive settings; `None` for no keepalive.
    pub keepalive: Option<Keepalive>,
    /// `TCP_NOTSENT_LOWAT` in bytes: how much unsent data the kernel accepts before the socket stops being writable.
    pub notsent_lowat: Option<u32>,
}

/// Sets `TCP_NODELAY`, keepalive, user timeout and unsent limit on a leg. Urgent data is read in line with the other
/// bytes, because its last byte would be lost otherwise.
pub fn set_leg_options(socket: &impl AsFd, options: &LegOptions) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    if let Some(keepalive) = options.keepalive {
        let probes = TcpKeepalive::new().with_time(keepalive.time).with_interval(keepalive.interval);
        socket.set_tcp_keepalive(&probes.with_retries(keepalive.retries))?;
        if keepalive.user_timeout {
            socket.set_tcp_user_timeout(Some(keepalive.bound()))?;
        }
    }
    if let Some(bytes) = options.notsent_lowat {
        socket.set_tcp_notsent_lowat(bytes)?;
    }
    Ok(())
}

/// Makes the kernel give a connection up once its peer has not acknowledged data for the time `unacknowledged`. If
/// keepalive allows less time, that shorter time is set, because this option overrides keepalive's own limit.
fn give_up_after(socket: &impl AsFd, unacknowledged: Duration, options: &LegOptions) -> io::Result<()> {
    let bound = options.keepalive.map_or(unacknowledged, |keepalive| keepalive.bound().min(unacknowledged));
    SockRef::from(socket).set_tcp_user_timeout(Some(bound))
}

/// Most bytes of a tunnel that wait unsent in the kernel, where smaller messages cannot overtake them.
const UNSENT_MAX: u32 = 256 * 1024;

/// Sets the options of a tunnel's socket: [`give_up_after`], and how much waits unsent in the kernel.
pub fn set_tunnel_options(socket: &impl AsFd, unacknowledged: Duration, options: &LegOptions) -> io::Result<()> {
    give_up_after(socket, unacknowledged, options)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_MAX)
}

/// Marks a socket. Mark 0 leaves it as it is, because setting any mark needs CAP_NET_ADMIN.
fn set_mark(socket: &Socket, mark: u32) -> io::Result<()> {
    if mark == 0 { Ok(()) } else { socket.set_mark(mark) }
}

/// Binds a listener for captured traffic in the thread's current namespace. With `ipv6` it is dual-stack, with
/// `reuse_port` a second daemon may share the port. It is marked, and transparent so that it can answer from foreign
/// addresses; with mark 0 it is neither, and binding it needs no right. Accepted sockets have the options of `legs`.
pub fn bind_capture(port: u16, ipv6: bool, mark: u32, reuse_port: bool, legs: &LegOptions) -> io::Result<TcpListener> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if ipv6 {
        socket.set_only_v6(false)?;
    }
    if reuse_port {
        socket.set_reuse_port(true)?;
    } else {
        socket.set_reuse_address(true)?;
    }
    if mark != 0 {
        socket.set_mark(mark)?;
        socket.set_ip_transparent_v4(true)?;
    }
    let any = if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    socket.bind(&SocketAddr::new(any, port).into())?;
    listen_with(socket, legs)
}

/// Listens. The kernel gives each accepted socket the options of its listener, so they are set once instead of for
/// every connection.
fn listen_with(socket: Socket, legs: &LegOptions) -> io::Result<TcpListener> {
    set_leg_options(&socket, legs)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds a listener to a port on all addresses of one family in the thread's current namespace, for connections that
/// are redirected to it from the same machine.
pub fn bind_stream(port: u16, v4: bool, mark: u32, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = bound(port, v4, Type::STREAM, reuse_port)?;
    set_mark(&socket, mark)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds a listener to a port on the loopback address of one family in the thread's current namespace. Accepted sockets
/// have the options of `legs`.
pub fn bind_loopback(port: u16, v4: bool, reuse_port: bool, legs: &LegOptions) -> io::Result<TcpListener> {
    let ip: IpAddr = if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let address = SocketAddr::new(ip, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    } else {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    listen_with(socket, legs)
}

/// Binds a datagram socket to a port on all addresses of one family in the thread's current namespace.
pub fn bind_datagram(port: u16, v4: bool, reuse_port: bool) -> io::Result<UdpSocket> {
    Ok(bound(port, v4, Type::DGRAM, reuse_port)?.into())
}

fn bound(port: u16, v4: bool, kind: Type, reuse_port: bool) -> io::Result<Socket> {
    let any: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let address = SocketAddr::new(any, port);
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), None)?;
    if !v4 {
        socket.set_only_v6(true)?;
    }
    if reuse_port {
        socket.set_reuse_port(true)?;
    } else if kind == Type::STREAM {
        // For streams only: with datagrams this would let another process share the port.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Makes a marked, non-blocking datagram socket that is connected to `to`, in the thread's current namespace.
pub fn outgoing_datagram(to: SocketAddr, mark: u32) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    set_mark(&socket, mark)?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// The local address of an outgoing connection.
#[derive(Clone, Copy, Debug)]
pub struct Bind {
    /// Address and port. Port 0 means any port that is free for the destination.
    pub address: SocketAddr,
    /// Whether the address does not belong to the namespace.
    pub foreign: bool,
}

/// Makes a marked, non-blocking TCP socket for a connection to `to`, in the thread's current namespace. Applications
/// that set `SO_REUSEADDR` can still listen on its local port.
pub fn outgoing(to: SocketAddr, bind: Option<Bind>, mark: u32, legs: &LegOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    set_mark(&socket, mark)?;
    set_leg_options(&socket, legs)?;
    socket.set_reuse_address(true)?;
    if let Some(Bind { address, foreign }) = bind {
        match address.ip() {
            IpAddr::V4(_) if foreign => {
                socket.set_ip_transparent_v4(true)?;
            }
            IpAddr::V6(_) if foreign => {
                set_flag(&socket, nix::libc::IPPROTO_IPV6, nix::libc::IPV6_TRANSPARENT)?;
            }
            _ => {}
        }
        if address.port() == 0 {
            // Without this option, binding would reserve a port for the source address whatever the destination, and
            // ports would run out.
            set_flag(&socket, nix::libc::IPPROTO_IP, nix::libc::IP_BIND_ADDRESS_NO_PORT)?;
        }
        socket.bind(&address.into())?;
    }
    Ok(socket)
}

/// Two stream sockets that are connected with each other, non-blocking. They have the type of TCP sockets, and can be
/// read, written, shut down and watched like these; options of TCP cannot be set on them.
pub fn connected_pair() -> io::Result<(TcpStream, TcpStream)> {
    let (one, two) = UnixStream::pair()?;
    for socket in [&one, &two] {
        socket.set_nonblocking(true)?;
        // Each write of a tunnel brings up to 256 KiB. The kernel takes its own maximum if that is less.
        SockRef::from(socket).set_send_buffer_size(PAIR_BYTES)?;
    }
    Ok((OwnedFd::from(one).into(), OwnedFd::from(two).into()))
}

/// Sets a flag for which socket2 has no method.
fn set_flag(socket: &Socket, level: i32, name: i32) -> io::Result<()> {
    let on: nix::libc::c_int = 1;
    let length = nix::libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(4);
    // SAFETY: the descriptor is open, and pointer and length describe a live integer, which is what these options take.
    match unsafe { nix::libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Accepts a connection: a non-blocking socket, and the address that opened it.
pub fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = nix::libc::SOCK_NONBLOCK | nix::libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes an address of at most `length` bytes to the storage, and its length to `length`. The
    // descriptor that it returns belongs to nobody else.
    let (socket, peer) = unsafe {
        SockAddr::try_init(|storage, length| {
            let raw = nix::libc::accept4(listener.as_raw_fd(), storage.cast(), length, flags);
            if raw < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(raw)) }
        })
    }?;
    let peer = peer.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket.into(), peer))
}

/// Registers a listener with the runtime of this thread, so that tasks can wait for connections.
pub fn watch(listener: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    // SAFETY: a TcpListener owns its descriptor, returns the same one for all its life and closes it only when dropped.
    unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }.map_err(io::Error::from)
}

/// Registers a socket with the runtime of this thread for as long as the result exists.
pub fn watch_for(socket: &impl AsFd, interest: Interest) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor stays open and the same for as long as it is borrowed.
    unsafe { AsyncFd::register_with_interest(socket.as_fd(), interest) }.map_err(io::Error::from)
}

/// Makes an unmarked TCP socket, as an application in the namespace would.
pub fn ordinary(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// Starts to connect a non-blocking socket. The caller waits until it is writable.
pub fn start_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&SockAddr::from(to)) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// The number of bytes written to a TCP socket that the peer has not acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unacknowledged(socket: &impl AsRawFd) -> io::Result<usize> {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: the descriptor is open, and this request writes one integer to the pointer.
    match unsafe { nix::libc::ioctl(socket.as_raw_fd(), nix::libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(usize::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes closing this socket send RST instead of FIN.
pub fn reset_on_close(socket: &impl AsFd) {
    // This fails only for a descriptor that is not a socket, which is then closed normally.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_leg_are_set() {
        let keepalive = Keepalive {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(75),
            retries: 9,
            user_timeout: true,
        };
        let legs = LegOptions { keepalive: Some(keepalive), notsent_lowat: Some(131_072) };
        let captured = bind_capture(0, true, 0, false, &legs).unwrap();
        let loopback = bind_loopback(0, true, false, &legs).unwrap();
        let mut all = Vec::new();
        for listener in [captured, loopback] {
            let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listener.local_addr().unwrap().port());
            let socket = outgoing(to, None, 1337, &legs).unwrap();
            start_connect(&socket, to).unwrap();
            let (accepted, peer) = accept(&listener).unwrap();
            assert_eq!(peer.ip().to_canonical(), Ipv4Addr::LOCALHOST);
            assert_eq!(peer.port(), socket.local_addr().unwrap().as_socket().unwrap().port());
            assert_eq!(accept(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(socket.mark().unwrap(), 1337);
            all.extend([socket, accepted.into()]);
        }
        for leg in &all {
            assert!(leg.nonblocking().unwrap());
            assert_eq!(nix::fcntl::fcntl(leg, nix::fcntl::FcntlArg::F_GETFD).unwrap(), nix::libc::FD_CLOEXEC);
            assert!(leg.tcp_nodelay().unwrap());
            assert!(leg.out_of_band_inline().unwrap());
            assert!(leg.keepalive().unwrap());
            assert_eq!(leg.tcp_keepalive_time().unwrap(), Duration::from_secs(180));
            assert_eq!(leg.tcp_keepalive_interval().unwrap(), Duration::from_secs(75));
            assert_eq!(leg.tcp_keepalive_retries().unwrap(), 9);
            assert_eq!(leg.tcp_user_timeout().unwrap(), Some(Duration::from_secs(180 + 9 * 75)));
            assert_eq!(leg.tcp_notsent_lowat().unwrap(), 131_072);
        }
    }

    #[test]
    fn a_tunnel_is_given_up_after_its_own_limit_or_the_shorter_one_of_keepalive() {
        let seconds = Duration::from_secs;
        let keepalive = |time, user_timeout| {
            Some(Keepalive { time: seconds(time), interval: seconds(2), retries: 5, user_timeout })
        };
        for (keepalive, expected) in [
            (None, 50),
            (keepalive(180, false), 50),
            (keepalive(180, true), 50),
            (keepalive(10, true), 20),
            (keepalive(10, false), 20),
        ] {
            let legs = LegOptions { keepalive, notsent_lowat: None };
            let socket = outgoing("127.0.0.1:9".parse().unwrap(), None, 1337, &legs).unwrap();
            give_up_after(&socket, seconds(50), &legs).unwrap();
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(seconds(expected)), "{keepalive:?}");
        }
    }

    #[test]
    fn a_foreign_source_binds_without_a_port() {
        let legs = LegOptions { keepalive: None, notsent_lowat: None };
        for (to, source) in [("127.0.0.1:9", "203.0.113.7"), ("[::1]:9", "2001:db8::7")] {
            let bind = Bind { address: SocketAddr::new(source.parse().unwrap(), 0), foreign: true };
            let socket = outgoing(to.parse().unwrap(), Some(bind), 1337, &legs).unwrap();
            let local = socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(local.ip().to_string(), source);
            assert_eq!(local.port(), 0, "the port is chosen when connecting, not when binding");
        }
    }
}
