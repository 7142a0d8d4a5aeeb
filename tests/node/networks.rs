//! Two networks: the client's node knows only a gateway to the other one, which is a real Envoy that passes the inner
//! tunnels on. There is culvert on both sides.

use crate::envoy::{self, address, tls, typed};
use crate::world::facts::hostname;
use crate::world::sniffer::Sniffer;
use crate::world::{Pod, World, apps, ask, certs, connect, eventually, is_reset, replace};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown};

/// Ends CONNECT on `port` and passes the bytes of a stream for an authority on to the HBONE port of one of its pods, as
/// Istio's east-west gateway does.
fn gateway(w: &World, cert: &certs::Files, port: u16, routes: &[(&str, &[&Pod])]) -> Value {
    let log = "authority=%REQ(:AUTHORITY)% peer=%DOWNSTREAM_PEER_URI_SAN% code=%RESPONSE_CODE% \
               baggage=%REQ(BAGGAGE)% forwarded=%REQ(FORWARDED)% network=%REQ(X-FORWARDED-NETWORK)%\n";
    let hosts: Vec<Value> = routes
        .iter()
        .map(|(authority, _)| {
            json!({"name": authority, "domains": [authority], "routes": [{"match": {"connect_matcher": {}}, "route": {
                "cluster": authority, "timeout": "0s",
                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
            }}]})
        })
        .collect();
    let manager = json!({
        "stat_prefix": "hbone", "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": true},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "access_log": [{"name": "envoy.access_loggers.stdout", "typed_config": typed(
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            json!({"log_format": {"text_format_source": {"inline_string": log}}}),
        )}],
        "route_config": {"name": "connect", "virtual_hosts": hosts},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", json!({})),
        }],
    });
    let context =
        json!({"require_client_certificate": true, "common_tls_context": tls(w, cert, "spiffe://cluster.local/")});
    let clusters: Vec<Value> = routes
        .iter()
        .map(|(authority, pods)| {
            let ends: Vec<Value> =
                pods.iter().map(|pod| json!({"endpoint": {"address": address(&pod.v4.to_string(), 15008)}})).collect();
            json!({
                "name": authority, "type": "STATIC", "connect_timeout": "5s",
                "load_assignment": {"cluster_name": authority, "endpoints": [{"lb_endpoints": ends}]},
            })
        })
        .collect();
    json!({"static_resources": {
        "listeners": [{
            "name": "hbone", "address": {"socket_address": {"address": "::", "port_value": port, "ipv4_compat": true}},
            "filter_chains": [{
                "transport_socket": {
                    "name": "envoy.transport_sockets.tls",
                    "typed_config": typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", context),
                },
                "filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": typed(
                        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", manager),
                }],
            }],
        }],
        "clusters": clusters,
    }})
}

/// A client in `net-1` on node 1; servers and a gateway in `net-2` on node 2. Node 1 knows of `net-2` what istiod would
/// announce to it: the gateway, and one workload for all endpoints of `web` there.
struct Networks {
    w: World,
    client: Pod,
    gateway: Pod,
    servers: Vec<Pod>,
    /// Facts of node 1.
    near: Value,
    /// Facts of node 2.
    far: Value,
}

const GATEWAY_PORT: u16 = 15009;

