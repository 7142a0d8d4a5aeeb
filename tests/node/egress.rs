//! Egress policies: which destinations outside the mesh a pod may connect to.

use crate::socks::{address, ask_in, host, request};
use crate::world::names::{RESOLVER, kubernetes_conf};
use crate::world::{
    ControlPlane, Pod, World, apps, ask, connect, eventually, inside, ip_in, is_reset, replace, subject,
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Addresses of a host outside the mesh.
const NAMED: &str = "10.2.0.201";
const OTHER: &str = "10.2.0.202";

/// A client, a server of the mesh, and a host outside the mesh that has two further addresses. `named.example` leads to
/// the first. The daemon's own resolver is the one that the pods have too.
fn world() -> World {
    world_with(&[], &[])
}

/// The same with further settings of the daemons, and with further pods on node 1 that have this resolver.
fn world_with(settings: &[(&str, &str)], more: &[(&str, &str)]) -> World {
    let mut w = World::new();
    for (name, resolver) in more {
        let pod = w.mesh_pod(name, 1);
        w.start_container(&pod, &format!("nameserver {resolver}\n"));
    }
    let (client, _server, outside) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.add_pod("outside", 2));
    ip_in(&outside.netns, &format!("addr add {NAMED}/24 dev eth0\naddr add {OTHER}/24 dev eth0\n"));
    for pod in ["server", "outside"] {
        apps::serve(&w.ns(pod), 80, apps::echo);
    }
    apps::serve(&outside.netns, 443, apps::echo);
    w.start_resolver(&format!("  local-data: \"named.example. 300 IN A {NAMED}\"\n"));
    w.start_container(&client, &kubernetes_conf());
    w.write_mesh();
    let conf = w.dir.join("daemon-resolv.conf");
    std::fs::write(&conf, format!("nameserver {RESOLVER}\n")).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", conf.display());
    let by = ["unshare", "--mount", "--propagation", "private", "sh", "-c", &script, "node"];
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node_by(&by.map(str::to_owned), node, settings);
        w.wait_captured(node);
    }
    w
}

fn pod(w: &World, name: &str) -> Pod {
    w.pods.iter().find(|pod| pod.name == name).unwrap().clone()
}

/// Puts these policies in force on node 1.
fn set(w: &mut World, policies: Value) {
    let applied = |w: &World| w.metric(1, "culvert_mesh_file_applied_total", &[]);
    let before = applied(w);
    w.mesh.egress = policies.as_array().unwrap().clone();
    w.write_mesh();
    eventually("the policies are in force", || applied(w) > before);
}

fn echoes(ns: &str, to: SocketAddr) -> bool {
    ask(ns, to, "hello").is_ok_and(|answer| answer == "hello\n")
}

