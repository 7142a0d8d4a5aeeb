//! The daemon's own pod: listens for tunnels in its own network namespace, so that peers which policy allows can read
//! its metrics through the mesh, under its identity.

use super::capture::Capturer;
use crate::connection::dial::direct::{OpenLegs, SocketConfig};
use crate::connection::{Entrance, Pod};
use crate::mesh::workload::pod_uid;
use crate::mesh::{SpiffeName, Text};
use crate::ports::HBONE;
use crate::sys::netns::Netns;
use crate::sys::socket::bind_capture;
use crate::task::Group;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Time between attempts to listen.
const RETRY: Duration = Duration::from_secs(5);

/// Serves tunnels to the daemon's own pod until the process ends. Failing to listen does not affect other pods.
/// `legs` records the connections to the daemon's ports that are opened for peers.
pub async fn serve(capturer: Arc<Capturer>, name: Text, identity: SpiffeName, legs: OpenLegs) {
    let drain = capturer.drain.signal();
    let mut said = false;
    let accepting = loop {
        match listen(&capturer, &name, &identity, &legs) {
            Ok(accepting) => break accepting,
            Err(error) if !said => {
                tracing::error!(port = HBONE, %error, "cannot listen for tunnels to the daemon's own pod: its metrics are not reachable through the mesh; trying again");
                said = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = drain.gentle() => return,
        }
    };
    drain.gentle().await;
    accepting.finished().await;
    drain.now().await;
    capturer.identities.forget(&identity);
}

fn listen(capturer: &Capturer, name: &Text, identity: &SpiffeName, legs: &OpenLegs) -> io::Result<Group> {
    let netns = Netns::open(Path::new("/proc/self/ns/net")).map_err(io::Error::other)?;
    let held = netns.addresses().map_err(io::Error::other)?.into_iter().map(|(ip, _)| ip).collect();
    let (config, options) = (&capturer.config, &capturer.sockets.legs);
    let listener = bind_capture(HBONE, config.ipv6, config.mark, config.reuse_port, options)?;
    capturer.identities.want(identity);
    let mesh_uid = pod_uid(&capturer.config.cluster_id, &identity.namespace, name);
    let pod = Arc::new(Pod {
        uid: mesh_uid.clone(),
        capture: Pod::next_capture(),
        name: name.clone(),
        namespace: identity.namespace.clone(),
        mesh_uid,
        resolver: capturer.dns.resolver(&identity.namespace, &netns),
        netns,
        // There is no redirection here, so replies to a foreign source address would not come back.
        sockets: SocketConfig { keep_source: false, ..capturer.sockets },
        dns: Default::default(),
        legs: legs.clone(),
        identity: watch::Sender::new(Some(identity.clone())),
        addresses: arc_swap::ArcSwap::from_pointee(held),
        drain: capturer.drain.child(),
        active: Default::default(),
        usage: Default::default(),
        capture_checks: Default::default(),
    });
    let accepting = Group::default();
    capturer.workers.serve(&pod, listener, Entrance::Tunnel, &accepting);
    Ok(accepting)
}
