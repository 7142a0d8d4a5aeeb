//! How the TCP connections of both legs of live connections do, for `/connections?tcp_info=true`. The kernel is asked
//! when somebody asks for it, by netlink and once for each pod, so no worker and none of its sockets take part.

use crate::connection::Shared;
use crate::connection::report::Direction;
use crate::connection::report::live::Connection;
use crate::mesh::Text;
use crate::ports;
use crate::sys::tcp_info::TcpInfo;
use crate::sys::tcp_sockets::{TcpSocket, open_with_info};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The sockets of pods, by uid of the pod and by their ends: the local port, and the peer.
pub(super) struct Sockets(HashMap<Text, HashMap<(u16, SocketAddr), TcpInfo>>);

impl Sockets {
    /// Those of all pods that have one of these connections.
    pub(super) fn of(shared: &Shared, live: &[(u64, Arc<Connection>)]) -> Self {
        let mut of_pods = HashMap::new();
        for (_, connection) in live {
            if of_pods.contains_key(&connection.pod) {
                continue;
            }
            let pod = shared.pods.by_uid(&connection.pod);
            // A pod that is gone has no sockets.
            let sockets = pod.and_then(|pod| pod.netns.enter(open_with_info).ok()?.ok()).unwrap_or_default();
            let by_ends = |socket: TcpSocket| Some(((socket.local.port(), socket.peer), socket.info?));
            of_pods.insert(connection.pod.clone(), sockets.into_iter().filter_map(by_ends).collect());
        }
        Self(of_pods)
    }

    /// How both legs of a connection do; null for a leg that is not found, such as one that has just ended.
    pub(super) fn show(&self, connection: &Connection) -> Value {
        let (direction, source, actual) = (connection.direction, connection.source, connection.details.actual);
        let find = |port: u16, peer: SocketAddr| {
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            self.0.get(&connection.pod)?.get(&(port, peer))
        };
        let accepted = match direction {
            Direction::Outbound => [ports::OUTBOUND, ports::SOCKS],
            Direction::Inbound => [ports::HBONE, ports::PLAINTEXT],
        };
        // A transparent socket has the port that the client dialled.
        let accepted = accepted.into_iter().chain([connection.destination.port()]).find_map(|port| find(port, source));
        let dialled = find(connection.leg_port.load(Ordering::Relaxed), actual);
        let (app, far) = match direction {
            Direction::Outbound => (accepted, dialled),
            Direction::Inbound => (dialled, accepted),
        };
        json!({"app": app.map(info), "far": far.map(info)})
    }
}

fn info(info: &TcpInfo) -> Value {
    json!({
        "rttUs": info.rtt_us,
        "rttVarUs": info.rtt_var_us,
        "retransmits": info.retransmits,
        "cwnd": info.cwnd,
        "notSentBytes": info.notsent_bytes,
        "busyUs": info.busy_us,
        "rwndLimitedUs": info.rwnd_limited_us,
        "sndbufLimitedUs": info.sndbuf_limited_us,
    })
}