fn refused(w: &World, to: SocketAddr) -> String {
    let line = w.log_line(1, "the refusal is in the log", |line| {
        line["scope"] == "access" && line["dst.addr"] == to.to_string() && line["reason"] == "egress_denied"
    });
    line["error"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn destinations_outside_the_mesh_are_refused_as_the_policy_of_the_namespace_says() {
    let mut w = world();
    let (client, server, outside) = (pod(&w, "client"), pod(&w, "server"), pod(&w, "outside"));
    let (ns, v4) = (&client.netns, SocketAddr::from((outside.v4, 80)));
    let v6 = SocketAddr::from((outside.v6, 80));
    assert!(echoes(ns, v4) && echoes(ns, v6), "without a policy everything is allowed");
    assert_eq!(w.metric(1, "culvert_egress_decisions_total", &[]), 0.0);

    // First only noted: nothing is refused, and the log says what would be.
    let deny = |dry_run: bool, rules: Value| json!([{"namespace": "ns", "dryRun": dry_run, "default": "Deny", "rules": rules}]);
    set(&mut w, deny(true, json!([])));
    assert!(echoes(ns, v4));
    w.log_line(1, "the dry run is noted", |line| {
        line["scope"] == "egress" && line["message"].as_str().is_some_and(|m| m.contains("would have denied"))
    });
    assert_eq!(w.metric(1, "culvert_egress_decisions_total", &["decision=\"would_deny\""]), 1.0);

    // Then enforced: connections that are open end, new ones are refused, and the mesh is not concerned.
    let mut open = connect(ns, v4).unwrap();
    open.write_all(b"x\n").unwrap();
    open.read_exact(&mut [0; 2]).unwrap();
    set(
        &mut w,
        deny(
            false,
            json!([
                {"action": "Allow", "cidrs": [format!("{}/128", outside.v6)]},
                {"action": "Log", "cidrs": [format!("{OTHER}")], "ports": ["400-500"]},
            ]),
        ),
    );
    open.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let ended = open.read(&mut [0; 1]);
    assert!(ended.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset), "{ended:?}");
    assert!(is_reset(ns, v4));
    let error = refused(&w, v4);
    assert!(error.contains("egress policy of namespace ns default") && error.contains("no DNS name known"), "{error}");
    assert!(echoes(ns, v6), "a rule allows it");
    assert!(echoes(ns, SocketAddr::from((server.v4, 80))), "a destination in the mesh");
    let other: std::net::IpAddr = OTHER.parse().unwrap();
    assert!(is_reset(ns, SocketAddr::new(other, 80)), "a port that the rule does not name");
    assert!(echoes(ns, SocketAddr::new(other, 443)));
    w.log_line(1, "the connection is noted", |line| {
        line["scope"] == "egress" && line["rule"].as_str().is_some_and(|rule| rule.contains("rule[1]"))
    });
    let decided =
        |decision: &str| w.metric(1, "culvert_egress_decisions_total", &[&format!("decision=\"{decision}\"")]);
    assert!(decided("denied") >= 3.0 && decided("allowed") >= 1.0 && decided("logged") >= 1.0);

    // The policy for all other namespaces does not concern this one, and no policy means everything again.
    set(
        &mut w,
        json!([
            {"namespace": "ns", "dryRun": false, "default": "Allow"},
            {"namespace": "*", "dryRun": false, "default": "Deny"},
        ]),
    );
    assert!(echoes(ns, v4));
    set(&mut w, json!([{"namespace": "*", "dryRun": false, "default": "Deny"}]));
    assert!(is_reset(ns, v4));
    set(&mut w, json!([]));
    assert!(echoes(ns, v4));
}

/// Starts a resolver that a pod's owner runs, and that says what its owner wants: `named.example` leads to [`OTHER`].
fn start_liar(w: &mut World) {
    let outside = w.ns("outside");
    let liar = w.dir.join("liar.conf");
    let text = format!(
        "server:\n  interface: {OTHER}\n  access-control: 0.0.0.0/0 allow\n  username: \"\"\n  chroot: \"\"\n  pidfile: \"\"\n  \
         use-syslog: no\n  do-daemonize: no\n  module-config: \"iterator\"\n  local-data: \"named.example. 300 IN A {OTHER}\"\n\
         remote-control:\n  control-enable: no\n"
    );
    std::fs::write(&liar, text).unwrap();
    w.start_in(&outside, std::process::Command::new("/usr/sbin/unbound").arg("-d").arg("-c").arg(&liar), "liar.log");
}

#[test]
fn a_host_rule_needs_an_answer_of_the_nodes_own_resolver() {
    let mut w = world();
    let client = pod(&w, "client");
    let named = SocketAddr::new(NAMED.parse().unwrap(), 80);
    start_liar(&mut w);
    set(
        &mut w,
        json!([{"namespace": "ns", "dryRun": false, "default": "Deny", "rules": [
            {"action": "Allow", "ports": [80], "hosts": ["*.example"]},
            {"action": "Allow", "ports": [53]},
        ]}]),
    );
    let (ns, dig) = (&client.netns, |w: &World, args: &[&str]| {
        w.run_in(&client, &[&["dig", "+short", "+time=8", "+tries=1"], args].concat())
    });
    assert!(is_reset(ns, named), "nobody has asked for the name yet");
    let at = format!("@{OTHER}");
    eventually("the other resolver answers", || dig(&w, &[&at, "named.example"]).trim() == OTHER);
    assert!(is_reset(ns, SocketAddr::new(OTHER.parse().unwrap(), 80)), "its answers prove nothing");
    assert_eq!(dig(&w, &["named.example"]).trim(), NAMED);
    assert!(echoes(ns, named));
    assert!(is_reset(ns, SocketAddr::new(NAMED.parse().unwrap(), 443)), "the name for another port");
    let error = refused(&w, SocketAddr::new(NAMED.parse().unwrap(), 443));
    assert!(error.contains("(named.example)"), "the refusal names what is known: {error}");
}

#[test]
fn a_name_that_is_given_by_socks_counts_if_the_nodes_own_resolver_says_where_it_leads() {
    let mut w = world_with(&[("UNSTABLE_ENABLE_SOCKS5", "true")], &[("believer", OTHER)]);
    start_liar(&mut w);
    let rules = json!([{"action": "Allow", "ports": [80], "hosts": ["*.example"]}]);
    set(&mut w, json!([{"namespace": "ns", "dryRun": false, "default": "Deny", "rules": rules}]));
    let (client, believer) = (w.ns("client"), w.ns("believer"));
    let named: std::net::IpAddr = NAMED.parse().unwrap();
    let by_name = |ns: &str, name: &str, port: u16| {
        let (code, mut stream) = ask_in(ns, "127.0.0.1", &request(&host(name), port));
        let mut echoes = || {
            stream.write_all(b"x\n")?;
            stream.read_exact(&mut [0; 2])
        };
        (code, code == 0 && echoes().is_ok())
    };
    let by_address = || ask_in(&client, "127.0.0.1", &request(&address(named), 80)).0;
    let explained = |to: &str| {
        let mut command = std::process::Command::new(subject());
        command.args(["explain", "--from", "ns/client", "--to", to]);
        String::from_utf8(inside(&w.ns("n1"), || command.output()).unwrap().stdout).unwrap()
    };
    assert_eq!(by_address(), 2, "nobody has asked for the name yet");
    // An explanation counts the name, but opens nothing.
    for _ in 0..2 {
        let text = explained("named.example:80");
        assert!(text.contains("Allow by the egress policy of namespace ns rule[0]"), "{text}");
    }
    assert!(explained(&format!("{NAMED}:80")).contains("reason egress_denied"));
    assert_eq!(by_address(), 2);
    for name in ["named.example", "NAMED.example."] {
        assert_eq!(by_name(&client, name, 80), (0, true), "{name}");
    }
    assert_eq!(by_name(&client, "named.example", 443).0, 2, "the name for another port");
    assert_eq!(by_address(), 0, "as after a question of the pod");
    // Only the pod names this resolver, so its answer proves nothing, whether it is cached or not.
    for _ in 0..2 {
        assert_eq!(by_name(&believer, "named.example", 80).0, 2);
    }
    let error = refused(&w, SocketAddr::new(OTHER.parse().unwrap(), 80));
    assert!(error.contains("no DNS name known"), "{error}");
}

#[test]
fn what_leaves_a_pod_outside_of_tunnels_is_counted() {
    let w = world();
    let (client, outside) = (pod(&w, "client"), pod(&w, "outside"));
    let counts = || {
        let pods = w.json(1, "/pods");
        (pods[0]["untunnelledUdp"].as_u64().unwrap(), pods[0]["untunnelledOther"].as_u64().unwrap())
    };
    assert!(echoes(&client.netns, SocketAddr::from((outside.v4, 80))));
    w.run_in(&client, &["dig", "named.example"]);
    assert_eq!(counts(), (0, 0), "TCP and DNS");
    inside(&client.netns, || {
        for to in [SocketAddr::from((outside.v4, 9)), SocketAddr::from((outside.v6, 9))] {
            let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            std::net::UdpSocket::bind(from).unwrap().send_to(b"x", to).unwrap();
        }
        // A protocol number for experiments (RFC 3692).
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(253))).unwrap();
        raw.send_to(b"x", &SocketAddr::from((outside.v4, 0)).into()).unwrap();
        // Within the pod nothing leaves.
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", "127.0.0.1:9").unwrap();
    });
    eventually("they are counted", || counts() == (2, 1));
}