impl Networks {
    fn new() -> Self {
        let mut w = World::new();
        let client = w.mesh_pod("client", 1);
        let (one, two) = (w.mesh_pod("one", 2), w.mesh_pod("two", 2));
        let gateway = w.add_pod("gateway", 2);
        let ports = json!({"80": 8080, "90": 9000});
        w.mesh.service("web", &[], &ports, &[&one, &two]);
        w.mesh.services[0]["subjectAltNames"] = json!([certs::spiffe("one"), certs::spiffe("two")]);
        for (pod, network) in [("client", "net-1"), ("one", "net-2"), ("two", "net-2")] {
            w.mesh.of(pod)["network"] = json!(network);
        }
        let [mut client_facts, one_facts, two_facts] = ["client", "one", "two"].map(|pod| w.mesh.of(pod).clone());
        client_facts["locality"] = json!({"region": "r1"});
        let service = w.mesh.services[0].clone();
        let (mut here, mut there) = (service.clone(), service);
        here["vips"] = json!(["net-1/10.96.0.1", "net-1/fd00:96::1"]);
        there["vips"] = json!(["net-2/10.97.0.1"]);
        let near = json!({"services": [here], "workloads": [
            client_facts,
            {
                "uid": format!("NetworkGateway/net-2/{}/{GATEWAY_PORT}", gateway.v4), "namespace": "ns",
                "serviceAccount": "gateway", "network": "net-2", "workloadIps": [gateway.v4, gateway.v6],
            },
            {
                "uid": "net-2/SplitHorizonWorkload/ns/gateway/ns/web", "namespace": "ns", "protocol": "HBONE",
                "network": "net-2", "clusterId": "c2", "workloadIps": [], "capacity": 2,
                "networkGateway": {"destination": format!("net-2/{}", gateway.v4), "hboneMtlsPort": GATEWAY_PORT},
                "services": {(format!("ns/{}", hostname("web"))): ports},
            },
        ]});
        let gateway_there = json!({
            "uid": "c2//Pod/ns/gateway", "name": "gateway", "namespace": "ns", "serviceAccount": "gateway",
            "network": "net-2", "workloadIps": [gateway.v4, gateway.v6],
        });
        let far = json!({"services": [there], "workloads": [one_facts, two_facts, gateway_there]});
        for server in [&one, &two] {
            apps::serve(&server.netns, 8080, apps::who);
            apps::serve(&server.netns, 9000, apps::echo);
        }
        Self { w, client, gateway, servers: vec![one, two], near, far }
    }

    /// Starts both daemons, each with one worker: tunnels of several would reach more endpoints.
    fn start(&mut self) {
        self.start_with(&[]);
    }

    /// The same with further settings of node 1.
    fn start_with(&mut self, settings: &[(&str, &str)]) {
        for node in [1, 2] {
            self.write(node);
            self.w.write_pods(node, &self.w.captured_pods(node));
            let one_worker = [("ZTUNNEL_WORKER_THREADS", "1")];
            let all: Vec<_> = one_worker.iter().chain(settings.iter().filter(|_| node == 1)).copied().collect();
            self.w.start_node(node, &all);
        }
        for node in [1, 2] {
            self.w.wait_captured(node);
        }
    }

    fn write(&self, node: u8) {
        let facts = if node == 1 { &self.near } else { &self.far };
        replace(&self.w.mesh_file(node), &facts.to_string());
    }

    /// Starts Envoy as the gateway, with the certificate of `identity`.
    fn start_gateway(&mut self, identity: &str) -> u32 {
        let cert = certs::good(&self.w.ca(), &self.w.dir, identity);
        let pods: Vec<&Pod> = self.servers.iter().collect();
        let authorities = [70, 71, 80, 90].map(|port| format!("{}:{port}", hostname("web")));
        let routes: Vec<(&str, &[&Pod])> = authorities.iter().map(|name| (&**name, &*pods)).collect();
        let config = gateway(&self.w, &cert, GATEWAY_PORT, &routes);
        envoy::start(&mut self.w, &self.gateway.clone(), GATEWAY_PORT, &config)
    }

    /// Addresses of `web` in the client's network.
    fn vips() -> [IpAddr; 2] {
        ["10.96.0.1", "fd00:96::1"].map(|ip| ip.parse().unwrap())
    }
}

/// What an outbound connection through the gateway says about itself, in the log of node 1.
fn outbound(n: &Networks, what: &str, test: impl Fn(&Value) -> bool) -> Value {
    n.w.log_line(1, what, |l| l["direction"] == "outbound" && l["message"] == "connection complete" && test(l))
}

