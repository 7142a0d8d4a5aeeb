//! A real Envoy on each end: as the HBONE client of a captured pod, and as the waypoint of a service.

use crate::world::certs::{self, Files};
use crate::world::sniffer::Sniffer;
use crate::world::{Pod, World, apps, connect, eventually, python_env};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

/// Starts Envoy in a pod's namespace and waits until it listens on `port`. Returns its process.
pub fn start(w: &mut World, pod: &Pod, port: u16, config: &Value) -> u32 {
    let file = w.dir.join(format!("{}-envoy.json", pod.name));
    std::fs::write(&file, serde_json::to_string_pretty(config).unwrap()).unwrap();
    let mut command = Command::new(python_env("envoy"));
    command.arg("-c").arg(&file).args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"]);
    command.args(["--file-flush-interval-msec", "50"]);
    let pid = w.start_in(&pod.netns, &mut command, &format!("{}-envoy.log", pod.name));
    let listening = || {
        let sockets = crate::world::output_in(&pod.netns, "ss", &["-Hltn"]);
        sockets.contains(&format!(":{port} "))
    };
    eventually("Envoy listens", listening);
    pid
}

/// Sends a line and reads everything. This end stays open until then, because Envoy resets a connection that is half
/// closed before Envoy has reached the far side.
fn ask(ns: &str, to: impl Into<SocketAddr>, line: &str) -> std::io::Result<String> {
    let (mut stream, mut answer) = (connect(ns, to)?, String::new());
    stream.write_all(format!("{line}\n").as_bytes())?;
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

pub fn log(w: &World, pod: &Pod) -> String {
    std::fs::read_to_string(w.dir.join(format!("{}-envoy.log", pod.name))).unwrap()
}

pub fn typed(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/{kind}"));
    fields
}

pub fn tls(w: &World, cert: &Files, peer: &str) -> Value {
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": cert.chain}, "private_key": {"filename": cert.key}}],
        "validation_context": {
            "trusted_ca": {"filename": w.ca().join("ca.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": peer}}],
        },
    })
}

pub fn address(ip: &str, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

/// Accepts TCP on loopback and carries each connection as a CONNECT stream to a pod's HBONE port.
fn client(w: &World, cert: &Files, to: &Pod, port: u16) -> Value {
    let proxy = json!({
        "stat_prefix": "out", "cluster": "hbone",
        "tunneling_config": {"hostname": format!("{}:{port}", to.v4)},
    });
    let http2 = json!({"explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100}}});
    let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let context = json!({"common_tls_context": tls(w, cert, &certs::spiffe(&to.name))});
    json!({"static_resources": {
        "listeners": [{
            "name": "in", "address": address("127.0.0.1", 15101),
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", proxy),
            }]}],
        }],
        "clusters": [{
            "name": "hbone", "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": "hbone", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": address(&to.v4.to_string(), 15008)}},
            ]}]},
            "typed_extension_protocol_options": {(format!("envoy.extensions.upstreams.http.v3.HttpProtocolOptions")): typed(kind, http2)},
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": typed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", context),
            },
        }],
    }})
}

