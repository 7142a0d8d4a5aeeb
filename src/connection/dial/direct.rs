//! TCP from the pod's namespace, the original source kept where there is one to keep.

use super::error::{CONNECT_DEADLINE, DialError};
use crate::connection::authorize::Permit;
use crate::ports::OWN_CONNECTIONS;
use crate::sys::netns::Netns;
use crate::sys::socket::{Bind, LegOptions, outgoing, reset_on_close, start_connect};
use parking_lot::Mutex;
use socket2::Socket;
use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
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

/// Ports that are tried before the kernel chooses one.
const TRIES: usize = 4;

/// Two ends of a connection: our own address and port, and those that it was opened to.
type Ends = [(IpAddr, u16); 2];

fn ends(own: SocketAddr, to: SocketAddr) -> Ends {
    [own, to].map(|end| (end.ip().to_canonical(), end.port()))
}

/// The connections that we have opened in one pod's namespace and that are open still. One that comes to a listener of ours has
/// been led back there; passed on, it would come again, and so on without end.
#[derive(Clone, Debug, Default)]
pub struct OpenLegs(Arc<Mutex<HashSet<Ends>>>);

impl OpenLegs {
    /// Whether a connection from `source` to `destination` is one of them.
    pub fn contains(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.0.lock().contains(&ends(source, destination))
    }

    /// Starts to connect. The port may be chosen only now, and the connection may be back at once: until it is entry, nobody
    /// looks.
    fn connect(&self, socket: &Socket, to: SocketAddr) -> io::Result<OpenLeg> {
        let mut open = self.0.lock();
        start_connect(socket, to)?;
        let own = socket.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
        let ends = ends(own, to);
        open.insert(ends);
        Ok(OpenLeg { ends, open: self.clone() })
    }
}

/// Keeps a connection among the open ones.
#[derive(Debug)]
pub struct OpenLeg {
    ends: Ends,
    open: OpenLegs,
}

impl Drop for OpenLeg {
    fn drop(&mut self) {
        self.open.0.lock().remove(&self.ends);
    }
}

/// A connection that we have opened.
#[derive(Debug)]
pub struct Leg {
    /// To be dropped before the socket: after that, another may have its ends.
    pub entry: OpenLeg,
    /// The socket.
    pub socket: TcpStream,
}

/// Connects from the pod to somewhere else, as the pod; from `source` where that is one of its addresses.
pub async fn outbound(
    netns: &Netns,
    to: SocketAddr,
    source: Option<IpAddr>,
    config: &SocketConfig,
    open: &OpenLegs,
) -> Result<Leg, DialError> {
    connect(netns, to, source.map_or(SourceAddress::FromRoute, SourceAddress::Own), config, open).await
}

/// Connects to the pod's application, as the original client. Needs a permit.
pub async fn to_app(
    _permit: &Permit,
    netns: &Netns,
    to: SocketAddr,
    client: IpAddr,
    config: &SocketConfig,
    open: &OpenLegs,
) -> Result<Leg, DialError> {
    // A pod that reaches itself has its own address already; another family cannot be kept, nor a link-local IPv6 address, to
    // which answers go by its link alone.
    let on_link = matches!(client, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let keep = config.keep_source && client != to.ip() && client.is_ipv4() == to.is_ipv4() && !on_link;
    let source = if keep { SourceAddress::Client(client) } else { SourceAddress::FromRoute };
    connect(netns, to, source, config, open).await
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
enum SourceAddress {
    /// Whatever the route says.
    FromRoute,
    /// An address of the pod.
    Own(IpAddr),
    /// The address of the client in whose name it is opened.
    Client(IpAddr),
}

impl SourceAddress {
    /// Makes a socket and starts to connect it, in the namespace that the thread is in.
    fn connect(self, to: SocketAddr, config: &SocketConfig, open: &OpenLegs) -> io::Result<(OpenLeg, Socket)> {
        let (ip, foreign, mark) = match self {
            Self::FromRoute => (None, false, config.mark),
            Self::Own(ip) => (Some(ip), false, config.mark),
            Self::Client(ip) => (Some(ip), true, config.mark | LEG_BIT),
        };
        let from = |port| {
            let bind = ip.map(|ip| Bind { address: SocketAddr::new(ip, port), foreign });
            let socket = outgoing(to, bind, mark, &config.legs)?;
            open.connect(&socket, to).map(|entry| (entry, socket))
        };
        for _ in 0..ip.map_or(0, |_| TRIES) {
            match from(rand::random_range(OWN_CONNECTIONS)) {
                Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => {}
                started => return started,
            }
        }
        from(0)
    }
}

/// A connection that is not there yet. Given up, it is reset: whoever has accepted it already must not take it for one that
/// ended in order.
struct Connecting(Option<Leg>);

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(leg) = &self.0 {
            reset_on_close(&leg.socket);
        }
    }
}

async fn connect(
    netns: &Netns,
    to: SocketAddr,
    source: SourceAddress,
    config: &SocketConfig,
    open: &OpenLegs,
) -> Result<Leg, DialError> {
    let failed = |source| DialError::Connect { to, source };
    let connecting = async {
        let (entry, socket) = netns.enter(|| source.connect(to, config, open))?.map_err(failed)?;
        let mut leg = Connecting(Some(Leg { entry, socket: TcpStream::from_std(socket.into()).map_err(failed)? }));
        if let Some(Leg { socket, .. }) = &leg.0 {
            socket.writable().await.map_err(failed)?;
            if let Some(error) = socket.take_error().map_err(failed)? {
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
