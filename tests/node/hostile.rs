//! Peers that are not culvert: what an HBONE port answers them, and which peers a daemon does not talk to at all.

use crate::world::certs::{self, Files, spiffe};
use crate::world::{Pod, World, apps, ask, connect, eventually, output_in, peer_script, python_env};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

/// Runs the raw HTTP/2 client in a namespace.
fn raw(w: &World, from: &str, to: &Pod, ca: &Path, cert: Option<&Files>, requests: &[Value]) -> Value {
    let spec = json!({
        "to": [to.v4, 15008], "ca": ca.join("ca.pem"), "cert": cert.map(|c| &c.chain), "key": cert.map(|c| &c.key),
        "requests": requests,
    });
    let python = python_env("python");
    let script = peer_script("h2_connect.py");
    let args = [script.to_str().unwrap(), &spec.to_string()];
    serde_json::from_str(&output_in(&w.ns(from), python.to_str().unwrap(), &args)).unwrap()
}

fn connect_to(authority: &str) -> Value {
    json!({"headers": [[":method", "CONNECT"], [":authority", authority]], "send": "x\n"})
}

fn world() -> World {
    let mut w = World::new();
    w.mesh_pod("server", 2);
    w.plain_pod("peer", 1);
    apps::serve(&w.ns("server"), 8080, apps::who);
    w
}

fn server(w: &World) -> Pod {
    w.pods.iter().find(|pod| pod.name == "server").unwrap().clone()
}

#[test]
fn every_connect_is_answered_with_its_status() {
    let mut w = world();
    let to = server(&w);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080, "81": 0}), &[&to]);
    w.mesh.service("other", &["10.96.0.2"], &json!({"80": 8080}), &[]);
    w.mesh.policy("no-9999", "Namespace", "Deny", json!({"destinationPorts": [9999]}));
    w.start();
    let cert = certs::good(&w.ca(), &w.dir, "peer");
    let own = |port: u16| format!("{}:{port}", to.v4);
    let cases = [
        (connect_to(&own(8080)), 200),
        (connect_to("web.ns.svc.cluster.local:80"), 200),
        (
            json!({"headers": [[":method", "GET"], [":scheme", "https"], [":authority", own(8080)], [":path", "/"]]}),
            400,
        ),
        (
            json!({"headers": [[":method", "CONNECT"], [":authority", own(8080)], ["te", "trailers"]], "send": "x\n"}),
            200,
        ),
        (connect_to("nonsense"), 400),
        (connect_to("10.2.0.99:8080"), 400),
        (connect_to("127.0.0.1:8080"), 400),
        (connect_to("169.254.169.254:80"), 400),
        (connect_to("[::1]:8080"), 400),
        (connect_to("10.96.0.1:80"), 400),
        (connect_to(&own(15001)), 503),
        (connect_to(&own(15006)), 503),
        (connect_to(&own(15008)), 503),
        (connect_to("nobody.ns.svc.cluster.local:80"), 503),
        (connect_to("other.ns.svc.cluster.local:80"), 503),
        (connect_to("web.ns.svc.cluster.local:81"), 503),
        (connect_to("web.ns.svc.cluster.local:82"), 503),
        (connect_to(&own(9999)), 401),
        (connect_to(&own(7)), 503),
    ];
    let requests: Vec<Value> = cases.iter().map(|(request, _)| request.clone()).collect();
    let answer = raw(&w, "peer", &to, &w.ca(), Some(&cert), &requests);
    assert_eq!(answer["tls"], "ok", "{answer}");
    for ((request, status), result) in cases.iter().zip(answer["results"].as_array().unwrap()) {
        assert_eq!(result["status"], *status, "{request}: {result}");
        let peer = w.pods.iter().find(|pod| pod.name == "peer").unwrap().v4;
        let body = if *status == 200 { format!("{peer} x") } else { String::new() };
        assert_eq!(result["body"], body, "{request}: a refusal says nothing, and the app sees the original client");
    }
    eventually("each refusal is counted", || {
        w.metric(2, "culvert_connection_failures_total", &["reason=\"ip_mismatch\""]) == 5.0
            && w.log(2)
                .iter()
                .any(|l| l["error"].as_str().is_some_and(|e| e.contains("istio.io/reroute-virtual-interfaces")))
            && w.metric(2, "culvert_connection_failures_total", &["reason=\"loop\""]) == 3.0
            && w.metric(2, "culvert_connection_failures_total", &["reason=\"bad_request\""]) == 2.0
    });
}

