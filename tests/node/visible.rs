//! What operators see: config_dump, metrics, readiness, logging, the access log.

use crate::world::alive;
use crate::world::{Pod, World, apps, ask, connect, eventually, http, inside, output_in, peer_script, python_env};
use serde_json::{Value, json};

fn world() -> (World, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.policy("open", "Namespace", "Allow", json!({"destinationPorts": [8080], "notSourceIps": ["192.0.2.0/24"]}));
    w.start();
    (w, client, server)
}

#[test]
fn config_dump_has_the_shape_that_istioctl_reads_and_no_keys() {
    let (w, _, server) = world();
    let dump = w.json(2, "/config_dump");
    let workload = dump["workloads"].as_array().unwrap().iter().find(|x| x["name"] == "server").unwrap();
    assert_eq!(workload["workloadIps"], json!([server.v4, server.v6]));
    assert_eq!((&workload["protocol"], &workload["status"]), (&json!("HBONE"), &json!("Healthy")));
    assert_eq!(workload["services"], json!(["ns/web.ns.svc.cluster.local"]));
    let service = &dump["services"][0];
    assert_eq!(service["vips"], json!(["/10.96.0.1"]));
    assert_eq!(service["endpoints"]["c1//Pod/ns/server"]["status"], "Healthy");
    let policy = &dump["policies"][0];
    assert_eq!((&policy["scope"], &policy["action"]), (&json!("Namespace"), &json!("Allow")));
    assert_eq!(policy["rules"], json!([[[{"destinationPorts": [8080], "notSourceIps": ["192.0.2.0/24"]}]]]));
    let certificate = &dump["certificates"][0];
    assert_eq!(certificate["identity"], "spiffe://cluster.local/ns/ns/sa/server");
    assert_eq!(certificate["state"], "Available");
    for part in ["certChain", "rootCerts"] {
        let one = &certificate[part][0];
        assert!(one["serialNumber"].as_str().unwrap().bytes().all(|b| b.is_ascii_digit()), "{one}");
        assert!(one["expirationTime"].as_str().unwrap().ends_with('Z'), "{one}");
        assert!(one["pem"].as_str().unwrap().starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"), "{one}");
    }
    assert_eq!(dump["workloadState"]["uid-server"]["state"], "Up");
    assert_eq!(dump["workloadState"]["uid-server"]["info"]["serviceAccount"], "server");
    let text = dump.to_string();
    let key = std::fs::read_to_string(w.ca().join("ca.key")).unwrap();
    for secret in ["PRIVATE KEY", "UFJJVkFURSBLRVk", key.lines().nth(1).unwrap()] {
        assert!(!text.contains(secret));
    }
}

/// The shape of a value. In maps that are keyed by names, one placeholder stands for all keys.
fn shape(value: &Value) -> Value {
    let word = |word: &str| Value::from(word);
    match value {
        Value::Null => word("null"),
        Value::Bool(_) => word("bool"),
        Value::Number(_) => word("number"),
        Value::String(_) => word("text"),
        Value::Array(all) => Value::Array(all.iter().take(1).map(shape).collect()),
        Value::Object(all) => Value::Object(all.iter().map(|(key, value)| (key.clone(), shape(value))).collect()),
    }
}

/// Whether everything in ztunnel's dump is in ours, with values of the same kind.
fn has_shape(ours: &Value, expected: &Value, path: &str) {
    match expected {
        Value::Object(keys) => {
            keys.iter().for_each(|(key, value)| has_shape(&ours[key], value, &format!("{path}.{key}")))
        }
        Value::Array(all) => all.iter().for_each(|one| has_shape(&ours[0], one, &format!("{path}[]"))),
        _ => assert_eq!(ours, expected, "{path}"),
    }
}

#[test]
fn config_dump_has_the_keys_and_kinds_of_the_references() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 9000, apps::echo);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 9000}), &[&server]);
    w.mesh.services[0]["cidrVips"] = json!(["/10.97.0.0/16"]);
    w.mesh.services[0]["waypoint"] = json!({"destination": "ns/way.ns.svc.cluster.local", "hboneMtlsPort": 15008});
    w.mesh.policy("open", "Namespace", "Allow", json!({"destinationPorts": [9000]}));
    w.start();
    let mut open = connect(&client.netns, (server.v4, 9000)).unwrap();
    assert!(alive(&mut open));
    let (here, there) = (w.json(1, "/config_dump"), w.json(2, "/config_dump"));
    let named = |dump: &Value, list: &str, name: &str| {
        shape(dump[list].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap())
    };
    let gateway = json!({"destination": "text", "hboneMtlsPort": "number"});
    let workload = json!({
        "workloadIps": ["text"], "protocol": "text", "networkMode": "text", "uid": "text", "name": "text", "namespace": "text",
        "trustDomain": "text", "serviceAccount": "text", "workloadName": "text", "workloadType": "text", "canonicalName": "text",
        "canonicalRevision": "text", "node": "text", "status": "text", "clusterId": "text", "services": ["text"],
        "capacity": "number",
    });
    has_shape(&named(&there, "workloads", "server"), &workload, "workload");
    let service = json!({
        "name": "text", "namespace": "text", "hostname": "text", "vips": ["text"], "ports": {"80": "number"},
        "cidrVips": [{"cidr": "text", "network": "text"}], "waypoint": gateway, "visibility": "text",
        "endpoints": {"c1//Pod/ns/server": {"workloadUid": "text", "port": {"80": "number"}, "status": "text"}},
    });
    has_shape(&named(&there, "services", "web"), &service, "service");
    let policy = json!({"name": "text", "namespace": "text", "scope": "text", "action": "text", "rules": [[[{"destinationPorts": ["number"]}]]]});
    has_shape(&named(&there, "policies", "open"), &policy, "policy");
    let certificate = json!({"pem": "text", "serialNumber": "text", "validFrom": "text", "expirationTime": "text"});
    let connection = json!({"src": "text", "originalDst": "text", "actualDst": "text", "protocol": "text"});
    let config = json!({"proxy": "bool", "dnsProxy": "bool", "windowSize": "number", "connectionWindowSize": "number", "frameSize": "number",
                "poolMaxStreamsPerConn": "number", "poolUnusedReleaseTimeout": "text", "adminAddr": "text", "statsAddr": "text",
                "readinessAddr": "text", "inboundAddr": "text", "inboundPlaintextAddr": "text", "outboundAddr": "text",
                "dnsProxyAddr": "text", "illegalPorts": ["number"], "network": "text", "localNode": "text", "proxyMode": "text",
                "clusterId": "text", "clusterDomain": "text", "secretTtl": "text", "xdsOnDemand": "bool",
                "selfTerminationDeadline": "text", "numWorkerThreads": "number", "requireOriginalSource": "bool", "fakeCa": "bool",
                "inpodPortReuse": "bool", "packetMark": "number", "localhostAppTunnel": "bool", "ipv6Enabled": "bool",
                "socketConfig": {"keepaliveEnabled": "bool", "keepaliveTime": "text", "keepaliveInterval": "text",
                    "keepaliveRetries": "number", "userTimeoutEnabled": "bool"}});
    let whole = |direction: &str, pod: &str| {
        json!({
            "workloads": [], "services": [], "policies": [], "stagedServices": {},
            "staticConfig": {"workloads": [], "services": [], "policies": []},
            "certificates": [{"identity": "text", "state": "text", "certChain": [certificate], "rootCerts": [certificate]}],
            "version": {"version": "text", "gitRevision": "text", "rustVersion": "text", "buildProfile": "text", "buildStatus": "text",
                "istioVersion": "text", "cryptoProvider": "text"},
        "config": config.clone(),
            "workloadState": {pod: {"state": "text", "info": {"name": "text", "namespace": "text", "serviceAccount": "text"},
                "connections": {direction: [connection]}}},
        })
    };
    has_shape(&shape(&here), &whole("outbound", "uid-client"), "dump of the first node");
    has_shape(&shape(&there), &whole("inbound", "uid-server"), "dump of the second node");
    let inbound = &there["workloadState"]["uid-server"]["connections"]["inbound"][0];
    assert_eq!(inbound["originalDst"], "web.ns.svc.cluster.local", "the service behind the port");
}

