//! Capturing and releasing pods: the order of steps, the checks, and what remains when the daemon dies.

use crate::world::sniffer::Sniffer;
use crate::world::{Pod, World, apps, ask, connect, eventually, inside, ip, output_in, pod_entry, replace};
use serde_json::{Value, json};
use std::io::{Read, Write};

fn world() -> (World, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    apps::serve(&server.netns, 9000, apps::echo);
    (w, client, server)
}

fn ruleset(pod: &Pod) -> String {
    output_in(&pod.netns, "nft", &["list", "ruleset"])
}

fn rules(pod: &Pod) -> usize {
    let routing = |family: &str| output_in(&pod.netns, "ip", &[family, "rule", "list"]).matches("32764:").count();
    ruleset(pod).lines().count() + 1000 * (routing("-4") + routing("-6"))
}

#[test]
fn after_a_kill_traffic_is_refused_not_passed_in_plaintext_and_the_next_start_takes_over() {
    let (mut w, client, server) = world();
    w.start();
    let canary = "canary-5f1c9e2a7b";
    // The sniffer does see a canary that comes from a namespace that is not captured.
    let outside = w.add_pod("outside", 1);
    let plain = w.add_pod("plain", 2);
    apps::serve(&plain.netns, 8080, apps::who);
    let control = Sniffer::start(&mut w, "control", canary);
    ask(&outside.netns, (plain.v4, 8080), canary).unwrap();
    assert!(control.seen(&mut w)["found"].as_u64().unwrap() > 0);

    let before = rules(&client);
    let sniffer = Sniffer::start(&mut w, "sniffer", canary);
    assert!(ask(&client.netns, (server.v4, 8080), canary).is_ok());
    for node in [1, 2] {
        let mut live = connect(&client.netns, (server.v4, 9000)).unwrap();
        live.write_all(canary.as_bytes()).unwrap();
        live.read_exact(&mut [0; 4]).unwrap();
        w.node(node).kill();
        for _ in 0..20 {
            assert!(ask(&client.netns, (server.v4, 8080), canary).is_err(), "node {node} is down");
            assert!(ask(&client.netns, (server.v6, 8080), canary).is_err(), "node {node} is down");
        }
        // Open connections have ended: at most the rest of the first echo still arrives, never a second echo.
        let _ = live.write_all(canary.as_bytes());
        let mut rest = Vec::new();
        let ended = live.read_to_end(&mut rest);
        let waited = matches!(&ended, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!waited && rest.len() < canary.len(), "{ended:?} {rest:?}");
        w.start_node(node, &[]);
        w.wait_captured(node);
        eventually("traffic flows again", || ask(&client.netns, (server.v4, 8080), canary).is_ok());
    }
    assert_eq!(rules(&client), before, "rules are not doubled by a take-over");
    let seen = sniffer.seen(&mut w);
    assert!(seen["frames"].as_u64().unwrap() > 50, "{seen}");
    assert_eq!((&seen["found"], &seen["dropped"]), (&json!(0), &json!(0)), "{seen}");
}

#[test]
fn adding_and_removing_a_pod_leaves_the_others_alone() {
    let (mut w, client, server) = world();
    let second = w.mesh_pod("second", 1);
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.write_pods(2, &[&server]);
    for node in [1, 2] {
        w.start_node(node, &[]);
    }
    eventually("both are captured", || w.state(1, "client").0 == "captured" && w.state(2, "server").0 == "captured");
    let mut live = connect(&client.netns, (server.v4, 9000)).unwrap();
    let mut alive = |when: &str| {
        live.write_all(b"ping").and_then(|()| live.read_exact(&mut [0; 4])).unwrap_or_else(|e| panic!("{when}: {e}"));
    };
    alive("at first");
    w.write_pods(1, &[&client, &second]);
    eventually("the second is captured", || w.state(1, "second").0 == "captured");
    assert!(ask(&second.netns, (server.v4, 8080), "x").is_ok());
    alive("after another was added");
    assert!(ruleset(&second).contains("table inet culvert"));
    w.write_pods(1, &[&client]);
    eventually("the second is released", || w.state(1, "second").0.is_empty());
    assert_eq!(ruleset(&second), "", "nothing of ours is left");
    assert_eq!(output_in(&second.netns, "ip", &["rule", "list"]).matches("32764:").count(), 0);
    assert_eq!(output_in(&second.netns, "ss", &["-Hltn"]), "", "no listener is left");
    assert!(ask(&second.netns, (server.v4, 8080), "x").is_ok(), "as any other client, in plaintext");
    alive("after another was removed");
    w.write_pods(1, &[&client, &second]);
    eventually("and captured again", || w.state(1, "second").0 == "captured");
    alive("at last");
}

