//! Policies: which connections are refused, by which rule, and which open connections a change ends.

use crate::world::facts::principal;
use crate::world::{World, alive, apps, ask, connect, eventually};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A connection that is no longer permitted must end within this time of the file's change.
const WITHIN: Duration = Duration::from_secs(1);

fn world() -> World {
    let mut w = World::new();
    for (name, node) in [("good", 1), ("bad", 1), ("server", 2)] {
        w.mesh_pod(name, node);
    }
    w.plain_pod("stranger", 1);
    apps::serve(&w.ns("server"), 8080, apps::who);
    apps::serve(&w.ns("server"), 9000, apps::echo);
    w
}

fn server(w: &World) -> std::net::IpAddr {
    w.pods.iter().find(|pod| pod.name == "server").unwrap().v4
}

/// An open connection that has carried data.
fn open(w: &World, from: &str) -> TcpStream {
    let mut stream = connect(&w.ns(from), (server(w), 9000)).unwrap();
    assert!(alive(&mut stream));
    stream
}

fn refused(w: &World, from: &str) -> bool {
    // A reset may arrive before the request has been written.
    let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::NotConnected];
    matches!(ask(&w.ns(from), (server(w), 8080), "x"), Err(e) if reset.contains(&e.kind()))
}

#[test]
fn a_refusal_names_its_rule_in_the_log_and_in_metrics() {
    let mut w = world();
    w.mesh.policy("no-bad", "Namespace", "Deny", principal("bad"));
    w.mesh.policy("mesh-only", "Namespace", "Deny", json!({"notPrincipals": ["Presence"]}));
    w.start();
    assert!(ask(&w.ns("good"), (server(&w), 8080), "x").is_ok());
    assert!(refused(&w, "bad"));
    assert!(refused(&w, "stranger"));
    for (source, rule) in [("bad", "ns/no-bad rule[0]"), ("stranger", "ns/mesh-only rule[0]")] {
        let by = |l: &Value| l["direction"] == "inbound" && l["src.workload"] == source && l["reason"] == "denied";
        let line = w.log_line(2, source, by);
        let expected = format!("connection closed due to policy rejection: explicitly denied by: {rule}");
        assert_eq!(line["error"], json!(expected));
        assert_eq!(line["level"], "error");
    }
    let out = w.log_line(1, "the client's side", |l| l["src.workload"] == "bad" && l["direction"] == "outbound");
    assert!(out["error"].as_str().unwrap().contains("401 Unauthorized: the far end's policies refuse it"), "{out}");
    // No server listens on this port.
    assert!(ask(&w.ns("good"), (server(&w), 8081), "x").is_err());
    let out = w.log_line(1, "refused by the far end", |l| l["reason"] == "peer_refused");
    assert!(out["error"].as_str().unwrap().contains("does it listen on the port?"), "{out}");
    let denied = ["reporter=\"destination\"", "response_flags=\"DENY\"", "source_workload=\"bad\""];
    assert_eq!(w.metric(2, "istio_tcp_connections_failed_total", &denied), 1.0);
    assert_eq!(w.metric(2, "culvert_connection_failures_total", &["reason=\"denied\"", "fault=\"policy\""]), 2.0);
}

#[test]
fn a_new_policy_ends_exactly_the_connections_that_it_denies() {
    let mut w = world();
    w.start();
    let (mut good, mut bad, mut stranger) = (open(&w, "good"), open(&w, "bad"), open(&w, "stranger"));
    w.mesh.policy("no-bad", "Namespace", "Deny", principal("bad"));
    let start = Instant::now();
    w.write_mesh();
    let error = bad.read(&mut [0]).expect_err("the denied connection is reset");
    assert!(start.elapsed() < WITHIN, "{:?}", start.elapsed());
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(alive(&mut good) && alive(&mut stranger), "the others go on");
    let line = w.log_line(2, "policy change", |l| l["reason"] == "policy_change");
    let error = line["error"].as_str().unwrap();
    assert!(error.starts_with("connection closed due to policy change: explicitly denied by: ns/no-bad"), "{error}");
}

