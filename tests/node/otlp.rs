//! Spans and log records for a collector: what they say, how they are sampled, and that a collector which misbehaves
//! costs connections nothing.

use crate::world::collector::{Collector, Mood, attributes};
use crate::world::control_plane::{Root, server_tls};
use crate::world::{Pod, World, apps, ask, certs, eventually, is_reset, output_in, peer_script, python_env};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const CANARY: &str = "canary-c0ffee-of-the-collector";
const CLIENT: &str = "connection outbound";
const SERVER: &str = "connection inbound";

/// Settings that send soon.
const SOON: [(&str, &str); 2] = [("OTEL_BSP_SCHEDULE_DELAY", "50"), ("OTEL_BLRP_SCHEDULE_DELAY", "50")];
const GRPC: [(&str, &str); 2] =
    [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://172.30.0.1:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
const HTTP: [(&str, &str); 1] = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://172.30.0.1:4318/")];

/// A client on the first node and a server on the second.
fn world(settings: [&[(&str, &str)]; 2]) -> (World, Pod, Pod) {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    for port in [8080, 8081] {
        apps::serve(&server.netns, port, apps::who);
    }
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.policy("shut", "Namespace", "Deny", json!({"destinationPorts": [8081]}));
    w.write_mesh();
    for (node, settings) in [1, 2].into_iter().zip(settings) {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[settings, &SOON].concat());
    }
    for node in [1, 2] {
        w.wait_captured(node);
    }
    (w, client, server)
}

/// The spans of a direction, once there are so many.
fn spans(collector: &Collector, name: &str, count: usize) -> Vec<(opentelemetry_proto::tonic::trace::v1::Span, Value)> {
    eventually(&format!("{count} spans {name}"), || collector.spans(name).len() >= count);
    collector.spans(name)
}

