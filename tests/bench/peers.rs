//! Configurations of the peers that are a pair of proxies, one in each pod: Envoy over HBONE, haproxy and nginx over
//! mTLS.
//!
//! The client's proxy gets the application's connections from a rule in its pod. Access logs are off. haproxy and nginx
//! open a TLS connection for each connection of the application, and resume earlier sessions.

use crate::world::certs::Files;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::path::Path;

/// The port on which the client's proxy takes connections.
pub const TAKE: u16 = 15101;
/// The port of the server's proxy.
pub const TUNNEL: u16 = 15008;
/// More connections and streams than any case opens.
const MANY: u32 = 100_000;

/// The sockets of one nginx process, which allocates all of them at its start.
const NGINX_SOCKETS: u32 = 32_768;

/// What a pair of proxies is configured from.
pub struct Pair<'a> {
    pub root: &'a Path,
    pub client: &'a Files,
    pub server: &'a Files,
    pub to: IpAddr,
    pub port: u16,
}

fn typed(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/envoy.{kind}"));
    fields
}

fn envoy_tls(root: &Path, own: &Files) -> Value {
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": own.chain}, "private_key": {"filename": own.key}}],
        "validation_context": {
            "trusted_ca": {"filename": root},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}],
        },
    })
}

fn envoy_socket(kind: &str, context: Value) -> Value {
    let kind = format!("extensions.transport_sockets.tls.v3.{kind}");
    json!({"name": "envoy.transport_sockets.tls", "typed_config": typed(&kind, context)})
}

fn envoy(listener: Value, cluster: &Value) -> String {
    let mut listener = listener;
    listener["name"] = json!("in");
    let mut cluster = cluster.clone();
    cluster["name"] = json!("out");
    cluster["type"] = json!("ORIGINAL_DST");
    cluster["lb_policy"] = json!("CLUSTER_PROVIDED");
    cluster["connect_timeout"] = json!("5s");
    cluster["circuit_breakers"] = json!({"thresholds": [
        {"max_connections": MANY, "max_pending_requests": MANY, "max_requests": MANY, "max_retries": MANY},
    ]});
    json!({"static_resources": {"listeners": [listener], "clusters": [cluster]}}).to_string()
}

fn address(port: u16) -> Value {
    json!({"socket_address": {"address": "0.0.0.0", "port_value": port}})
}

/// Envoy as HBONE client: each connection becomes a CONNECT stream to its original address, at the tunnel port.
pub fn envoy_client(pair: &Pair<'_>) -> String {
    let proxy = json!({
        "stat_prefix": "out", "cluster": "out", "tunneling_config": {"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"},
    });
    let original = typed("extensions.filters.listener.original_dst.v3.OriginalDst", json!({}));
    let listener = json!({
        "address": address(TAKE),
        "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config": original}],
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": typed("extensions.filters.network.tcp_proxy.v3.TcpProxy", proxy),
        }]}],
    });
    let http = json!({"explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100}}});
    let context = json!({"common_tls_context": envoy_tls(pair.root, pair.client)});
    let protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let mut options = serde_json::Map::new();
    options.insert(protocol.into(), typed(protocol.trim_start_matches("envoy."), http));
    let cluster = json!({
        "original_dst_lb_config": {"upstream_port_override": TUNNEL},
        "typed_extension_protocol_options": options,
        "transport_socket": envoy_socket("UpstreamTlsContext", context),
    });
    envoy(listener, &cluster)
}

/// Envoy as the end of the tunnels: each stream becomes a connection to the address in `:authority`.
pub fn envoy_server(pair: &Pair<'_>) -> String {
    let router = typed("extensions.filters.http.router.v3.Router", json!({}));
    let manager = json!({
        "stat_prefix": "hbone", "codec_type": "HTTP2", "http2_protocol_options": {"allow_connect": true},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "route_config": {"name": "connect", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
            {"match": {"connect_matcher": {}}, "route": {
                "cluster": "out", "timeout": "0s",
                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
            }},
        ]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    });
    let kind = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let context = json!({"require_client_certificate": true, "common_tls_context": envoy_tls(pair.root, pair.server)});
    let listener = json!({
        "address": address(TUNNEL),
        "filter_chains": [{
            "transport_socket": envoy_socket("DownstreamTlsContext", context),
            "filters": [
                {"name": "envoy.filters.network.http_connection_manager", "typed_config": typed(kind, manager)},
            ],
        }],
    });
    let original = json!({"use_http_header": true, "http_header_name": ":authority"});
    envoy(listener, &json!({"original_dst_lb_config": original}))
}

fn haproxy(bind: &str, server: &str) -> String {
    format!(
        "global\n  maxconn {MANY}\n  nbthread 2\n  no strict-limits\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
         listen carry\n  bind {bind}\n  server next {server}\n"
    )
}

/// haproxy in the client's pod. It reads chain and key from one file, made by [`one_file`].
pub fn haproxy_client(pair: &Pair<'_>) -> String {
    let (own, root) = (one_file(pair.client), pair.root.display());
    let server = format!("{}:{TUNNEL} ssl verify required ca-file {root} crt {own} ssl-min-ver TLSv1.3", pair.to);
    haproxy(&format!("0.0.0.0:{TAKE}"), &server)
}

pub fn haproxy_server(pair: &Pair<'_>) -> String {
    let (own, root) = (one_file(pair.server), pair.root.display());
    let bind = format!("0.0.0.0:{TUNNEL} ssl crt {own} ca-file {root} verify required ssl-min-ver TLSv1.3");
    haproxy(&bind, &format!("127.0.0.1:{}", pair.port))
}

fn one_file(own: &Files) -> String {
    let both = own.chain.with_extension("both");
    let text = std::fs::read_to_string(&own.chain).unwrap() + &std::fs::read_to_string(&own.key).unwrap();
    std::fs::write(&both, text).unwrap();
    both.display().to_string()
}

fn nginx(dir: &Path, server: &str) -> String {
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root;\nworker_processes 2;\ndaemon off;\n\
         pid {}/nginx.pid;\nerror_log stderr warn;\nworker_rlimit_nofile {MANY};\n\
         events {{ worker_connections {NGINX_SOCKETS}; }}\nstream {{ access_log off; proxy_timeout 1h; tcp_nodelay on;\n\
         server {{ {server} }} }}\n",
        dir.display()
    )
}

/// nginx in the client's pod. It does not verify the server: `proxy_ssl_verify` would check a DNS name, which these
/// certificates do not have.
pub fn nginx_client(pair: &Pair<'_>, dir: &Path) -> String {
    let (chain, key) = (pair.client.chain.display(), pair.client.key.display());
    nginx(
        dir,
        &format!(
            "listen {TAKE}; proxy_pass {}:{TUNNEL}; proxy_ssl on; proxy_ssl_protocols TLSv1.3;\n\
             proxy_ssl_certificate {chain}; proxy_ssl_certificate_key {key};",
            pair.to
        ),
    )
}

pub fn nginx_server(pair: &Pair<'_>, dir: &Path) -> String {
    let (chain, key, root) = (pair.server.chain.display(), pair.server.key.display(), pair.root.display());
    nginx(
        dir,
        &format!(
            "listen {TUNNEL} ssl; ssl_protocols TLSv1.3; ssl_verify_client on; ssl_client_certificate {root};\n\
             ssl_session_cache shared:s:1m; ssl_certificate {chain}; ssl_certificate_key {key};\n\
             proxy_pass 127.0.0.1:{};",
            pair.port
        ),
    )
}