#[test]
fn a_released_pod_finishes_its_connections() {
    let (mut w, client, server) = world();
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[("CONNECTION_TERMINATION_DEADLINE", "60s")]);
        w.wait_captured(node);
    }
    let mut outbound = connect(&client.netns, (server.v4, 9000)).unwrap();
    let mut alive = || outbound.write_all(b"ping").is_ok() && outbound.read_exact(&mut [0; 4]).is_ok();
    assert!(alive());
    w.write_pods(2, &[]);
    eventually("the server is being released", || w.state(2, "server").0 == "releasing");
    assert!(alive(), "an open connection goes on while its pod is released");
    assert!(ruleset(&server).contains("pre_nat"), "the return path stays as long as it is needed");
    drop(outbound);
    eventually("then it is gone", || w.state(2, "server").0.is_empty());
    assert_eq!(ruleset(&server), "");
}

#[test]
fn an_entry_that_comes_back_while_its_pod_is_released_keeps_what_is_open_and_another_identity_does_not() {
    let (mut w, client, server) = world();
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[("CONNECTION_TERMINATION_DEADLINE", "60s")]);
        w.wait_captured(node);
    }
    let mut open: Vec<_> = (0..3).map(|_| connect(&client.netns, (server.v4, 9000)).unwrap()).collect();
    let mut alive = || {
        open.iter_mut()
            .filter_map(|open| open.write_all(b"ping").and_then(|()| open.read_exact(&mut [0; 4])).ok())
            .count()
    };
    for round in 0..5 {
        assert_eq!(alive(), 3);
        w.write_pods(1, &[]);
        eventually("it is being released", || w.state(1, "client").0 == "releasing");
        assert_eq!(alive(), 3, "round {round}");
        w.write_pods(1, &[&client]);
        eventually("it is captured at once", || w.state(1, "client").0 == "captured");
        assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok());
    }
    // No connection continues after the pod has become another workload.
    w.write_pods(1, &[]);
    eventually("it is being released", || w.state(1, "client").0 == "releasing");
    let mut entry = pod_entry(&client);
    entry["serviceAccount"] = json!("other");
    replace(&w.pods_file(1), &json!({"pods": [entry]}).to_string());
    eventually("the mistake is named", || w.state(1, "client").1.contains("service account is \"other\""));
    assert_eq!(alive(), 0);
    w.write_pods(1, &[]);
    eventually("it is removed", || w.state(1, "client").0.is_empty());
    assert_eq!(ruleset(&client), "", "nothing of ours is left");
}