#[test]
fn one_trace_follows_a_connection_over_both_nodes() {
    let header = format!("authorization=Bearer%20{CANARY},x-tenant={CANARY}");
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", header.as_str());
    let named = [headers, ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=te%20st"), ("NODE_NAME", "n1")];
    // The collector is there first, but the world makes its namespace: the daemons wait for it.
    let (mut w, client, server) = world([&[&GRPC[..], &named].concat(), &[&HTTP[..], &[headers]].concat()]);
    let collector = Collector::start(&w.ns("n1"), None);
    ask(&client.netns, ("10.96.0.1".parse::<std::net::IpAddr>().unwrap(), 80), "hello").unwrap();
    let (from, to) = (&spans(&collector, CLIENT, 1)[0], &spans(&collector, SERVER, 1)[0]);
    assert_eq!(from.0.trace_id, to.0.trace_id, "one trace");
    assert_eq!((from.0.parent_span_id.len(), &to.0.parent_span_id), (0, &from.0.span_id));
    assert_eq!((from.0.kind, to.0.kind), (3, 2), "client and server");
    assert!(from.0.start_time_unix_nano < to.0.end_time_unix_nano && from.0.status.is_none(), "{from:#?}");
    for (key, expected) in [
        ("network.transport", json!("tcp")),
        ("source.address", json!(client.v4.to_string())),
        ("destination.address", json!("10.96.0.1")),
        ("destination.port", json!(80)),
        ("server.address", json!("web.ns.svc.cluster.local")),
        ("network.peer.address", json!(server.v4.to_string())),
        ("tls.protocol.version", json!("1.3")),
        ("tls.cipher", json!("TLS_AES_256_GCM_SHA384")),
        ("culvert.source.identity", json!("spiffe://cluster.local/ns/ns/sa/client")),
        ("culvert.destination.identity", json!("spiffe://cluster.local/ns/ns/sa/server")),
        ("culvert.destination.k8s.namespace.name", json!("ns")),
        ("culvert.bytes.sent", json!(6)),
        ("culvert.encrypted", json!(true)),
    ] {
        assert_eq!(from.1[key], expected, "{key}: {:#}", from.1);
    }
    assert!(from.1["culvert.stage.tls"].is_number() && to.1["culvert.stage.policy"].is_number(), "{from:#?} {to:#?}");
    assert_eq!(from.0.events[0].name, "culvert.open");
    assert_eq!(to.1["source.address"], client.v4.to_string());
    assert_eq!(to.1["culvert.source.k8s.pod.name"], "client");
    let resource = collector.received().spans.iter().find(|(span, _)| span.name == CLIENT).unwrap().1.clone();
    let expected = json!({"service.name": "culvert", "service.version": env!("CARGO_PKG_VERSION"), "k8s.node.name": "n1", "deployment.environment.name": "te st"});
    assert_eq!(resource, expected);

    eventually("both log records", || collector.received().logs.len() >= 2);
    let logs = collector.received().logs.clone();
    for (span, port) in [(from, 80), (to, 8080)] {
        let log = logs.iter().find(|(log, _)| log.span_id == span.0.span_id).unwrap();
        assert_eq!((&log.0.trace_id, log.0.severity_text.as_str()), (&span.0.trace_id, "INFO"));
        assert_eq!(attributes(&log.0.attributes)["destination.port"], port);
    }

    // A refusal is an error on both sides, of one trace.
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    let (from, to) = (&spans(&collector, CLIENT, 2)[1], &spans(&collector, SERVER, 2)[1]);
    assert_eq!((&to.0.parent_span_id, &from.1["error.type"]), (&from.0.span_id, &json!("peer_denied")));
    assert_eq!((&to.1["culvert.reason"], to.0.status.as_ref().unwrap().code), (&json!("denied"), 2));

    // A client that names no trace begins one here.
    let peer = certs::good(&w.ca(), &w.dir, "client");
    let spec = json!({"to": [server.v4.to_string(), 15008], "ca": w.ca().join("ca.pem"), "cert": peer.chain, "key": peer.key,
        "requests": [{"headers": [[":method", "CONNECT"], [":authority", format!("{}:8080", server.v4)]], "send": "x\n"}]});
    let node = w.ns("n1");
    let script = peer_script("h2_connect.py");
    output_in(&node, python_env("python").to_str().unwrap(), &[script.to_str().unwrap(), &spec.to_string()]);
    let alone = &spans(&collector, SERVER, 3)[2];
    assert!(alone.0.parent_span_id.is_empty() && alone.0.trace_id.iter().any(|byte| *byte != 0), "{alone:#?}");

    // Header values went where they belong and nowhere else.
    for (_, headers) in &collector.received().requests {
        assert_eq!(headers["authorization"], format!("Bearer {CANARY}"));
        assert_eq!(headers["x-tenant"], CANARY);
    }
    let paths: std::collections::BTreeSet<String> =
        collector.received().requests.iter().map(|(path, _)| path.clone()).collect();
    assert_eq!(paths.len(), 4, "{paths:?}");
    for node in [1, 2] {
        for path in ["/config_dump", "/history", "/connections", "/pods", "/"] {
            let (status, text) = w.try_get(node, 15000, path).unwrap();
            assert!(status == 200 && !text.contains(CANARY), "{path}: {status} {text}");
        }
        let (status, text) = w.try_get(node, 15020, "/metrics").unwrap();
        assert!(status == 200 && !text.contains(CANARY), "{status} {text}");
        assert!(!w.log(node).iter().any(|line| line.to_string().contains(CANARY)));
        assert!(w.metric(node, "culvert_otlp_sent_total", &["traces"]) >= 2.0);
        assert_eq!(w.metric(node, "culvert_otlp_dropped_total", &[]), 0.0);
    }
    let dump = w.json(1, "/config_dump");
    assert_eq!(dump["config"]["otlpTracesEndpoint"], "http://172.30.0.1:4317/", "{dump:#}");

    // What still waits is sent when the daemon ends.
    ask(&client.netns, (server.v4, 8080), "last").unwrap();
    let mut first = w.take_node(1);
    first.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(first.wait().success());
    assert_eq!(collector.spans(CLIENT).len(), 3);
}

#[test]
fn a_collector_with_tls_is_verified() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    let (good, other) = (Root::new("collector root"), Root::new("another root"));
    let files = ["good", "other"].map(|name| w.dir.join(name).display().to_string());
    std::fs::write(&files[0], &good.pem).unwrap();
    std::fs::write(&files[1], &other.pem).unwrap();
    let secure = |port| format!("https://localhost:{port}");
    let (grpc, http) = (secure(4317), secure(4318) + "/v1/logs");
    // Each node has a collector of its own, by the name in its certificate.
    let collectors =
        [1, 2].map(|node| Collector::start(&w.ns(&format!("n{node}")), Some(server_tls(&good, "localhost"))));
    w.write_mesh();
    let trusting = ("OTEL_EXPORTER_OTLP_CERTIFICATE", files[0].as_str());
    let one = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", grpc.as_str()),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", http.as_str()),
        trusting,
    ];
    let two = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", grpc.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        trusting,
        ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", files[1].as_str()),
    ];
    for (node, settings) in [(1, one), (2, two)] {
        w.write_pods(node, &w.captured_pods(node));
        w.start_node(node, &[&settings[..], &SOON].concat());
        w.wait_captured(node);
    }
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    spans(&collectors[0], CLIENT, 1);
    for collector in &collectors {
        eventually("log records", || !collector.received().logs.is_empty());
    }
    let refused = w.log_line(2, "the certificate", |line| line["error"].to_string().contains("TLS handshake"));
    assert!(refused["error"].to_string().contains("UnknownIssuer"), "{refused}");
    assert_eq!(collectors[1].received().spans.len(), 0);
}