#[test]
fn what_comes_in_counts_for_the_one_service_behind_the_port() {
    let mut w = World::new();
    let (client, plain, server) = (w.mesh_pod("client", 1), w.plain_pod("plain", 1), w.mesh_pod("server", 2));
    for port in [8080, 8081, 8082] {
        apps::serve(&server.netns, port, apps::who);
    }
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080, "81": 8081}), &[&server]);
    w.mesh.service("also", &["10.96.0.2"], &json!({"80": 8081}), &[&server]);
    w.start();
    // A connection to the pod's own address does not tell which service was meant.
    for from in [&client, &plain] {
        for port in [8080, 8081, 8082] {
            ask(&from.netns, (server.v4, port), "x").unwrap();
        }
    }
    let counted = |service: &str, of: &str| {
        let labels = [
            "reporter=\"destination\"",
            &format!("source_workload=\"{of}\""),
            &format!("destination_service=\"{service}\""),
        ];
        w.metric(2, "istio_tcp_connections_closed_total", &labels)
    };
    for of in ["client", "plain"] {
        eventually("all are counted", || counted("web.ns.svc.cluster.local", of) + counted("unknown", of) == 3.0);
        assert_eq!(
            (counted("web.ns.svc.cluster.local", of), counted("unknown", of)),
            (1.0, 2.0),
            "two services have 8081, none 8082"
        );
    }
    w.log_line(2, "the service", |l| l["direction"] == "inbound" && l["dst.service"] == "web.ns.svc.cluster.local");
}

