//! Installing and uninstalling.

use super::cluster;
use crate::world::{Cluster, SHOP, SYSTEM, Sniffer, eventually, root};

fn nothing_is_left(cluster: &Cluster) {
    for node in ["n1", "n2"] {
        eventually(&format!("nothing of culvert is left on {node}"), || {
            let traces = cluster.traces(node);
            (!traces.is_empty()).then(|| traces.join("; "))
        });
    }
}

#[test]
fn it_is_installed_by_kustomize_and_by_helm_and_removed() {
    let cluster = cluster();
    cluster.run(&["helm", "uninstall", "culvert", "-n", SYSTEM, "--wait"]);
    nothing_is_left(&cluster);
    // New pods of the application start and talk in plaintext, as if there had never been a mesh.
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    cluster.works();

    let folder = root().join("daemonset");
    cluster.kubectl(&["apply", "-k", folder.to_str().unwrap()]);
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    eventually("all pods are captured", || {
        let pods = cluster.get(&["pods", "-n", SHOP, "-l", "app"]);
        let outside =
            |pod: &&serde_json::Value| pod["metadata"]["annotations"]["ambient.istio.io/redirection"] != "enabled";
        pods["items"].as_array().unwrap().iter().find(outside).map(|pod| pod["metadata"]["name"].to_string())
    });
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    assert_eq!(wire.found(), 0);
    cluster.kubectl(&["delete", "-k", folder.to_str().unwrap()]);
    nothing_is_left(&cluster);
    cluster.works();
}

#[test]
fn a_node_that_was_off_when_it_was_uninstalled_is_cleaned() {
    let cluster = cluster();
    cluster.run(&["stop", "n2"]);
    cluster.run(&["helm", "uninstall", "culvert", "-n", SYSTEM]);
    eventually("nothing of culvert is left on n1", || {
        let traces = cluster.traces("n1");
        (!traces.is_empty()).then(|| traces.join("; "))
    });
    cluster.run(&["start", "n2"]);
    // The plugin is still installed but no daemon answers it, so the node's pods wait.
    assert!(!cluster.traces("n2").is_empty());
    let folder = root().join("daemonset/cleanup");
    let folder = folder.to_str().unwrap();
    cluster.kubectl(&["apply", "-k", folder]);
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel-cleanup");
    nothing_is_left(&cluster);
    // Annotations too, because the rights to remove them may have been removed with the installation.
    let pods = cluster.get(&["pods", "-n", SHOP]);
    let inside = |pod: &&serde_json::Value| !pod["metadata"]["annotations"]["ambient.istio.io/redirection"].is_null();
    assert_eq!(pods["items"].as_array().unwrap().iter().find(inside), None);
    cluster.kubectl(&["delete", "-k", folder]);
    for deployment in ["web", "echo", "front"] {
        cluster.rolled_out(SHOP, &format!("deployment/{deployment}"));
    }
    cluster.works();
}
