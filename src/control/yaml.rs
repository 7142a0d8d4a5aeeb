//! Parses the mesh file: YAML text into mesh facts. Pure; accepts any text. Unknown keys and values are errors that
//! name the line and the key.
//!
//! The format is that of ztunnel's local configuration (workloads, services, policies), with these additions:
//! `trustDomain` defaults to `cluster.local`, `serviceAccount` to `default`, `uid` to
//! `<clusterId>//Pod/<namespace>/<name>`, and an IP address without prefix length is accepted as a CIDR.

use super::yaml_egress::FileEgress;
use super::yaml_policies::FilePolicy;
use crate::mesh::address::{parse_network_address, parse_network_cidr};
use crate::mesh::egress::EgressPolicy;
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, RoutingScope, Visibility};
use crate::mesh::workload::{ApplicationTunnel, Delivery, Health, Locality, NetworkMode, WorkloadType, pod_uid};
use crate::mesh::{Facts, GatewayRef, GatewayTarget, Protocol, Service, ServiceKey, Text, Workload};
use crate::task::files::from_yaml;
use ipnet::IpNet;
use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

/// Why a mesh file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It is not YAML, or has an unknown key. The text names line, column and key.
    #[error("{0}")]
    Yaml(String),
    /// A value is invalid. The text names the object.
    #[error("{0}")]
    Values(String),
}

/// Parses a mesh file. All invalid values are reported together.
pub fn facts(text: &str) -> Result<Facts, DecodeError> {
    let file: File = from_yaml(text).map_err(DecodeError::Yaml)?;
    let mut faults = Vec::new();
    let facts = Facts {
        workloads: file.workloads.into_iter().filter_map(|w| keep(w.check(), &mut faults)).collect(),
        services: file.services.into_iter().filter_map(|s| keep(s.check(), &mut faults)).collect(),
        policies: file.policies.into_iter().filter_map(|p| keep(p.check(), &mut faults)).collect(),
        egress: file.egress.into_iter().filter_map(|e| keep(e.check(), &mut faults)).collect(),
    };
    report_duplicates("workload", facts.workloads.iter().map(|w| w.uid.to_string()), &mut faults);
    let pods = facts.workloads.iter().filter(|w| !w.name.is_empty());
    report_duplicates("workload", pods.map(|w| format!("{}/{}", w.namespace, w.name)), &mut faults);
    report_duplicates("service", facts.services.iter().map(|s| s.key.to_string()), &mut faults);
    report_duplicates("policy", facts.policies.iter().map(|p| p.key.to_string()), &mut faults);
    report_double_egress(&facts.egress, &mut faults);
    if faults.is_empty() { Ok(facts) } else { Err(DecodeError::Values(faults.join("; "))) }
}

/// Parses an egress file, which is the section `egress` of a mesh file and nothing else.
pub fn egress(text: &str) -> Result<Vec<EgressPolicy>, DecodeError> {
    let file: EgressFile = from_yaml(text).map_err(DecodeError::Yaml)?;
    let mut faults = Vec::new();
    let policies: Vec<_> = file.egress.into_iter().filter_map(|e| keep(e.check(), &mut faults)).collect();
    report_double_egress(&policies, &mut faults);
    if faults.is_empty() { Ok(policies) } else { Err(DecodeError::Values(faults.join("; "))) }
}

fn report_double_egress(policies: &[EgressPolicy], faults: &mut Vec<String>) {
    report_duplicates("egress of namespace", policies.iter().map(|policy| policy.namespace.to_string()), faults);
}

fn keep<T>(result: Result<T, String>, faults: &mut Vec<String>) -> Option<T> {
    result.map_err(|fault| faults.push(fault)).ok()
}

