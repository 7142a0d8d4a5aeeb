//! TCP connections from the pod's network namespace. A connection to the pod's application comes from the original
//! client's address, unless that cannot be kept.

use super::error::{CONNECT_DEADLINE, DialError};
use crate::connection::authorize::Permit;
use crate::ports::OWN_CONNECTIONS;
use crate::sys::leg::connected;
use crate::sys::netns::Netns;
use crate::sys::socket::{Bind, LegOptions, outgoing, reset_on_close, start_connect};
use parking_lot::Mutex;
use socket2::Socket;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;

/// How the daemon marks and sets up its sockets.
#[derive(Clone, Copy, Debug)]
pub struct SocketConfig {
    /// `SO_MARK`. The rules in the pod use it to tell the daemon's packets from the application's. 0: no mark; the rules
    /// know the daemon's packets by its user.
    pub mark: u32,
    /// Socket options of every leg.
    pub legs: LegOptions,
    /// Whether applications see the original client's address as the source.
    pub keep_source: bool,
}

/// Bit of `SO_MARK` for connections that have a client's address as their source. It is set in addition to
/// [`SocketConfig::mark`].
pub const LEG_BIT: u32 = 0x1000;

/// How many of these are tried before the kernel chooses a port.
const TRIES: usize = 4;

/// The two ends of a connection that the daemon opened: its own address and port, and those of the destination.
type Ends = [(IpAddr, u16); 2];

fn ends(own: SocketAddr, to: SocketAddr) -> Ends {
    [own, to].map(|end| (end.ip().to_canonical(), end.port()))
}

/// The connections that the daemon has opened in one pod's namespace and that are still open. If one of them arrives at
/// a listener of the daemon, something has redirected it there. Carrying it would open another one, and so on without
/// end. Where the connection does not come from the address of the client that it is for, that address is recorded too.
#[derive(Clone, Debug, Default)]
pub struct OpenLegs(Arc<Mutex<HashMap<Ends, Option<IpAddr>>>>);

impl OpenLegs {
    /// Whether the daemon opened the connection from `source` to `destination`.
    pub fn contains(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.0.lock().contains_key(&ends(source, destination))
    }

    /// The client that the daemon opened the connection from `source` to `destination` for, where it comes from another
    /// address than the client's.
    pub fn client(&self, source: SocketAddr, destination: SocketAddr) -> Option<IpAddr> {
        self.0.lock().get(&ends(source, destination)).copied().flatten()
    }

    /// Starts to connect, and records the connection. `own` is the address that the socket is bound to, if it was bound
    /// to a port. The lock is held throughout: the kernel may choose the source port only now, and if the connection comes
    /// back at once, [`OpenLegs::contains`] must not run before it is recorded.
    fn connect(
        &self,
        socket: &Socket,
        own: Option<SocketAddr>,
        to: SocketAddr,
        client: Option<IpAddr>,
    ) -> io::Result<OpenLeg> {
        let mut open = self.0.lock();
        start_connect(socket, to)?;
        let own = match own {
            Some(own) => own,
            None => socket.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?,
        };
        let ends = ends(own, to);
        open.insert(ends, client);
        Ok(OpenLeg { ends, open: self.clone() })
    }
}

/// An entry in [`OpenLegs`]. Dropping it removes the connection.
#[derive(Debug)]
pub struct OpenLeg {
    ends: Ends,
    open: OpenLegs,
}

impl OpenLeg {
    /// The daemon's own port.
    pub fn port(&self) -> u16 {
        let [(_, port), _] = self.ends;
        port
    }
}

impl Drop for OpenLeg {
    fn drop(&mut self) {
        self.open.0.lock().remove(&self.ends);
    }
}

/// A connection that the daemon opened.
#[derive(Debug)]
pub struct DialledLeg {
    /// Its entry. It must be dropped before the socket, because afterwards another connection may have the same ends.
    pub entry: OpenLeg,
    /// The socket.
    pub socket: TcpStream,
}

/// Connects from the pod to a destination outside; from `source`, which is one of the pod's addresses, if given.
pub async fn outbound(
    netns: &Netns,
    to: SocketAddr,
    source: Option<IpAddr>,
    config: &SocketConfig,
    open: &OpenLegs,
) -> Result<DialledLeg, DialError> {
    connect(netns, to, source.map_or(SourceAddress::FromRoute(None), SourceAddress::Own), config, open).await
}

/// Connects to the pod's application, from the address of the original client if that can be kept. Requires a permit.
pub async fn to_app(
    _permit: &Permit,
    netns: &Netns,
    to: SocketAddr,
    client: IpAddr,
    config: &SocketConfig,
    open: &OpenLegs,
) -> Result<DialledLeg, DialError> {
    // A pod that connects to itself has that address anyway. An address of the other family cannot be kept, and neither
    // can a link-local IPv6 address, because the kernel sends answers to it through its own link only.
    let on_link = matches!(client, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let keep = config.keep_source && client != to.ip() && client.is_ipv4() == to.is_ipv4() && !on_link;
    let source = if keep { SourceAddress::Client(client) } else { SourceAddress::FromRoute(Some(client)) };
    connect(netns, to, source, config, open).await
}

/// The source address of a connection.
#[derive(Clone, Copy, Debug)]
enum SourceAddress {
    /// The address that the kernel's route gives, for this client if there is one.
    FromRoute(Option<IpAddr>),
    /// This address of the pod.
    Own(IpAddr),
    /// The address of the original client, which is not an address of the pod.
    Client(IpAddr),
}

impl SourceAddress {
    /// Opens a socket in the thread's current namespace and starts to connect it.
    fn connect(self, to: SocketAddr, config: &SocketConfig, open: &OpenLegs) -> io::Result<(OpenLeg, Socket)> {
        let (ip, foreign, mark) = match self {
            Self::FromRoute(_) => (None, false, config.mark),
            Self::Own(ip) => (Some(ip), false, config.mark),
            Self::Client(ip) => (Some(ip), true, config.mark | LEG_BIT),
        };
        let client = if let Self::FromRoute(client) = self { client } else { None };
        let from = |port| {
            let bind = ip.map(|ip| Bind { address: SocketAddr::new(ip, port), foreign });
            let socket = outgoing(to, bind, mark, &config.legs)?;
            let own = ip.filter(|_| port != 0).map(|ip| SocketAddr::new(ip, port));
            open.connect(&socket, own, to, client).map(|entry| (entry, socket))
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

/// A connection that is being opened. If it is given up, it is reset: an application that has accepted it already must
/// not take this for an orderly end.
struct Connecting(Option<DialledLeg>);

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
) -> Result<DialledLeg, DialError> {
    let failed = |source| DialError::Connect { to, source };
    let connecting = async {
        let (entry, socket) = netns.enter(|| source.connect(to, config, open))?.map_err(failed)?;
        let mut leg = Connecting(Some(DialledLeg { entry, socket: socket.into() }));
        if let Some(DialledLeg { socket, .. }) = &leg.0 {
            connected(socket).await.map_err(failed)?;
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