#[test]
fn pods_that_cannot_be_captured_are_named_with_the_reason_and_others_go_on() {
    let (mut w, client, server) = world();
    let mut others = Vec::new();
    for name in ["missing", "not-a-netns", "foreign", "busy", "twin", "other-account"] {
        others.push(w.mesh_pod(name, 1));
    }
    let unknown = w.add_pod("unknown", 1);
    let busy = w.pods.iter().find(|p| p.name == "busy").unwrap().clone();
    let _taken = inside(&busy.netns, || std::net::TcpListener::bind("0.0.0.0:15006")).unwrap();
    let mut entries: Vec<Value> = others.iter().chain([&client, &unknown]).map(pod_entry).collect();
    for entry in &mut entries {
        match entry["name"].as_str().unwrap() {
            "missing" => entry["netns"] = json!("/run/netns/there-is-no-such"),
            "not-a-netns" => entry["netns"] = json!("/etc/hostname"),
            "foreign" => entry["netns"] = json!(format!("/run/netns/{}", unknown.netns)),
            "twin" => {
                entry["netns"] = json!(format!("/run/netns/{}", client.netns));
            }
            "other-account" => entry["serviceAccount"] = json!("somebody"),
            _ => {}
        }
    }
    // The twin's workload has the client's addresses. Only the namespace distinguishes them.
    w.mesh.of("twin")["workloadIps"] = json!([client.v4, client.v6]);
    w.write_mesh();
    replace(&w.pods_file(1), &json!({"pods": entries}).to_string());
    w.write_pods(2, &[&server]);
    for node in [1, 2] {
        w.start_node(node, &[]);
    }
    let expected = [
        ("missing", "failed", "/run/netns/there-is-no-such: cannot open the network namespace"),
        ("not-a-netns", "failed", "/etc/hostname: not a network namespace"),
        ("foreign", "failed", "does not hold the workload's address"),
        ("busy", "failed", "port 15006 cannot be bound"),
        ("other-account", "failed", "service account is \"somebody\", the mesh facts say \"other-account\""),
        ("unknown", "pending", "no workload ns/unknown in the mesh facts yet"),
    ];
    for (name, state, reason) in expected {
        eventually(&format!("{name} is {state}: {reason}"), || {
            let (now, why) = w.state(1, name);
            now == state && why.contains(reason)
        });
    }
    // The twin that came first has the namespace; the other one is refused by name.
    eventually("one of the twins is refused", || {
        let refused = |name: &str| w.state(1, name).1.contains("a namespace belongs to one pod");
        let captured = |name: &str| w.state(1, name).0 == "captured";
        (refused("twin") && captured("client")) || (refused("client") && captured("twin"))
    });
    let (status, text) = w.try_get(1, 15021, "/healthz/ready").unwrap();
    assert_eq!((status, text.as_str()), (200, "ready\n"), "bad pods never make a node unready");
    assert!(w.metric(1, "culvert_capture_failures_total", &["reason=\"not_the_pod\""]) >= 1.0);
    assert_eq!(w.metric(1, "culvert_pods", &["state=\"failed\""]), 6.0);
    assert_eq!(w.metric(1, "culvert_pods", &["state=\"captured\""]), 1.0);
    // The missing facts arrive, and the pod is captured without further help.
    w.mesh.workload(&unknown, "HBONE");
    w.write_mesh();
    eventually("unknown is known now", || w.state(1, "unknown").0 == "captured");
}

#[test]
fn a_pod_whose_namespace_vanishes_is_named_and_comes_back() {
    let (mut w, client, server) = world();
    let other = w.mesh_pod("other", 1);
    w.start();
    ip(&format!("netns del {}\n", client.netns));
    eventually("its loss is noticed", || {
        let (state, reason) = w.state(1, "client");
        state == "failed" && (reason.contains("has gone") || reason.contains("cannot open"))
    });
    assert!(ask(&other.netns, (server.v4, 8080), "x").is_ok(), "others go on");
    let ns = &client.netns;
    ip(&format!("netns add {ns}\nlink add again netns {} type veth peer name eth0 netns {ns}\n", w.ns("n1")));
    crate::world::ip_in(&w.ns("n1"), "link set again master pods\nlink set again up\n");
    crate::world::ip_in(
        ns,
        &format!(
            "link set lo up\nlink set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via 10.1.0.1\nroute add default via fd00:1::1\n",
            client.v4, client.v6
        ),
    );
    eventually("the new namespace is captured", || w.state(1, "client").0 == "captured");
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok());
}

