//! Whether the control plane and the CA can be reached at all.

use super::finding::{DEADLINE, Finding, fail, ok};
use crate::config::{CaSource, Config, MeshSource};
use std::net::SocketAddr;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

pub(super) async fn reachable(config: &Config) -> Vec<Finding> {
    let mut targets = Vec::new();
    if let MeshSource::Xds(xds) = &config.mesh {
        targets.push(("control plane", xds.rpc.address.clone()));
    }
    if let CaSource::Istio(rpc) = &config.ca {
        targets.push(("CA", rpc.address.clone()));
    }
    if targets.is_empty() {
        return vec![ok("network", "facts and certificates come from files")];
    }
    let mut lines = Vec::new();
    for (name, address) in targets {
        let host = address.host().unwrap_or_default().trim_matches(['[', ']']);
        lines.push(match reach(host, address.port_u16().unwrap_or(443)).await {
            Ok(()) => ok("network", format!("the {name} {address} can be reached")),
            Err(error) => fail("network", format!("the {name} {address} cannot be reached: {error}")),
        });
    }
    lines
}

async fn reach(host: &str, port: u16) -> Result<(), String> {
    let found = timeout(DEADLINE, lookup_host((host, port))).await.map_err(|_| "no answer; does DNS work here?")?;
    let all: Vec<SocketAddr> = found.map_err(|error| format!("{error}; does DNS work here?"))?.collect();
    let each = DEADLINE / u32::try_from(all.len().max(1)).unwrap_or(1);
    for to in &all {
        if timeout(each, TcpStream::connect(to)).await.is_ok_and(|connected| connected.is_ok()) {
            return Ok(());
        }
    }
    Err(format!("none of its {} addresses answers; is it running?", all.len()))
}