#[test]
fn refusals_that_depend_on_policy_tunnels_and_limits() {
    let mut w = world();
    let (sandwiched, way) = (w.mesh_pod("sandwiched", 2), w.mesh_pod("way", 2));
    apps::serve(&way.netns, 80, apps::who);
    w.mesh.of("sandwiched")["applicationTunnel"] = json!({"protocol": "PROXY", "port": 9000});
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[]);
    w.mesh.services[0]["waypoint"] = json!({"destination": format!("/{}", way.v4), "hboneMtlsPort": 15008});
    w.mesh.policy("only-8080", "WorkloadSelector", "Allow", json!({"destinationPorts": [8080]}));
    w.mesh.of("server")["authorizationPolicies"] = json!(["ns/only-8080"]);
    w.write_mesh();
    w.write_pods(2, &w.captured_pods(2));
    // One tunnel and one stream are allowed: a second stream is one too many.
    w.start_node(2, &[("CULVERT_MAX_CONNECTIONS", "2")]);
    w.wait_captured(2);
    let cert = certs::good(&w.ca(), &w.dir, "peer");
    let to = server(&w);
    let ask_for = |w: &World, to: &Pod, authority: String| {
        let answer = raw(w, "peer", to, &w.ca(), Some(&cert), &[connect_to(&authority)]);
        answer["results"][0]["status"].as_u64().unwrap_or_else(|| panic!("{authority}: {answer}"))
    };
    assert_eq!(ask_for(&w, &to, format!("{}:8080", to.v4)), 200);
    assert_eq!(ask_for(&w, &to, format!("{}:8081", to.v4)), 401, "no ALLOW rule matches");
    assert_eq!(ask_for(&w, &sandwiched, format!("{}:9000", sandwiched.v4)), 503, "PROXY protocol");
    assert_eq!(ask_for(&w, &way, "10.96.0.1:80".into()), 200, "the waypoint of a service takes its address");
    assert_eq!(ask_for(&w, &way, format!("{}:80", to.v4)), 400, "and no other");
    eventually("all have ended", || w.metric(2, "culvert_data_plane_tasks", &[]) == 0.0);
    let parked = connect(&w.ns("peer"), (to.v4, 15008)).unwrap();
    eventually("it is accepted", || w.metric(2, "istio_tcp_sockets_open", &[]) == 1.0);
    assert_eq!(ask_for(&w, &to, format!("{}:8080", to.v4)), 200, "who has not said who it is takes nobody's place");
    drop(parked);
    let peer = w.pods.iter().find(|pod| pod.name == "peer").unwrap().clone();
    let (_, says) = crate::stalls::misuse(&mut w, &peer, &to, &cert, json!({"do": "idle", "tunnels": 1}));
    eventually("a place is taken", || std::fs::read_to_string(&says).is_ok_and(|said| said.contains("open 1")));
    assert_eq!(ask_for(&w, &to, format!("{}:8080", to.v4)), 503, "the limit");
    assert_eq!(w.metric(2, "culvert_connection_failures_total", &["reason=\"limit\""]), 1.0);
}

