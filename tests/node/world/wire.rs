//! The mesh of a test as the control plane sends it.

use super::facts::Mesh;
use culvert::proto::istio::security as auth;
use culvert::proto::istio::workload as wl;
use prost::Message;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::IpAddr;

pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

type Resources = BTreeMap<String, Vec<u8>>;

/// The resources by type and name.
pub fn resources(mesh: &Mesh) -> [(&'static str, Resources); 2] {
    let mut addresses = Resources::new();
    for w in &mesh.workloads {
        let workload = workload(w);
        addresses.insert(workload.uid.clone(), address(wl::address::Type::Workload(workload)));
    }
    for s in &mesh.services {
        let service = service(s);
        let name = format!("{}/{}", service.namespace, service.hostname);
        addresses.insert(name, address(wl::address::Type::Service(service)));
    }
    let policies = mesh.policies.iter().map(policy);
    let policies = policies.map(|p| (format!("{}/{}", p.namespace, p.name), p.encode_to_vec())).collect();
    [(ADDRESS, addresses), (AUTHORIZATION, policies)]
}

/// The other names of a resource: its addresses in their networks.
pub fn aliases(type_url: &str, _name: &str, bytes: &[u8]) -> Vec<String> {
    if type_url != ADDRESS {
        return Vec::new();
    }
    let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => Some(IpAddr::from(v4)),
        Err(_) => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    match wl::Address::decode(bytes).ok().and_then(|address| address.r#type) {
        Some(wl::address::Type::Workload(w)) => {
            w.addresses.iter().filter_map(|a| Some(format!("{}/{}", w.network, ip(a)?))).collect()
        }
        Some(wl::address::Type::Service(s)) => {
            s.addresses.iter().filter_map(|a| Some(format!("{}/{}", a.network, ip(&a.address)?))).collect()
        }
        None => Vec::new(),
    }
}

/// The keys of the services of which a workload is an endpoint.
pub fn services(bytes: &[u8]) -> Vec<String> {
    match wl::Address::decode(bytes).ok().and_then(|address| address.r#type) {
        Some(wl::address::Type::Workload(w)) => w.services.into_keys().collect(),
        _ => Vec::new(),
    }
}

pub fn address(resource: wl::address::Type) -> Vec<u8> {
    wl::Address { r#type: Some(resource) }.encode_to_vec()
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn ip_bytes(ip: &str) -> bytes::Bytes {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

fn ports(value: &Value) -> Vec<wl::Port> {
    let map = value.as_object().cloned().unwrap_or_default();
    let port = |(from, to): (&String, &Value)| wl::Port {
        service_port: from.parse().unwrap(),
        target_port: u32::try_from(to.as_u64().unwrap()).unwrap(),
        app_protocol: 0,
    };
    map.iter().map(port).collect()
}

fn gateway(value: &Value) -> Option<wl::GatewayAddress> {
    let destination = value["destination"].as_str()?;
    let (front, back) = destination.split_once('/')?;
    let destination = match back.parse::<IpAddr>() {
        Ok(_) => wl::gateway_address::Destination::Address(wl::NetworkAddress {
            network: front.into(),
            address: ip_bytes(back),
            length: None,
        }),
        Err(_) => wl::gateway_address::Destination::Hostname(wl::NamespacedHostname {
            namespace: front.into(),
            hostname: back.into(),
        }),
    };
    let port = u32::try_from(value["hboneMtlsPort"].as_u64()?).ok()?;
    Some(wl::GatewayAddress { destination: Some(destination), hbone_mtls_port: port })
}

pub fn workload(w: &Value) -> wl::Workload {
    let services = w["services"].as_object().cloned().unwrap_or_default();
    wl::Workload {
        uid: text(w, "uid"),
        name: text(w, "name"),
        namespace: text(w, "namespace"),
        service_account: text(w, "serviceAccount"),
        addresses: w["workloadIps"].as_array().unwrap().iter().map(|ip| ip_bytes(ip.as_str().unwrap())).collect(),
        tunnel_protocol: i32::from(w["protocol"] == "HBONE"),
        node: text(w, "node"),
        workload_name: text(w, "workloadName"),
        canonical_name: text(w, "canonicalName"),
        canonical_revision: text(w, "canonicalRevision"),
        cluster_id: text(w, "clusterId"),
        waypoint: gateway(&w["waypoint"]),
        status: i32::from(w["status"] == "Unhealthy"),
        authorization_policies: w["authorizationPolicies"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|p| p.as_str().unwrap().to_owned())
            .collect(),
        services: services.iter().map(|(key, map)| (key.clone(), wl::PortList { ports: ports(map) })).collect(),
        ..Default::default()
    }
}

fn service(s: &Value) -> wl::Service {
    let address = |vip: &Value| {
        let (network, ip) = vip.as_str().unwrap().split_once('/').unwrap();
        wl::NetworkAddress { network: network.into(), address: ip_bytes(ip), length: None }
    };
    let ranges = s["cidrVips"].as_array().into_iter().flatten().map(|range| {
        let (first, length) = range.as_str().unwrap().rsplit_once('/').unwrap();
        wl::NetworkAddress { length: Some(length.parse().unwrap()), ..address(&Value::from(first)) }
    });
    wl::Service {
        name: text(s, "name"),
        namespace: text(s, "namespace"),
        hostname: text(s, "hostname"),
        addresses: s["vips"].as_array().unwrap().iter().map(address).chain(ranges).collect(),
        ports: ports(&s["ports"]),
        waypoint: gateway(&s["waypoint"]),
        ..Default::default()
    }
}

fn policy(p: &Value) -> auth::Authorization {
    let scope = ["Global", "Namespace", "WorkloadSelector"].iter().position(|s| p["scope"] == **s).unwrap();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let strings = |value: &Value| {
        let one = |m: &Value| auth::StringMatch {
            match_type: Some(match m["Exact"].as_str() {
                Some(exact) => auth::string_match::MatchType::Exact(exact.into()),
                None => auth::string_match::MatchType::Presence(()),
            }),
        };
        list(value).iter().map(one).collect::<Vec<_>>()
    };
    let one_match = |m: &Value| auth::Match {
        principals: strings(&m["principals"]),
        not_principals: strings(&m["notPrincipals"]),
        destination_ports: list(&m["destinationPorts"]).iter().map(|n| n.as_u64().unwrap() as u32).collect(),
        ..Default::default()
    };
    let clause = |c: &Value| auth::Clause { matches: list(c).iter().map(one_match).collect() };
    let rule = |r: &Value| auth::Rule { clauses: list(r).iter().map(clause).collect() };
    auth::Authorization {
        name: text(p, "name"),
        namespace: text(p, "namespace"),
        scope: i32::try_from(scope).unwrap(),
        action: i32::from(p["action"] == "Deny"),
        dry_run: p["dryRun"] == true,
        rules: list(&p["rules"]).iter().map(rule).collect(),
        ..Default::default()
    }
}
