//! A real Prometheus scrapes daemons that carry traffic. The queries of Istio's ztunnel and mesh dashboards and of Kiali's
//! graph, our own dashboard and our alerting rules are asked of it. promtool reads the metrics.

use crate::istio::Istio;
use crate::world::names::{answer, ask as ask_dns, question};
use crate::world::{
    World, alive, apps, ask, certs, connect, eventually, http, inside, output_in, peer_script, python_env, replace,
};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A Prometheus in the namespace of the first node, which scrapes both nodes each second.
struct Prometheus<'a> {
    w: &'a World,
}

impl Prometheus<'_> {
    const PORT: u16 = 9090;

    fn config(w: &World) -> PathBuf {
        // The labels that Prometheus' Kubernetes service discovery gives to the targets of Istio's sample configuration.
        let target = |node: u8| {
            json!({"targets": [format!("172.30.0.{node}:15020")],
                "labels": {"pod": format!("ztunnel-{node}"), "app": "ztunnel", "namespace": "istio-system"}})
        };
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [root().join("daemonset/chart/monitoring/alerts.yaml")],
            "scrape_configs": [{"job_name": "culvert", "static_configs": [target(1), target(2)]}],
        });
        let path = w.dir.join("prometheus.yml");
        replace(&path, &config.to_string());
        path
    }

    fn api(&self, path: &str, arguments: &[(&str, &str)]) -> Value {
        let mut curl = vec!["-sG".to_owned(), "--max-time".into(), "10".into()];
        for (name, value) in arguments {
            curl.extend(["--data-urlencode".to_owned(), format!("{name}={value}")]);
        }
        curl.push(format!("http://127.0.0.1:{}/api/v1/{path}", Self::PORT));
        let curl: Vec<&str> = curl.iter().map(String::as_str).collect();
        let answer: Value = serde_json::from_str(&output_in(&self.w.ns("n1"), "curl", &curl)).unwrap();
        assert_eq!(answer["status"], "success", "{path} {arguments:?}: {answer}");
        answer["data"].clone()
    }

    /// The series of a query's answer.
    fn ask(&self, query: &str) -> Vec<Value> {
        self.api("query", &[("query", query)])["result"].as_array().unwrap().clone()
    }
}

/// What Istio's ztunnel dashboard asks of ztunnel, and its mesh dashboard of TCP workloads. Container metrics, which are the
/// kubelet's, are left out.
const ISTIO: [&str; 10] = [
    r#"sum by (tag) (istio_build{component="ztunnel"})"#,
    r#"sum by (pod) (rate(istio_tcp_connections_opened_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (rate(istio_tcp_connections_closed_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (rate(istio_tcp_sent_bytes_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (rate(istio_tcp_received_bytes_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (rate(istio_dns_requests_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (rate(istio_xds_connection_terminations_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (url) (irate(istio_xds_message_total{pod=~"ztunnel-.*"}[1m]))"#,
    r#"sum by (pod) (workload_manager_active_proxy_count{pod=~"ztunnel-.*"})"#,
    r#"sum by (pod) (workload_manager_pending_proxy_count{pod=~"ztunnel-.*"})"#,
];

/// The labels by which Kiali builds the edges of its graph. It skips a series that lacks one.
const EDGE: [&str; 14] = [
    "source_cluster",
    "source_workload_namespace",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "destination_cluster",
    "destination_service_namespace",
    "destination_service",
    "destination_service_name",
    "destination_workload_namespace",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "response_flags",
];

/// What Kiali adds to them for the lock on an edge.
const SECURITY: [&str; 3] = ["source_principal", "destination_principal", "connection_security_policy"];