#[test]
fn traffic_metrics_have_the_names_and_labels_that_dashboards_read() {
    let (w, client, _) = world();
    let answer = ask(&client.netns, ("10.96.0.1".parse::<std::net::IpAddr>().unwrap(), 80), "hello").unwrap();
    let labels = |reporter: &str| {
        [
            format!("reporter=\"{reporter}\""),
            "source_workload=\"client\"".into(),
            "source_principal=\"spiffe://cluster.local/ns/ns/sa/client\"".into(),
            "source_workload_namespace=\"ns\"".into(),
            "destination_service=\"web.ns.svc.cluster.local\"".into(),
            "destination_service_name=\"web\"".into(),
            "destination_workload=\"server\"".into(),
            "destination_principal=\"spiffe://cluster.local/ns/ns/sa/server\"".into(),
            "connection_security_policy=\"mutual_tls\"".into(),
            "request_protocol=\"tcp\"".into(),
            "response_flags=\"-\"".into(),
        ]
    };
    for (node, reporter) in [(1, "source"), (2, "destination")] {
        let labels = labels(reporter);
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        eventually("the connection is counted as closed", || {
            w.metric(node, "istio_tcp_connections_closed_total", &labels) == 1.0
        });
        assert_eq!(w.metric(node, "istio_tcp_connections_opened_total", &labels), 1.0);
        assert_eq!(w.metric(node, "istio_tcp_received_bytes_total", &labels), 6.0, "client to server, {reporter}");
        assert_eq!(
            w.metric(node, "istio_tcp_sent_bytes_total", &labels),
            answer.len() as f64,
            "server to client, {reporter}"
        );
        assert_eq!(w.metric(node, "istio_tcp_sockets_open", &["source"]), 0.0);
    }
    let (_, text) = w.try_get(1, 15020, "/stats/prometheus").unwrap();
    for name in [
        "process_open_fds",
        "process_max_fds",
        "culvert_build_info",
        "culvert_pods",
        "culvert_certificate_expiry_seconds",
        "culvert_tunnels_open",
        "culvert_log_lines_dropped_total",
    ] {
        assert!(text.lines().any(|l| l.starts_with(name)), "{name}");
    }
}

#[test]
fn prometheus_reads_the_metrics_in_either_format() {
    let (w, client, server) = world();
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    let plain = ["-", "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"];
    let open = [
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    ];
    let (python, script) = (python_env("python"), peer_script("scrape.py"));
    let mut arguments = vec![script.to_str().unwrap()];
    arguments.extend(plain.iter().chain(&open));
    let said = output_in(&w.ns("n2"), python.to_str().unwrap(), &arguments);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    for accept in plain.iter().chain(&open) {
        let is_open = open.contains(accept);
        let kind = said[accept]["content_type"].as_str().unwrap();
        let expected =
            if is_open { "application/openmetrics-text; version=1.0.0" } else { "text/plain; version=0.0.4" };
        assert!(kind.starts_with(expected), "{accept}: {kind}");
        let types = said[accept]["types"].as_object().unwrap();
        assert!(types.len() > 20, "{types:?}");
        for (name, kind) in types {
            let is_counter = name.ends_with("_total");
            assert_eq!(kind == "counter", is_counter, "{accept}: {name} is {kind}");
            assert_ne!(kind, "unknown", "{accept}: {name}");
        }
        assert_eq!(types["istio_tcp_connections_opened_total"], "counter", "{accept}");
        assert_eq!(types["culvert_build_info"], if is_open { "info" } else { "gauge" }, "{accept}");
    }
}

#[test]
fn the_access_log_has_the_fields_of_the_reference() {
    let (w, client, server) = world();
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    ask(&client.netns, (vip, 80), "hello").unwrap();
    let line = w.log_line(1, "outbound", |l| l["message"] == "connection complete" && l["direction"] == "outbound");
    let fields = [
        ("level", json!("info")),
        ("scope", json!("access")),
        ("src.workload", json!("client")),
        ("src.namespace", json!("ns")),
        ("src.identity", json!("spiffe://cluster.local/ns/ns/sa/client")),
        ("src.cluster", json!("c1")),
        ("dst.addr", json!(format!("{}:15008", server.v4))),
        ("dst.hbone_addr", json!(format!("{}:8080", server.v4))),
        ("dst.service", json!("web.ns.svc.cluster.local")),
        ("dst.workload", json!("server")),
        ("dst.identity", json!("spiffe://cluster.local/ns/ns/sa/server")),
        ("bytes_sent", json!(6)),
    ];
    for (key, value) in fields {
        assert_eq!(line[key], value, "{key} in {line}");
    }
    assert!(line["duration"].as_str().unwrap().ends_with("ms"), "{line}");
    let line = w.log_line(2, "inbound", |l| l["message"] == "connection complete" && l["direction"] == "inbound");
    assert_eq!((&line["dst.addr"], &line["bytes_recv"]), (&json!(format!("{}:15008", server.v4)), &json!(6)), "{line}");
}