#[test]
fn a_service_in_another_network_is_reached_through_its_gateway() {
    let mut n = Networks::new();
    n.start();
    n.start_gateway("gateway");
    let sniffer = Sniffer::start(&mut n.w, "canary", "CANARY");
    for vip in Networks::vips() {
        for _ in 0..10 {
            // The server sees the gateway, as the address of the client would mean nothing in its network.
            assert_eq!(ask(&n.client.netns, (vip, 80), "CANARY").unwrap(), format!("{} CANARY", n.gateway.v4), "{vip}");
        }
    }
    assert_eq!(sniffer.found(&mut n.w), 0, "nothing is on the wire in the clear");
    let line = outbound(&n, "one of them", |_| true);
    for (field, expected) in [
        ("dst.addr", json!(format!("{}:{GATEWAY_PORT}", n.gateway.v4))),
        ("dst.hbone_addr", json!("web.ns.svc.cluster.local:80")),
        ("dst.service", json!("web.ns.svc.cluster.local")),
        ("dst.gateway", json!(format!("NetworkGateway/net-2/{}/{GATEWAY_PORT}", n.gateway.v4))),
        ("dst.gateway_identity", json!(certs::spiffe("gateway"))),
        ("src.identity", json!(certs::spiffe("client"))),
    ] {
        assert_eq!(line[field], expected, "{field} in {line}");
    }
    assert!(line.get("error").is_none(), "{line}");
    let none_is_claimed = ["destination_principal=\"unknown\"", "destination_service=\"web.ns.svc.cluster.local\""];
    assert_eq!(n.w.metric(1, "istio_tcp_connections_opened_total", &none_is_claimed), 20.0);
    // The far end is one of the servers, and has the same connections once, under the client's identity.
    let servers = ["one", "two"].map(certs::spiffe);
    assert!(servers.iter().any(|server| line["dst.identity"] == **server), "{line}");
    let line = n.w.log_line(2, "inbound", |l| l["message"] == "connection complete");
    assert_eq!(line["src.identity"], certs::spiffe("client"), "{line}");
    assert_eq!(line["dst.hbone_addr"], "web.ns.svc.cluster.local:80", "{line}");
    assert!(line.get("src.workload").is_none(), "the gateway's address says nothing about the client: {line}");
    for node in [1, 2] {
        eventually("all are counted, once", || {
            n.w.metric(node, "istio_tcp_connections_closed_total", &["mutual_tls"]) == 20.0
        });
        assert_eq!(n.w.metric(node, "istio_tcp_connections_opened_total", &[]), 20.0);
    }
    // Envoy logs a stream at its end. The tunnels inside are kept for further connections, so the daemon ends them.
    let mut node = n.w.take_node(1);
    node.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(node.wait().success(), "no tunnel delays the end");
    eventually("Envoy has logged one", || envoy::log(&n.w, &n.gateway).contains("code=200"));
    let text = envoy::log(&n.w, &n.gateway);
    let line = text.lines().find(|line| line.contains("code=200")).unwrap();
    for word in [
        "authority=web.ns.svc.cluster.local:80",
        "peer=spiffe://cluster.local/ns/ns/sa/client",
        "k8s.namespace.name=ns",
        &format!("for=\"{}:", n.client.v4),
        "host=web.ns.svc.cluster.local",
        "network=-",
    ] {
        assert!(line.contains(word), "{word} in {line}");
    }
}

#[test]
fn a_gateway_is_reached_over_ipv6_too() {
    let mut n = Networks::new();
    n.near["workloads"][2]["networkGateway"]["destination"] = json!(format!("net-2/{}", n.gateway.v6));
    n.start();
    n.start_gateway("gateway");
    for vip in Networks::vips() {
        assert_eq!(ask(&n.client.netns, (vip, 80), "x").unwrap(), format!("{} x", n.gateway.v4), "{vip}");
    }
    let line = outbound(&n, "one of them", |_| true);
    assert_eq!(line["dst.addr"], format!("[{}]:{GATEWAY_PORT}", n.gateway.v6), "{line}");
}

