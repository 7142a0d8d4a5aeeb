//! What a node remembers: connections that have ended or were refused, and changes.

use crate::world::{Pod, World, apps, ask, eventually, is_reset};
use serde_json::{Value, json};

/// A client that may reach a port of the server, and one that may not.
fn world(settings: &[(&str, &str)]) -> (World, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    for port in [8080, 8081] {
        apps::serve(&server.netns, port, apps::who);
    }
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.policy("open", "Namespace", "Allow", json!({"destinationPorts": [8080]}));
    w.mesh.policy("shut", "Namespace", "Deny", json!({"destinationPorts": [8081]}));
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, settings);
    }
    for node in [1, 2] {
        w.wait_captured(node);
    }
    (w, client, server)
}

/// The entries of an answer, once there are so many.
fn entries(w: &World, node: u8, query: &str, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    eventually(&format!("{count} entries of {query}"), || {
        found = w.json(node, &format!("/history?{query}"))["entries"].as_array().unwrap().clone();
        found.len() >= count
    });
    found
}

#[test]
fn the_history_says_what_ended_what_was_refused_by_which_rule_and_what_to_look_at() {
    let (w, client, server) = world(&[]);
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    ask(&client.netns, (vip, 80), "hello").unwrap();
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    let there = entries(&w, 2, "kind=connection", 2);
    let (refused, well) = (&there[0], &there[1]);
    for (value, expected) in [
        (&refused["outcome"], "refused"),
        (&refused["reason"], "denied"),
        (&refused["direction"], "inbound"),
        (&refused["pod"], "ns/server"),
        (&refused["source"]["identity"], "spiffe://cluster.local/ns/ns/sa/client"),
        (&refused["source"]["workload"], "ns/client"),
        (&refused["destination"]["workload"], "ns/server"),
        (&well["outcome"], "ok"),
        (&well["destination"]["service"], "web.ns.svc.cluster.local"),
        (&well["destination"]["identity"], "spiffe://cluster.local/ns/ns/sa/server"),
    ] {
        assert_eq!(value, expected, "{there:#?}");
    }
    assert!(refused["rule"].as_str().unwrap().contains("ns/shut"), "{refused:#}");
    assert!(refused["next_step"].as_str().unwrap().contains("A DENY policy matched"), "{refused:#}");
    assert!(well["rule"].as_str().unwrap().contains("ns/open"), "{well:#}");
    assert_eq!((&well["encrypted"], &well["bytes_received"]), (&json!(true), &json!(6)), "{well:#}");
    // The client's node knows only that the other one refused it.
    let here = entries(&w, 1, "refused=true&pod=ns/client", 1);
    assert_eq!((&here[0]["reason"], &here[0]["direction"]), (&json!("peer_denied"), &json!("outbound")));
    assert_eq!(here[0]["destination"]["address"], format!("{}:8081", server.v4));
    // Each filter leaves out the rest.
    let count = |query: &str| w.json(2, &format!("/history?{query}"))["entries"].as_array().unwrap().len();
    for (query, expected) in [
        ("outcome=ok", 1),
        ("outcome=failed", 0),
        ("reason=denied", 1),
        ("peer=ns/client", 2),
        ("peer=spiffe://cluster.local/ns/ns/sa/client&refused=true", 1),
        ("peer=ns/server", 0),
        ("kind=connection&since=1h", 2),
        ("kind=connection&limit=1", 1),
        ("since=2030-01-01T00:00:00Z", 0),
        ("pod=ns/other", 0),
    ] {
        assert_eq!(count(query), expected, "{query}");
    }
    let (status, text) = w.try_get(2, 15000, "/history?peers=x").unwrap();
    assert_eq!((status, text.contains("\"peers\" is not understood")), (400, true), "{text}");
}

#[test]
fn changes_and_refusals_outlast_connections_that_end_well() {
    let (w, client, server) = world(&[("CULVERT_HISTORY", "32")]);
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    for _ in 0..40 {
        ask(&client.netns, (server.v4, 8080), "x").unwrap();
    }
    eventually("all have ended", || w.json(2, "/history")["kept"]["ok"]["dropped"] == 24);
    let history = w.json(2, "/history");
    assert_eq!(history["dropped"], 24, "{history:#}");
    let count = |query: &str| w.json(2, &format!("/history?{query}"))["entries"].as_array().unwrap().len();
    assert_eq!((count("outcome=ok"), count("refused=true")), (16, 1));
    let captured = entries(&w, 2, "what=capture&pod=ns/server", 1);
    assert!(captured[0]["text"].as_str().unwrap().starts_with("The pod is captured"), "{captured:#?}");
}

#[test]
fn without_room_nothing_is_remembered() {
    let (w, client, server) = world(&[("CULVERT_HISTORY", "0")]);
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    w.log_line(2, "refused", |line| line["reason"] == "denied");
    let history = w.json(2, "/history");
    assert_eq!((&history["entries"], &history["dropped"], &history["oldest"]), (&json!([]), &json!(0), &Value::Null));
}

#[test]
fn each_stage_of_a_connection_is_timed_on_both_nodes() {
    let (w, client, server) = world(&[("CULVERT_ACCESS_LOG_STAGES", "true")]);
    let stages = |entry: &Value| entry["stages_ms"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let first = ["queue", "facts", "certificate", "dial", "tls", "connect", "first_byte"];
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    let here = entries(&w, 1, "kind=connection", 1);
    let sorted =
        |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(stages(&here[0]).into_iter().collect::<std::collections::BTreeSet<_>>(), sorted(&first), "{here:#?}");
    // The tunnel is open now.
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    let here = entries(&w, 1, "kind=connection", 2);
    let later = sorted(&["queue", "facts", "certificate", "connect", "first_byte"]);
    assert_eq!(stages(&here[0]).into_iter().collect::<std::collections::BTreeSet<_>>(), later, "{here:#?}");
    let there = entries(&w, 2, "kind=connection", 2);
    let inbound = sorted(&["facts", "policy", "dial", "first_byte"]);
    assert_eq!(stages(&there[0]).into_iter().collect::<std::collections::BTreeSet<_>>(), inbound, "{there:#?}");
    let total: f64 = here[1]["stages_ms"].as_object().unwrap().values().filter_map(Value::as_f64).sum();
    assert!(total > 0.0 && total <= here[1]["duration_ms"].as_f64().unwrap() + 0.1, "{here:#?}");
    for (node, stage, direction, count) in [
        (1, "tls", "outbound", 1.0),
        (1, "connect", "outbound", 2.0),
        (2, "tls", "inbound", 1.0),
        (2, "dial", "inbound", 2.0),
        (2, "first_byte", "inbound", 2.0),
    ] {
        let labels = [format!("stage=\"{stage}\""), format!("direction=\"{direction}\"")];
        let counted = w.metric(node, "culvert_connection_stage_seconds_count", &[&labels[0], &labels[1]]);
        assert_eq!(counted, count, "{stage} {direction}");
    }
    let line = w.log_line(1, "complete", |line| line["message"] == "connection complete");
    assert!(line["stages"].as_str().unwrap().starts_with("queue="), "{line}");
    // A refusal ends the stage that refused.
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    let refused = entries(&w, 1, "refused=true", 1);
    assert!(refused[0]["stages_ms"]["connect"].is_number(), "{refused:#?}");
    assert!(refused[0]["stages_ms"]["first_byte"].is_null(), "{refused:#?}");
}
