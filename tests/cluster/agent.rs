//! With a real istio-cni, which enrols the pods and writes their rules; and instead of it.

use crate::world::{Cluster, Load, Mode, SHOP, SYSTEM, Sniffer, Watched};

fn cluster() -> Cluster {
    Cluster::of(Mode::Agent)
}

#[test]
fn an_application_is_rolled_out_beside_istio_cni() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let pods = Watched::start(&cluster);
    let wire = Sniffer::start(&cluster, "n1");
    let loads = Load::from_both_nodes(&cluster, 20, 20);
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    for load in loads {
        load.all_well(&cluster);
    }
    assert_eq!(wire.found(), 0);
    let pods = pods.stop();
    for node in ["n1", "n2"] {
        let log = cluster.kubectl(&["-n", SYSTEM, "logs", &cluster.daemon(node)]);
        let errors: Vec<&str> =
            log.lines().filter(|line| line.contains("\terror\t") && !line.contains("\taccess\t")).collect();
        assert!(errors.is_empty(), "pods that end are no errors: {errors:?}");
    }
    assert!(pods.len() >= 4 && pods.values().all(|pod| pod.enabled && !pod.ready_before_enabled), "{pods:?}");
}

#[test]
fn doctor_and_istioctl_beside_istio_cni() {
    let cluster = cluster();
    for node in ["n1", "n2"] {
        let daemon = cluster.daemon(node);
        let said = cluster
            .try_kubectl(&["-n", SYSTEM, "exec", &daemon, "--", "culvert", "doctor"])
            .unwrap_or_else(|why| panic!("{why}"));
        assert!(!said.contains("FAIL"), "{said}");
        assert!(cluster.run(&["istioctl", "ztunnel-config", "workload", &daemon]).contains("web"));
    }
}

#[test]
fn it_takes_over_from_istio_cni() {
    let cluster = cluster();
    let wire = Sniffer::start(&cluster, "n1");
    // Istio's plugin and agent are removed. From then on culvert finds the pods by itself.
    cluster.kubectl(&["-n", SYSTEM, "delete", "daemonset", "istio-cni-node"]);
    let chart = crate::world::root().join("daemonset/chart");
    let chart = chart.to_str().unwrap();
    cluster.run(&["helm", "upgrade", "culvert", chart, "-n", SYSTEM, "--set", "pods=kubernetes"]);
    cluster.rolled_out(SYSTEM, "daemonset/ztunnel");
    cluster.works();
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    cluster.works();
    assert_eq!(wire.found(), 0);
}