#[test]
fn attaching_a_policy_to_the_workload_ends_live_connections_too() {
    let mut w = world();
    w.mesh.policy("strict", "WorkloadSelector", "Deny", json!({"notPrincipals": ["Presence"]}));
    w.start();
    let (mut good, mut stranger) = (open(&w, "good"), open(&w, "stranger"));
    w.mesh.of("server")["authorizationPolicies"] = json!(["ns/strict"]);
    let start = Instant::now();
    w.write_mesh();
    let error = stranger.read(&mut [0]).expect_err("plaintext is reset once STRICT is attached");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(start.elapsed() < WITHIN, "{:?}", start.elapsed());
    assert!(alive(&mut good));
    assert!(refused(&w, "stranger"));
}

#[test]
fn a_principal_holds_in_both_spellings_and_in_each_trust_domain_that_is_one() {
    let mut w = world();
    let aliases = [("CULVERT_TRUST_DOMAIN_ALIASES", "old.local")];
    w.mesh.of("bad")["trustDomain"] = json!("old.local");
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &aliases);
    }
    for node in [1, 2] {
        w.wait_captured(node);
    }
    // A principal with the scheme and the main trust domain also matches the alias.
    let (mut good, mut bad) = (open(&w, "good"), open(&w, "bad"));
    let identities = w.json(2, "/connections").to_string();
    assert!(identities.contains("spiffe://old.local/ns/ns/sa/bad"), "{identities}");
    w.mesh.policy(
        "no-bad",
        "Namespace",
        "Deny",
        json!({"principals": [{"Exact": "spiffe://cluster.local/ns/ns/sa/bad"}]}),
    );
    w.write_mesh();
    let error = bad.read(&mut [0]).expect_err("the denied connection is reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(refused(&w, "bad") && alive(&mut good));
    // A principal with the alias also matches the main trust domain.
    w.mesh.policies.clear();
    w.mesh.policy("no-good", "Namespace", "Deny", json!({"principals": [{"Prefix": "old.local/ns/ns/sa/good"}]}));
    w.write_mesh();
    let error = good.read(&mut [0]).expect_err("the denied connection is reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(refused(&w, "good"));
    // A policy that can never match is refused by name, and the earlier policies stay in force.
    w.mesh.policy("typo", "Namespace", "Deny", json!({"principals": [{"Exact": "cluster.local/ns/ns/sa/good/"}]}));
    w.write_mesh();
    let line = w.log_line(2, "refused", |l| l["message"].as_str().is_some_and(|m| m.starts_with("mesh file refused")));
    assert!(line["error"].as_str().unwrap().contains("policy ns/typo: rule[0]: principal"), "{line}");
    assert!(refused(&w, "good"));
}

#[test]
fn a_policy_that_is_attached_but_unknown_refuses_and_is_waited_for() {
    let mut w = world();
    w.mesh.of("server")["authorizationPolicies"] = json!(["ns/late"]);
    w.start();
    assert!(refused(&w, "good"), "never skipped");
    let line = w.log_line(2, "policy unknown", |l| l["reason"] == "policy_unknown");
    assert!(line["error"].as_str().unwrap().contains("ns/late"), "{line}");
    let waiting = std::thread::scope(|scope| {
        eventually("only the tunnel is there", || w.metric(2, "culvert_data_plane_tasks", &[]) == 1.0);
        let asking = scope.spawn(|| ask(&w.ns("good"), (server(&w), 8080), "x"));
        eventually("the question is waiting", || w.metric(2, "culvert_data_plane_tasks", &[]) == 2.0);
        let mut mesh = w.mesh.clone();
        mesh.policy("late", "WorkloadSelector", "Allow", principal("good"));
        crate::world::replace(&w.mesh_file(2), &mesh.json());
        asking.join().unwrap()
    });
    assert!(waiting.is_ok(), "{waiting:?}");
    assert!(refused(&w, "bad"));
}

#[test]
fn a_dry_run_policy_is_only_noted() {
    let mut w = world();
    w.mesh.policy("trial", "Namespace", "Deny", principal("good"));
    w.mesh.policies[0]["dryRun"] = json!(true);
    w.start();
    assert!(ask(&w.ns("good"), (server(&w), 8080), "x").is_ok());
    let line = w.log_line(2, "dry run", |l| l["scope"] == "authorize");
    assert_eq!(line["message"], "dry-run policy: ns/trial rule[0] would have denied this");
}
