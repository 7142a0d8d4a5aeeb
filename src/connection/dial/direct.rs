//! TCP from the pod's namespace, the original source kept where there is one to keep.

use super::{CONNECT_DEADLINE, DialError};
use crate::connection::authorize::Permit;
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, outgoing, start_connect};
use std::io;
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

/// Connects from the pod to somewhere else, as the pod.
pub async fn outbound(netns: &Netns, to: SocketAddr, config: &SocketConfig) -> Result<TcpStream, DialError> {
    connect(netns, to, None, config).await
}

/// Connects to the pod's application, as the original client. Needs a permit.
pub async fn to_app(
    _permit: &Permit,
    netns: &Netns,
    to: SocketAddr,
    client: IpAddr,
    config: &SocketConfig,
) -> Result<TcpStream, DialError> {
    // A pod that reaches itself has its own address already; another family cannot be kept.
    let keep = config.keep_source && client != to.ip() && client.is_ipv4() == to.is_ipv4();
    connect(netns, to, keep.then_some(client), config).await
}

async fn connect(
    netns: &Netns,
    to: SocketAddr,
    source: Option<IpAddr>,
    config: &SocketConfig,
) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { to, source };
    let connecting = async {
        let socket = netns.enter(|| outgoing(to, source, config.mark, &config.legs))?.map_err(failed)?;
        start_connect(&socket, to).map_err(failed)?;
        let stream = TcpStream::from_std(socket.into()).map_err(failed)?;
        stream.writable().await.map_err(failed)?;
        match stream.take_error() {
            Ok(None) => Ok(stream),
            Ok(Some(error)) | Err(error) => Err(failed(error)),
        }
    };
    match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
        Ok(Err(DialError::Connect { source, .. })) if source.kind() == io::ErrorKind::TimedOut => {
            Err(DialError::ConnectDeadline(to))
        }
        Ok(result) => result,
        Err(_) => Err(DialError::ConnectDeadline(to)),
    }
}
