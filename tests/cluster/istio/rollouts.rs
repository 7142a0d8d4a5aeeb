//! New pods and new daemons while clients are running: no client notices.

use super::cluster;
use crate::world::{Cluster, IMAGE, Load, SHOP, SYSTEM, Sniffer, Watched};

/// How many times an application is rolled out under load.
const ROLLOUTS: usize = 4;

fn application_is_rolled_out(cluster: &Cluster) {
    let pods = Watched::start(cluster);
    let wire = Sniffer::start(cluster, "n1");
    let loads = Load::from_both_nodes(cluster, 30, 60);
    for _ in 0..ROLLOUTS {
        cluster.restart(SHOP, "deployment/web");
        cluster.rolled_out(SHOP, "deployment/web");
    }
    for load in loads {
        load.all_well(cluster);
    }
    assert_eq!(wire.found(), 0, "plaintext between captured pods");
    let pods = pods.stop();
    let late: Vec<&String> = pods.iter().filter(|(_, pod)| pod.ready_before_enabled).map(|(name, _)| name).collect();
    assert!(pods.len() >= 4 * ROLLOUTS, "{pods:?}");
    assert!(late.is_empty(), "{} of {} were Ready before peers knew that they speak HBONE", late.len(), pods.len());
}

#[test]
fn an_application_is_rolled_out_where_plaintext_is_refused() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    application_is_rolled_out(&cluster);
}

#[test]
fn an_application_is_rolled_out_where_plaintext_is_let_in() {
    application_is_rolled_out(&cluster());
}

#[test]
fn the_daemon_is_rolled_out_and_upgraded() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n2");
    let loads = Load::from_both_nodes(&cluster, 20, 60);
    let held = Load::held(&cluster, "held", "n1", "echo:9000", 10, 15);
    cluster.restart(SYSTEM, "daemonset/ztunnel");
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    held.all_well(&cluster);
    // Another version, with other settings.
    cluster.run(&["image", "0.1.1"]);
    let set = ["-n", SYSTEM, "set"];
    cluster.kubectl(&[&set[..], &["env", "daemonset/ztunnel", "EXCLUDE_NAMESPACES=kube-system,plain"]].concat());
    cluster.kubectl(&[&set[..], &["image", "daemonset/ztunnel", "istio-proxy=example.org/culvert:0.1.1"]].concat());
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    for node in ["n1", "n2"] {
        let log = cluster.kubectl(&["-n", SYSTEM, "logs", &cluster.daemon(node)]);
        let lines = |text: &str| log.lines().filter(|line| line.contains(text)).count();
        assert_eq!(lines("another program"), 0, "daemons have fought over rules");
        assert!(
            lines("CNI plugin is installed") <= 1,
            "they have fought over the plugin: {} times",
            lines("CNI plugin is installed")
        );
    }
    for load in loads {
        load.all_well(&cluster);
    }
    // Back again: the older version is now the newer daemon.
    let image = format!("istio-proxy=example.org/culvert:{IMAGE}");
    cluster.kubectl(&[&set[..], &["image", "daemonset/ztunnel", &image]].concat());
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    cluster.works();
    assert_eq!(wire.found(), 0);
}