/// Terminates CONNECT on `port` and forwards the bytes to the address in `:authority` as plain TCP.
fn waypoint(w: &World, cert: &Files, port: u16) -> Value {
    let manager = json!({
        "stat_prefix": "hbone", "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": true},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "access_log": [{"name": "envoy.access_loggers.stdout", "typed_config": typed(
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            json!({"log_format": {"text_format_source": {"inline_string":
                "authority=%REQ(:AUTHORITY)% peer=%DOWNSTREAM_PEER_URI_SAN% code=%RESPONSE_CODE% baggage=%REQ(BAGGAGE)% forwarded=%REQ(FORWARDED)%\n"}}}),
        )}],
        "route_config": {"name": "connect", "virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"connect_matcher": {}}, "route": {
                "cluster": "authority", "timeout": "0s",
                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
            }}],
        }]},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", json!({})),
        }],
    });
    let context =
        json!({"require_client_certificate": true, "common_tls_context": tls(w, cert, "spiffe://cluster.local/")});
    json!({"static_resources": {
        "listeners": [{
            "name": "hbone", "address": address("0.0.0.0", port),
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
        "clusters": [{
            "name": "authority", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
            "original_dst_lb_config": {"use_http_header": true, "http_header_name": ":authority"},
        }],
    }})
}

#[test]
fn envoy_as_client_reaches_a_captured_pod() {
    let mut w = World::new();
    let (envoy, server) = (w.plain_pod("envoy", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    apps::serve(&server.netns, 9002, apps::count);
    w.mesh.policy("envoy-only", "Namespace", "Allow", crate::world::facts::principal("envoy"));
    w.start();
    let cert = certs::good(&w.ca(), &w.dir, "envoy");
    let config = client(&w, &cert, &server, 8080);
    start(&mut w, &envoy, 15101, &config);
    let local: IpAddr = "127.0.0.1".parse().unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&envoy.netns, (local, 15101), "x").unwrap(), format!("{} x", envoy.v4));
    }
    let line = w.log_line(2, "from Envoy", |l| l["src.identity"] == certs::spiffe("envoy"));
    assert_eq!(line["message"], "connection complete", "{line}");
}

#[test]
fn envoy_as_waypoint_stands_between_two_captured_pods() {
    let mut w = World::new();
    // On the way to the server, the wire between the nodes is passed twice.
    let (from, server, way) = (w.mesh_pod("client", 1), w.mesh_pod("server", 1), w.mesh_pod("way", 2));
    apps::serve(&server.netns, 8080, apps::who);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.service("way", &["10.96.0.2"], &json!({"15008": 15009}), &[&way]);
    w.start();
    let cert = certs::good(&w.ca(), &w.dir, "way");
    let config = waypoint(&w, &cert, 15009);
    start(&mut w, &way, 15009, &config);
    let sniffer = Sniffer::start(&mut w, "canary", "CANARY");
    let vip: IpAddr = "10.96.0.1".parse().unwrap();
    for (index, (destination, port)) in
        [(format!("/{}", way.v4), 15009), ("ns/way.ns.svc.cluster.local".into(), 15008), ("/10.96.0.2".into(), 15008)]
            .iter()
            .enumerate()
    {
        w.mesh.services[0]["waypoint"] = json!({"destination": destination, "hboneMtlsPort": port});
        let applied = w.metric(1, "culvert_mesh_file_applied_total", &[]);
        w.write_mesh();
        eventually("the facts are known", || w.metric(1, "culvert_mesh_file_applied_total", &[]) > applied);
        eventually("on both nodes", || w.metric(2, "culvert_mesh_file_applied_total", &[]) > applied);
        // The server is reached through the waypoint, whose own traffic to the service is not sent back to it.
        assert_eq!(ask(&from.netns, (vip, 80), "CANARY").unwrap(), format!("{} CANARY", way.v4), "{destination}");
        eventually("Envoy has logged it", || log(&w, &way).matches("code=200").count() == index + 1);
    }
    let text = log(&w, &way);
    let line = text.lines().find(|line| line.contains("code=200")).unwrap();
    for word in [
        "authority=10.96.0.1:80",
        "peer=spiffe://cluster.local/ns/ns/sa/client",
        "k8s.namespace.name=ns",
        "service.name=client",
        &format!("for=\"{}:", from.v4),
        "host=web.ns.svc.cluster.local",
    ] {
        assert!(line.contains(word), "{word} in {line}");
    }
    let inbound = w.log_line(1, "at the server", |l| l["dst.workload"] == "server" && l["direction"] == "inbound");
    assert_eq!(inbound["src.identity"], certs::spiffe("way"), "{inbound}");
    assert_eq!(sniffer.found(&mut w), 0, "nothing is on the wire in the clear");
}

