//! Traffic between pods: what passes, and what does not.

use super::cluster;
use crate::world::{Load, SHOP, Sniffer, eventually};

#[test]
fn probes_pass_while_outsiders_are_refused() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    // New pods become Ready by HTTP probes, stay alive by TCP and exec probes, and start with startup probes.
    for deployment in ["web", "echo"] {
        cluster.restart(SHOP, &format!("deployment/{deployment}"));
        cluster.rolled_out(SHOP, &format!("deployment/{deployment}"));
    }
    cluster.works();
    assert_eq!(wire.found(), 0);
    for node in ["n1", "n2"] {
        let refused = cluster.ask("plain/outsider", node, "http://web.shop/").unwrap_err();
        assert!(refused.contains("reset") || refused.contains("refused") || refused.contains("EOF"), "{refused}");
    }
    let restarted = |pod: &serde_json::Value| pod["status"]["containerStatuses"][0]["restartCount"] != 0;
    let pods = cluster.get(&["pods", "-n", SHOP, "-l", "app in (web, echo)"]);
    let restarted: Vec<_> = pods["items"].as_array().unwrap().iter().filter(|pod| restarted(pod)).collect();
    assert!(restarted.is_empty(), "probes have failed: {restarted:?}");
}

#[test]
fn both_families_pass() {
    let cluster = cluster();
    let wire = Sniffer::start(&cluster, "n2");
    let service = cluster.get(&["service", "-n", SHOP, "web"]);
    let addresses = service["spec"]["clusterIPs"].as_array().unwrap();
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in addresses {
        let address = address.as_str().unwrap();
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        for node in ["n1", "n2"] {
            // Several requests, because some of the pods are on the other node.
            for _ in 0..8 {
                cluster.ask("shop/front", node, &format!("http://{host}/")).unwrap();
            }
        }
    }
    assert_eq!(wire.found(), 0);
}

#[test]
fn the_first_process_of_a_job_is_in_the_mesh() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    cluster.apply(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: first, namespace: shop, labels: {made-by: scenario}}\nspec:\n  completions: 8\n  parallelism: 4\n  \
         backoffLimit: 0\n  template:\n    metadata: {labels: {made-by: scenario}}\n    spec:\n      serviceAccountName: front\n      restartPolicy: Never\n      \
         containers: [{name: get, image: \"example.org/app:1\", args: [get, \"http://web/\"]}]\n",
    );
    eventually("the job ends", || {
        let status = cluster.get(&["job", "-n", SHOP, "first"])["status"].clone();
        assert_eq!(
            status["failed"].as_u64().unwrap_or(0),
            0,
            "{}",
            cluster.kubectl(&["-n", SHOP, "logs", "-l", "job-name=first"])
        );
        (status["succeeded"] != 8).then(|| status.to_string())
    });
    cluster.kubectl(&["-n", SHOP, "delete", "job", "first"]);
    assert_eq!(wire.found(), 0);
}

#[test]
fn a_policy_is_in_force_for_as_long_as_it_is_there() {
    let cluster = cluster();
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-front, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: web}}\n  action: DENY\n  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/front]}}]}]\n",
    );
    for node in ["n1", "n2"] {
        eventually("the policy is in force", || cluster.ask("shop/front", node, "http://web.shop/").ok());
        // Every pod of the service, on both nodes, has received it by then or soon.
        eventually("it is in force everywhere", || {
            (0..8).find_map(|_| cluster.ask("shop/front", node, "http://web.shop/").ok())
        });
    }
    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicy", "no-front"]);
    cluster.works();
    assert_eq!(wire.found(), 0);
}

#[test]
fn a_namespace_leaves_and_comes_back_under_load() {
    let cluster = cluster();
    let requests = Load::requests(&cluster, "requests", "n1", "http://web/", 20, 30);
    // Connections that are open when the label is removed keep their time of 25 s.
    let held = Load::held(&cluster, "held", "n2", "echo:9000", 10, 20);
    cluster.kubectl(&["label", "namespace", SHOP, "istio.io/dataplane-mode-"]);
    eventually("nobody is in", || {
        let pods = cluster.get(&["pods", "-n", SHOP]);
        let inside =
            |pod: &&serde_json::Value| !pod["metadata"]["annotations"]["ambient.istio.io/redirection"].is_null();
        pods["items"].as_array().unwrap().iter().find(inside).map(ToString::to_string)
    });
    cluster.kubectl(&["label", "namespace", SHOP, "istio.io/dataplane-mode=ambient"]);
    requests.all_well(&cluster);
    held.all_well(&cluster);
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    assert_eq!(wire.found(), 0);
}