#[test]
fn sampling_decides_about_spans_and_not_about_log_records() {
    let none = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
    let share = ("OTEL_TRACES_SAMPLER_ARG", "0");
    let (mut w, client, server) = world([&[&GRPC[..], &[none, share]].concat(), &HTTP]);
    let collector = Collector::start(&w.ns("n1"), None);
    let logged = |count: usize| eventually("log records", || collector.received().logs.len() >= count);
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    logged(2);
    let flags = |log: usize| collector.received().logs[log].0.flags & 1;
    assert_eq!((flags(0), flags(1)), (0, 0), "the server's node follows the client's");
    let traces: std::collections::BTreeSet<_> =
        collector.received().logs.iter().map(|(log, _)| log.trace_id.clone()).collect();
    assert_eq!(traces.len(), 1, "log records are of one trace all the same");
    // The server's node decides by itself.
    drop(w.take_node(2));
    w.start_node(2, &[&HTTP[..], &[("OTEL_TRACES_SAMPLER", "always_on")], &SOON].concat());
    w.wait_captured(2);
    eventually("the server is reached", || ask(&client.netns, (server.v4, 8080), "x").is_ok());
    let there = &spans(&collector, SERVER, 1)[0];
    assert_eq!((there.0.parent_span_id.len(), collector.spans(CLIENT).len()), (8, 0));
    // Nothing is exported if that is switched off, or if no collector is named.
    for settings in [&[HTTP[0], ("OTEL_SDK_DISABLED", "true")][..], &[("OTEL_LOGS_EXPORTER", "otlp")]] {
        drop(w.take_node(2));
        w.start_node(2, settings);
        let names = std::fs::read_dir(format!("/proc/{}/task", w.pid(2))).unwrap();
        let names: Vec<String> = names
            .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned())
            .collect();
        assert!(names.iter().any(|name| name == "culvert-judge"), "{names:?}");
        assert!(!names.iter().any(|name| name == "culvert-otlp"), "{names:?}");
    }
}

#[test]
fn a_collector_that_is_gone_or_silent_or_stalled_costs_connections_nothing() {
    let small = [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
        ("OTEL_BLRP_MAX_QUEUE_SIZE", "16"),
        ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "4"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
    ];
    let (mut w, client, server) = world([&[&GRPC[..], &small].concat(), &[&HTTP[..], &small].concat()]);
    let mut collector = Collector::start(&w.ns("n1"), None);
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    spans(&collector, CLIENT, 1);
    spans(&collector, SERVER, 1);
    let dropped = |w: &World, node: u8, signal: &str| {
        w.metric(node, "culvert_otlp_dropped_total", &[signal, "reason=\"queue_full\""])
    };
    let failed = |w: &World, node: u8, signal: &str| w.metric(node, "culvert_otlp_failed_requests_total", &[signal]);
    let mut longest = Duration::ZERO;
    for trouble in [Some(Mood::Silent), Some(Mood::Stalled), Some(Mood::Refuse(503)), None] {
        let each = [(1, "traces"), (1, "logs"), (2, "traces"), (2, "logs")];
        let before = each.map(|(node, signal)| (dropped(&w, node, signal), failed(&w, node, signal)));
        match trouble {
            Some(mood) => collector.mood(mood),
            None => collector.down(),
        }
        if trouble == Some(Mood::Stalled) {
            // Connections that are open were accepted by one that reads.
            collector.down();
            collector.up();
        }
        for _ in 0..60 {
            let begun = Instant::now();
            ask(&client.netns, (server.v4, 8080), "x").unwrap();
            longest = longest.max(begun.elapsed());
        }
        for ((node, signal), before) in each.into_iter().zip(before) {
            // One batch is being sent, and the queue is full.
            eventually(&format!("{trouble:?}: node {node} counts what it drops of {signal}"), || {
                dropped(&w, node, signal) - before.0 >= 60.0 - 16.0 - 4.0 - 4.0
            });
            eventually(&format!("{trouble:?}: an attempt of node {node} has failed"), || {
                failed(&w, node, signal) > before.1
            });
        }
        collector.received().spans.clear();
        collector.received().logs.clear();
        collector.mood(Mood::Accept);
        if matches!(trouble, None | Some(Mood::Stalled)) {
            collector.down();
            collector.up();
        }
        // What waited arrives, and then what is new.
        eventually("the queues are sent", || {
            let received = collector.received();
            let of = |name: &str| received.spans.iter().filter(|(span, _)| span.name == name).count();
            of(CLIENT) >= 16 && of(SERVER) >= 16 && received.logs.len() >= 32
        });
        let before = (collector.spans(CLIENT).len(), collector.spans(SERVER).len());
        ask(&client.netns, (server.v4, 8080), "x").unwrap();
        spans(&collector, CLIENT, before.0 + 1);
        spans(&collector, SERVER, before.1 + 1);
    }
    assert!(longest < Duration::from_secs(5), "{longest:?}");
    w.log_line(1, "the collector fails", |line| line["message"].to_string().contains("does not accept data"));
    w.log_line(1, "the collector works", |line| line["message"].to_string().contains("accepts data again"));
    // A daemon ends in time although nobody takes its spans.
    collector.mood(Mood::Silent);
    ask(&client.netns, (server.v4, 8080), "x").unwrap();
    let mut first = w.take_node(1);
    let begun = Instant::now();
    first.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(first.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
