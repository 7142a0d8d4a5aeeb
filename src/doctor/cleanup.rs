//! `culvert cleanup`: removes every trace of culvert from a node. Never while a daemon runs: that would write it all again.

use super::get;
use crate::config::Config;
use crate::node::cni::install;
use crate::node::{Source, legs, probes, redirect};
use crate::sys::netns::Netns;
use crate::sys::seqpacket::Seqpacket;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Where named namespaces are.
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// Cleans the node and hands a line for each thing to `say`; whether all could be removed.
pub async fn run(config: &Config, mut say: impl FnMut(&str)) -> bool {
    if get(config.admin.admin_port, "/pods").is_ok() || answers(config) {
        say("FAIL  a daemon runs on this node, and would write everything again; end it first");
        return false;
    }
    let mut fine = true;
    let mut done = |what: String, result: Result<bool, String>| match result {
        Ok(true) => say(&format!("removed  {what}")),
        Ok(false) => {}
        Err(error) => {
            fine = false;
            say(&format!("FAIL  {what}: {error}"));
        }
    };
    let host = Netns::open(&config.node.host_netns);
    for family in ["inet", "bridge"] {
        let probes = match &host {
            Ok(host) => table(host, family, probes::TABLE).await,
            Err(error) => Err(error.to_string()),
        };
        done(format!("the host's rules for probes ({family})"), probes);
    }
    for netns in namespaces(config).into_values() {
        let what = format!("rules in {}", netns.path().display());
        let listed = redirect::list_table(&netns, redirect::TABLE).await;
        let removed = match listed {
            Ok(listed) if listed.is_null() => table(&netns, "inet", legs::TABLE).await,
            Ok(_) | Err(redirect::RedirectError::Unreadable(_)) => {
                redirect::remove(&netns, true).await.map(|()| true).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        done(what, removed);
    }
    if let Source::Kubernetes(kubernetes) = &config.node.source {
        if let Some(cni) = &kubernetes.cni {
            match cni.remove() {
                Ok(files) => files.iter().for_each(|file| done(file.display().to_string(), Ok(true))),
                Err(error) => done(install::PLUGIN.into(), Err(error.to_string())),
            }
        }
        if let Some(file) = kubernetes.memory.as_ref().filter(|file| file.exists()) {
            let removed = std::fs::remove_file(file).map(|()| true).map_err(|error| error.to_string());
            done(file.display().to_string(), removed);
        }
        match std::fs::remove_file(&kubernetes.cni_socket) {
            Ok(()) => done(kubernetes.cni_socket.display().to_string(), Ok(true)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => done(kubernetes.cni_socket.display().to_string(), Err(error.to_string())),
        }
    }
    if let crate::config::MeshSource::Xds(xds) = &config.mesh
        && let Some(file) = xds.state_file.as_ref().filter(|file| file.exists())
    {
        done(file.display().to_string(), std::fs::remove_file(file).map(|()| true).map_err(|error| error.to_string()));
    }
    if fine {
        say(
            "ok    no trace is left on this node; pods go on without the mesh. Their annotation ambient.istio.io/redirection stays until",
        );
        say("      they end or a daemon removes it: kubectl annotate pod POD ambient.istio.io/redirection-");
    }
    fine
}

/// Whether a daemon in another pod takes the CNI plugin's questions.
fn answers(config: &Config) -> bool {
    matches!(&config.node.source, Source::Kubernetes(kubernetes) if Seqpacket::connect(&kubernetes.cni_socket).is_ok())
}

async fn table(netns: &Netns, family: &str, name: &str) -> Result<bool, String> {
    let listed = redirect::list_table_of(netns, family, name).await.map_err(|error| error.to_string())?;
    if listed.is_null() {
        return Ok(false);
    }
    let removed = redirect::apply(netns, &format!("delete table {family} {name}\n")).await;
    removed.map(|()| true).map_err(|error| error.to_string())
}

/// Every network namespace of the node but the host's and our own: of all processes, and all that have a name.
fn namespaces(config: &Config) -> HashMap<(u64, u64), Netns> {
    let proc = match &config.node.source {
        Source::Kubernetes(kubernetes) => kubernetes.proc.clone(),
        _ => PathBuf::from("/proc"),
    };
    let mut found = HashMap::new();
    let folders = NAMED.map(PathBuf::from).into_iter().chain([proc.clone()]);
    for entry in folders.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        let process = entry.path().parent() == Some(&proc);
        let path = if process { entry.path().join("ns/net") } else { entry.path() };
        if let Ok(netns) = Netns::open(&path) {
            found.entry(netns.id()).or_insert(netns);
        }
    }
    for own in [Path::new("/proc/self/ns/net"), &proc.join("1/ns/net"), &config.node.host_netns] {
        if let Ok(own) = Netns::open(own) {
            found.remove(&own.id());
        }
    }
    found
}
