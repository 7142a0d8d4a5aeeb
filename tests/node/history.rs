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

/// The plaintext of a pod, as `/plaintext` has it.
fn plaintext(w: &World, node: u8, pod: &str) -> Value {
    let answer = w.json(node, &format!("/plaintext?pod={pod}"));
    answer["pods"][0].clone()
}

#[test]
fn each_node_proves_since_when_its_pods_have_sent_and_received_no_plaintext() {
    let mut w = World::new();
    let (client, plain, server) = (w.mesh_pod("client", 1), w.plain_pod("plain", 1), w.mesh_pod("server", 2));
    for port in [8080, 8081] {
        apps::serve(&server.netns, port, apps::who);
    }
    apps::serve(&plain.netns, 8080, apps::who);
    w.mesh.policy("shut", "Namespace", "Deny", json!({"destinationPorts": [8081]}));
    w.start();
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    entries(&w, 2, "kind=connection", 1);
    for (node, pod) in [(1, "ns/client"), (2, "ns/server")] {
        let clean = plaintext(&w, node, pod);
        for action in ["accepted", "opened", "refused"] {
            assert_eq!((&clean[action], &clean[&format!("last_{action}")]), (&json!(0), &Value::Null), "{clean:#}");
        }
        assert_eq!((&clean["state"], &clean["peers"], &clean["open"]), (&json!("captured"), &json!([]), &json!(0)));
        assert!(clean["since"].is_string(), "{clean:#}");
    }
    // From outside the mesh to the pod, once carried and once refused; and from the pod to the outside.
    ask(&plain.netns, (server.v4, 8080), "x").unwrap();
    assert!(is_reset(&plain.netns, (server.v4, 8081)));
    ask(&client.netns, (plain.v4, 8080), "x").unwrap();
    eventually("the refusal is counted", || plaintext(&w, 2, "ns/server")["refused"] == 1);
    let there = plaintext(&w, 2, "ns/server");
    assert_eq!(
        (&there["accepted"], &there["opened"], &there["refused"]),
        (&json!(1), &json!(0), &json!(1)),
        "{there:#}"
    );
    let peer = &there["peers"][0];
    assert_eq!((&peer["accepted"], &peer["refused"]), (&json!(1), &json!(1)), "{there:#}");
    assert!(peer["last_accepted"].is_string() && there["last_refused"].is_string(), "{there:#}");
    eventually("it has ended", || plaintext(&w, 1, "ns/client")["open"] == 0);
    let here = plaintext(&w, 1, "ns/client");
    assert_eq!((&here["accepted"], &here["opened"], &here["refused"]), (&json!(0), &json!(1), &json!(0)), "{here:#}");
    let metric = |action: &str| {
        w.metric(2, "culvert_plaintext_connections_total", &["pod=\"server\"", &format!("action=\"{action}\"")])
    };
    assert_eq!(["accepted", "opened", "refused"].map(metric), [1.0, 0.0, 1.0]);
    // While a connection is open, the last time is now.
    let mut open = crate::world::connect(&plain.netns, (server.v4, 8080)).unwrap();
    eventually("it is open", || plaintext(&w, 2, "ns/server")["open"] == 1);
    let answer = w.json(2, "/plaintext?pod=ns/server");
    assert_eq!(answer["pods"][0]["last_accepted"], answer["now"], "{answer:#}");
    std::io::Write::write_all(&mut open, b"x\n").unwrap();
    drop(open);
    eventually("it has ended", || plaintext(&w, 2, "ns/server")["open"] == 0);
    let (status, text) = w.try_get(2, 15000, "/plaintext?pods=x").unwrap();
    assert_eq!((status, text.contains("\"pods\" is not understood")), (400, true), "{text}");
}

#[test]
fn changes_of_policies_certificates_and_the_mesh_file_are_remembered_without_secrets() {
    let (mut w, client, server) = world(&[]);
    let text = |w: &World, what: &str, subject: &str| {
        let found = entries(w, 2, &format!("what={what}"), 1);
        let all = found.iter().filter(|entry| entry["subject"] == subject);
        all.map(|entry| entry["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let issued = text(&w, "certificate", "spiffe://cluster.local/ns/ns/sa/server");
    assert!(issued.iter().any(|text| text.starts_with("The CA issued a certificate")), "{issued:?}");
    let of_policies = |w: &World, count: usize| {
        let found = entries(w, 2, "what=policy", count);
        let one =
            |entry: &Value| format!("{}: {}", entry["subject"].as_str().unwrap(), entry["text"].as_str().unwrap());
        found.iter().map(one).collect::<Vec<_>>()
    };
    assert_eq!(w.json(2, "/history?what=policy")["entries"], json!([]), "what was there at the start is no change");
    w.mesh.policies.retain(|policy| policy["name"] != "shut");
    w.mesh.policy("later", "Namespace", "Allow", json!({"destinationPorts": [9999]}));
    w.write_mesh();
    assert_eq!(of_policies(&w, 2), ["ns/shut: The policy was removed.", "ns/later: The policy was added."]);
    crate::world::replace(&w.mesh_file(2), "workloads: {");
    eventually("the file is refused", || {
        let noted = w.json(2, "/history?what=control_plane");
        let first = noted["entries"][0]["text"].as_str().unwrap_or_default().to_owned();
        first.starts_with("The mesh file was refused")
    });
    // Neither keys nor what connections carry are part of it.
    ask(&client.netns, (server.v4, 8080), "hunter2-canary").unwrap();
    entries(&w, 2, "kind=connection", 1);
    let key = std::fs::read_to_string(w.ca().join("ca.key")).unwrap();
    for page in ["/history?limit=100000", "/plaintext"] {
        let text = w.json(2, page).to_string();
        for secret in ["PRIVATE KEY", "hunter2-canary", key.lines().nth(1).unwrap()] {
            assert!(!text.contains(secret), "{secret} in {page}");
        }
    }
}

#[test]
fn how_both_legs_do_is_shown_when_somebody_asks() {
    let mut w = World::new();
    let (client, plain, server) = (w.mesh_pod("client", 1), w.plain_pod("plain", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    w.start();
    let open = [&client, &plain].map(|from| {
        let mut open = crate::world::connect(&from.netns, (server.v4, 9000)).unwrap();
        assert!(crate::world::alive(&mut open));
        open
    });
    for (node, count) in [(1, 1), (2, 2)] {
        let shown = w.json(node, "/connections?tcp_info=true");
        assert_eq!(shown.as_array().unwrap().len(), count, "{shown:#}");
        for leg in shown.as_array().unwrap().iter().flat_map(|one| [&one["tcp"]["app"], &one["tcp"]["far"]]) {
            assert!(leg["rttUs"].as_u64().is_some_and(|rtt| rtt > 0), "{shown:#}");
            assert_eq!(leg["retransmits"], 0, "{shown:#}");
            assert!(leg["busyUs"].is_number() && leg["rwndLimitedUs"].is_number(), "{shown:#}");
        }
    }
    assert!(w.json(2, "/connections")[0]["tcp"].is_null());
    let (status, _) = w.try_get(2, 15000, "/connections?tcp=true").unwrap();
    assert_eq!(status, 400);
    drop(open);
}
