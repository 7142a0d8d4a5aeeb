//! Settings and files: every fault is reported by name, and nothing is applied in part.

use crate::world::{World, apps, ask, eventually, replace, subject};
use std::process::{Command, Output};

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(subject()).args(args).env_clear().envs(env.iter().copied()).output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_fault_of_a_configuration_is_reported_at_once_with_exit_code_2() {
    let env = [
        ("KEEPALIVE_TIME", "soon"),
        ("IPV6_ENABLED", "yes"),
        ("PACKET_MARK", "0"),
        ("HTTP2_FRAME_SIZE", "1"),
        ("CULVERT_CA_DIR", "/nonexistent"),
        ("XDS_ADDRESS", "http://istiod:15010"),
        ("ENABLE_PROXY", "false"),
    ];
    for command in ["node", "check"] {
        let output = run(&[command], &env);
        assert_eq!(output.status.code(), Some(2), "{command}");
        let text = errors(&output);
        for name in [
            "KEEPALIVE_TIME (--keepalive-time): \"soon\"",
            "IPV6_ENABLED (--ipv6): \"yes\"",
            "PACKET_MARK (--packet-mark): \"0\"",
            "HTTP2_FRAME_SIZE (--frame-size): \"1\"",
            "XDS_ADDRESS (--xds-address): \"http://istiod:15010\"",
            "ENABLE_PROXY: \"false\" is not supported",
        ] {
            assert!(text.contains(name), "{command}: {name} in\n{text}");
        }
        assert!(text.lines().all(|line| line.starts_with("culvert: ")), "{text}");
    }
    assert_eq!(run(&["proxy", "something"], &[]).status.code(), Some(2));
    assert_eq!(run(&["fly"], &[]).status.code(), Some(2));
}

#[test]
fn the_allocator_reads_its_settings() {
    // It finds them by the name of a symbol, which a linker may leave out.
    let output = run(&["version"], &[("_RJEM_MALLOC_CONF", "confirm_conf:true")]);
    let said = errors(&output);
    for setting in ["narenas_ratio:1", "dirty_decay_ms:1000", "muzzy_decay_ms:0"] {
        assert!(said.contains(&format!("Set conf value: {setting}\n")), "{setting}: {said}");
    }
}

#[test]
fn check_names_what_is_wrong_with_each_file_and_starts_nothing() {
    let w = World::new();
    let (mesh, pods) = (w.dir.join("mesh.yaml"), w.dir.join("pods.yaml"));
    let ca = w.ca();
    let check = |ca: &str| {
        let env = [
            ("LOCAL_XDS_PATH", mesh.to_str().unwrap()),
            ("CULVERT_PODS_FILE", pods.to_str().unwrap()),
            ("CULVERT_CA_DIR", ca),
        ];
        run(&["check"], &env)
    };
    std::fs::write(&mesh, "workloads:\n- namespace: a\n  name: b\n  workloadIps: [10.0.0.1]\n  servces: {}\n").unwrap();
    std::fs::write(&pods, "pods:\n- {name: a, namespace: b, serviceAccount: c, uid: u, netns: /x}\n- {name: d, namespace: b, serviceAccount: c, uid: u, netns: /y}\n").unwrap();
    let output = check("/nonexistent");
    assert_eq!(output.status.code(), Some(2));
    let text = errors(&output);
    for word in [
        "mesh.yaml",
        "line 5",
        "servces",
        "pods.yaml",
        "has the same uid u as pod b/a",
        "/nonexistent/ca.key",
        "culvert ca init",
    ] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
    assert_eq!(text.lines().count(), 3, "one line each:\n{text}");
    std::fs::write(&mesh, "policies:\n- {name: no-a, namespace: b, scope: Global, action: Deny, dryRun: false, rules: [[[principals: [{Exact: x/ns/b/sa/A}]]]]}\n").unwrap();
    std::fs::write(&pods, "pods: []\n").unwrap();
    let output = check(ca.to_str().unwrap());
    assert_eq!(output.status.code(), Some(2));
    let text = errors(&output);
    assert!(text.contains("policy b/no-a: rule[0]: principal \"x/ns/b/sa/A\" never matches"), "{text}");
    std::fs::write(&mesh, "workloads: []\n").unwrap();
    let output = check(ca.to_str().unwrap());
    assert!(output.status.success(), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("ok: "));
}