#[test]
fn dashboards_of_istio_kiali_and_our_own_find_what_they_ask_for() {
    let mut istio = Istio::new();
    let server = istio.pod("server");
    istio.w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    istio.tell();
    let resolver = istio.w.start_scripted(51, |asked| vec![answer(asked, [9, 9, 9, 9])]);
    istio.start();
    let config = Prometheus::config(&istio.w);
    let mut program = Command::new("prometheus");
    let data = istio.w.dir.join("prometheus");
    program.arg(format!("--config.file={}", config.display())).arg(format!("--storage.tsdb.path={}", data.display()));
    program.arg(format!("--web.listen-address=127.0.0.1:{}", Prometheus::PORT));
    program.arg("--enable-feature=exemplar-storage");
    let node = istio.w.ns("n1");
    istio.w.start_in(&node, &mut program, "prometheus.log");
    let client = istio.w.ns("client");
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    let traffic = || {
        ask(&client, (vip, 80), "hello").unwrap();
        inside(&client, || ask_dns(&question("elsewhere.example", 1), resolver.ip, false)).unwrap();
    };
    traffic();
    istio.plane.cut();
    eventually("Prometheus answers queries", || {
        let ready = inside(&node, || http(Prometheus::PORT, "GET", "/-/ready", "localhost"));
        ready.is_some_and(|(status, _)| status == 200)
    });
    let prometheus = Prometheus { w: &istio.w };
    // A rate needs two scrapes of each series, and that there was traffic between them.
    eventually("both nodes are scraped", || prometheus.ask("up == 1").len() == 2);
    let found = |query: &str| {
        traffic();
        prometheus.ask(query)
    };
    let value = |series: &Value| series["value"][1].as_str().unwrap().parse::<f64>().unwrap();
    for query in ISTIO {
        eventually(query, || !found(query).is_empty());
    }
    eventually("there is a rate", || found(ISTIO[1]).iter().filter(|series| value(series) > 0.0).count() == 2);
    let tcp = r#"label_join(sum by (destination_workload, destination_workload_namespace, destination_service)
        (rate(istio_tcp_received_bytes_total{reporter=~"source|waypoint"}[1m])), "destination_workload_var", ".",
        "destination_workload", "destination_workload_namespace") > 0"#;
    let workloads = found(tcp);
    assert_eq!(workloads[0]["metric"]["destination_workload_var"], "server.ns", "{workloads:?}");

    // Kiali: traffic into a namespace, traffic out of it, and its encryption.
    for (metric, of) in [
        ("istio_tcp_sent_bytes_total", r#"app="ztunnel",reporter="destination",destination_workload_namespace="ns""#),
        ("istio_tcp_received_bytes_total", r#"app="ztunnel",reporter="source",source_workload_namespace="ns""#),
    ] {
        let edges = found(&format!("sum by (app,{}) (rate({metric}{{{of}}}[60s])) > 0", EDGE.join(",")));
        assert_eq!(edges.len(), 1, "{metric}: {edges:?}");
        let edge = &edges[0]["metric"];
        for label in EDGE {
            assert!(edge[label].is_string() && edge[label] != "unknown", "{metric} {label}: {edge}");
        }
        assert_eq!((&edge["source_workload"], &edge["destination_workload"]), (&json!("client"), &json!("server")));
        assert_eq!(edge["destination_service_name"], "web");
    }
    let locks = [&EDGE[..13], &SECURITY].concat().join(",");
    let of = r#"reporter="destination",source_workload_namespace="ns""#;
    let locks = found(&format!("sum by ({locks}) (rate(istio_tcp_sent_bytes_total{{{of}}}[60s])) > 0"));
    assert_eq!(locks[0]["metric"]["connection_security_policy"], "mutual_tls", "{locks:?}");
    for (label, account) in [("source_principal", "client"), ("destination_principal", "server")] {
        assert_eq!(locks[0]["metric"][label], format!("spiffe://cluster.local/ns/ns/sa/{account}"));
    }

    our_dashboard(&prometheus);
    let rules = prometheus.api("rules", &[])["groups"][0]["rules"].as_array().unwrap().clone();
    for rule in &rules {
        assert_ne!(rule["health"], "err", "{rule}");
    }
    // Pending ones too: many would fire only after minutes. The certificates of the scenario's CA live for a short time.
    let alerts = prometheus.ask(r#"ALERTS{alertname!="CulvertCertificateNearEnd"}"#);
    assert!(rules.len() > 15 && alerts.is_empty(), "nothing is wrong here: {alerts:?}");
    for node in [1, 2] {
        reads_clean(&istio.w, node);
    }
}

/// Every query of our dashboard is one, and those about a node that is well find something.
fn our_dashboard(prometheus: &Prometheus<'_>) {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(root().join("daemonset/chart/monitoring/dashboard.json")).unwrap())
            .unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut empty = Vec::new();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap();
            let query = query.replace("$instance", ".*").replace("$__rate_interval", "1m");
            if prometheus.ask(&query).is_empty() {
                empty.push(panel["title"].as_str().unwrap().to_owned());
            }
        }
    }
    // Nothing failed, nothing was plaintext, and the agent redirects here.
    let quiet = [
        "Plaintext accepted in the last hour",
        "Plaintext connections of pods",
        "Refused by policy, by reason",
        "Failed, by reason",
        "Tried on another endpoint",
        "Tunnels cut, by reason",
    ];
    empty.retain(|title| !quiet.contains(&title.as_str()));
    assert!(empty.is_empty(), "panels that find nothing: {empty:?}");
}