#[test]
fn connections_at_the_same_time_reach_all_endpoints_behind_a_gateway_and_are_listed_with_it() {
    let mut n = Networks::new();
    n.start();
    n.start_gateway("gateway");
    let [vip, _] = Networks::vips();
    let mut open = Vec::new();
    for _ in 0..16 {
        let mut stream = connect(&n.client.netns, (vip, 90)).unwrap();
        stream.write_all(b"ping").unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
        open.push(stream);
    }
    let all = n.w.json(1, "/connections");
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 16);
    for server in ["one", "two"].map(certs::spiffe) {
        assert!(all.iter().any(|c| c["dstIdentity"] == *server), "{server}: {all:?}");
    }
    for one in all {
        assert_eq!(one["gatewayIdentity"], certs::spiffe("gateway"), "{one}");
        assert_eq!(one["hboneAddr"], "web.ns.svc.cluster.local:90", "{one}");
        assert_eq!((&one["bytesSent"], &one["bytesReceived"]), (&json!(4), &json!(4)), "{one}");
    }
    // A policy that forbids them ends them, though the gateway knows nothing of it.
    n.far["policies"] = json!([{"name": "none", "namespace": "ns", "scope": "Namespace", "action": "Deny",
        "dryRun": false, "rules": [[[crate::world::facts::principal("client")]]]}]);
    n.write(2);
    for mut stream in open {
        assert_eq!(stream.read(&mut [0]).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    }
    assert!(ask(&n.client.netns, (vip, 80), "x").is_err());
    let line = outbound(&n, "refused there", |l| l["reason"] == "peer_denied");
    assert_eq!(line["dst.gateway_identity"], Value::Null, "{line}");
}

#[test]
fn much_data_half_close_and_resets_pass_through_both_tunnels() {
    let mut n = Networks::new();
    for server in &n.servers {
        apps::serve(&server.netns, 8000, apps::count);
        apps::serve(&server.netns, 8001, apps::reset);
    }
    let further = json!({"80": 8080, "90": 9000, "70": 8000, "71": 8001});
    n.near["services"][0]["ports"] = further.clone();
    n.far["services"][0]["ports"] = further.clone();
    for (facts, workloads) in [(&mut n.near, &[2][..]), (&mut n.far, &[0, 1])] {
        for index in workloads {
            facts["workloads"][*index]["services"]["ns/web.ns.svc.cluster.local"] = further.clone();
        }
    }
    n.start();
    n.start_gateway("gateway");
    let [vip, v6] = Networks::vips();
    let body = vec![9u8; 20_000_000];
    for vip in [vip, v6] {
        let mut stream = connect(&n.client.netns, (vip, 70)).unwrap();
        stream.write_all(&body).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "20000000 true", "{vip}");
    }
    let mut stream = connect(&n.client.netns, (vip, 90)).unwrap();
    let mut writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        writing.write_all(&body).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(back.len() == 20_000_000 && back.iter().all(|byte| *byte == 9), "{}", back.len());
    let mut stream = connect(&n.client.netns, (vip, 71)).unwrap();
    stream.write_all(b"x").unwrap();
    let error = stream.read(&mut [0]).expect_err("an orderly end instead of a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(outbound(&n, "reset", |l| l.get("error").is_some())["reason"], "peer_reset");
}

