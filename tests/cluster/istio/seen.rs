//! What operators see: doctor, istioctl, and what a node costs.

use super::cluster;
use crate::world::{Cluster, SHOP, SYSTEM};

#[test]
fn doctor_is_content_on_every_node() {
    let cluster = cluster();
    for node in ["n1", "n2"] {
        let said = cluster.try_kubectl(&["-n", SYSTEM, "exec", &cluster.daemon(node), "--", "culvert", "doctor"]);
        let said = said.unwrap_or_else(|why| panic!("{why}"));
        assert!(!said.contains("FAIL"), "{said}");
    }
}

#[test]
fn istioctl_reads_all_of_it() {
    let cluster = cluster();
    cluster.works();
    for (what, expected) in [
        ("workload", "front"),
        ("service", "web"),
        ("certificate", "spiffe://cluster.local/ns/shop/sa/web"),
        ("policy", ""),
        ("connections", ""),
        ("all", "web"),
        ("log", "info"),
    ] {
        let said = cluster.run(&["istioctl", "ztunnel-config", what, &cluster.daemon("n1")]);
        assert!(said.contains(expected), "{what}: {said}");
    }
}

/// Resident KiB and CPU time, in hundredths of a second, of a node's daemon.
fn cost(cluster: &Cluster, node: &str) -> (u64, u64) {
    let script = "pid=$(pgrep -x culvert | head -1); awk '/VmRSS/{print $2}' /proc/$pid/status; awk '{print $14 + $15}' /proc/$pid/stat";
    let said = cluster.run(&["node", node, "bash", "-c", script]);
    let mut values = said.lines().map(|line| line.trim().parse().unwrap());
    (values.next().unwrap(), values.next().unwrap())
}

#[test]
fn what_an_idle_node_costs() {
    let cluster = cluster();
    for pods in [10, 50] {
        cluster.apply(&format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: idle, namespace: shop, labels: {{made-by: scenario}}}}\nspec:\n  replicas: {pods}\n  selector: {{matchLabels: {{app: idle}}}}\n  \
             template:\n    metadata: {{labels: {{app: idle}}}}\n    spec:\n      nodeName: n1\n      terminationGracePeriodSeconds: 0\n      containers:\n      \
             - {{name: idle, image: \"example.org/app:1\", args: [sleep], resources: {{requests: {{cpu: 1m, memory: 1Mi}}}}}}\n"
        ));
        cluster.rolled_out(SHOP, "deployment/idle");
        let (_, before) = cost(&cluster, "n1");
        let start = std::time::Instant::now();
        // The cost of a node is measured over a while.
        std::thread::sleep(std::time::Duration::from_secs(10));
        let (resident, after) = cost(&cluster, "n1");
        let share = (after - before) as f64 / start.elapsed().as_secs_f64();
        eprintln!("{pods} idle pods: {:.1} MiB resident, {share:.2} % of a core", resident as f64 / 1024.0);
    }
    cluster.kubectl(&["-n", SHOP, "delete", "deployment", "idle"]);
}
