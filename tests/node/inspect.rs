//! The commands with which people look at daemons: of a cluster, through port-forwards of the Kubernetes API, and of
//! this machine.

use crate::world::forward::Forward;
use crate::world::kube::Api;
use crate::world::{Pod, World, apps, connect, eventually, inside, subject};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::process::Command;

/// Two nodes with daemons, a client on the first one and a server on the second one, and an API server that knows both
/// daemons.
struct Cluster {
    w: World,
    api: Api,
    client: Pod,
    server: Pod,
}

fn running() -> Value {
    json!({"phase": "Running"})
}

impl Cluster {
    fn new() -> Self {
        let mut w = World::new();
        let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
        apps::serve(&server.netns, 8080, apps::echo);
        w.start();
        let api = Api::start(&w, 1);
        for node in [1, 2] {
            api.daemon(node, running(), Forward::To(w.ns(&format!("n{node}"))));
        }
        Self { w, api, client, server }
    }

    /// Runs a command as on a laptop: with the kubeconfig alone, in the network from which the API server is reached.
    fn run(&self, arguments: &[&str]) -> Said {
        let mut command = Command::new(subject());
        command.args(arguments).env_clear().env("KUBECONFIG", &self.api.kubeconfig);
        said(inside(&self.w.ns("n1"), || command.output()).unwrap())
    }
}

/// What a command printed, and its exit code.
#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    error: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    fn has(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{}{}", self.out, self.error);
        for part in parts {
            assert!(
                self.out.contains(part) || self.error.contains(part),
                "{part:?} is not in\n{}{}",
                self.out,
                self.error
            );
        }
    }
}

fn said(output: std::process::Output) -> Said {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), error: text(output.stderr) }
}

/// A command on a node, without a kubeconfig.
fn on_node(w: &World, node: u8, arguments: &[&str]) -> Said {
    let mut command = Command::new(subject());
    command.args(arguments).env_clear();
    said(inside(&w.ns(&format!("n{node}")), || command.output()).unwrap())
}

