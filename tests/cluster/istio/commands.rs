//! The commands with which people look at a mesh, as from a laptop: with a kubeconfig, through port-forwards of a real
//! API server and real kubelets.

use super::cluster;
use crate::world::{Cluster, Load, SHOP, eventually};
use serde_json::Value;
use std::process::Command;

/// What a command of culvert prints.
fn culvert(cluster: &Cluster, arguments: &[&str]) -> String {
    cluster.run(&[&["culvert"], arguments].concat())
}

/// The same, as JSON.
fn json(cluster: &Cluster, arguments: &[&str]) -> Value {
    let said = culvert(cluster, arguments);
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))
}

#[test]
fn one_screen_says_that_all_is_well_and_names_a_node_that_is_gone() {
    let cluster = cluster();
    cluster.works();
    let said = culvert(&cluster, &["status", "--wait=3m"]);
    assert!(["n1", "n2"].iter().all(|node| said.contains(node)), "{said}");
    cluster.run(&["stop", "n2"]);
    let said = cluster.try_run(&["culvert", "status", "--timeout", "3s"]).unwrap_err();
    cluster.run(&["start", "n2"]);
    assert!(said.starts_with("exit status: 1:") && ["n1", "n2"].iter().all(|node| said.contains(node)), "{said}");
    cluster.works();
    culvert(&cluster, &["status", "--wait=5m"]);
}

#[test]
fn who_talks_to_whom_and_why_not() {
    let cluster = cluster();
    cluster.works();
    let client = cluster.pods(SHOP, "app=front", Some("n1")).remove(0);
    let from = format!("{SHOP}/{client}");
    cluster.ask("shop/front", "n1", "http://web.shop/").unwrap();
    let said = culvert(&cluster, &["connections", "--since", "5m", "--pod", &from]);
    assert!(said.contains(&client) && said.contains("ns/shop/sa/web"), "{said}");
    let said = culvert(&cluster, &["explain", "--from", &from, "--to", "web.shop:80"]);
    assert!(said.contains("spiffe://cluster.local/ns/shop/sa/web"), "{said}");
    let said = culvert(&cluster, &["logs", &from, "--since", "5m"]);
    assert!(said.lines().any(|line| line.contains(&client)), "{said}");
    for page in [&["pods"][..], &["status", "--plaintext"], &["doctor", "--cluster"]] {
        let said = culvert(&cluster, page);
        assert!(said.contains(&client) || page == ["doctor", "--cluster"], "{page:?}: {said}");
        assert!(!said.contains("FAIL"), "{page:?}: {said}");
    }

    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: closed, namespace: shop}\nspec:\n  selector: {matchLabels: {app: web}}\n  \
         action: DENY\n  rules: [{}]\n",
    );
    eventually("the policy refuses, and its name is shown", || {
        let answered = cluster.ask("shop/front", "n1", "http://web.shop/").is_ok();
        let said = culvert(&cluster, &["connections", "--since", "5m", "--refused"]);
        (answered || !said.contains("shop/closed")).then_some(said)
    });
    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicies", "closed"]);
    cluster.works();

    let held = Load::held(&cluster, "held", "n1", "echo:9000", 3, 20);
    eventually("open connections are shown as flows", || {
        let flows = json(&cluster, &["top", "--json", "--interval", "500ms"]).to_string();
        (!flows.contains("ns/shop/sa/front")).then_some(flows)
    });
    held.finish(&cluster);
}

#[test]
fn a_report_holds_what_both_nodes_say() {
    let cluster = cluster();
    cluster.works();
    let archive = cluster.folder().join("report.tar.gz");
    let path = archive.to_str().unwrap();
    culvert(&cluster, &["report", "-o", path]);
    let listed = Command::new("tar").args(["tzf", path]).output().unwrap();
    let names = String::from_utf8(listed.stdout).unwrap();
    std::fs::remove_file(&archive).unwrap();
    for node in ["n1", "n2"] {
        assert!(names.lines().filter(|name| name.contains(node)).count() > 5, "{names}");
    }
}