#[test]
fn a_bad_new_version_of_a_file_keeps_the_old_one_and_says_why() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    w.start();
    let good = w.mesh.json();
    let refused = |n: f64| eventually("refused", || w.metric(1, "culvert_mesh_file_refused_total", &[]) == n);
    for (n, bad, word) in [
        (1.0, good.replace("\"protocol\"", "\"protocoll\""), "protocoll"),
        (2.0, good.replace("HBONE", "QUIC"), "QUIC"),
        (3.0, good[..good.len() / 2].to_owned(), "line"),
    ] {
        replace(&w.mesh_file(1), &bad);
        refused(n);
        w.log_line(1, word, |l| {
            l["message"] == "mesh file refused; the previous mesh facts stay in force"
                && l["error"].as_str().unwrap().contains(word)
        });
        assert_eq!(w.metric(1, "culvert_mesh_file_stale", &[]), 1.0);
        assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok(), "the old facts are in force");
    }
    replace(&w.mesh_file(1), &good);
    eventually("good again", || w.metric(1, "culvert_mesh_file_stale", &[]) == 0.0);

    replace(&w.pods_file(1), "pods: [{name: client}]");
    let line = w.log_line(1, "pods file refused", |l| l["message"] == "pods file refused; the previous pods stay");
    assert!(line["error"].as_str().unwrap().contains("line 1"), "{line}");
    assert_eq!(w.state(1, "client").0, "captured");
    std::fs::remove_file(w.mesh_file(1)).unwrap();
    refused(4.0);
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_ok(), "a file that is gone takes nothing with it");
}

#[test]
fn a_second_daemon_on_the_same_ports_says_so() {
    let mut w = World::new();
    w.mesh_pod("client", 1);
    w.start();
    let ns = w.ns("n1");
    let output = Command::new("ip")
        .args(["netns", "exec", &ns])
        .arg(subject())
        .args(["proxy", "ztunnel"])
        .env("LOCAL_XDS_PATH", w.mesh_file(1))
        .env("CLUSTER_ID", "c1")
        .env("CULVERT_PODS_FILE", w.pods_file(1))
        .env("CULVERT_CA_DIR", w.ca())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("cannot listen on 127.0.0.1:15000"), "{}", errors(&output));
}

#[test]
fn without_nft_the_pod_is_named_with_what_to_install() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    w.write_mesh();
    w.write_pods(1, &[&client]);
    w.start_node(1, &[("PATH", "/nonexistent")]);
    eventually("the reason names nft", || {
        let (state, reason) = w.state(1, "client");
        state == "failed" && reason.contains("cannot run nft") && reason.contains("install nftables")
    });
}

#[test]
fn without_the_right_to_it_each_pod_is_named_with_the_capability_that_is_missing() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    w.write_mesh();
    w.write_pods(1, &[&client]);
    let log = w.dir.join("weak.log");
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(subject()).arg("node");
    command
        .env("LOCAL_XDS_PATH", w.mesh_file(1))
        .env("CLUSTER_ID", "c1")
        .env("CULVERT_PODS_FILE", w.pods_file(1))
        .env("CULVERT_CA_DIR", w.ca());
    let _weak = crate::world::Process::start(&w.ns("n1"), &mut command, &log);
    eventually("the reason names the capability", || {
        let pods = w.try_get(1, 15000, "/pods").map(|(_, body)| body).unwrap_or_default();
        pods.contains("failed") && pods.contains("CAP_NET_ADMIN")
    });
}

#[test]
fn a_daemon_starts_where_its_own_namespace_has_no_ipv6() {
    let mut w = World::new();
    for interface in ["lo", "all"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        crate::world::inside(&w.ns("n1"), || std::fs::write(path, "1").unwrap());
    }
    w.write_mesh();
    w.write_pods(1, &[]);
    w.start_node(1, &[]);
    eventually("the node is ready", || w.is_ready(1));
}