fn report_duplicates(kind: &str, keys: impl Iterator<Item = String>, faults: &mut Vec<String>) {
    let mut seen = HashSet::new();
    for key in keys {
        if !seen.insert(key.clone()) {
            faults.push(format!("{kind} {key} occurs twice"));
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    workloads: Vec<FileWorkload>,
    #[serde(default)]
    services: Vec<FileService>,
    #[serde(default)]
    policies: Vec<FilePolicy>,
    #[serde(default)]
    egress: Vec<FileEgress>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EgressFile {
    /// Required: without it, a misspelt key of a file with nothing else would mean that everything is allowed.
    egress: Vec<FileEgress>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileGateway {
    destination: String,
    hbone_mtls_port: u16,
}

impl FileGateway {
    fn check(self) -> Result<GatewayRef, String> {
        let target = GatewayTarget::parse(&self.destination)
            .map_err(|_| format!("{:?} is neither network/ip nor namespace/hostname", self.destination))?;
        Ok(GatewayRef { target, hbone_port: self.hbone_mtls_port })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FileLocality {
    region: String,
    zone: String,
    subzone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileTunnel {
    protocol: TunnelProtocol,
    port: Option<u16>,
}

#[derive(Deserialize)]
enum TunnelProtocol {
    #[serde(rename = "NONE")]
    None,
    #[serde(rename = "PROXY")]
    Proxy,
}

#[derive(Deserialize, Default)]
enum FileProtocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Deserialize, Default)]
enum FileNetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Deserialize, Default)]
enum FileHealth {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum FileWorkloadType {
    #[default]
    Deployment,
    CronJob,
    Pod,
    Job,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileWorkload {
    workload_ips: Option<Vec<IpAddr>>,
    namespace: String,
    services: Option<BTreeMap<String, BTreeMap<u16, u16>>>,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    name: String,
    #[serde(default = "cluster_local")]
    trust_domain: String,
    #[serde(default = "default_account")]
    service_account: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    protocol: FileProtocol,
    #[serde(default)]
    network_mode: FileNetworkMode,
    waypoint: Option<FileGateway>,
    network_gateway: Option<FileGateway>,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: FileWorkloadType,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<FileTunnel>,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default)]
    status: FileHealth,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    locality: FileLocality,
    #[serde(default = "one")]
    capacity: u32,
}

fn cluster_local() -> String {
    "cluster.local".into()
}

fn default_account() -> String {
    "default".into()
}

fn one() -> u32 {
    1
}

impl FileWorkload {
    fn check(self) -> Result<Workload, String> {
        let label = if self.uid.is_empty() { format!("{}/{}", self.namespace, self.name) } else { self.uid.clone() };
        let fault = |reason: String| format!("workload {label}: {reason}");
        if self.uid.is_empty() && self.name.is_empty() {
            return Err(fault("one of uid and name is needed".into()));
        }
        let Some(workload_ips) = self.workload_ips else {
            return Err(fault("workloadIps is missing; write `workloadIps: []` if it has only a host name".into()));
        };
        // A workload without services may omit the key.
        let mut services = BTreeMap::new();
        for (key, ports) in self.services.unwrap_or_default() {
            services.insert(ServiceKey::parse(&key).map_err(|e| fault(e.to_string()))?, ports);
        }
        let gateway = |g: Option<FileGateway>| g.map(FileGateway::check).transpose().map_err(&fault);
        let uid =
            if self.uid.is_empty() { pod_uid(&self.cluster_id, &self.namespace, &self.name) } else { self.uid.into() };
        let workload = Workload {
            uid,
            name: self.name.into(),
            namespace: self.namespace.into(),
            trust_domain: self.trust_domain.into(),
            service_account: self.service_account.into(),
            ips: workload_ips.iter().map(IpAddr::to_canonical).collect(),
            network: self.network.into(),
            protocol: match self.protocol {
                FileProtocol::Tcp => Protocol::Tcp,
                FileProtocol::Hbone => Protocol::Hbone,
            },
            network_mode: match self.network_mode {
                FileNetworkMode::Standard => NetworkMode::Standard,
                FileNetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            waypoint: gateway(self.waypoint)?,
            network_gateway: gateway(self.network_gateway)?,
            canonical_name: self.canonical_name.into(),
            canonical_revision: self.canonical_revision.into(),
            workload_name: self.workload_name.into(),
            workload_type: match self.workload_type {
                FileWorkloadType::Deployment => WorkloadType::Deployment,
                FileWorkloadType::CronJob => WorkloadType::CronJob,
                FileWorkloadType::Pod => WorkloadType::Pod,
                FileWorkloadType::Job => WorkloadType::Job,
            },
            hostname: self.hostname.into(),
            node: self.node.into(),
            native_tunnel: self.native_tunnel,
            application_tunnel: self.application_tunnel.map(|tunnel| ApplicationTunnel {
                delivery: match tunnel.protocol {
                    TunnelProtocol::None => Delivery::Plain,
                    TunnelProtocol::Proxy => Delivery::Proxy,
                },
                port: tunnel.port.filter(|port| *port != 0),
            }),
            policies: self.authorization_policies.into_iter().map(Text::from).collect(),
            health: match self.status {
                FileHealth::Healthy => Health::Healthy,
                FileHealth::Unhealthy => Health::Unhealthy,
            },
            cluster_id: self.cluster_id.into(),
            locality: Locality {
                region: self.locality.region.into(),
                zone: self.locality.zone.into(),
                subzone: self.locality.subzone.into(),
            },
            services,
            capacity: self.capacity,
            known: Default::default(),
        };
        match workload.identity() {
            Err(error) if workload.protocol == Protocol::Hbone => Err(fault(error.to_string())),
            _ => Ok(workload),
        }
    }
}

#[derive(Deserialize)]
enum FileMode {
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Deserialize)]
enum FileScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Deserialize)]
enum FileHealthPolicy {
    OnlyHealthy,
    AllowAll,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileLoadBalancer {
    routing_preferences: Vec<FileScope>,
    mode: FileMode,
    health_policy: FileHealthPolicy,
}

#[derive(Deserialize)]
enum FileFamilies {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
    Dual,
}

#[derive(Deserialize, Default)]
enum FileVisibility {
    #[default]
    Public,
    Namespace,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileService {
    name: String,
    namespace: String,
    hostname: String,
    vips: Option<Vec<String>>,
    ports: Option<BTreeMap<u16, u16>>,
    #[serde(default)]
    port_names: BTreeMap<String, u16>,
    #[serde(default)]
    cidr_vips: Vec<String>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<FileGateway>,
    load_balancer: Option<FileLoadBalancer>,
    ip_families: Option<FileFamilies>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: FileVisibility,
}

impl FileService {
    fn check(self) -> Result<Service, String> {
        let label = format!("{}/{}", self.namespace, self.hostname);
        let fault = |reason: String| format!("service {label}: {reason}");
        let key = ServiceKey::parse(&label).map_err(|e| fault(e.to_string()))?;
        if !is_host(&self.hostname) {
            let hint = "a '*' stands for the first label, in front of a domain, as in *.example.com";
            return Err(fault(format!("hostname {:?} is not a name: {hint}", self.hostname)));
        }
        let Some(vips) = self.vips else {
            return Err(fault("vips is missing; write `vips: []` if it has none".into()));
        };
        let Some(ports) = self.ports else {
            return Err(fault(
                "ports is missing; write `ports: {80: 8080}`, from the service's port to the workload's".into(),
            ));
        };
        let vip = |v: &String| parse_network_address(v).ok_or_else(|| fault(invalid_vip(v)));
        let cidr = |v: &String| {
            let hint = "network/ip/length; the network may be empty, as in \"/10.0.0.0/8\"";
            parse_network_cidr(v).ok_or_else(|| fault(format!("cidrVip {v:?} is not of the form {hint}")))
        };
        Ok(Service {
            vips: vips.iter().map(vip).collect::<Result<_, _>>()?,
            cidrs: self.cidr_vips.iter().map(cidr).collect::<Result<_, _>>()?,
            waypoint: self.waypoint.map(FileGateway::check).transpose().map_err(&fault)?,
            key,
            name: self.name.into(),
            port_names: port_names(self.port_names, &ports).map_err(&fault)?,
            ports,
            subject_alt_names: self.subject_alt_names.into_iter().map(Text::from).collect(),
            weighted_waypoints: Vec::new(),
            load_balancer: self.load_balancer.map(load_balancer),
            ip_families: self.ip_families.map(|families| match families {
                FileFamilies::V4 => IpFamilies::V4,
                FileFamilies::V6 => IpFamilies::V6,
                FileFamilies::Dual => IpFamilies::Dual,
            }),
            canonical: self.canonical,
            visibility: match self.visibility {
                FileVisibility::Public => Visibility::Public,
                FileVisibility::Namespace => Visibility::Namespace,
            },
        })
    }
}

/// Whether a service may have this host name. A wildcard may replace the first label of a domain.
fn is_host(hostname: &str) -> bool {
    let domain = hostname.strip_prefix("*.").unwrap_or(hostname);
    !domain.contains('*') && domain.split('.').any(|label| !label.is_empty())
}

/// Why a text is not a virtual address.
fn invalid_vip(text: &str) -> String {
    let address = text.split_once('/').map_or(text, |(_, address)| address);
    if [text, address].iter().any(|text| text.parse::<IpNet>().is_ok()) {
        return format!("vip {text:?} is a range; ranges go into cidrVips, as network/ip/length");
    }
    if text.parse::<IpAddr>().is_ok() {
        return format!("vip {text:?} is not of the form network/ip; if the network has no name, write \"/{text}\"");
    }
    format!("vip {text:?} is not of the form network/ip; the network may be empty, as in \"/10.96.0.7\"")
}

/// The names in lower case, as questions are looked up. Each must belong to an existing port.
fn port_names(names: BTreeMap<String, u16>, ports: &BTreeMap<u16, u16>) -> Result<BTreeMap<Text, u16>, String> {
    let one = |(name, port): (String, u16)| {
        let known = ports.contains_key(&port).then(|| (Text::from(name.to_ascii_lowercase()), port));
        known.ok_or_else(|| format!("portNames: {name:?} is port {port}, which is not among the ports"))
    };
    names.into_iter().map(one).collect()
}

fn load_balancer(lb: FileLoadBalancer) -> LoadBalancer {
    let scope = |scope: FileScope| match scope {
        FileScope::Region => RoutingScope::Region,
        FileScope::Zone => RoutingScope::Zone,
        FileScope::Subzone => RoutingScope::Subzone,
        FileScope::Node => RoutingScope::Node,
        FileScope::Cluster => RoutingScope::Cluster,
        FileScope::Network => RoutingScope::Network,
    };
    LoadBalancer {
        preferences: lb.routing_preferences.into_iter().map(scope).collect(),
        mode: match lb.mode {
            FileMode::Standard => LoadBalancingMode::Standard,
            FileMode::Strict => LoadBalancingMode::Strict,
            FileMode::Failover => LoadBalancingMode::Failover,
            FileMode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match lb.health_policy {
            FileHealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            FileHealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FULL: &str = r#"
services:
- name: shop
  namespace: retail
  hostname: shop.retail.svc.cluster.local
  vips: ["net-a/10.96.0.7", "/fd00::7"]
  ports: {80: 8080}
  subjectAltNames: ["spiffe://cluster.local/ns/retail/sa/other"]
  waypoint: {destination: "net-a/10.96.0.9", hboneMtlsPort: 15008}
  loadBalancer: {routingPreferences: [Network, Zone], mode: Failover, healthPolicy: OnlyHealthy}
workloads:
- uid: c1//Pod/retail/shop-0
  name: shop-0
  namespace: retail
  serviceAccount: shop
  trustDomain: cluster.local
  workloadIps: ["10.0.1.5"]
  protocol: HBONE
  node: node-1
  network: net-a
  waypoint: {destination: retail/way.retail.svc, hboneMtlsPort: 15008}
  services:
    "retail/shop.retail.svc.cluster.local": {80: 8080}
policies:
- name: only-front
  namespace: retail
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [{Exact: cluster.local/ns/retail/sa/front}, Presence, {Presence: []}]
        notSourceIps: ["10.0.0.0/8", "192.0.2.1"]
        destinationPorts: [8080]
"#;

    #[test]
    fn the_format_of_ztunnel_is_read() {
        let facts = facts(FULL).unwrap();
        assert_eq!(facts.workloads[0].identity().unwrap().to_string(), "spiffe://cluster.local/ns/retail/sa/shop");
        assert_eq!(facts.services[0].vips.len(), 2);
        let test = &facts.policies[0].rules[0][0][0];
        assert_eq!((test.principals.any_of.len(), test.source_ips.none_of.len()), (3, 2));
        assert_eq!(test.destination_ports.any_of, [8080]);
        assert_eq!(super::facts("workloads: []").unwrap(), Facts::default());
        assert!(super::facts(" \n").is_err(), "a file that is being written may be empty at first");
    }

    #[test]
    fn faults_are_named_with_line_or_object() {
        for (change, expected) in [
            (("serviceAccount: shop", "serviceAcount: shop"), &["line 15", "serviceAcount"][..]),
            (("protocol: HBONE", "protocol: QUIC"), &["line 18", "QUIC"]),
            (("\"10.0.0.0/8\"", "\"10.0.0.0/80\""), &["line 32", "10.0.0.0/80"]),
            (
                ("net-a/10.96.0.7", "10.96.0.7"),
                &["retail/shop.retail.svc.cluster.local", "\"10.96.0.7\"", "\"/10.96.0.7\""],
            ),
            (("net-a/10.96.0.7", "net-a/10.96.0.0/16"), &["service retail/shop.", "is a range", "cidrVips"]),
            (("net-a/10.96.0.7", "10.96.0.0/16"), &["service retail/shop.", "is a range", "cidrVips"]),
            (("hostname: shop.retail.svc.cluster.local", "hostname: \"*\""), &["service retail/*", "*.example.com"]),
            (("hostname: shop.retail", "hostname: shop.*.retail"), &["service retail/shop.*.retail", "first label"]),
            (("  vips: [\"net-a/10.96.0.7\", \"/fd00::7\"]\n", ""), &["service retail/shop.", "`vips: []`"]),
            (("  ports: {80: 8080}\n", ""), &["service retail/shop.", "ports is missing"]),
            (("  workloadIps: [\"10.0.1.5\"]\n", ""), &["workload c1//Pod/retail/shop-0", "`workloadIps: []`"]),
            (
                ("trustDomain: cluster.local", "trustDomain: \"Cluster local\""),
                &["c1//Pod/retail/shop-0", "Cluster local"],
            ),
            (("dryRun: false", ""), &["dryRun"]),
            (("\"retail/shop.", "\"shop."), &["c1//Pod/retail/shop-0", "namespace/hostname"]),
        ] {
            let text = FULL.replacen(change.0, change.1, 1);
            assert_ne!(text, FULL, "{change:?}");
            let error = facts(&text).unwrap_err().to_string();
            for word in expected {
                assert!(error.contains(word), "{change:?}: {error:?} should name {word:?}");
            }
            assert!(!error.contains('\n'), "one line: {error:?}");
        }
        let twice = format!(
            "{FULL}- {{name: only-front, namespace: retail, scope: Global, action: Deny, dryRun: true, rules: []}}\n"
        );
        assert!(facts(&twice).unwrap_err().to_string().contains("policy retail/only-front occurs twice"));
    }

    #[test]
    fn principals_are_accepted_in_both_spellings_and_values_that_can_never_match_are_refused() {
        let policy = |part: &str| {
            let rest = "scope: Global, action: Deny, dryRun: false";
            facts(&format!("policies:\n- {{name: p, namespace: a, {rest}, rules: [[[{{{part}}}]]]}}\n"))
        };
        let read = |part: &str| policy(part).unwrap().policies.remove(0).rules.remove(0).remove(0).remove(0);
        let plain = read("principals: [{Exact: td/ns/a/sa/b}], notPrincipals: [{Prefix: td/}]");
        assert_eq!(
            read("principals: [{Exact: \"spiffe://td/ns/a/sa/b\"}], notPrincipals: [{Prefix: \"spiffe://td/\"}]"),
            plain
        );
        // Addresses of IPv4 connections never appear as IPv6 addresses.
        assert_eq!(read("sourceIps: [\"::ffff:10.0.0.0/104\"]"), read("sourceIps: [10.0.0.0/8]"));
        assert_eq!(read("sourceIps: [\"::ffff:10.0.0.1\"]"), read("sourceIps: [10.0.0.1]"));
        for (part, word) in [
            ("principals: [{Exact: td/ns/a/sa/b/}]", "policy a/p: rule[0]: principal \"td/ns/a/sa/b/\" never matches"),
            ("notPrincipals: [{Exact: TD/ns/a/sa/b}]", "lower case"),
            ("principals: [{Exact: /ns/a/sa/b}]", "<trust domain>/ns/"),
            ("principals: [{Exact: \"*\"}]", "Presence"),
            ("namespaces: [{Prefix: A}]", "namespace \"A\""),
            ("serviceAccounts: [{namespace: a, serviceAccount: a/b}]", "service account \"a/b\""),
            ("destinationPorts: [0]", "port 0"),
            ("sourceIps: [db.example/24]", "db.example/24"),
            ("", "without any test"),
        ] {
            let error = policy(part).unwrap_err().to_string();
            assert!(error.contains(word), "{part}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "\\PC{0,200}") {
            drop(facts(&text));
        }

        #[test]
        fn parsing_a_damaged_file_is_total(position in 0..FULL.len(), junk in "[\\PC\\n]{0,3}") {
            let mut text = FULL.to_owned();
            text.insert_str(position, &junk);
            drop(facts(&text));
            text.truncate(position);
            drop(facts(&text));
        }
    }
}