#[test]
fn sigterm_sends_goaway_to_peers() {
    let mut w = world();
    w.start();
    let (to, ready) = (server(&w), w.dir.join("ready"));
    let cert = certs::good(&w.ca(), &w.dir, "peer");
    let spec = json!({
        "to": [to.v4, 15008], "ca": w.ca().join("ca.pem"), "cert": cert.chain, "key": cert.key,
        "requests": [connect_to(&format!("{}:8080", to.v4))], "until_goaway": ready,
    });
    let mut command = std::process::Command::new(python_env("python"));
    command.arg(peer_script("h2_connect.py")).arg(spec.to_string());
    let pid = w.start_in(&w.ns("peer"), &mut command, "goaway.out");
    eventually("the peer is connected", || ready.exists());
    w.node(2).signal(nix::sys::signal::Signal::SIGTERM);
    let ended = w.take(pid).wait();
    let text = std::fs::read_to_string(w.dir.join("goaway.out")).unwrap();
    assert!(ended.success(), "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&answer["results"][0]["status"], &answer["goaway"]), (&json!(200), &json!(0)), "{answer}");
}

#[test]
fn a_destination_that_cannot_prove_who_it_is_gets_nothing() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    w.mesh.policies.clear();
    let fakes: Vec<Pod> =
        ["other-ca", "two-names", "expired", "wrong-name"].iter().map(|name| w.add_pod(name, 2)).collect();
    for fake in &fakes {
        // The facts promise HBONE, but the pod is not captured and a server of the test listens there.
        w.mesh.workload(fake, "HBONE");
    }
    let other_ca = w.dir.join("other-ca-dir");
    assert!(
        std::process::Command::new(crate::world::subject())
            .args(["ca", "init"])
            .arg(&other_ca)
            .status()
            .unwrap()
            .success()
    );
    let (ca, dir) = (w.ca(), w.dir.clone());
    for fake in &fakes {
        let own = spiffe(&fake.name);
        let files = match fake.name.as_str() {
            "other-ca" => certs::leaf(&other_ca, &dir, "s1", &[&own], -60, 600),
            "two-names" => certs::leaf(&ca, &dir, "s2", &[&own, &spiffe("client")], -60, 600),
            "expired" => certs::leaf(&ca, &dir, "s3", &[&own], -600, -60),
            _ => certs::leaf(&ca, &dir, "s4", &[&spiffe("somebody")], -60, 600),
        };
        let ready = dir.join(format!("{}.ready", fake.name));
        let mut command = std::process::Command::new("python3");
        command.arg(peer_script("tls_server.py")).args([fake.v4.to_string().as_str(), "15008"]);
        command.args([&files.chain, &files.key, &ready]);
        w.start_in(&fake.netns, &mut command, &format!("{}.out", fake.name));
        eventually("it listens", || ready.exists());
    }
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.start_node(1, &[]);
    eventually("the client is captured", || w.state(1, "client").0 == "captured");
    for (fake, word) in fakes.iter().zip(["UnknownIssuer", "2 URI names", "expired", "sa/somebody, expected"]) {
        assert!(ask(&client.netns, (fake.v4, 80), "secret").is_err(), "{}", fake.name);
        let reason = if word == "expired" { "clock" } else { "tunnel_tls" };
        let line = w.log_line(1, &fake.name, |l| l["dst.workload"] == *fake.name && l["reason"] == reason);
        assert!(line["error"].as_str().unwrap().contains(word), "{word} in {line}");
    }
}

#[test]
fn what_is_sent_before_the_answer_reaches_nobody_when_the_answer_is_no() {
    static RECEIVED: std::sync::Mutex<Vec<u8>> = std::sync::Mutex::new(Vec::new());
    let mut w = world();
    let to = server(&w);
    for port in [7001, 7002] {
        apps::serve(&to.netns, port, |mut stream| {
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            RECEIVED.lock().unwrap().extend(all);
        });
    }
    w.mesh.policy("no-7001", "Namespace", "Deny", json!({"destinationPorts": [7001]}));
    w.start();
    let cert = certs::good(&w.ca(), &w.dir, "peer");
    let early = |port: u16, text: &str| {
        let headers = json!([[":method", "CONNECT"], [":authority", format!("{}:{port}", to.v4)]]);
        json!({"headers": headers, "early": text, "send": " and late"})
    };
    let requests = [early(7001, "smuggled"), early(7002, "early")];
    let answer = raw(&w, "peer", &to, &w.ca(), Some(&cert), &requests);
    assert_eq!(
        (&answer["results"][0]["status"], &answer["results"][1]["status"]),
        (&json!(401), &json!(200)),
        "{answer}"
    );
    eventually("the allowed stream arrives", || !RECEIVED.lock().unwrap().is_empty());
    assert_eq!(RECEIVED.lock().unwrap().as_slice(), b"early and late");
}

