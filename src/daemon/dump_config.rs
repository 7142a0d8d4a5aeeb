//! Which version this is and what it is set to, as `/config_dump` shows it: by the reference's names where it has the setting.

use crate::config::{CaSource, Config, MeshSource};
use crate::connection::choose::own_ports;
use crate::node::Source;
use crate::ports;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// The version. What was not known when it was built is `unknown`.
pub(super) fn version(c: &Config) -> Value {
    let istio = match &c.mesh {
        MeshSource::Xds(xds) => xds.metadata.get("ISTIO_VERSION").and_then(Value::as_str),
        MeshSource::File(_) => None,
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("CULVERT_GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": option_env!("CULVERT_RUST_VERSION").unwrap_or("unknown"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": "culvert",
        "istioVersion": istio.unwrap_or("unknown"),
        "cryptoProvider": "aws-lc-rs",
    })
}

fn duration(d: Duration) -> String {
    humantime::format_duration(d).to_string()
}

/// The settings. Values of headers, tokens and keys are not among them.
pub(super) fn config(c: &Config) -> Value {
    let (mut shown, ours) = (theirs(c), own(c));
    if let (Value::Object(shown), Value::Object(ours)) = (&mut shown, ours) {
        shown.extend(ours);
    }
    shown
}

/// Those that the reference has.
fn theirs(c: &Config) -> Value {
    let any: IpAddr = if c.node.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let on = |ip: IpAddr, port| SocketAddr::new(ip, port).to_string();
    let (xds, keepalive) = (xds(c), c.connection.sockets.legs.keepalive);
    json!({
        "proxy": true,
        "dnsProxy": c.dns.capture,
        "windowSize": c.connection.hbone.stream_window,
        "connectionWindowSize": c.connection.hbone.connection_window,
        "frameSize": c.connection.hbone.frame_size,
        "poolMaxStreamsPerConn": c.connection.pool.max_streams,
        "poolUnusedReleaseTimeout": duration(c.connection.pool.idle),
        "adminAddr": on(Ipv4Addr::LOCALHOST.into(), c.admin.admin_port),
        "statsAddr": on(any, c.admin.stats_port),
        "readinessAddr": on(any, ports::READY),
        "inboundAddr": on(any, ports::HBONE),
        "inboundPlaintextAddr": on(any, ports::PLAINTEXT),
        "outboundAddr": on(any, ports::OUTBOUND),
        "dnsProxyAddr": on(any, ports::DNS),
        "illegalPorts": own_ports(c.dns.capture),
        "network": c.network,
        "localNode": c.node_name,
        "proxyMode": "Shared",
        "clusterId": c.node.cluster_id,
        "clusterDomain": &*c.dns.cluster_domain,
        "caAddress": match &c.ca { CaSource::Istio(rpc) => Some(rpc.address.to_string()), CaSource::Builtin(_) => None },
        "secretTtl": duration(c.secret_ttl),
        "xdsAddress": xds.map(|xds| xds.rpc.address.to_string()),
        "xdsOnDemand": xds.is_some_and(|xds| xds.on_demand),
        "preferedServiceNamespace": Some(&*c.dns.preferred_namespace).filter(|name| !name.is_empty()),
        "selfTerminationDeadline": duration(c.drain_deadline),
        "proxyMetadata": xds.map(|xds| &xds.metadata),
        "numWorkerThreads": c.connection.workers,
        "requireOriginalSource": c.connection.sockets.keep_source,
        "fakeCa": false,
        "inpodUds": match &c.node.source { Source::Agent(path) => Some(path.display().to_string()), _ => None },
        "inpodPortReuse": c.node.reuse_port,
        "packetMark": c.node.mark,
        "socketConfig": {
            "keepaliveEnabled": keepalive.is_some(),
            "keepaliveTime": keepalive.map(|k| duration(k.time)),
            "keepaliveInterval": keepalive.map(|k| duration(k.interval)),
            "keepaliveRetries": keepalive.map(|k| k.retries),
            "userTimeoutEnabled": keepalive.is_some_and(|k| k.user_timeout),
        },
        "localhostAppTunnel": c.connection.localhost_app_tunnel,
        "ipv6Enabled": c.node.ipv6,
        "crlPath": c.crl.as_ref().map(|p| p.display().to_string()),
    })
}

/// Those of our own.
fn own(c: &Config) -> Value {
    let xds = xds(c);
    json!({
        "localXdsPath": match &c.mesh { MeshSource::File(path) => Some(path.display().to_string()), MeshSource::Xds(_) => None },
        "stateFile": xds.and_then(|xds| xds.state_file.as_ref()).map(|p| p.display().to_string()),
        "pods": match &c.node.source { Source::File(_) => "file", Source::Agent(_) => "agent", Source::Kubernetes(_) => "kubernetes" },
        "podsFile": match &c.node.source { Source::File(path) => Some(path.display().to_string()), _ => None },
        "caDir": match &c.ca { CaSource::Builtin(dir) => Some(dir.display().to_string()), CaSource::Istio(_) => None },
        "trustDomain": c.trust_domain,
        "onlyPostQuantum": c.only_post_quantum,
        "trustDomainAliases": c.trust_domain_aliases,
        "maxConnections": c.connection.max_connections,
        "halfClosedTimeout": duration(c.connection.hbone.half_closed_silence),
        "enableResponseBaggage": c.connection.response_baggage,
        "logFilter": c.log.filter,
        "logFormat": if c.log.json { "json" } else { "text" },
        "settings": c.settings,
    })
}

fn xds(c: &Config) -> Option<&crate::control::xds::Config> {
    match &c.mesh {
        MeshSource::Xds(xds) => Some(xds),
        MeshSource::File(_) => None,
    }
}
