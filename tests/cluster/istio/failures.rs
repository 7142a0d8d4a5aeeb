//! What pods and daemons depend on goes away and comes back.

use super::cluster;
use crate::world::{Cluster, Load, SHOP, SYSTEM, Sniffer, eventually};

/// New daemons, because the kubelet restarts a container at once the first time it ends, and later each time after a
/// longer pause.
fn cluster_with_new_daemons() -> Cluster {
    let cluster = cluster();
    cluster.restart(SYSTEM, "daemonset/ztunnel");
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    cluster
}

#[test]
fn a_daemon_is_killed() {
    let cluster = cluster_with_new_daemons();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    let other = Load::requests(&cluster, "unconcerned", "n2", "http://web/", 10, 20);
    let before = cluster.daemon("n1");
    let restarts = || {
        cluster.get(&["pod", "-n", SYSTEM, &before])["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap()
    };
    let earlier = restarts();
    cluster.run(&["node", "n1", "pkill", "-9", "-x", "culvert"]);
    eventually("the daemon is started again", || (restarts() == earlier).then(String::new));
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    cluster.works();
    // Clients of the other node see failures only of connections to the daemon that died.
    let outcome = other.finish(&cluster);
    assert!(outcome.ok > outcome.failed, "{outcome:?}");
    assert_eq!(wire.found(), 0, "plaintext while there was no daemon");
}

#[test]
fn istiod_is_killed() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    let loads = Load::from_both_nodes(&cluster, 20, 30);
    let istiod = cluster.pods(SYSTEM, "app=istiod", None).remove(0);
    cluster.kubectl(&["-n", SYSTEM, "delete", "pod", &istiod, "--force", "--grace-period=0"]);
    cluster.rolled_out(SYSTEM, "deployment/istiod");
    for load in loads {
        load.all_well(&cluster);
    }
    assert_eq!(wire.found(), 0);
}

#[test]
fn the_api_server_is_killed() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    let loads = Load::from_both_nodes(&cluster, 20, 20);
    cluster.run(&["stop", "apiserver"]);
    for node in ["n1", "n2"] {
        eventually("the load ends while the API server is away", || load_runs(&cluster, node));
    }
    cluster.run(&["start", "apiserver"]);
    for load in loads {
        load.all_well(&cluster);
    }
    cluster.works();
    assert_eq!(wire.found(), 0);
}

/// Why a load on a node is not over.
fn load_runs(cluster: &Cluster, node: &str) -> Option<String> {
    cluster.try_run(&["node", node, "pgrep", "-f", "^/app load"]).ok()
}

#[test]
fn a_node_loses_the_api_server_and_then_its_daemon() {
    let cluster = cluster_with_new_daemons();
    cluster.mutual_tls("STRICT");
    // The node without istiod, because istiod asks the API server about tokens.
    let (node, other) = match cluster.pods(SYSTEM, "app=istiod", Some("n1")).is_empty() {
        true => ("n1", "n2"),
        false => ("n2", "n1"),
    };
    let wire = Sniffer::start(&cluster, "n1");
    let seconds = 60;
    let load = Load::requests(&cluster, "requests", other, "http://web/", 20, seconds);
    let cut = "add table inet cut; add chain inet cut in { type filter hook prerouting priority 0; }; \
               add rule inet cut in tcp sport 6443 drop";
    cluster.run(&["node", node, "nft", cut]);
    // The kubelet restarts the container, and the daemon has no API that tells which pods there are.
    cluster.run(&["node", node, "pkill", "-9", "-x", "culvert"]);
    eventually("the load ends while the node is alone", || load_runs(&cluster, other));
    cluster.run(&["node", node, "nft", "delete table inet cut"]);
    let outcome = load.finish(&cluster);
    // Connections that were open to the node's pods when its daemon died have failed, and so have new ones until it was
    // back.
    let after = |error: &&String| error.split(' ').nth(1).unwrap().parse::<u32>().unwrap() > seconds / 2;
    let late: Vec<&String> = outcome.errors.keys().filter(after).collect();
    assert!(outcome.ok > 0 && late.is_empty(), "the daemon has not come back to its pods: {late:?}");
    cluster.works();
    assert_eq!(wire.found(), 0);
}

#[test]
fn a_node_is_switched_off_and_on() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    cluster.run(&["stop", "n2"]);
    cluster.run(&["start", "n2"]);
    for deployment in ["web", "echo", "front"] {
        eventually(&format!("{deployment} runs again on n2"), || {
            let ready = cluster.try_kubectl(&[
                "-n",
                SHOP,
                "wait",
                "pod",
                "-l",
                &format!("app={deployment}"),
                "--for=condition=Ready",
                "--timeout=60s",
            ]);
            ready.err()
        });
    }
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    cluster.works();
    let load = Load::requests(&cluster, "requests", "n1", "http://web/", 20, 10);
    load.all_well(&cluster);
    assert_eq!(wire.found(), 0, "plaintext before the daemon was there");
}