#[test]
fn every_leg_has_keepalive_in_the_shipped_binary() {
    let (w, client, server) = world();
    // The server waits for a line, so the connection stays open.
    let _live = crate::world::connect(&client.netns, (server.v4, 8080)).unwrap();
    eventually("the connection is open", || w.json(2, "/connections").as_array().unwrap().len() == 1);
    for (pod, node) in [(&client, 1), (&server, 2)] {
        let pid = format!("pid={},", w.pid(node));
        // While data is in flight the kernel shows another timer. At rest it must be that of keepalive.
        eventually(&format!("both legs at {} have keepalive", pod.name), || {
            let sockets = output_in(&pod.netns, "ss", &["-Htnpo", "state", "established"]);
            let ours: Vec<&str> = sockets.lines().filter(|line| line.contains(&pid)).collect();
            ours.len() == 2 && ours.iter().all(|line| line.contains("timer:(keepalive,"))
        });
    }
}

#[test]
fn the_log_level_is_changed_while_running() {
    let (w, client, server) = world();
    let post = |path: &'static str| inside(&w.ns("n1"), move || http(15000, "POST", path, "localhost")).unwrap();
    assert_eq!(w.try_get(1, 15000, "/logging").unwrap().0, 405);
    assert_eq!(post("/logging"), (200, "current log level is info\n".into()));
    assert_eq!(post("/logging?level=").0, 200, "istioctl asks in this way");
    assert_eq!(post("/logging?level=access=debug").0, 200);
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    w.log_line(1, "opened, at debug", |l| l["message"] == "connection opened");
    assert_eq!(post("/logging?level=a=b=c").0, 400);
    assert_eq!(post("/logging?nonsense").0, 400);
    assert_eq!(post("/logging?reset"), (200, "current log level is info\n".into()));
}

#[test]
fn the_admin_port_is_for_local_hosts_only() {
    let (w, client, _) = world();
    let get = |host: &'static str| inside(&w.ns("n1"), move || http(15000, "GET", "/config_dump", host)).unwrap().0;
    assert_eq!(get("localhost"), 200);
    assert_eq!(get("attacker.example"), 403);
    let node: std::net::IpAddr = "10.1.0.1".parse().unwrap();
    for port in [15000, 15001] {
        // The pod's outbound connection is captured and passed on, but no server listens at the other end.
        assert!(ask(&client.netns, (node, port), "GET / HTTP/1.0\r\n\r").is_err(), "{port}");
    }
    let (status, page) = w.try_get(1, 15000, "/").unwrap();
    assert!(status == 200 && page.contains("/connections"), "{page}");
    assert_eq!(w.try_get(1, 15021, "/healthz/ready").unwrap(), (200, "ready\n".into()));
}

#[test]
fn the_log_as_text_has_one_line_per_event_with_tabs() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    let server = w.mesh_pod("server", 1);
    apps::serve(&server.netns, 8080, apps::who);
    w.write_mesh();
    w.write_pods(1, &[&client, &server]);
    w.start_node(1, &[("LOG_FORMAT", "text")]);
    w.wait_captured(1);
    ask(&client.netns, (server.v4, 8080), "hello").unwrap();
    let mut line = String::new();
    eventually("the line is written", || {
        let text = std::fs::read_to_string(w.dir.join("node1.log")).unwrap();
        let found = text.lines().find(|l| l.contains("direction=\"outbound\""));
        line = found.unwrap_or_default().to_owned();
        found.is_some()
    });
    let parts: Vec<&str> = line.split('\t').collect();
    let [time, level, target, message, fields] = parts.as_slice() else { panic!("{line:?}") };
    assert!(time.len() == 27 && time.ends_with('Z'), "RFC 3339 with microseconds: {time}");
    assert_eq!((*level, *target, *message), ("info", "access", "connection complete"));
    assert!(fields.starts_with(&format!("src.addr={}:", client.v4)), "{fields}");
    for field in ["src.identity=\"spiffe://cluster.local/ns/ns/sa/client\"", "bytes_sent=6", "duration="] {
        assert!(fields.contains(field), "{field} in {fields}");
    }
}