#[test]
fn status_shows_all_nodes_and_names_those_that_do_not_answer() {
    let c = Cluster::new();
    let green = c.run(&["status"]);
    green.has(0, &["NODE", "n1 ", "n2 ", "1/1", "green: 2 nodes"]);
    assert!(!green.out.contains('\u{1b}'), "no colours where it is no terminal: {}", green.out);
    let shape = c.run(&["status", "--json", "--node", "n2"]).json();
    assert_eq!(shape["green"], true);
    let nodes = shape["nodes"].as_array().unwrap();
    assert_eq!((nodes.len(), &nodes[0]["node"], &nodes[0]["pod"]), (1, &json!("n2"), &json!("istio-system/ztunnel-2")));
    let status = &nodes[0]["status"];
    assert_eq!(
        (&status["ready"], &status["pods"]["captured"], &status["pods"]["total"]),
        (&json!(true), &json!(1), &json!(1))
    );
    assert!(status["certificates"]["next"]["secondsLeft"].as_u64().unwrap() > 3600, "{status:#}");

    // Another pod with the label is named and not asked.
    c.api.impostor(1);
    c.run(&["status"])
        .has(0, &["n1: with the label app=ztunnel, but not controlled", "other/impostor", "green: 2 nodes"]);
    c.run(&["status", "--namespace", "../x"]).has(3, &["is not the name of a namespace"]);

    // Nodes that cannot be asked are named with the reason, and the others are shown.
    c.api.daemon(
        3,
        json!({"phase": "Pending", "containerStatuses": [{"name": "istio-proxy", "image": "", "imageID": "",
        "ready": false, "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}),
        Forward::Refused(500),
    );
    c.api.daemon(4, running(), Forward::Fails("container not running (17)".into()));
    c.api.daemon(5, running(), Forward::Refused(403));
    c.api.daemon(6, running(), Forward::Silent);
    let some = c.run(&["status", "--timeout", "2s"]);
    some.has(
        1,
        &[
            "n1 ",
            "n2 ",
            "red: 4 of 6 nodes",
            "n3: no answer: its daemon istio-system/ztunnel-3 is not running: Pending (ImagePullBackOff)",
            "n4: no answer: port-forward: container not running (17)",
            "n5: no answer: port-forward:",
            "your account needs the right to create pods/portforward",
            "n6: no answer: no answer within 2s",
        ],
    );
    let pods = c.run(&["pods", "--json", "--timeout", "2s"]);
    pods.has(1, &["culvert: n5: no answer: port-forward:"]);
    let nodes = pods.json()["nodes"].clone();
    assert_eq!((&nodes[1]["pods"][0]["name"], &nodes[4]["reached"]), (&json!("server"), &json!(false)), "{nodes:#}");
    c.run(&["status", "--node", "n9"]).has(3, &["n9: no answer: no daemon runs on this node"]);
    c.run(&["status", "--node", "n4", "--json"]).has(3, &["\"reached\": false"]);
    c.run(&["status", "--namespace", "elsewhere"]).has(3, &["there are no daemons: not in elsewhere"]);
    c.api.away(true);
    c.run(&["status", "--timeout", "1s"]).has(3, &["the Kubernetes API"]);
    c.run(&["status", "--kubeconfig", "/nowhere"]).has(3, &["kubeconfig /nowhere"]);
    c.run(&["status", "--wait=soon"]).has(2, &["--wait"]);
}

#[test]
fn status_shows_the_control_plane_where_the_daemons_use_it() {
    let mut w = World::new();
    w.write_pods(1, &[]);
    // It cannot be reached here; what counts is that the daemon says where it has its facts from.
    w.start_node(1, &[("LOCAL_XDS_PATH", ""), ("XDS_ADDRESS", "culvert-control.istio-system.svc:15012")]);
    let api = Api::start(&w, 1);
    api.daemon(1, running(), Forward::To(w.ns("n1")));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(subject());
        command.args(arguments).env_clear().env("KUBECONFIG", &api.kubeconfig);
        said(inside(&w.ns("n1"), || command.output()).unwrap())
    };
    let summary = |said: &str| format!("control plane istio-system/culvert-control: {said} replicas are ready");
    run(&["status"]).has(1, &[&summary("0 of 0"), "0 of 0 replicas are ready: daemons go on with what they know"]);
    for node in [1, 2] {
        api.control(node, true);
    }
    let well = run(&["status"]);
    well.has(1, &[&summary("2 of 2"), "red: 1 of 1 node"]);
    assert!(!well.out.contains("go on with what they know"), "{}", well.out);
    api.control(2, false);
    run(&["status"]).has(1, &[&summary("1 of 2"), "culvert-control-2 on n2 is not ready (Running)"]);
    let shape = run(&["status", "--json"]).json()["controlPlane"].clone();
    assert_eq!(shape["namespace"], "istio-system");
    let ready = |at: usize| shape["replicas"][at]["ready"].clone();
    assert_eq!((ready(0), ready(1), ready(2)), (json!(true), json!(false), Value::Null));
    run(&["doctor", "--cluster"]).has(1, &["control plane\n", "1 of 2 replicas are ready"]);
    // Where facts come from a file, there is none to look for.
    assert!(!Cluster::new().run(&["status"]).out.contains("control plane"));
}

#[test]
fn status_is_red_while_a_pod_is_not_captured_and_waits_until_it_is() {
    let mut c = Cluster::new();
    let late = c.w.add_pod("late", 2);
    c.w.write_pods(2, &[&c.server, &late]);
    eventually("the daemon knows the pod", || c.w.states(2).len() == 2);
    let red = c.run(&["status"]);
    red.has(1, &["n2: 1 of 2 pods are not captured", "n2: ns/late is pending", "red: 1 of 2 nodes"]);
    c.run(&["status", "--node", "n1"]).has(0, &["green: 1 node"]);
    c.run(&["status", "--wait=1s", "--json"]).has(1, &["\"green\": false", "\"pod\": \"ns/late\""]);
    c.run(&["doctor", "--node", "n2"]).has(1, &["n2\n", "FAIL  pod           ns/late is pending"]);
    let waited = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| c.run(&["status", "--wait=60s"]));
        c.api.change_state(|state| state.requests.clear());
        eventually("it looks", || !c.api.state().requests.is_empty());
        let mut mesh = c.w.mesh.clone();
        mesh.workload(&late, "HBONE");
        for node in [1, 2] {
            crate::world::replace(&c.w.mesh_file(node), &mesh.json());
        }
        waiting.join().unwrap()
    });
    waited.has(0, &["2/2", "green: 2 nodes"]);
    c.run(&["doctor", "--cluster"]).has(0, &["ok    pods          2 of 2 are captured", "ok    clock"]);
    c.run(&["pods"]).has(0, &["node n1\n", "ns/client", "node n2\n", "ns/late"]);
}

