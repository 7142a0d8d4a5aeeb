//! Where this node's pods come from, and who is in where that is the Kubernetes API.

use super::args::NodeArgs;
use super::check::Checker;
use crate::node::Source;
use crate::node::cni::install;
use crate::node::kubernetes;
use crate::node::kubernetes::select::{Enablement, default_selectors, read_selectors};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where Istio's agent listens.
const AGENT_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";

/// Where the CNI plugin finds the daemon.
const CNI_SOCKET: &str = "/var/run/culvert/cni.sock";

/// Words of `CULVERT_PODS`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Kubernetes,
    Agent,
    File,
}

/// Reads where pods come from.
pub(super) fn pods_source(c: &mut Checker, args: &NodeArgs, proc: &Path) -> Source {
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let file = text(&args.pods_file).map(PathBuf::from);
    let default = if file.is_some() { Word::File } else { Word::Agent };
    let word = c.read("CULVERT_PODS", args.pods.as_ref(), default, |text| match text {
        "kubernetes" => Ok(Word::Kubernetes),
        "agent" => Ok(Word::Agent),
        "file" => Ok(Word::File),
        _ => Err("kubernetes, agent or file".into()),
    });
    if word != Word::File && file.is_some() {
        c.faults.push(
            "CULVERT_PODS_FILE (--pods-file): is set, and CULVERT_PODS says that pods come from elsewhere".into(),
        );
    }
    match (word, file) {
        (Word::File, Some(path)) => Source::File(path),
        (Word::File, None) => {
            c.faults.push("CULVERT_PODS_FILE (--pods-file): is not set, and CULVERT_PODS is file".into());
            Source::File(PathBuf::new())
        }
        (Word::Agent, _) => Source::Agent(text(&args.agent_socket).map_or_else(|| AGENT_SOCKET.into(), PathBuf::from)),
        (Word::Kubernetes, _) => Source::Kubernetes(Box::new(enrolment(c, args, proc))),
    }
}

fn enrolment(c: &mut Checker, args: &NodeArgs, proc: &Path) -> kubernetes::Config {
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let node_name = text(&args.node_name).unwrap_or_default();
    if node_name.is_empty() {
        c.faults.push("NODE_NAME (--node-name): is not set; it says whose pods are this node's".into());
    }
    let selectors = c.read("AMBIENT_ENABLEMENT_SELECTOR", args.selectors.as_ref(), default_selectors(), |text| {
        read_selectors(text).map_err(|error| format!("a list of selectors: {error}"))
    });
    let excluded = args.exclude_namespaces.clone().unwrap_or_else(|| "kube-system".into());
    let excluded: BTreeSet<String> =
        excluded.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let own_namespace = text(&args.pod_namespace).unwrap_or_else(|| "istio-system".into());
    let daemonset = text(&args.daemonset).unwrap_or_else(|| "ztunnel".into());
    let cni_socket = text(&args.cni_socket).map_or_else(|| CNI_SOCKET.into(), PathBuf::from);
    let cni = match (text(&args.cni_bin_dir), text(&args.cni_conf_dir)) {
        (Some(bin_dir), Some(conf_dir)) => Some(install::Config {
            bin_dir: bin_dir.into(),
            conf_dir: conf_dir.into(),
            socket: cni_socket.clone(),
            excluded: excluded.iter().cloned().collect(),
            own_namespace: own_namespace.clone(),
            own_name: daemonset.clone(),
            node: node_name.clone(),
        }),
        (None, None) => None,
        _ => {
            c.faults.push(
                "CULVERT_CNI_BIN_DIR (--cni-bin-dir), CULVERT_CNI_CONF_DIR (--cni-conf-dir): one is set and the other is not".into(),
            );
            None
        }
    };
    kubernetes::Config {
        cni,
        cni_socket,
        node_name,
        daemonset,
        enablement: Enablement { selectors, excluded, own_namespace },
        proc: proc.to_owned(),
        kubeconfig: text(&args.kubeconfig).map(PathBuf::from),
        // Beside the last known mesh: both are for a start without those who tell.
        memory: text(&args.state_file).map(|file| super::pods_file(&file)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{Machine, check};
    use super::*;
    use crate::config::istio::Environment;

    #[test]
    fn what_is_missing_or_contradicts_is_named() {
        let word = |text: &str| Some(text.to_owned());
        let base = || NodeArgs { mesh_file: word("/m"), ca_dir: word("/c"), ..NodeArgs::default() };
        let machine = Machine { cpus: 2, open_files: 1024 };
        let faults =
            |args: &NodeArgs| check(args, &Environment::default(), machine).map(drop).map_err(|f| f.to_string());
        let kubernetes = || NodeArgs { pods: word("kubernetes"), node_name: word("n"), ..base() };
        assert_eq!(faults(&kubernetes()), Ok(()));
        for (args, expected) in [
            (NodeArgs { pods: word("label"), ..base() }, "CULVERT_PODS (--pods): \"label\""),
            (NodeArgs { pods: word("file"), ..base() }, "CULVERT_PODS_FILE (--pods-file): is not set"),
            (NodeArgs { pods_file: word("/p"), ..kubernetes() }, "CULVERT_PODS_FILE (--pods-file): is set"),
            (NodeArgs { node_name: None, ..kubernetes() }, "NODE_NAME (--node-name)"),
            (
                NodeArgs { selectors: word("[{a: b}]"), ..kubernetes() },
                "AMBIENT_ENABLEMENT_SELECTOR (--enablement-selectors)",
            ),
        ] {
            let said = faults(&args).unwrap_err();
            assert!(said.starts_with(expected), "{expected}: {said}");
        }
    }
}