#[test]
fn a_namespace_without_ipv6_is_captured_for_ipv4() {
    let (mut w, client, server) = world();
    inside(&client.netns, || {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap();
    });
    w.mesh.of("client")["workloadIps"] = json!([client.v4]);
    w.start();
    assert_eq!(ask(&client.netns, (server.v4, 8080), "x").unwrap(), format!("{} x", client.v4));
    assert_eq!(output_in(&client.netns, "ip", &["-6", "rule", "list"]).matches("32764:").count(), 0);
}

#[test]
fn rules_that_come_before_ours_are_noticed() {
    let (mut w, client, _) = world();
    let foreign = "table inet foreign { chain out { type nat hook output priority -150; tcp dport 15091-15099 redirect to :1; }; }";
    let file = w.dir.join("foreign.nft");
    std::fs::write(&file, foreign).unwrap();
    output_in(&client.netns, "nft", &["-f", file.to_str().unwrap()]);
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.start_node(1, &[]);
    eventually("capture is not taken on trust", || {
        let (state, reason) = w.state(1, "client");
        state == "failed" && reason.contains("was not captured")
    });
    output_in(&client.netns, "nft", &["delete", "table", "inet", "foreign"]);
    eventually("and verified once they are gone", || w.state(1, "client").0 == "captured");
    assert!(!ruleset(&client).contains("169.254.7.127"), "nobody gives the node's probes that address here");
}

#[test]
fn a_changed_entry_never_opens_the_pod_and_a_corrected_one_is_captured_again() {
    let (mut w, client, server) = world();
    w.start();
    let entry = |uid: &str, account: &str| {
        let mut entry = pod_entry(&client);
        entry["uid"] = json!(uid);
        entry["serviceAccount"] = json!(account);
        json!({"pods": [entry]}).to_string()
    };
    let mut live = connect(&client.netns, (server.v4, 9000)).unwrap();
    live.write_all(b"ping").unwrap();
    live.read_exact(&mut [0; 4]).unwrap();
    replace(&w.pods_file(1), &entry("uid-client", "typo"));
    eventually("the mistake is named", || w.state(1, "client").1.contains("service account is \"typo\""));
    assert!(live.read(&mut [0]).is_err(), "what was open under the old entry is cut");
    assert!(ruleset(&client).contains("redirect to :15001"), "the rules stay");
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_err(), "refused, not passed in plaintext");
    replace(&w.pods_file(1), &entry("another-uid", "client"));
    eventually("captured again under another uid", || w.state(1, "client").0 == "captured");
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok());
    replace(&w.pods_file(1), &entry("another-uid", "typo"));
    eventually("the mistake is named again", || w.state(1, "client").0 == "failed");
    replace(&w.pods_file(1), "pods: []");
    eventually("removed while it failed", || w.state(1, "client").0.is_empty());
    assert_eq!(ruleset(&client), "", "a pod that is wanted no more is left as it was found");
}

#[test]
fn a_workload_that_gets_another_identity_is_captured_anew_with_it() {
    let (mut w, client, server) = world();
    w.start();
    // The destination accepts the new trust domain too. Both nodes learn of it at the same time.
    w.mesh.of("client")["trustDomain"] = json!("other.local");
    w.mesh.of("server")["trustDomain"] = json!("other.local");
    w.write_mesh();
    let held = |node: u8, identity: &str| {
        let dump = w.json(node, "/config_dump");
        dump["certificates"].as_array().unwrap().iter().any(|c| c["identity"] == identity && c["state"] == "Available")
    };
    eventually("both have the new identity", || {
        held(1, "spiffe://other.local/ns/ns/sa/client") && held(2, "spiffe://other.local/ns/ns/sa/server")
    });
    eventually("captured with it", || w.state(1, "client").0 == "captured" && w.state(2, "server").0 == "captured");
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok());
    let line = w.log_line(2, "the new identity", |l| l["src.identity"] == "spiffe://other.local/ns/ns/sa/client");
    assert_eq!(line["message"], "connection complete");
}
