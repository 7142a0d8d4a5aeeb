//! TCP from the pod's namespace, the original source kept where there is one to keep.

use super::{CONNECT_DEADLINE, DialError};
use crate::connection::authorize::Permit;
use crate::sys::netns::Netns;
use crate::sys::socket::{Bind, LegOptions, outgoing, reset_on_close, start_connect};
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use tokio::net::TcpStream;

/// How sockets of the daemon are marked and set up.
#[derive(Clone, Copy, Debug)]
pub struct SocketConfig {
    /// `SO_MARK`, by which the pod's rules tell our packets from the application's.
    pub mark: u32,
    /// Options of every leg.
    pub legs: LegOptions,
    /// Whether applications see the original client's address.
    pub keep_source: bool,
}

/// Bit of `SO_MARK`, beside the bits that say that a packet is ours, of connections that are opened in a client's name.
pub const LEG_BIT: u32 = 0x1000;

/// Ports that our connections come from where they are free: above those that Linux chooses from by itself, because a port
/// that we hold is one that an application cannot listen on. (`net.ipv4.ip_local_port_range` ends at 60999.)
const PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;

/// Ports that are tried before the kernel chooses one.
const TRIES: usize = 4;

/// Connects from the pod to somewhere else, as the pod; from `source` where that is one of its addresses.
pub async fn outbound(
    netns: &Netns,
    to: SocketAddr,
    source: Option<IpAddr>,
    config: &SocketConfig,
) -> Result<TcpStream, DialError> {
    connect(netns, to, source.map_or(Source::Any, Source::Own), config).await
}

/// Connects to the pod's application, as the original client. Needs a permit.
pub async fn to_app(
    _permit: &Permit,
    netns: &Netns,
    to: SocketAddr,
    client: IpAddr,
    config: &SocketConfig,
) -> Result<TcpStream, DialError> {
    // A pod that reaches itself has its own address already; another family cannot be kept, nor a link-local IPv6 address, to
    // which answers go by its link alone.
    let on_link = matches!(client, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let keep = config.keep_source && client != to.ip() && client.is_ipv4() == to.is_ipv4() && !on_link;
    let source = if keep { Source::Client(client) } else { Source::Any };
    connect(netns, to, source, config).await
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Whatever the route says.
    Any,
    /// An address of the pod.
    Own(IpAddr),
    /// The address of the client in whose name it is opened.
    Client(IpAddr),
}

impl Source {
    /// Makes a socket and starts to connect it, in the namespace that the thread is in.
    fn connect(self, to: SocketAddr, config: &SocketConfig) -> io::Result<Socket> {
        let (ip, foreign, mark) = match self {
            Self::Any => (None, false, config.mark),
            Self::Own(ip) => (Some(ip), false, config.mark),
            Self::Client(ip) => (Some(ip), true, config.mark | LEG_BIT),
        };
        let from = |port| {
            let bind = ip.map(|ip| Bind { address: SocketAddr::new(ip, port), foreign });
            let socket = outgoing(to, bind, mark, &config.legs)?;
            start_connect(&socket, to).map(|()| socket)
        };
        for _ in 0..ip.map_or(0, |_| TRIES) {
            match from(rand::random_range(PORTS)) {
                Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => {}
                started => return started,
            }
        }
        from(0)
    }
}

/// A connection that is not there yet. Given up, it is reset: whoever has accepted it already must not take it for one that
/// ended in order.
struct Connecting(Option<TcpStream>);

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            reset_on_close(stream);
        }
    }
}

async fn connect(netns: &Netns, to: SocketAddr, source: Source, config: &SocketConfig) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { to, source };
    let connecting = async {
        let socket = netns.enter(|| source.connect(to, config))?.map_err(failed)?;
        let mut leg = Connecting(Some(TcpStream::from_std(socket.into()).map_err(failed)?));
        if let Some(stream) = &leg.0 {
            stream.writable().await.map_err(failed)?;
            if let Some(error) = stream.take_error().map_err(failed)? {
                return Err(failed(error));
            }
        }
        leg.0.take().ok_or_else(|| failed(ErrorKind::NotConnected.into()))
    };
    match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
        Ok(Err(DialError::Connect { source, .. })) if source.kind() == ErrorKind::TimedOut => {
            Err(DialError::ConnectDeadline(to))
        }
        Ok(result) => result,
        Err(_) => Err(DialError::ConnectDeadline(to)),
    }
}
