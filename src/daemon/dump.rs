//! The admin port's pages as JSON: `/config_dump`, in the form that `istioctl ztunnel-config` reads, `/connections` and
//! `/pods`.

use super::parts::Parts;
use super::tcp::Sockets;
use super::{dump_config, version};
use crate::admin::Query;
use crate::config::MeshSource;
use crate::connection::Shared;
use crate::connection::choose::endpoints::SetAside;
use crate::connection::report::Direction;
use crate::connection::report::live::Connection;
use crate::identity::Credentials;
use crate::identity::store::HeldCertificate;
use crate::mesh::egress::{EgressAction, EgressPolicy, EgressRule, HostMatch};
use crate::mesh::policy::{Action, Attribute, Match, PolicyScope, StringMatch};
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::workload::{Delivery, Health, NetworkMode};
use crate::mesh::{GatewayRef, Policy, Protocol, Service, Snapshot, Text, Workload};
use crate::node::spec::NetnsRef;
use crate::node::status::{CaptureState, PodStatus};
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};
use x509_parser::prelude::{FromDer, X509Certificate};

/// `/config_dump`.
pub(super) fn config_dump(parts: &Parts) -> Value {
    let snapshot = parts.mesh.load();
    let [workloads, services, policies] = facts(&snapshot);
    let live = parts.reporter.live.list();
    let state: Map<String, Value> =
        parts.board.list().iter().map(|pod| (pod.spec.uid.to_string(), workload_state(pod, &live))).collect();
    json!({
        "workloads": workloads,
        "services": services,
        "policies": policies,
        "egress": snapshot.egress.all().map(egress).collect::<Vec<_>>(),
        "stagedServices": staged(&snapshot),
        "staticConfig": {"workloads": [], "services": [], "policies": []},
        "meshState": mesh_state(parts),
        "endpointsSetAside": set_aside(parts),
        "revocationListError": parts.revocations.error(),
        "meshFileError": parts.mesh_file.error(),
        "egressFileError": parts.egress_file.error(),
        "certificates": certificates(parts),
        "workloadState": state,
        "version": version::shown(&parts.config),
        "config": dump_config::config(&parts.config),
    })
}

/// The workloads, services and policies of a mesh, each by name.
pub(super) fn facts(snapshot: &Snapshot) -> [Value; 3] {
    let sorted = |mut all: Vec<(String, Value)>| {
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Value::Array(all.into_iter().map(|(_, value)| value).collect())
    };
    [
        sorted(snapshot.workloads().map(|w| (w.uid.to_string(), workload(w))).collect()),
        sorted(snapshot.services().map(|s| (s.key.hostname.to_string(), service(snapshot, s))).collect()),
        sorted(snapshot.policies().map(|p| (p.key.to_string(), policy(p))).collect()),
    ]
}

