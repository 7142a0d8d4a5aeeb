//! What the log says at the start, on one screen: where pods, facts and certificates come from, which ports are open,
//! and what is missing.

use super::version;
use crate::config::{CaSource, Config, MeshSource};
use crate::doctor;
use crate::node::PodSource;
use crate::ports;
use crate::task::thread::run_blocking;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where facts, pods and certificates come from. `asked`: whether servers will be asked; otherwise they have not been.
pub(super) fn sources(config: &Config, asked: bool) -> [String; 3] {
    let not_asked = if asked { "" } else { " (not asked)" };
    let mesh = match &config.mesh {
        MeshSource::File(path) => format!("the mesh from {}", path.display()),
        MeshSource::Xds(xds) => format!("the mesh from {}{not_asked}", xds.rpc.address),
    };
    let egress = config.egress_file.as_ref();
    let egress = egress.map_or(String::new(), |path| format!(", egress policies from {}", path.display()));
    let pods = match &config.node.source {
        PodSource::File(path) => format!("pods from {}", path.display()),
        PodSource::Agent(path) => format!("pods from the agent at {}{not_asked}", path.display()),
        PodSource::Kubernetes(kubernetes) => {
            format!("pods of node {} from the Kubernetes API{not_asked}", kubernetes.node_name)
        }
        PodSource::Own(own) => format!("one workload, {}/{}", own.namespace, own.name),
    };
    let ca = match &config.ca {
        CaSource::Builtin(dir) => format!("certificates from the CA in {}", dir.display()),
        CaSource::Istio(rpc) => format!("certificates from {}{not_asked}", rpc.address),
    };
    [mesh + &egress, pods, ca]
}

/// Writes the lines. The daemon runs already.
pub(super) async fn say(config: &Config) {
    let mode = if matches!(config.node.source, PodSource::Own(_)) { "dedicated" } else { "shared" };
    let (workers, node) = (config.connection.workers, config.node_name.as_str());
    tracing::info!(workers, node, mode, "{} is running", version::text());
    let [mesh, pods, ca] = sources(config, true);
    for source in [pods, mesh, ca] {
        tracing::info!("{source}");
    }
    let any: IpAddr = if config.admin.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, config.admin.admin_port));
    let (metrics, ready) = (SocketAddr::new(any, config.admin.stats_port), SocketAddr::new(any, ports::READY));
    let in_pods = ports::in_pod(config.dns.capture).iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    tracing::info!(%admin, %metrics, %ready, in_pods, "listening");
    let own = config.clone();
    // It reads files of the host, one of which may be slow.
    for (is_fault, text) in run_blocking(move || missing(&own)).await.unwrap_or_default() {
        match is_fault {
            true => tracing::warn!("missing: {text}"),
            false => tracing::info!("missing: {text}"),
        }
    }
}

/// What is missing, and whether something does not work without it.
fn missing(config: &Config) -> Vec<(bool, String)> {
    let mut missing = doctor::at_start(config);
    if config.xds().is_some() && config.state_files.is_empty() {
        let text = "a state file: if the daemon restarts while the control plane is unreachable, it knows no facts and refuses \
                    connections; set CULVERT_STATE_FILE";
        missing.push((false, text.to_owned()));
    }
    missing
}