#[test]
fn connections_flows_and_logs_of_all_nodes_name_both_ends_and_why_one_was_refused() {
    let mut c = Cluster::new();
    c.w.mesh.policy("closed", "Namespace", "Deny", json!({"destinationPorts": [9999]}));
    c.w.write_mesh();
    let mut open = connect(&c.client.netns, (c.server.v4, 8080)).unwrap();
    open.write_all(b"hello\n").unwrap();
    open.read_exact(&mut [0; 6]).unwrap();
    let to_server = format!("{}:8080", c.server.v4);
    let shown = c.run(&["connections"]);
    shown.has(
        0,
        &[
            "n1 ",
            "n2 ",
            "ns/client  to ",
            "ns/server  from",
            &to_server,
            "cluster.local/ns/ns/sa/server",
            "X25519MLKEM768",
        ],
    );
    assert!(!shown.out.contains("PLAINTEXT"), "{}", shown.out);
    let one = c.run(&["connections", "--pod", "ns/server", "--json"]).json();
    let counts: Vec<usize> =
        one["nodes"].as_array().unwrap().iter().map(|node| node["connections"].as_array().unwrap().len()).collect();
    assert_eq!(counts, [0, 1], "{one:#}");
    let top = c.run(&["top", "--json", "--interval", "100ms"]).json();
    let flow = top["flows"].as_array().unwrap().iter().find(|flow| flow["pod"] == "ns/client").unwrap();
    assert_eq!(
        (&flow["connections"], &flow["farIdentity"]),
        (&json!(1), &json!("cluster.local/ns/ns/sa/server")),
        "{top:#}"
    );
    assert_eq!((&flow["bytesSent"], &flow["bytesReceived"]), (&json!(6), &json!(6)));
    c.run(&["top", "--interval", "100ms", "--sort", "connections"])
        .has(0, &["CONNECT p50/p99", "ns/client", "ns/server"]);

    let closed = (c.server.v4, 9999);
    eventually("the policy is in force", || {
        c.w.json(2, "/config_dump")["policies"].as_array().is_some_and(|policies| !policies.is_empty())
    });
    assert!(crate::world::is_reset(&c.client.netns, closed));
    drop(open);
    eventually("both ends have ended", || c.run(&["connections"]).out == "no connection is open\n");
    let refused = c.run(&["connections", "--refused", "--since", "5m"]);
    refused.has(0, &["ns/server  from", "refused: denied", "ns/closed", "denied: A DENY policy matched"]);
    let ended = c.run(&["connections", "--since", "5m", "--pod", "ns/client"]);
    ended.has(0, &["ok", "ns/server", &to_server]);
    c.run(&["status"]).has(0, &["inbound denied on n2: A DENY policy matched"]);
    c.run(&["status", "--plaintext"]).has(0, &["ns/client", "ns/server", "(ever)"]);

    let explained = c.run(&["explain", "--from", "ns/client", "--to", "10.9.9.9:1"]);
    explained.has(3, &["there is no pod ns/client"]);
    let mut pod = crate::world::kube::KubePod::without_sandbox(&c.client);
    c.api.pod(&pod);
    pod.name = "elsewhere".into();
    pod.node = 7;
    c.api.pod(&pod);
    c.run(&["explain", "--from", "ns/client", "--to", &to_server]).has(0, &["from  ns/client", "=> "]);
    c.run(&["explain", "--from", "ns/elsewhere", "--to", &to_server])
        .has(3, &["ns/elsewhere runs on node n7, which has no daemon"]);

    c.api.change_state(|state| drop(state.logs.insert("ztunnel-1".into(), c.w.logs.join("node1.log"))));
    let logs = c.run(&["logs", "ns/client"]);
    logs.has(
        0,
        &[
            "lines about ns/client from the log of istio-system/ztunnel-1 on node n1",
            "connection complete",
            "\"next_step\"",
        ],
    );
    assert!(logs.out.lines().all(|line| line.contains("client")), "{}", logs.out);
    c.run(&["logs", "client"]).has(3, &["is not NAMESPACE/NAME"]);
}

#[test]
fn logs_are_followed_until_the_reader_leaves() {
    let c = Cluster::new();
    c.api.pod(&crate::world::kube::KubePod::without_sandbox(&c.client));
    c.api.change_state(|state| drop(state.logs.insert("ztunnel-1".into(), c.w.logs.join("node1.log"))));
    let mut command = Command::new(subject());
    command.args(["logs", "ns/client", "-f"]).env_clear().env("KUBECONFIG", &c.api.kubeconfig);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let mut following = inside(&c.w.ns("n1"), || command.spawn()).unwrap();
    assert!(crate::world::ask(&c.client.netns, (c.server.v4, 8080), "x").is_ok());
    let mut reader = std::io::BufReader::new(following.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("connection complete") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut reader, &mut line).unwrap() > 0, "it goes on until the line comes");
    }
    following.kill().unwrap();
    following.wait().unwrap();
}

