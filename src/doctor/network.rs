//! Checks whether the control plane and the CA can be reached over TCP.

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
        return vec![ok("network", "no server is needed: facts and certificates come from files")];
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
    let looked_up = timeout(DEADLINE, lookup_host((host, port))).await;
    let found =
        looked_up.map_err(|_| format!("its name was not resolved within {} s; check DNS", DEADLINE.as_secs()))?;
    let all: Vec<SocketAddr> =
        found.map_err(|error| format!("its name cannot be resolved: {error}; check DNS"))?.collect();
    let each = DEADLINE / u32::try_from(all.len().max(1)).unwrap_or(1);
    for to in &all {
        if timeout(each, TcpStream::connect(to)).await.is_ok_and(|connected| connected.is_ok()) {
            return Ok(());
        }
    }
    Err(format!(
        "none of its {} addresses accepts a connection; check that it runs and that no policy blocks it",
        all.len()
    ))
}