#[test]
fn a_refusal_leads_to_its_trace_where_one_is_recorded() {
    let mut w = World::new();
    let (server, peer) = (w.mesh_pod("server", 2), w.plain_pod("peer", 1));
    w.mesh.policy("no-9000", "Namespace", "Deny", json!({"destinationPorts": [9000]}));
    w.start();
    let cert = certs::good(&w.ca(), &w.dir, "peer");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request = |flags: &str| {
        json!({"headers": [[":method", "CONNECT"], [":authority", format!("{}:9000", server.v4)],
            ["traceparent", format!("00-{trace}-00f067aa0ba902b7-{flags}")]], "send": "x\n"})
    };
    let refused = |flags: &str| {
        let spec = json!({"to": [server.v4.to_string(), 15008], "ca": w.ca().join("ca.pem"), "cert": cert.chain,
            "key": cert.key, "requests": [request(flags)]});
        let (python, script) = (python_env("python"), peer_script("h2_connect.py"));
        let said = output_in(&peer.netns, python.to_str().unwrap(), &[script.to_str().unwrap(), &spec.to_string()]);
        assert!(said.contains("\"status\": 401") || said.contains("\"status\": 403"), "{said}");
    };
    let counted = |accept: &str| {
        let accept = format!("accept: {accept}");
        let text = output_in(&w.ns("n2"), "curl", &["-s", "-H", &accept, "http://127.0.0.1:15020/metrics"]);
        let denied = |line: &&str| line.starts_with("culvert_connection_failures_total{") && line.contains("policy");
        text.lines().find(denied).unwrap_or_default().to_owned()
    };
    let (open_metrics, text) = ("application/openmetrics-text", "text/plain");
    refused("00");
    eventually("it is counted", || counted(open_metrics).ends_with("} 1"));
    refused("01");
    let example = format!("}} 2 # {{trace_id=\"{trace}\"}} 1.0 ");
    eventually("the trace is its example", || counted(open_metrics).contains(&example));
    assert!(counted(text).ends_with("} 2"), "{}", counted(text));
}

#[test]
fn series_end_with_their_workloads_and_names_beyond_the_limit_are_left_out() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    let servers = ["one", "two", "three"].map(|name| w.mesh_pod(name, 2));
    for server in &servers {
        apps::serve(&server.netns, 9000, apps::echo);
    }
    w.write_mesh();
    for (node, settings) in
        [(1, &[("CULVERT_METRIC_SERIES_MAX", "2"), ("CULVERT_METRIC_SERIES_IDLE", "1s")][..]), (2, &[])]
    {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, settings);
    }
    [1, 2].into_iter().for_each(|node| w.wait_captured(node));
    let opened = |w: &World, to: &str| {
        w.metric(1, "istio_tcp_connections_opened_total", &[&format!("destination_workload=\"{to}\"")])
    };
    let open = servers.each_ref().map(|server| {
        let mut stream = connect(&client.netns, (server.v4, 9000)).unwrap();
        assert!(alive(&mut stream));
        stream
    });
    let all = ["one", "two", "three", "overflow"].map(|to| opened(&w, to));
    assert_eq!(all, [1.0, 1.0, 0.0, 1.0], "what comes third is counted without its name");
    assert!(w.metric(1, "culvert_metric_overflows_total", &["of=\"connections\""]) >= 1.0);
    drop(open);
    w.mesh.workloads.retain(|workload| workload["name"] != "two");
    w.write_mesh();
    eventually("the facts are known", || !w.json(1, "/config_dump")["workloads"].to_string().contains("\"two\""));
    eventually("the series goes with its workload", || opened(&w, "two") == 0.0);
    eventually("what overflowed goes when it is idle", || opened(&w, "overflow") == 0.0);
    assert_eq!(opened(&w, "one"), 1.0, "the other one stays, as long as its workload is in the mesh");
}

/// promtool's remarks about names that ztunnel has too, and that its dashboards ask for.
const OF_ZTUNNEL: [&str; 2] = [
    r#"workload_manager_active_proxy_count non-histogram and non-summary metrics should not have "_count" suffix"#,
    r#"workload_manager_pending_proxy_count non-histogram and non-summary metrics should not have "_count" suffix"#,
];

fn reads_clean(w: &World, node: u8) {
    let (_, text) = w.try_get(node, 15020, "/metrics").unwrap();
    let path = w.dir.join(format!("metrics{node}.txt"));
    replace(&path, &text);
    let said = remarks(&path);
    let own: Vec<&String> = said.iter().filter(|line| !OF_ZTUNNEL.contains(&line.as_str())).collect();
    assert!(own.is_empty(), "{own:#?}");
    assert_eq!(said.len(), OF_ZTUNNEL.len(), "promtool reads them: {said:?}");
}

/// What promtool says about metrics in a file.
fn remarks(path: &Path) -> Vec<String> {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::from(fs::File::open(path).unwrap()));
    let output = promtool.output().expect("promtool is not there: scripts/test installs it");
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
}