/// Behind the daemon of its own pod: accepts plain TCP on loopback, or TCP that begins with a PROXY protocol header. With
/// the header it forwards to the address in it, otherwise to `to`.
fn sandwiched(proxy_protocol: bool, port: u16, to: (&str, u16)) -> Value {
    let log = "from=%DOWNSTREAM_REMOTE_ADDRESS% to=%DOWNSTREAM_LOCAL_ADDRESS% \
               peer=%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:peer)%\n";
    let proxy = json!({
        "stat_prefix": "in", "cluster": if proxy_protocol { "dialled" } else { "fixed" },
        "access_log": [{"name": "envoy.access_loggers.stdout", "typed_config": typed(
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            json!({"log_format": {"text_format_source": {"inline_string": log}}}),
        )}],
    });
    let header = json!({"rules": [{"tlv_type": 0xd0, "on_tlv_present": {"key": "peer"}}]});
    let first = json!([{"name": "proxy_protocol", "typed_config": typed(
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", header)}]);
    json!({"static_resources": {
        "listeners": [{
            "name": "in", "address": address("0.0.0.0", port),
            "listener_filters": if proxy_protocol { first } else { json!([]) },
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", proxy),
            }]}],
        }],
        "clusters": [
            {"name": "dialled", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s"},
            {"name": "fixed", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
                "cluster_name": "fixed",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(to.0, to.1)}}]}],
            }},
        ],
    }})
}

#[test]
fn envoy_as_waypoint_behind_a_daemon_learns_who_asks_for_what() {
    for protocol in ["PROXY", "NONE"] {
        let mut w = World::new();
        let (from, server, way) = (w.mesh_pod("client", 1), w.mesh_pod("server", 1), w.mesh_pod("way", 2));
        apps::serve(&server.netns, 8080, apps::who);
        w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
        // A waypoint's service need not have ports if the waypoint has a tunnel.
        w.mesh.service("way", &["10.96.0.2"], &json!({}), &[&way]);
        w.mesh.services[0]["waypoint"] = json!({"destination": "ns/way.ns.svc.cluster.local", "hboneMtlsPort": 15008});
        w.mesh.of("way")["applicationTunnel"] = json!({"protocol": protocol, "port": 15088});
        w.start();
        let config = sandwiched(protocol == "PROXY", 15088, ("10.96.0.1", 80));
        start(&mut w, &way, 15088, &config);
        let sniffer = Sniffer::start(&mut w, "canary", "CANARY");
        let vip: IpAddr = "10.96.0.1".parse().unwrap();
        for _ in 0..10 {
            assert_eq!(ask(&from.netns, (vip, 80), "CANARY").unwrap(), format!("{} CANARY", way.v4), "{protocol}");
        }
        assert_eq!(sniffer.found(&mut w), 0, "{protocol}: nothing is on the wire in the clear");
        eventually("Envoy has logged it", || log(&w, &way).matches("from=").count() == 10);
        let text = log(&w, &way);
        let line = text.lines().find(|line| line.contains("from=")).unwrap();
        let (to, peer) = match protocol {
            "PROXY" => ("10.96.0.1:80".to_owned(), certs::spiffe("client")),
            _ => (format!("{}:15088", way.v4), "-".to_owned()),
        };
        for word in [format!("from={}:", from.v4), format!("to={to} "), format!("peer={peer}")] {
            assert!(line.contains(&word), "{protocol}: {word} in {line}");
        }
        // Each daemon knows its own peer: the waypoint's the client, and the server's the waypoint.
        for (node, workload, peer) in [(2, "way", "client"), (1, "server", "way")] {
            let inbound = |l: &Value| l["dst.workload"] == workload && l["direction"] == "inbound";
            let line = w.log_line(node, "inbound", inbound);
            assert_eq!(line["src.identity"], certs::spiffe(peer), "{line}");
            assert!(line.get("error").is_none(), "{line}");
        }
    }
}