/// The first node takes its facts from a control plane, and its egress policies from a file.
fn world_with_control_plane(policies: &Value) -> (World, ControlPlane, PathBuf) {
    let mut w = World::new();
    let (_client, server, outside) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.add_pod("outside", 2));
    apps::serve(&server.netns, 80, apps::echo);
    apps::serve(&outside.netns, 80, apps::echo);
    apps::serve(&outside.netns, 443, apps::echo);
    let plane = ControlPlane::start(&w.ns("n1"), &w.dir);
    plane.set(&w.mesh);
    w.write_mesh();
    let file = w.dir.join("egress.yaml");
    replace(&file, &policies.to_string());
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
    }
    let mut settings = World::facts_from(&plane);
    settings.push(("CULVERT_EGRESS_FILE".into(), file.display().to_string()));
    settings.push(("CLUSTER_ID".into(), "c1".into()));
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (&**name, &**value)).collect();
    w.start_node(1, &settings);
    w.start_node(2, &[]);
    for node in [1, 2] {
        w.wait_captured(node);
    }
    (w, plane, file)
}

#[test]
fn policies_beside_a_control_plane_come_from_a_file_of_their_own() {
    let policies = |dry_run: bool, rules: Value| json!({"egress": [{"namespace": "ns", "dryRun": dry_run, "default": "Deny", "rules": rules}]});
    let (mut w, plane, file) = world_with_control_plane(&policies(false, json!([{"action": "Allow", "ports": [443]}])));
    let (client, server, outside) = (pod(&w, "client"), pod(&w, "server"), pod(&w, "outside"));
    let (ns, v4) = (client.netns.clone(), SocketAddr::from((outside.v4, 80)));
    let in_mesh = SocketAddr::from((server.v4, 80));
    assert!(is_reset(&ns, v4), "in force from the first connection");
    assert!(refused(&w, v4).contains("egress policy of namespace ns default"));
    assert!(echoes(&ns, SocketAddr::from((outside.v4, 443))), "a rule allows it");
    assert!(echoes(&ns, in_mesh), "a destination in the mesh");

    // What the control plane announces, and when it comes back, changes nothing about these policies.
    w.mesh.of("server")["canonicalRevision"] = json!("v2");
    plane.set(&w.mesh);
    plane.cut();
    eventually("the change is known", || w.json(1, "/config_dump")["workloads"].to_string().contains("v2"));
    assert!(is_reset(&ns, v4));

    // A new version applies to open connections too.
    let change = |w: &World, text: &str, metric: &str| {
        let before = w.metric(1, metric, &[]);
        replace(&file, text);
        eventually("the file is read", || w.metric(1, metric, &[]) > before);
    };
    let (applied, stale) = ("culvert_egress_file_applied_total", "culvert_egress_file_stale");
    change(&w, &policies(true, json!([])).to_string(), applied);
    assert!(echoes(&ns, v4), "a dry run");
    w.log_line(1, "the dry run is noted", |line| {
        line["scope"] == "egress" && line["message"].as_str().is_some_and(|m| m.contains("would have denied"))
    });
    let mut open = connect(&ns, v4).unwrap();
    open.write_all(b"x\n").unwrap();
    open.read_exact(&mut [0; 2]).unwrap();
    let rules = json!([{"action": "Log", "ports": [443]}, {"action": "Deny", "ports": [80]}]);
    change(&w, &policies(false, rules).to_string(), applied);
    open.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(open.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
    assert!(is_reset(&ns, v4) && echoes(&ns, SocketAddr::from((outside.v4, 443))));
    w.log_line(1, "a connection is noted", |line| {
        line["scope"] == "egress" && line["rule"].as_str().is_some_and(|rule| rule.contains("rule[0]"))
    });
    assert!(w.json(1, "/config_dump")["egressFileError"].is_null());

    // A version with a fault, and a file that is gone, leave the last good version in force, and say so.
    for (text, word) in
        [("egress: [{namespace: ns}]", "missing field"), ("egres: []", "egres"), ("", "the file is empty")]
    {
        change(&w, text, "culvert_egress_file_refused_total");
        let error = w.json(1, "/config_dump")["egressFileError"].as_str().unwrap_or_default().to_owned();
        assert!(error.starts_with("egress file ") && error.contains(word), "{text}: {error}");
        w.log_line(1, word, |line| {
            line["message"] == "egress file refused; the previous egress policies stay in force"
                && line["error"].as_str().is_some_and(|error| error.contains(word))
        });
        assert_eq!(w.metric(1, stale, &[]), 1.0);
        assert!(is_reset(&ns, v4) && echoes(&ns, in_mesh), "{text}");
    }
    let before = w.metric(1, "culvert_egress_file_refused_total", &[]);
    std::fs::remove_file(&file).unwrap();
    eventually("it is noticed", || w.metric(1, "culvert_egress_file_refused_total", &[]) > before);
    assert!(w.json(1, "/config_dump")["egressFileError"].as_str().unwrap_or_default().contains("No such file"));
    assert!(is_reset(&ns, v4));
    change(&w, "egress: []", applied);
    assert!(echoes(&ns, v4) && w.metric(1, stale, &[]) == 0.0);
}

#[test]
fn without_a_valid_egress_file_nothing_starts() {
    let w = World::new();
    let file = w.dir.join("egress.yaml");
    let run = |command: &str, mesh: &str| {
        let mut run = std::process::Command::new(subject());
        run.arg(command).env_clear().env("CULVERT_EGRESS_FILE", &file).env("LOCAL_XDS_PATH", mesh);
        run.env("XDS_ADDRESS", if mesh.is_empty() { "https://127.0.0.1:1" } else { "" });
        let output =
            run.env("CULVERT_CA_DIR", w.ca()).env("CULVERT_PODS", "kubernetes").env("NODE_NAME", "n1").output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    for command in ["node", "check"] {
        let _ = std::fs::remove_file(&file);
        let (code, said) = run(command, "");
        assert!(code == Some(2) && said.contains("egress.yaml: No such file"), "{command}: {code:?} {said}");
        std::fs::write(&file, "egress: [{namespace: ns, dryRun: false, default: Forbid}]").unwrap();
        let (code, said) = run(command, "");
        assert!(code == Some(2) && said.contains("egress file ") && said.contains("Forbid"), "{command}: {said}");
        std::fs::write(&file, "egress: []").unwrap();
        let (code, said) = run(command, "/nonexistent");
        assert!(code == Some(2) && said.contains("CULVERT_EGRESS_FILE (--egress-file): is set together"), "{said}");
    }
    let (code, said) = run("check", "");
    assert!(code == Some(0) && said.contains(&format!("egress policies from {}", file.display())), "{said}");
}