fn egress(policy: &EgressPolicy) -> Value {
    let action = |action: EgressAction| match action {
        EgressAction::Allow => "Allow",
        EgressAction::Log => "Log",
        EgressAction::Deny => "Deny",
    };
    let rule = |rule: &EgressRule| {
        json!({
            "action": action(rule.action),
            "cidrs": rule.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ports": rule.ports.iter().map(|(first, last)| format!("{first}-{last}")).collect::<Vec<_>>(),
            "hosts": rule.hosts.iter().map(HostMatch::text).collect::<Vec<_>>(),
        })
    };
    json!({
        "namespace": &*policy.namespace,
        "dryRun": policy.dry_run,
        "default": action(policy.otherwise),
        "rules": policy.rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

/// `/connections`; with `tcp_info=true` also how both legs of each do.
pub(super) fn connections(parts: &Parts, shared: &Shared, query: &Query) -> Result<Value, String> {
    let mut with_tcp = false;
    for (name, value) in query {
        match (name.as_str(), value.as_str()) {
            ("tcp_info", "true") => with_tcp = true,
            ("tcp_info", "false") => with_tcp = false,
            _ => return Err(format!("{name:?} with the value {value:?} is not understood: use tcp_info=true")),
        }
    }
    let live = parts.reporter.live.list();
    let sockets = with_tcp.then(|| Sockets::of(shared, &live));
    let names = pod_names(parts);
    let one = |(id, c): &(u64, std::sync::Arc<Connection>)| {
        let mut shown = connection(*id, c, &names);
        if let (Some(sockets), Value::Object(shown)) = (&sockets, &mut shown) {
            shown.insert("tcp".into(), sockets.show(c));
        }
        shown
    };
    Ok(Value::Array(live.iter().map(one).collect()))
}

/// The pods as `namespace/name`, by uid.
pub(super) fn pod_names(parts: &Parts) -> HashMap<Text, String> {
    let all = parts.board.list().into_iter();
    all.map(|pod| (pod.spec.uid.clone(), format!("{}/{}", pod.spec.namespace, pod.spec.name))).collect()
}

/// One connection of `/connections`.
pub(super) fn connection(id: u64, c: &Connection, names: &HashMap<Text, String>) -> Value {
    json!({
        "id": id,
        "pod": &*c.pod,
        "podName": names.get(&c.pod),
        "direction": c.direction.word(),
        "protocol": c.protocol(),
        "src": c.source.to_string(),
        "dst": c.destination.to_string(),
        "actualDst": c.details.actual.to_string(),
        "hboneAddr": c.details.authority.as_ref().map(ToString::to_string),
        "service": c.details.service.as_ref().map(|service| &*service.key.hostname),
        "srcIdentity": c.details.source_identity.as_ref().map(ToString::to_string),
        "gateway": c.details.gateway.as_deref(),
        "gatewayIdentity": c.gateway_identity().map(ToString::to_string),
        "dstIdentity": c.destination_identity().map(ToString::to_string),
        "bytesSent": c.bytes.up.load(Ordering::Relaxed),
        "bytesReceived": c.bytes.down.load(Ordering::Relaxed),
        "ageMs": u64::try_from(c.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        "tls": c.tls().map(|t| json!({"version": t.version, "keyExchange": t.key_exchange, "cipher": t.cipher})),
        "rule": c.details.rule.as_deref(),
    })
}

/// `/set_aside`.
pub(super) fn set_aside(parts: &Parts) -> Value {
    let mut all = parts.endpoints.set_aside();
    all.sort_by(|a, b| {
        (&a.service, a.service_port, &a.workload.uid).cmp(&(&b.service, b.service_port, &b.workload.uid))
    });
    let one = |one: SetAside| {
        json!({
            "service": one.service.to_string(),
            "servicePort": one.service_port,
            "workloadUid": &*one.workload.uid,
            "addresses": one.workload.ips,
            "hostname": Some(&*one.workload.hostname).filter(|name| !name.is_empty()),
            "port": one.port,
            "reason": one.failures.last.word(),
            "pauses": one.failures.pauses,
            "leftMs": one.left,
            "for": if one.for_everyone { "all pods" } else { "one pod" },
        })
    };
    Value::Array(all.into_iter().map(one).collect())
}

/// `/pods`.
pub(super) fn pods(parts: &Parts) -> Value {
    let one = |pod: &PodStatus| {
        json!({
            "uid": &*pod.spec.uid,
            "name": &*pod.spec.name,
            "namespace": &*pod.spec.namespace,
            "serviceAccount": &*pod.spec.service_account,
            "netns": pod.spec.netns.to_string(),
            "netnsHeld": held_netns(&pod.spec.netns),
            "state": pod.state.word(),
            "reason": pod.state.reason(),
            "since": time(pod.since),
            "listening": pod.listening,
            "redirected": pod.redirected,
            "uncapturedConnections": pod.preexisting,
            "bypassInboundCapture": pod.spec.settings.bypass_inbound,
            "dns": dns(parts, &pod.spec.uid),
            "otherRules": pod.observations.other_rules,
            "rulesUnread": pod.observations.unread,
            "inboundUnverified": pod.observations.inbound_unverified,
            "probeConnections": pod.observations.probe_connections,
            "untunnelledUdp": pod.observations.untunnelled_udp,
            "untunnelledOther": pod.observations.untunnelled_other,
            "mayBypass": pod.spec.powers.map(|powers| {
                let held = [("NET_ADMIN", powers.net_admin), ("NET_RAW", powers.net_raw)];
                held.into_iter().filter(|(_, held)| *held).map(|(name, _)| name).collect::<Vec<_>>()
            }),
        })
    };
    Value::Array(parts.board.list().iter().map(one).collect())
}

/// Where a namespace can be opened that is known by a descriptor instead of a path: in the daemon's own `/proc`, for as
/// long as it is held.
fn held_netns(netns: &NetnsRef) -> Value {
    let NetnsRef::Handle(netns) = netns else { return Value::Null };
    let ((device, inode), process) = (netns.id(), std::process::id());
    json!({"file": format!("/proc/{process}/fd/{}", netns.descriptor()), "device": device, "inode": inode})
}

/// How a pod's DNS requests ended, and which resolvers receive those that the mesh does not answer.
fn dns(parts: &Parts, uid: &Text) -> Value {
    let Some(requests) = parts.dns.counts(uid) else { return Value::Null };
    let used = parts.dns.resolvers(uid);
    json!({
        "requests": requests,
        "resolvers": used.as_ref().map(|used| used.servers.iter().map(ToString::to_string).collect::<Vec<_>>()),
        "search": used.as_ref().map(|used| used.search.iter().map(|search| &search.domain).collect::<Vec<_>>()),
        "from": used.map(|used| if used.from_pod { "the pod's resolv.conf" } else { "the daemon's resolv.conf" }),
    })
}

fn workload_state(pod: &PodStatus, live: &[(u64, std::sync::Arc<Connection>)]) -> Value {
    let of = |direction: Direction| {
        let all = live.iter().filter(|(_, c)| c.pod == pod.spec.uid && c.direction == direction);
        let one = |(_, c): &(u64, std::sync::Arc<Connection>)| {
            let original = match direction {
                Direction::Outbound => Value::from(c.destination.to_string()),
                Direction::Inbound => {
                    c.details.service.as_ref().map_or(Value::Null, |service| (*service.key.hostname).into())
                }
            };
            json!({"src": c.source.to_string(), "originalDst": original, "actualDst": c.details.actual.to_string(), "protocol": c.protocol()})
        };
        all.map(one).collect::<Vec<Value>>()
    };
    json!({
        "state": if pod.state == CaptureState::Captured { "Up" } else { "Pending" },
        "reason": pod.state.reason(),
        "info": {
            "name": &*pod.spec.name,
            "namespace": &*pod.spec.namespace,
            "serviceAccount": &*pod.spec.service_account,
        },
        "connections": {"inbound": of(Direction::Inbound), "outbound": of(Direction::Outbound)},
    })
}

/// Removes empty values, because ztunnel's dump leaves out defaults. The keys in `always` stay.
fn without_defaults(value: Value, always: &[&str]) -> Value {
    let Value::Object(map) = value else { return value };
    let empty = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    Value::Object(map.into_iter().filter(|(key, v)| always.contains(&key.as_str()) || !empty(v)).collect())
}

fn workload(w: &Workload) -> Value {
    let services: Vec<String> = w.services.keys().map(ToString::to_string).collect();
    let locality = json!({"region": &*w.locality.region, "zone": &*w.locality.zone, "subzone": &*w.locality.subzone});
    let value = json!({
        "workloadIps": w.ips,
        "waypoint": w.waypoint.as_ref().map(gateway),
        "networkGateway": w.network_gateway.as_ref().map(gateway),
        "protocol": match w.protocol { Protocol::Tcp => "TCP", Protocol::Hbone => "HBONE", Protocol::Unsupported => "unsupported" },
        "networkMode": match w.network_mode { NetworkMode::Standard => "Standard", NetworkMode::HostNetwork => "HostNetwork" },
        "uid": &*w.uid,
        "name": &*w.name,
        "namespace": &*w.namespace,
        "trustDomain": &*w.trust_domain,
        "serviceAccount": &*w.service_account,
        "network": &*w.network,
        "workloadName": &*w.workload_name,
        "workloadType": w.workload_type.as_str(),
        "canonicalName": &*w.canonical_name,
        "canonicalRevision": &*w.canonical_revision,
        "hostname": &*w.hostname,
        "node": &*w.node,
        "nativeTunnel": w.native_tunnel,
        "applicationTunnel": w.application_tunnel.map(|t| {
            let protocol = match t.delivery {
                Delivery::Plain => "NONE",
                Delivery::Proxy => "PROXY",
                Delivery::Unsupported => "unsupported",
            };
            json!({"protocol": protocol, "port": t.port})
        }),
        "authorizationPolicies": w.policies.iter().map(|p| &**p).collect::<Vec<_>>(),
        "status": match w.health { Health::Healthy => "Healthy", Health::Unhealthy => "Unhealthy" },
        "clusterId": &*w.cluster_id,
        "locality": without_defaults(locality, &[]),
        "services": services,
        "capacity": w.capacity,
    });
    without_defaults(
        value,
        &["workloadIps", "protocol", "networkMode", "name", "namespace", "status", "clusterId", "capacity"],
    )
}

fn gateway(g: &GatewayRef) -> Value {
    json!({"destination": g.target.to_string(), "hboneMtlsPort": g.hbone_port})
}

fn service(snapshot: &Snapshot, s: &Service) -> Value {
    let ports: Map<String, Value> = s.ports.iter().map(|(from, to)| (from.to_string(), Value::from(*to))).collect();
    let endpoints: Map<String, Value> = snapshot
        .endpoints(&s.key)
        .map(|endpoint| {
            let ports: Map<String, Value> =
                endpoint.ports.iter().map(|(from, to)| (from.to_string(), Value::from(*to))).collect();
            let status = if endpoint.workload.health == Health::Healthy { "Healthy" } else { "Unhealthy" };
            let uid = endpoint.workload.uid.to_string();
            (uid.clone(), json!({"workloadUid": uid, "port": ports, "status": status}))
        })
        .collect();
    let value = json!({
        "name": &*s.name,
        "namespace": &*s.key.namespace,
        "hostname": &*s.key.hostname,
        "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "cidrVips": s.cidrs.iter()
            .map(|cidr| json!({"network": &*cidr.network, "cidr": cidr.range.to_string()})).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "portNames": s.port_names.iter().map(|(name, port)| (name.to_string(), Value::from(*port))).collect::<serde_json::Map<_, _>>(),
        "subjectAltNames": s.subject_alt_names.iter().map(|n| &**n).collect::<Vec<_>>(),
        "waypoint": s.waypoint.as_ref().map(gateway),
        "weightedWaypoints": s.weighted_waypoints.iter()
            .map(|(way, weight)| json!({"destination": gateway(way), "weight": weight})).collect::<Vec<_>>(),
        "loadBalancer": s.load_balancer.as_ref().map(load_balancer),
        "ipFamilies": s.ip_families.map(|f| match f { IpFamilies::V4 => "IPv4", IpFamilies::V6 => "IPv6", IpFamilies::Dual => "Dual" }),
        "canonical": s.canonical,
        "visibility": match s.visibility { Visibility::Public => "Public", Visibility::Namespace => "Namespace" },
    });
    without_defaults(value, &["name", "namespace", "hostname", "vips", "ports", "endpoints", "visibility"])
}

/// Endpoints by services that are not known (yet).
fn staged(snapshot: &Snapshot) -> Value {
    let one = |(key, uids): (&crate::mesh::ServiceKey, Vec<&crate::mesh::Text>)| {
        (key.to_string(), Value::Array(uids.into_iter().map(|uid| Value::from(&**uid)).collect()))
    };
    Value::Object(snapshot.staged().map(one).collect())
}

fn load_balancer(lb: &LoadBalancer) -> Value {
    let scope = |scope: &RoutingScope| match scope {
        RoutingScope::Region => "Region",
        RoutingScope::Zone => "Zone",
        RoutingScope::Subzone => "Subzone",
        RoutingScope::Node => "Node",
        RoutingScope::Cluster => "Cluster",
        RoutingScope::Network => "Network",
        RoutingScope::Unknown => "Unknown",
    };
    json!({
        "routingPreferences": lb.preferences.iter().map(scope).collect::<Vec<_>>(),
        "mode": match lb.mode {
            LoadBalancingMode::Standard => "Standard",
            LoadBalancingMode::Strict => "Strict",
            LoadBalancingMode::Failover => "Failover",
            LoadBalancingMode::Passthrough => "Passthrough",
        },
        "healthPolicy": match lb.health_policy { HealthPolicy::OnlyHealthy => "OnlyHealthy", HealthPolicy::AllowAll => "AllowAll" },
    })
}

fn policy(p: &Policy) -> Value {
    let rules: Vec<Vec<Vec<Value>>> =
        p.rules.iter().map(|rule| rule.iter().map(|clause| clause.iter().map(one_match).collect()).collect()).collect();
    json!({
        "name": &*p.name,
        "namespace": &*p.namespace,
        "scope": match p.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::WorkloadSelector => "WorkloadSelector",
        },
        "action": match p.action { Action::Allow => "Allow", Action::Deny => "Deny" },
        "dryRun": p.dry_run,
        "rules": rules,
    })
}

fn one_match(m: &Match) -> Value {
    let mut map = Map::new();
    let mut put = |name: &str, not: &str, (any_of, none_of): (Vec<Value>, Vec<Value>)| {
        for (key, list) in [(name, any_of), (not, none_of)] {
            if !list.is_empty() {
                map.insert(key.to_owned(), Value::Array(list));
            }
        }
    };
    let text = |m: &StringMatch| match m {
        StringMatch::Exact(t) => json!({"Exact": &**t}),
        StringMatch::Prefix(t) => json!({"Prefix": &**t}),
        StringMatch::Suffix(t) => json!({"Suffix": &**t}),
        StringMatch::Presence => json!({"Presence": []}),
    };
    put("namespaces", "notNamespaces", lists(&m.namespaces, text));
    put("principals", "notPrincipals", lists(&m.principals, text));
    let account = |a: &crate::mesh::policy::ServiceAccountMatch| json!({"namespace": &*a.namespace, "serviceAccount": &*a.service_account});
    put("serviceAccounts", "notServiceAccounts", lists(&m.service_accounts, account));
    let net = |n: &ipnet::IpNet| Value::from(n.to_string());
    put("sourceIps", "notSourceIps", lists(&m.source_ips, net));
    put("destinationIps", "notDestinationIps", lists(&m.destination_ips, net));
    put("destinationPorts", "notDestinationPorts", lists(&m.destination_ports, |p| Value::from(*p)));
    Value::Object(map)
}

fn lists<T>(attribute: &Attribute<T>, show: impl Fn(&T) -> Value) -> (Vec<Value>, Vec<Value>) {
    (attribute.any_of.iter().map(&show).collect(), attribute.none_of.iter().map(&show).collect())
}

fn certificates(parts: &Parts) -> Value {
    let one = |held: HeldCertificate| {
        let chain = |pick: fn(&Credentials) -> &[CertificateDer<'static>]| {
            held.credentials.as_ref().map_or(Vec::new(), |c| pick(c).iter().map(certificate).collect())
        };
        json!({
            "identity": held.identity.to_string(),
            "state": certificate_state(&held),
            "error": held.error,
            "certChain": chain(|c| c.chain()),
            "rootCerts": chain(|c| c.roots()),
        })
    };
    Value::Array(parts.identities.list().into_iter().map(one).collect())
}

fn certificate_state(held: &HeldCertificate) -> String {
    match (&held.credentials, &held.error) {
        (Some(held), _) if held.not_after > SystemTime::now() => "Available".to_owned(),
        (Some(_), error) => format!("Unavailable: expired; {}", error.as_deref().unwrap_or("renewal is under way")),
        (None, Some(error)) => format!("Unavailable: {error}"),
        (None, None) => "Initializing".to_owned(),
    }
}

/// The certificates in short: one line for each identity.
pub(super) fn certificates_without_text(parts: &Parts) -> Value {
    let one = |held: HeldCertificate| {
        json!({
            "identity": held.identity.to_string(),
            "state": certificate_state(&held),
            "error": held.error,
            "expirationTime": held.credentials.as_ref().map(|held| time(held.not_after)),
        })
    };
    Value::Array(parts.identities.list().into_iter().map(one).collect())
}

fn certificate(der: &CertificateDer<'static>) -> Value {
    let pem = base64_pem(der);
    let Ok((_, parsed)) = X509Certificate::from_der(der) else { return json!({"pem": pem}) };
    let at = |time: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
        self::time(UNIX_EPOCH + std::time::Duration::from_secs(seconds))
    };
    json!({
        "pem": pem,
        "serialNumber": parsed.tbs_certificate.serial.to_string(),
        "validFrom": at(parsed.validity().not_before),
        "expirationTime": at(parsed.validity().not_after),
    })
}

/// The certificate's PEM text in base64, as in ztunnel's dump.
fn base64_pem(der: &CertificateDer<'static>) -> String {
    use base64::Engine as _;
    let base64 = base64::engine::general_purpose::STANDARD;
    let body = base64.encode(der);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in body.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    base64.encode(text)
}

pub(super) fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// How recent the mesh facts are, where they come from a control plane.
fn mesh_state(parts: &Parts) -> Value {
    let MeshSource::Xds(xds) = &parts.config.mesh else { return Value::Null };
    let report = parts.freshness.report();
    json!({
        "controlPlane": xds.rpc.address.to_string(),
        "stale": !report.live,
        "ageSeconds": report.age.map(|age| age.as_secs()),
        "source": if report.from_file { "state file" } else { "control plane" },
        "error": report.error,
    })
}
