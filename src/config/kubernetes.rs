//! Where this node's pods come from, and the settings of enrolment by labels.

use super::checker::Checker;
use super::settings::pods::PodsWord;
use super::settings::{mesh, node, pods};
use crate::node::PodSource;
use crate::node::cni::install;
use crate::node::kubernetes;
use crate::node::selectors::{Enablement, default_selectors};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Namespace of the daemon where none is set.
const OWN_NAMESPACE: &str = "istio-system";

/// Reads where pods come from.
pub(super) fn pods_source(c: &mut Checker<'_>, proc: &Path) -> PodSource {
    let file = c.path(&pods::PODS_FILE);
    let default = if file.is_some() { PodsWord::File } else { PodsWord::Agent };
    let word = c.read_or(&pods::PODS, default);
    if word != PodsWord::File && file.is_some() {
        c.fault(&pods::PODS_FILE.about, "is set, but CULVERT_PODS names another source of pods");
    }
    match (word, file) {
        (PodsWord::File, Some(path)) => PodSource::File(path),
        (PodsWord::File, None) => {
            c.fault(&pods::PODS_FILE.about, "is not set, but CULVERT_PODS is file");
            PodSource::File(PathBuf::new())
        }
        (PodsWord::Agent, _) => PodSource::Agent(c.path(&pods::AGENT_SOCKET).unwrap_or_default()),
        (PodsWord::Kubernetes, _) => PodSource::Kubernetes(Box::new(enrolment(c, proc))),
    }
}

/// The file beside the state file that keeps the enrolled pods.
pub(super) fn pods_state_file(state_file: &Path) -> PathBuf {
    let mut name = state_file.as_os_str().to_owned();
    name.push(".pods");
    name.into()
}

fn enrolment(c: &mut Checker<'_>, proc: &Path) -> kubernetes::Config {
    let node_name = c.text(&node::NODE_NAME).unwrap_or_default().to_owned();
    if node_name.is_empty() {
        c.fault(&node::NODE_NAME.about, "is not set; it says which pods belong to this node");
    }
    let selectors = c.read_or(&pods::SELECTORS, default_selectors());
    // Set to nothing, it excludes nothing.
    let excluded = c.given(&pods::EXCLUDE_NAMESPACES).or_else(|| c.text(&pods::EXCLUDE_NAMESPACES)).unwrap_or_default();
    let excluded: BTreeSet<String> =
        excluded.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let own_namespace = c.text(&node::POD_NAMESPACE).unwrap_or(OWN_NAMESPACE).to_owned();
    let daemonset = c.text(&pods::DAEMONSET).unwrap_or_default().to_owned();
    let cni_socket = c.path(&pods::CNI_SOCKET).unwrap_or_default();
    let cni = match (c.path(&pods::CNI_BIN_DIR), c.path(&pods::CNI_CONF_DIR)) {
        (Some(bin_dir), Some(conf_dir)) => Some(install::Config {
            bin_dir,
            conf_dir,
            socket: cni_socket.clone(),
            excluded: excluded.iter().cloned().collect(),
            own_namespace: own_namespace.clone(),
            own_name: daemonset.clone(),
            node: node_name.clone(),
        }),
        (None, None) => None,
        _ => {
            let names = [pods::CNI_BIN_DIR.about.names(), pods::CNI_CONF_DIR.about.names()];
            c.faults.push(format!("{}: one is set and the other is not", names.join(", ")));
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
        kubeconfig: c.path(&pods::KUBECONFIG),
        saved_pods: c.path(&mesh::STATE_FILE).map(|file| pods_state_file(&file)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::NodeArgs;
    use super::super::check::{Machine, check};
    use super::super::environment::Environment;

    #[test]
    fn what_is_missing_or_contradicts_is_named() {
        let base = [("LOCAL_XDS_PATH", "/m"), ("CULVERT_CA_DIR", "/c")];
        let machine = Machine { cpus: 2, open_files: 1024 };
        let faults = |more: &[(&str, &str)]| {
            let args = NodeArgs::from(&[&base[..], more].concat()[..]);
            check(&args, &Environment::default(), machine).map(drop).map_err(|f| f.to_string())
        };
        let kubernetes = [("CULVERT_PODS", "kubernetes"), ("NODE_NAME", "n")];
        assert_eq!(faults(&kubernetes), Ok(()));
        for (args, expected) in [
            (&[("CULVERT_PODS", "label")][..], "CULVERT_PODS (--pods): \"label\""),
            (&[("CULVERT_PODS", "file")], "CULVERT_PODS_FILE (--pods-file): is not set"),
            (&[kubernetes[0], kubernetes[1], ("CULVERT_PODS_FILE", "/p")], "CULVERT_PODS_FILE (--pods-file): is set"),
            (&kubernetes[..1], "NODE_NAME (--node-name)"),
            (
                &[kubernetes[0], kubernetes[1], ("AMBIENT_ENABLEMENT_SELECTOR", "[{a: b}]")],
                "AMBIENT_ENABLEMENT_SELECTOR (--enablement-selectors)",
            ),
        ] {
            let text = faults(args).unwrap_err();
            assert!(text.starts_with(expected), "{expected}: {text}");
        }
    }
}