/// The values that appear in no archive: a token, a header, and the key of the CA.
#[test]
fn a_report_has_every_page_of_every_node_and_no_secret() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::echo);
    w.write_mesh();
    for node in [1, 2] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(
            node,
            &[
                ("AUTH_TOKEN", "canary-token"),
                ("XDS_HEADER_AUTHORIZATION", "canary-header"),
                ("CA_HEADER_X", "canary-header"),
            ],
        );
    }
    [1, 2].iter().for_each(|node| w.wait_captured(*node));
    assert!(crate::world::ask(&client.netns, (server.v4, 8080), "canary-payload").is_ok());
    let api = Api::start(&w, 1);
    for node in [1, 2] {
        api.daemon(node, running(), Forward::To(w.ns(&format!("n{node}"))));
    }
    api.daemon(3, running(), Forward::Refused(500));
    let c = Cluster { w, api, client, server };
    let file = c.w.dir.join("report.tar.gz");
    let path = file.display().to_string();
    c.run(&["report", "-o", &path])
        .has(1, &["n1: all pages", "n2: all pages", "n3: 9 of 9 pages are missing: /status: port-forward"]);
    c.run(&["report", "-o", &path]).has(3, &["File exists"]);
    let files = unpacked(&std::fs::read(&file).unwrap());
    for node in ["n1", "n2"] {
        for page in [
            "status.json",
            "pods.json",
            "connections.json",
            "history.json",
            "config_dump.json",
            "kernel.json",
            "metrics.txt",
        ] {
            let name = format!("nodes/{node}/{page}");
            assert!(files.iter().any(|(path, text)| path.ends_with(&name) && !text.is_empty()), "{name}");
        }
    }
    let key = std::fs::read_to_string(c.w.ca().join("ca.key")).unwrap();
    let secret = key.lines().nth(1).unwrap();
    for (path, text) in &files {
        for canary in ["canary", "secret-token", "PRIVATE KEY", secret] {
            assert!(!text.contains(canary), "{path} contains {canary}");
        }
    }
    let here = on_node(&c.w, 1, &["report", "-o", &c.w.dir.join("here.tar.gz").display().to_string()]);
    here.has(0, &["this node: all pages"]);
    let files = unpacked(&std::fs::read(c.w.dir.join("here.tar.gz")).unwrap());
    assert!(
        files.iter().any(|(path, text)| path.ends_with("doctor.txt") && text.contains("the daemon runs and is ready"))
    );
    assert!(files.iter().all(|(_, text)| !text.contains("canary")));
}

fn unpacked(bytes: &[u8]) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    let entry = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let mut entry: tar::Entry<'_, flate2::read::GzDecoder<&[u8]>> = entry.unwrap();
        let (path, mut text) = (entry.path().unwrap().display().to_string(), String::new());
        entry.read_to_string(&mut text).unwrap();
        (path, text)
    };
    archive.entries().unwrap().map(entry).collect()
}

#[test]
fn on_a_node_the_commands_ask_its_daemon_and_say_so_where_there_is_none() {
    let c = Cluster::new();
    on_node(&c.w, 2, &["status"]).has(0, &["1/1", "green: 1 node"]);
    on_node(&c.w, 2, &["status", "--admin", "127.0.0.1:15000"]).has(0, &["green"]);
    on_node(&c.w, 2, &["status", "--admin", "127.0.0.1:1"]).has(3, &["127.0.0.1:1: ", "Connection refused"]);
    on_node(&c.w, 2, &["connections"]).has(0, &["no connection is open"]);
    on_node(&c.w, 2, &["status", "--cluster"]).has(3, &["no kubeconfig can be used", "--admin"]);
    on_node(&c.w, 2, &["logs", "ns/server"]).has(3, &["journalctl"]);
    let folder = c.w.dir.join("bin");
    std::fs::create_dir_all(&folder).unwrap();
    let plugin = folder.join("kubectl-culvert");
    std::os::unix::fs::symlink(subject(), &plugin).unwrap();
    let mut command = Command::new(&plugin);
    command.args(["status", "--help"]).env_clear();
    said(command.output().unwrap()).has(0, &["Usage: kubectl culvert status"]);
    on_node(&c.w, 1, &["completions", "bash"]).has(0, &["complete -F _culvert", "connections"]);
    on_node(&c.w, 1, &["man", "status"]).has(0, &[".TH culvert-status 1", "Wait until everything is green"]);
    on_node(&c.w, 1, &["man", "none"]).has(2, &["there is no command"]);
}
