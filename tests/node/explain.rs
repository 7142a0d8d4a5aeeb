//! `culvert explain` says what then happens.

use crate::world::facts::principal;
use crate::world::{Pod, World, apps, ask, connect, eventually, inside, is_reset, subject};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

const VIP: &str = "10.96.0.20";

/// A client; a service of three pods, of which one is unhealthy and one has no capacity; a plain pod; and a host outside
/// the mesh.
fn world() -> World {
    let mut w = World::new();
    let pods: Vec<Pod> =
        [("client", 1), ("web-0", 2), ("web-1", 2), ("web-2", 2)].map(|(name, node)| w.mesh_pod(name, node)).into();
    let (_plain, outside) = (w.plain_pod("plain", 2), w.add_pod("outside", 2));
    w.mesh.service("web", &[VIP], &json!({"80": 8080}), &[&pods[1], &pods[2], &pods[3]]);
    w.mesh.of("web-1")["status"] = json!("Unhealthy");
    w.mesh.of("web-2")["capacity"] = json!(0);
    for name in ["web-0", "web-1", "plain"] {
        apps::serve(&w.ns(name), 8080, apps::who);
    }
    apps::serve(&outside.netns, 8080, apps::who);
    w.start();
    w
}

fn explain(w: &World, from: &str, to: &str, json: bool) -> (bool, String) {
    let mut command = Command::new(subject());
    command.args(["explain", "--from", from, "--to", to]);
    if json {
        command.arg("--json");
    }
    let output = inside(&w.ns("n1"), || command.output()).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Explains a connection of the client, and makes it. Returns the explanation once both agree on whether it fails.
fn agrees(w: &World, to: &str) -> String {
    let (_, answer) = explain(w, "ns/client", to, true);
    let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{to}: {error}: {answer}"));
    let address: SocketAddr = answer["to"].as_str().unwrap().parse().unwrap();
    let ns = w.ns("client");
    let carried = ask(&ns, address, "x").is_ok_and(|said| !said.is_empty());
    assert_eq!(carried, answer["reason"].is_null(), "{to}: {answer:#}");
    if !carried {
        assert!(is_reset(&ns, address), "{to}");
    }
    let (fine, text) = explain(w, "ns/client", to, false);
    assert!(fine, "{text}");
    text
}

fn contains(text: &str, all: &[&str]) {
    for part in all {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn explanations_agree_with_what_happens() {
    let mut w = world();
    let v4 = |name: &str| w.pods.iter().find(|pod| pod.name == name).unwrap().v4.to_string();
    let (web, unhealthy, plain, outside) = (v4("web-0"), v4("web-1"), v4("plain"), v4("outside"));

    let service = agrees(&w, &format!("{VIP}:80"));
    contains(
        &service,
        &[
            "10.96.0.20 belongs to the service ns/web.ns.svc.cluster.local",
            "1 of 3 of ns/web.ns.svc.cluster.local port 80 may be chosen",
            &format!("web-0 at {web} port 8080: may be chosen"),
            "is not healthy",
            "has no capacity",
            &format!("tunnel to {web}:15008, asked for {web}:8080"),
            "expects spiffe://cluster.local/ns/ns/sa/web-0",
            "=> it would be carried in a tunnel with mutual TLS, allowed: no ALLOW policy applies",
        ],
    );
    for name in ["web", "web.ns", "web.ns.svc.cluster.local."] {
        assert_eq!(agrees(&w, &format!("{name}:80")), service, "{name}");
    }
    contains(&agrees(&w, &format!("{VIP}:81")), &["0 of 3", "has no such port", "has no port 81", "no_port"]);
    contains(&agrees(&w, &format!("{unhealthy}:8080")), &["is an address of the workload c1//Pod/ns/web-1"]);
    contains(&agrees(&w, &format!("{plain}:8080")), &["plain TCP", "carried in plaintext"]);
    contains(&agrees(&w, &format!("{outside}:8080")), &["is outside the mesh", "no egress policy applies"]);
    contains(&agrees(&w, &format!("{}:15001", v4("client"))), &["attempted recursive call", "reason loop"]);

    // The same with policies: of the destination, and for destinations outside the mesh.
    w.mesh.policy("no-client", "Namespace", "Deny", principal("client"));
    w.mesh.egress = vec![json!({"namespace": "ns", "dryRun": false, "default": "Deny"})];
    w.write_mesh();
    for node in [1, 2] {
        eventually("the policies are in force", || w.metric(node, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    }
    contains(&agrees(&w, &format!("{VIP}:80")), &["explicitly denied by: ns/no-client rule[0]", "reason denied"]);
    contains(&agrees(&w, &format!("{outside}:8080")), &["Deny by the egress policy of namespace ns", "egress_denied"]);
}

#[test]
fn the_endpoint_that_is_named_as_the_most_likely_one_is_then_chosen() {
    let mut w = world();
    w.mesh.of("web-1")["status"] = json!("Healthy");
    w.write_mesh();
    eventually("both may be chosen", || explain(&w, "ns/client", &format!("{VIP}:80"), false).1.contains("2 of 3"));
    let mut held = Vec::new();
    // Of two endpoints the one with fewer connections is chosen; with as many, either.
    for connections in [0, 0, 1, 1] {
        let said = explain(&w, "ns/client", &format!("{VIP}:80"), false).1;
        let likely = said.split("one of 2 by two random choices, now most likely ").nth(1).unwrap();
        let uid = likely.split(' ').next().unwrap();
        let expected = if connections == 1 { "(1 connection)" } else { "(0 connections)" };
        assert!(likely.starts_with(&format!("{uid} {expected}")), "{said}");
        held.push(connect(&w.ns("client"), VIP.parse::<std::net::IpAddr>().map(|ip| (ip, 80)).unwrap()).unwrap());
        let mut open = Value::Null;
        eventually("it is open", || {
            open = w.json(1, "/connections");
            open.as_array().is_some_and(|open| open.len() == held.len())
        });
        let newest = open.as_array().unwrap().iter().max_by_key(|one| one["id"].as_u64()).unwrap();
        let likely = w.pods.iter().find(|pod| uid.ends_with(&pod.name)).unwrap().v4;
        let at = newest["actualDst"].as_str().unwrap().parse::<SocketAddr>().unwrap().ip();
        assert!(held.len() % 2 == 1 || at == likely, "{said}: {newest}");
    }
}

#[test]
fn bad_questions_get_an_answer_that_says_what_is_wrong() {
    let w = world();
    for (from, to, expected) in [
        ("client", "10.0.0.1:80", "\"client\" is not NAMESPACE/POD"),
        ("ns/none", "10.0.0.1:80", "no pod ns/none is captured on this node"),
        ("ns/client", "10.0.0.1", "neither ADDRESS:PORT nor NAME:PORT"),
        ("ns/client", "web:http", "neither ADDRESS:PORT nor NAME:PORT"),
        ("ns/client", "a b:80", "neither ADDRESS:PORT nor NAME:PORT"),
        ("ns/client", "fd00::1:80", "[ADDRESS]:PORT"),
    ] {
        let (fine, text) = explain(&w, from, to, false);
        assert!(!fine && text.contains(expected), "{from} {to}: {text}");
    }
}

#[test]
fn what_a_policy_would_cut_is_what_it_then_cuts() {
    let mut w = World::new();
    let clients: Vec<Pod> = ["one", "two", "three"].map(|name| w.mesh_pod(name, 1)).into();
    let (server, stranger) = (w.mesh_pod("server", 2), w.plain_pod("stranger", 1));
    apps::serve(&server.netns, 8080, apps::echo);
    apps::serve(&server.netns, 9090, apps::echo);
    w.start();
    let open = |w: &World, from: &Pod, port: u16| {
        let mut stream = connect(&w.ns(&from.name), SocketAddr::from((server.v4, port))).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream
    };
    let from = |pod: &Pod, port: u16| (pod.v4.to_string(), format!("{}:{port}", server.v4));
    let mut streams: Vec<((String, String), TcpStream)> = Vec::new();
    for pod in clients.iter().chain([&stranger]) {
        for port in [8080, 9090] {
            streams.push((from(pod, port), open(&w, pod, port)));
        }
    }
    // One that has ended.
    drop(open(&w, &clients[0], 8080));
    let file = w.dir.join("policy.yaml");
    let no_one = json!({"principals": [{"Exact": "cluster.local/ns/ns/sa/one"}], "destinationPorts": [8080]});
    let no_plaintext = json!({"notPrincipals": ["Presence"]});
    let policy = json!({"name": "wanted", "namespace": "ns", "scope": "Namespace", "action": "Deny", "dryRun": false,
        "rules": [[[no_one]], [[no_plaintext]]]});
    std::fs::write(&file, json!({"policies": [policy]}).to_string()).unwrap();
    let ask = |json: bool| {
        let mut command = Command::new(subject());
        command.arg("explain").arg("--policy").arg(&file);
        if json {
            command.arg("--json");
        }
        let output = inside(&w.ns("n2"), || command.output()).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let mut answer = Value::Null;
    eventually("the connection that has ended is known as such", || {
        answer = serde_json::from_str(&ask(true)).unwrap();
        answer["wouldHaveBeenRefused"] == 1
    });
    assert_eq!((&answer["open"], &answer["wouldBeCut"]), (&json!(8), &json!(3)), "{answer:#}");
    let changes = answer["changes"].as_array().unwrap().iter().filter(|change| change["connection"] == "open");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut predicted: Vec<_> = changes.map(|one| (text(&one["source"]), text(&one["destination"]))).collect();
    predicted.sort();
    contains(
        &ask(false),
        &[
            "of 8 open connections 3 would be cut; of the last 1 that have ended 1 would have been refused and 0 allowed",
            "(spiffe://cluster.local/ns/ns/sa/one)",
            "(no identity)",
            "would be refused: explicitly denied by: ns/wanted rule[0]",
        ],
    );

    w.mesh.policies.push(policy);
    w.write_mesh();
    eventually("the policy is in force", || w.metric(2, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    // Those that stay answer still; those that are cut are reset.
    let mut cut = Vec::new();
    eventually("as many are cut", || {
        streams.retain_mut(|(ends, stream)| {
            let alive = stream.write_all(b"y").and_then(|()| stream.read_exact(&mut [0])).is_ok();
            if !alive {
                cut.push(ends.clone());
            }
            alive
        });
        cut.len() >= predicted.len()
    });
    cut.sort();
    assert_eq!(cut, predicted);
    assert_eq!(streams.len(), 5);
}

#[test]
fn a_policy_with_a_selector_counts_where_the_facts_name_it_and_a_note_says_so() {
    let mut w = World::new();
    let (client, servers) = (w.mesh_pod("client", 1), ["named", "other"].map(|name| w.mesh_pod(name, 2)));
    let policy = |port: u16| {
        let test = json!({"destinationPorts": [port]});
        json!({"name": "selects", "namespace": "ns", "scope": "WorkloadSelector", "action": "Deny", "dryRun": false,
            "rules": [[[test]]]})
    };
    // It is in force already, and denies something else.
    w.mesh.policies.push(policy(1));
    w.mesh.of("named")["authorizationPolicies"] = json!(["ns/selects"]);
    servers.iter().for_each(|pod| apps::serve(&pod.netns, 8080, apps::echo));
    w.start();
    let mut open: Vec<TcpStream> =
        servers.iter().map(|pod| connect(&client.netns, SocketAddr::from((pod.v4, 8080))).unwrap()).collect();
    for stream in &mut open {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    let ask = |text: &str| {
        let file = w.dir.join("policy.yaml");
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(subject());
        command.arg("explain").arg("--policy").arg(&file);
        let output = inside(&w.ns("n2"), || command.output()).unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let said = ask(&json!({"policies": [policy(8080)]}).to_string());
    contains(
        &said,
        &[
            "of 2 open connections 1 would be cut",
            "to c1//Pod/ns/named at",
            "note: policy ns/selects selects workloads by labels, which are not known here: it counts for those whose mesh facts name it \
             now (1 in the mesh)",
        ],
    );
    let unnamed = policy(8080).to_string().replace("selects", "unnamed");
    let said = ask(&format!("policies: [{unnamed}]"));
    contains(&said, &["of 2 open connections 0 would be cut", "note: policy ns/unnamed", "of no workload name it"]);
    let object = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n";
    contains(&ask(object), &["this is a Kubernetes object"]);
}

#[test]
fn files_that_are_no_policies_are_refused_by_name() {
    let w = world();
    let policy = "{name: p, namespace: a, scope: Global, action: Deny, dryRun: false, rules: []}";
    let egress = "{namespace: a, dryRun: true, default: Deny}";
    for (text, expected) in [
        ("policies: []".to_owned(), "there is no policy in it"),
        ("nothing".to_owned(), "line 1"),
        ("policies:\n- {name: x}\n".to_owned(), "missing field"),
        (format!("policies:\n- {policy}\negress:\n- {egress}\n"), "only `policies:`"),
    ] {
        let file = w.dir.join("policy.yaml");
        std::fs::write(&file, &text).unwrap();
        let mut command = Command::new(subject());
        command.arg("explain").arg("--policy").arg(&file);
        let output = inside(&w.ns("n1"), || command.output()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{text}: {said}");
    }
}