#[test]
fn peers_that_cannot_prove_who_they_are_are_not_talked_to() {
    let mut w = world();
    w.start();
    let to = server(&w);
    let other_ca = w.dir.join("other-ca");
    let made =
        std::process::Command::new(crate::world::subject()).args(["ca", "init"]).arg(&other_ca).status().unwrap();
    assert!(made.success());
    let (ca, dir) = (w.ca(), w.dir.clone());
    let me = spiffe("peer");
    let evil = me.replace("cluster.local", "evil.local");
    let two = [me.as_str(), "spiffe://cluster.local/ns/ns/sa/server"];
    let bad = [
        ("no certificate", None),
        ("another CA", Some(certs::good(&other_ca, &dir, "b"))),
        ("another trust domain", Some(certs::leaf(&ca, &dir, "c", &[&evil], -60, 600))),
        ("two identities", Some(certs::leaf(&ca, &dir, "d", &two, -60, 600))),
        ("expired", Some(certs::leaf(&ca, &dir, "e", &[&me], -600, -60))),
        ("not yet valid", Some(certs::leaf(&ca, &dir, "f", &[&me], 600, 1200))),
        ("no identity", Some(certs::leaf(&ca, &dir, "g", &[], -60, 600))),
        ("upper case", Some(certs::leaf(&ca, &dir, "h", &["spiffe://cluster.local/ns/ns/sa/Peer"], -60, 600))),
        ("trailing slash", Some(certs::leaf(&ca, &dir, "i", &[&format!("{me}/")], -60, 600))),
        ("another path", Some(certs::leaf(&ca, &dir, "j", &["spiffe://cluster.local/peer"], -60, 600))),
    ];
    let request = [connect_to(&format!("{}:8080", to.v4))];
    let (mut by_clock, mut others) = (0.0, 0.0);
    for (what, cert) in &bad {
        let answer = raw(&w, "peer", &to, &ca, cert.as_ref(), &request);
        assert_ne!(answer["tls"], "ok", "{what}: {answer}");
        *(if ["expired", "not yet valid"].contains(what) { &mut by_clock } else { &mut others }) += 1.0;
        eventually(what, || {
            w.metric(2, "culvert_connection_failures_total", &["reason=\"peer_tls\""]) == others
                && w.metric(2, "culvert_connection_failures_total", &["reason=\"clock\""]) == by_clock
        });
    }
    let line = w.log_line(2, "the clocks", |l| l["reason"] == "clock");
    assert!(line["error"].as_str().unwrap().contains("one of the two clocks is off"), "{line}");
    let said = crate::doctor::doctor(&w, 2);
    assert!(
        said.contains(
            "2 handshakes have failed because a certificate was not valid by the clock of one of the two nodes"
        ),
        "{said}"
    );
    let good = certs::good(&ca, &dir, "peer");
    let answer = raw(&w, "peer", &to, &ca, Some(&good), &request);
    assert_eq!(answer["results"][0]["status"], 200, "{answer}");
}

#[test]
fn a_destination_that_is_somebody_else_gets_nothing() {
    let mut w = world();
    let client = w.mesh_pod("client", 1);
    w.start();
    // On node 1 only, the facts name another workload than the one that is there.
    let mut mesh = w.mesh.clone();
    mesh.of("server")["serviceAccount"] = json!("impostor");
    crate::world::replace(&w.mesh_file(1), &mesh.json());
    eventually("node 1 has the new facts", || w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    assert!(ask(&client.netns, (server(&w).v4, 8080), "x").is_err());
    let line = w.log_line(1, "refused", |l| l["direction"] == "outbound" && l["reason"] == "tunnel_tls");
    let error = line["error"].as_str().unwrap();
    assert!(
        error.contains("sa/server") && error.contains("sa/impostor"),
        "names whom it met and whom it expected: {error}"
    );
}

#[test]
fn a_destination_may_be_whom_the_service_names_besides_and_the_log_says_who_it_was() {
    let mut w = world();
    let client = w.mesh_pod("client", 1);
    let to = server(&w);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&to]);
    w.mesh.services[0]["subjectAltNames"] = json!([spiffe("server")]);
    w.start();
    let mut mesh = w.mesh.clone();
    mesh.of("server")["serviceAccount"] = json!("renamed");
    crate::world::replace(&w.mesh_file(1), &mesh.json());
    eventually("node 1 has the new facts", || w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    assert!(ask(&client.netns, (vip, 80), "x").is_ok());
    let line = w.log_line(1, "outbound", |l| l["message"] == "connection complete" && l["direction"] == "outbound");
    assert_eq!(line["dst.identity"], spiffe("server"), "who it has proven to be, not who it was expected to be");
    assert!(ask(&client.netns, (to.v4, 8080), "x").is_err(), "addressed directly, nobody else is accepted");
    let line = w.log_line(1, "refused", |l| l["reason"] == "tunnel_tls");
    assert_eq!(line.get("dst.identity"), None, "nobody has proven anything: {line}");
}

#[test]
fn a_peer_that_says_nothing_is_dropped_and_others_go_on() {
    let mut w = world();
    let client = w.mesh_pod("client", 1);
    w.start();
    let to = server(&w);
    let mut silent: Vec<_> = (0..50).map(|_| connect(&w.ns("peer"), (to.v4, 15008)).unwrap()).collect();
    assert!(ask(&client.netns, (to.v4, 8080), "x").is_ok());
    for stream in &mut silent {
        // Closed or reset by the handshake deadline. If it were not, PATIENCE would show as a timeout.
        let ended = stream.read(&mut [0]);
        assert!(!matches!(&ended, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock), "{ended:?}");
    }
    let deadline = ["reason=\"peer_silent\""];
    eventually("all are counted", || w.metric(2, "culvert_connection_failures_total", &deadline) == 50.0);
}
