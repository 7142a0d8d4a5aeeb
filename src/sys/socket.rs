//! Sockets with the options that a transparent proxy needs. All of them are made by one of these functions.

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Length of a listener's accept queue.
const BACKLOG: i32 = 1024;

/// Keepalive of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up.
    pub retries: u32,
    /// Whether unacknowledged data ends a connection after the same time in all (`TCP_USER_TIMEOUT`).
    pub user_timeout: bool,
}

impl Keepalive {
    /// After which a silent connection is given up.
    fn bound(&self) -> Duration {
        self.time.saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// Options set on every leg of a connection.
#[derive(Clone, Copy, Debug)]
pub struct LegOptions {
    /// Keepalive, or none.
    pub keepalive: Option<Keepalive>,
    /// `TCP_NOTSENT_LOWAT` in bytes: how much unsent data the kernel takes before the socket stops being writable.
    pub notsent_lowat: Option<u32>,
}

/// Sets `TCP_NODELAY`, keepalive, user timeout and unsent limit on one leg. Urgent data is read in its place among the rest:
/// else its last byte would be lost.
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

/// Has the kernel give a connection up, and send no more, once its peer has acknowledged nothing for so long, or for the shorter
/// time that its keepalive allows: the kernel goes by this bound for keepalive too.
pub fn give_up_after(socket: &impl AsFd, unacknowledged: Duration, options: &LegOptions) -> io::Result<()> {
    let bound = options.keepalive.map_or(unacknowledged, |keepalive| keepalive.bound().min(unacknowledged));
    SockRef::from(socket).set_tcp_user_timeout(Some(bound))
}

/// Binds a listener for captured traffic in the namespace the thread is in: dual-stack where `ipv6`, marked,
/// transparent (so that replies to foreign addresses find it), shared with a second daemon where `reuse_port`.
pub fn bind_capture(port: u16, ipv6: bool, mark: u32, reuse_port: bool) -> io::Result<TcpListener> {
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
    socket.set_mark(mark)?;
    socket.set_ip_transparent_v4(true)?;
    let any = if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds a listener on a port of every address of one family in the namespace the thread is in, for what is redirected there
/// from the same machine.
pub fn bind_stream(port: u16, v4: bool, mark: u32, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = bound(port, v4, Type::STREAM, reuse_port)?;
    socket.set_mark(mark)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds a datagram socket on a port of every address of one family in the namespace the thread is in.
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
        // For datagrams this would let another process share the port.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Makes a marked, non-blocking datagram socket that speaks to `to` alone, in the namespace the thread is in.
pub fn outgoing_datagram(to: SocketAddr, mark: u32) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    socket.set_mark(mark)?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// Where an outgoing connection comes from.
#[derive(Clone, Copy, Debug)]
pub struct Bind {
    /// Address and port; port 0 is any that is free for the destination.
    pub address: SocketAddr,
    /// Whether the address is not one of the namespace's.
    pub foreign: bool,
}

/// Makes a marked, non-blocking TCP socket for a connection to `to` in the namespace the thread is in. Its port keeps no
/// application from listening on it that sets `SO_REUSEADDR`.
pub fn outgoing(to: SocketAddr, bind: Option<Bind>, mark: u32, legs: &LegOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_mark(mark)?;
    set_leg_options(&socket, legs)?;
    socket.set_reuse_address(true)?;
    if let Some(Bind { address, foreign }) = bind {
        match address.ip() {
            IpAddr::V4(_) if foreign => {
                socket.set_ip_transparent_v4(true)?;
                socket.set_freebind_v4(true)?;
            }
            IpAddr::V6(_) if foreign => {
                set_flag(&socket, nix::libc::IPPROTO_IPV6, nix::libc::IPV6_TRANSPARENT)?;
                socket.set_freebind_v6(true)?;
            }
            _ => {}
        }
        if address.port() == 0 {
            // Without it a port would be reserved per source address whatever the destination, and run out.
            set_flag(&socket, nix::libc::IPPROTO_IP, nix::libc::IP_BIND_ADDRESS_NO_PORT)?;
        }
        socket.bind(&address.into())?;
    }
    Ok(socket)
}

/// Sets a flag that socket2 has no method for.
fn set_flag(socket: &Socket, level: i32, name: i32) -> io::Result<()> {
    let on: nix::libc::c_int = 1;
    let length = nix::libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(4);
    // SAFETY: the descriptor is open, and pointer and length describe a live integer, which both options take.
    match unsafe { nix::libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Registers a listener with the runtime of this thread, to be told when a connection waits.
pub fn watch(listener: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    // SAFETY: a TcpListener owns its descriptor, gives the same one for all its life and closes it only when dropped.
    unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }.map_err(io::Error::from)
}

/// Makes an unmarked socket, as an application of the namespace would.
pub fn ordinary(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// Starts connecting a non-blocking socket; the caller waits for it to become writable.
pub fn start_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&SockAddr::from(to)) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// Bytes written to a TCP socket that its peer has not acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unacknowledged(socket: &impl AsRawFd) -> io::Result<usize> {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: the descriptor is open, and this request writes one integer, which the pointer leads to.
    match unsafe { nix::libc::ioctl(socket.as_raw_fd(), nix::libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(usize::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the coming close of this socket send RST instead of FIN.
pub fn reset_on_close(socket: &impl AsFd) {
    // Only fails for a descriptor that is no socket; the close then is the ordinary one.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_leg_are_really_set() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let keepalive = Keepalive {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(75),
            retries: 9,
            user_timeout: true,
        };
        let legs = LegOptions { keepalive: Some(keepalive), notsent_lowat: Some(131_072) };
        let socket = outgoing(listener.local_addr().unwrap(), None, 1337, &legs).unwrap();
        start_connect(&socket, listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        set_leg_options(&accepted, &legs).unwrap();
        assert_eq!(socket.mark().unwrap(), 1337);
        for leg in [SockRef::from(&socket), SockRef::from(&accepted)] {
            assert!(leg.tcp_nodelay().unwrap());
            assert!(leg.keepalive().unwrap());
            assert_eq!(leg.tcp_keepalive_time().unwrap(), Duration::from_secs(180));
            assert_eq!(leg.tcp_keepalive_interval().unwrap(), Duration::from_secs(75));
            assert_eq!(leg.tcp_keepalive_retries().unwrap(), 9);
            assert_eq!(leg.tcp_user_timeout().unwrap(), Some(Duration::from_secs(180 + 9 * 75)));
            assert_eq!(leg.tcp_notsent_lowat().unwrap(), 131_072);
        }
    }

    #[test]
    fn a_tunnel_is_given_up_after_the_shorter_of_its_own_bound_and_keepalives() {
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