#[test]
fn a_gateway_or_far_end_of_another_identity_gets_nothing() {
    let mut n = Networks::new();
    n.start();
    let pid = n.start_gateway("somebody");
    let [vip, _] = Networks::vips();
    assert!(is_reset(&n.client.netns, (vip, 80)));
    let line = outbound(&n, "the gateway is refused", |l| l["reason"] == "tunnel_tls");
    let error = line["error"].as_str().unwrap();
    assert!(error.starts_with("network gateway NetworkGateway/net-2/"), "{error}");
    assert!(error.contains("ns/sa/somebody, expected spiffe://cluster.local/ns/ns/sa/gateway"), "{error}");
    n.w.take(pid).kill();
    n.start_gateway("gateway");
    n.near["services"][0]["subjectAltNames"] = json!([certs::spiffe("nobody")]);
    n.write(1);
    eventually("the facts are known", || n.w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    assert!(is_reset(&n.client.netns, (vip, 80)));
    let line = outbound(&n, "the far end is refused", |l| {
        l["error"].as_str().is_some_and(|error| error.starts_with("behind network gateway"))
    });
    assert_eq!(line["reason"], "tunnel_tls", "{line}");
    assert!(line["error"].as_str().unwrap().contains("expected spiffe://cluster.local/ns/ns/sa/nobody"), "{line}");
    assert_eq!(n.w.metric(2, "istio_tcp_connections_opened_total", &[]), 0.0);
}

#[test]
fn without_the_gateway_nothing_leaves_and_its_death_ends_connections_with_the_reason() {
    let mut n = Networks::new();
    n.start();
    let [vip, _] = Networks::vips();
    let sniffer = Sniffer::start(&mut n.w, "absent", "CANARY");
    // It is reset: while it is being opened, at the write, or at the read.
    if let Ok(mut stream) = connect(&n.client.netns, (vip, 80)) {
        let _ = stream.write_all(b"CANARY\n");
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    }
    let line = outbound(&n, "no gateway", |l| l["reason"] == "tunnel_connect");
    assert!(line["error"].as_str().unwrap().starts_with("network gateway NetworkGateway/net-2/"), "{line}");
    assert_eq!(sniffer.found(&mut n.w), 0, "nothing is on the wire in the clear");

    let pid = n.start_gateway("gateway");
    let mut stream = connect(&n.client.netns, (vip, 90)).unwrap();
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    n.w.take(pid).kill();
    assert_eq!(stream.read(&mut [0]).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    let line = outbound(&n, "the gateway died", |l| l["reason"] == "tunnel_broken");
    assert!(line["error"].as_str().unwrap().contains("the stream that carried it ended"), "{line}");
    assert_eq!(line["bytes_recv"], 4, "{line}");
    n.start_gateway("gateway");
    assert_eq!(ask(&n.client.netns, (vip, 80), "x").unwrap(), format!("{} x", n.gateway.v4), "and all goes on");
}

#[test]
fn connections_leave_the_network_only_while_no_endpoint_in_it_is_healthy_if_it_is_preferred() {
    let mut n = Networks::new();
    let near = n.w.mesh_pod("near", 1);
    apps::serve(&near.netns, 8080, apps::who);
    let mut facts = n.w.mesh.of("near").clone();
    facts["network"] = json!("net-1");
    facts["services"] = n.near["workloads"][2]["services"].clone();
    n.near["workloads"].as_array_mut().unwrap().push(facts);
    n.near["services"][0]["loadBalancer"] =
        json!({"mode": "Failover", "routingPreferences": ["Network", "Region"], "healthPolicy": "OnlyHealthy"});
    n.start();
    n.start_gateway("gateway");
    let [vip, _] = Networks::vips();
    let mut applied = 1.0;
    for (status, seen_as) in [("Healthy", n.client.v4), ("Unhealthy", n.gateway.v4), ("Healthy", n.client.v4)] {
        n.near["workloads"][3]["status"] = json!(status);
        n.write(1);
        if status == "Unhealthy" || applied > 1.0 {
            applied += 1.0;
            eventually("the facts are known", || n.w.metric(1, "culvert_mesh_file_applied_total", &[]) >= applied);
        }
        for _ in 0..10 {
            assert_eq!(ask(&n.client.netns, (vip, 80), "x").unwrap(), format!("{seen_as} x"), "{status}");
        }
    }
}

#[test]
fn a_waypoint_in_another_network_is_reached_through_its_gateway_and_proves_its_own_identity() {
    let mut n = Networks::new();
    let way = n.w.mesh_pod("way", 2);
    apps::serve(&way.netns, 8080, apps::who);
    let name = format!("ns/{}", hostname("way"));
    let (reference, ports) = (json!({"destination": name, "hboneMtlsPort": 15008}), json!({"15008": 15008}));
    let service = json!({"name": "way", "namespace": "ns", "hostname": hostname("way"), "vips": [], "ports": ports,
        "subjectAltNames": [certs::spiffe("way")]});
    let mut facts = n.w.mesh.of("way").clone();
    (facts["network"], facts["services"]) = (json!("net-2"), json!({(name.clone()): ports}));
    n.far["workloads"].as_array_mut().unwrap().push(facts);
    let mut folded = n.near["workloads"][2].clone();
    (folded["uid"], folded["services"]) = (json!("net-2/SplitHorizonWorkload/way"), json!({(name): ports}));
    n.near["workloads"].as_array_mut().unwrap().push(folded);
    for facts in [&mut n.near, &mut n.far] {
        facts["services"][0]["waypoint"] = reference.clone();
        facts["services"].as_array_mut().unwrap().push(service.clone());
    }
    // The gateway leads to the waypoint.
    n.servers = vec![way];
    n.start();
    n.start_gateway("gateway");
    let [vip, _] = Networks::vips();
    assert_eq!(ask(&n.client.netns, (vip, 80), "x").unwrap(), format!("{} x", n.gateway.v4));
    let line = outbound(&n, "through the waypoint", |l| l["dst.identity"] == certs::spiffe("way"));
    assert_eq!(line["dst.hbone_addr"], "web.ns.svc.cluster.local:80", "{line}");
}

#[test]
fn a_gateway_that_is_known_by_name_is_resolved_by_the_pods_resolver() {
    let mut n = Networks::new();
    let record = format!("  local-data: \"lb.example. 300 IN A {}\"\n", n.gateway.v4);
    n.w.start_resolver(&record);
    n.w.start_container(&n.client, &crate::world::names::kubernetes_conf());
    n.near["workloads"][1]["workloadIps"] = json!([]);
    n.near["workloads"][1]["hostname"] = json!("lb.example");
    n.near["workloads"][2]["networkGateway"]["destination"] = json!("ns/lb.example");
    n.start();
    n.start_gateway("gateway");
    for vip in Networks::vips() {
        assert_eq!(ask(&n.client.netns, (vip, 80), "x").unwrap(), format!("{} x", n.gateway.v4));
    }
    n.near["workloads"][1]["hostname"] = json!("gone.example");
    n.near["workloads"][2]["networkGateway"]["destination"] = json!("ns/gone.example");
    n.write(1);
    eventually("the facts are known", || n.w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    let [vip, _] = Networks::vips();
    assert!(is_reset(&n.client.netns, (vip, 80)));
    let line = n.w.log_line(1, "the name is not known", |l| l["reason"] == "name_not_resolved");
    assert!(line["error"].as_str().unwrap().contains("gone.example"), "{line}");
}

#[test]
fn a_revoked_gateway_carries_no_connection_any_longer() {
    let mut n = Networks::new();
    let list = n.w.dir.join("crl.pem");
    std::fs::write(&list, certs::crl(&n.w.ca(), &[])).unwrap();
    n.start_with(&[("CRL_PATH", &list.display().to_string())]);
    n.start_gateway("gateway");
    let [vip, _] = Networks::vips();
    let mut stream = connect(&n.client.netns, (vip, 90)).unwrap();
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    let serial = certs::serial(&n.w.dir.join("gateway.pem"));
    let start = std::time::Instant::now();
    replace(&list, &certs::crl(&n.w.ca(), &[serial]));
    assert_eq!(stream.read(&mut [0]).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    outbound(&n, "why", |l| l["reason"] == "cert_revoked");
    assert!(is_reset(&n.client.netns, (vip, 80)));
    let line = outbound(&n, "and no new one", |l| {
        l["error"].as_str().is_some_and(|error| error.starts_with("network gateway"))
    });
    assert_eq!(line["reason"], "cert_revoked", "{line}");
}
