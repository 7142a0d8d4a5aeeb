//! Checks objects of the API and reduces them to what mesh facts depend on.
//!
//! A value that makes no sense, such as an address that is none or port 70000, is left out and named; the rest of its
//! object counts. Nothing is guessed in its place.

use super::api::{self, Metadata};
use super::object::{
    Asked, Distribution, Endpoint, Labels, NamedPorts, Namespace, Node, Pod, PodRef, Service, ServicePort, Slice,
    Target, Tunnel,
};
use super::owner::workload_name;
use super::waypoint;
use crate::control::xds::decode::Names;
use crate::mesh::address::is_link_local;
use crate::mesh::workload::Locality;
use crate::mesh::{ServiceKey, SpiffeName, Text};
use crate::telemetry::limit::shortened;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

/// Annotation of a pod that its node's daemon has captured, and the value that says so.
const REDIRECTION: (&str, &str) = ("ambient.istio.io/redirection", "enabled");
/// Label of a pod that speaks tunnel protocols itself.
const TUNNEL: &str = "networking.istio.io/tunnel";
/// Label of the pods of a gateway, with the name of the Gateway.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Label of the services of gateways.
const MANAGED: &str = "gateway.istio.io/managed";
/// Its values for gateways that have no waypoint.
const MANAGED_BY: [&str; 2] = ["istio.io-mesh-controller", "istio.io-eastwest-controller"];
/// Annotation of services and namespaces, from before there was a field for it.
const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
/// Label of a slice, with the name of its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of the control plane's namespace, with the name of the network.
const NETWORK: &str = "topology.istio.io/network";

/// What is said of an address that is left out.
const NO_ADDRESS: &str = "is no address at which other nodes can reach it";

/// Most addresses of one object. Kubernetes has two.
const ADDRESSES_MAX: usize = 16;
/// Most ports of a service. Each is repeated for each of its pods.
const PORTS_MAX: usize = 2_000;
/// Most endpoints of a slice; the API allows no more.
const ENDPOINTS_MAX: usize = 1_000;
/// Largest set of labels that is shared, in bytes, and how many are before those that nobody has any more are forgotten.
const SHARED_BYTES_MAX: usize = 4 << 10;
const SHARED_MIN: usize = 1_000;
/// Most faults that are kept until they are taken. Further ones are counted only.
const FAULTS_MAX: usize = 100;

/// What was left out, and why.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The first ones, by name.
    pub named: Vec<String>,
    /// How many there were.
    pub count: u64,
}

impl Faults {
    /// Adds one.
    pub fn add(&mut self, fault: String) {
        self.count += 1;
        if self.named.len() < FAULTS_MAX {
            self.named.push(shortened(fault));
        }
    }
}

/// Reads objects. It remembers texts and labels, so that objects share them.
#[derive(Debug)]
pub struct Reader {
    domain: Text,
    names: Names,
    labels: HashSet<Labels>,
    /// When there are this many, those that nobody has any more are forgotten.
    labels_room: usize,
    faults: Faults,
}

/// The object that is being read, for faults.
#[derive(Clone, Copy)]
struct Id<'a> {
    kind: &'static str,
    metadata: &'a Metadata,
}

impl Reader {
    /// A reader for a cluster whose DNS names have this domain.
    pub fn new(domain: Text) -> Self {
        Self {
            domain,
            names: Names::default(),
            labels: HashSet::new(),
            labels_room: SHARED_MIN,
            faults: Faults::default(),
        }
    }

    /// What was left out since the last call.
    pub fn take_faults(&mut self) -> Faults {
        std::mem::take(&mut self.faults)
    }

    fn fault(&mut self, id: Id<'_>, what: &str) {
        let (namespace, name) = (id.metadata.namespace.as_deref(), id.metadata.name.as_deref());
        let slash = if namespace.is_some() { "/" } else { "" };
        let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
        self.faults.add(format!("{} {namespace}{slash}{name}: {what}", id.kind));
    }

    /// Namespace and name; `None` if these cannot be parts of an identity or of a resource's name.
    fn key(&mut self, id: Id<'_>) -> Option<(Text, Text)> {
        let namespace = id.metadata.namespace.as_deref().unwrap_or_default();
        let name = id.metadata.name.as_deref().unwrap_or_default();
        if SpiffeName::is_part(namespace) && SpiffeName::is_part(name) {
            return Some((self.names.text(namespace), name.into()));
        }
        self.fault(id, "left out: its name or namespace is not valid");
        None
    }

    fn shared(&mut self, labels: Option<&api::Map>) -> Labels {
        let empty = api::Map::new();
        let labels = labels.unwrap_or(&empty);
        if let Some(known) = self.labels.get(labels) {
            return known.clone();
        }
        let new = Labels::new(labels.clone());
        if labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > SHARED_BYTES_MAX {
            return new;
        }
        if self.labels.len() >= self.labels_room {
            self.labels.retain(|labels| Labels::strong_count(labels) > 1);
            self.labels_room = SHARED_MIN.max(2 * self.labels.len());
        }
        self.labels.insert(new.clone());
        new
    }

    fn text(&mut self, text: Option<&str>) -> Text {
        self.names.text(text.unwrap_or_default())
    }

    fn ips<'a>(&mut self, id: Id<'_>, texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
        let mut ips = Vec::new();
        for text in texts {
            match parse_ip(text) {
                Some(ip) if ips.contains(&ip) => {}
                Some(_) if ips.len() >= ADDRESSES_MAX => {
                    self.fault(id, &format!("more than {ADDRESSES_MAX} addresses; the rest is left out"));
                    break;
                }
                Some(ip) => ips.push(ip),
                None => self.fault(id, &format!("{text:?} {NO_ADDRESS}")),
            }
        }
        ips
    }

    /// Reads a pod.
    pub fn pod(&mut self, pod: &api::Pod) -> Option<Pod> {
        let metadata = &pod.metadata;
        let id = Id { kind: "Pod", metadata };
        let (namespace, name) = self.key(id)?;
        let (no_spec, no_status) = (api::PodSpec::default(), api::PodStatus::default());
        let (spec, status) = (pod.spec.as_ref().unwrap_or(&no_spec), pod.status.as_ref().unwrap_or(&no_status));
        let service_account = spec.service_account_name.as_deref().unwrap_or_default();
        if !service_account.is_empty() && !SpiffeName::is_part(service_account) {
            self.fault(id, "left out: the name of its service account is not valid");
            return None;
        }
        let several = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.as_deref()).filter(|ip| !ip.is_empty());
        let one = status.pod_ip.as_deref().filter(|ip| !ip.is_empty());
        let mut ips = self.ips(id, several);
        if ips.is_empty() {
            ips = self.ips(id, one.into_iter());
        }
        let phase = status.phase.as_deref().unwrap_or("Pending");
        let ready = status.conditions.iter().flatten().any(|c| c.r#type == "Ready" && c.status == "True");
        Some(Pod {
            uid: metadata.uid.as_deref().unwrap_or_default().into(),
            service_account: self.names.text(service_account),
            node: self.text(spec.node_name.as_deref()),
            ips,
            labels: self.shared(metadata.labels.as_ref()),
            workload_name: self.names.text(&workload_name(metadata)),
            tunnel: tunnel(metadata),
            ports: self.container_ports(id, spec),
            host_network: spec.host_network == Some(true),
            healthy: ready && metadata.deletion_timestamp.is_none(),
            running: matches!(phase, "Pending" | "Running"),
            ended: matches!(phase, "Succeeded" | "Failed"),
            asked: self.asked(metadata, &namespace),
            gateway: metadata.label(GATEWAY_NAME).map(|name| self.names.text(name)),
            namespace,
            name,
        })
    }

    /// Named TCP ports of the containers that run beside each other. Of two with one name, the first counts.
    fn container_ports(&mut self, id: Id<'_>, spec: &api::PodSpec) -> NamedPorts {
        let beside = |container: &&api::Container| container.restart_policy.as_deref() == Some("Always");
        let init = spec.init_containers.iter().flatten().filter(beside);
        let all = spec.containers.iter().flatten().chain(init).flat_map(|c| c.ports.iter().flatten());
        let named = all.filter(|port| port.name.as_deref().is_some_and(|name| !name.is_empty()));
        let tcp = named.filter(|port| is_tcp(port.protocol.as_deref()));
        self.named_ports(id, tcp.map(|port| (port.name.as_deref().unwrap_or_default(), port.container_port)))
    }

    /// Ports by name. Of two with one name, the first counts.
    fn named_ports<'a>(&mut self, id: Id<'_>, all: impl Iterator<Item = (&'a str, Option<i64>)>) -> NamedPorts {
        let mut ports = BTreeMap::new();
        for (name, number) in all {
            match number.and_then(port_number) {
                Some(number) => drop(ports.entry(self.names.text(name)).or_insert(number)),
                None => self.fault(id, &format!("port {name:?} has no valid number")),
            }
        }
        NamedPorts::of(ports)
    }

    fn asked(&mut self, metadata: &Metadata, namespace: &str) -> Asked {
        waypoint::asked(metadata, namespace, &mut self.names)
    }

    /// Reads a service. `None` for one that is only another name for something outside the cluster.
    pub fn service(&mut self, service: &api::Service) -> Option<Service> {
        let metadata = &service.metadata;
        let id = Id { kind: "Service", metadata };
        let no_spec = api::ServiceSpec::default();
        let spec = service.spec.as_ref().unwrap_or(&no_spec);
        if spec.r#type.as_deref() == Some("ExternalName") {
            return None;
        }
        let (namespace, name) = self.key(id)?;
        let several = spec.cluster_ips.as_deref().unwrap_or_default().iter();
        let all = several.chain(spec.cluster_ip.iter()).map(String::as_str);
        let wanted: Vec<&str> = all.filter(|ip| !ip.is_empty() && *ip != "None").collect();
        if let Some(odd) = wanted.iter().find(|ip| parse_ip(ip).is_none()) {
            // With a part of its addresses, connections to the other part would miss the mesh.
            self.fault(id, &format!("left out: {odd:?} {NO_ADDRESS}"));
            return None;
        }
        let families = spec.ip_families.as_deref().unwrap_or_default();
        let hostname = format!("{name}.{namespace}.svc.{}", self.domain);
        let key = ServiceKey { namespace: namespace.clone(), hostname: hostname.as_str().into() };
        let managed = metadata.label(MANAGED);
        let annotated = || metadata.annotation(DISTRIBUTION);
        Some(Service {
            resource: key.to_string().as_str().into(),
            key,
            selector: spec.selector.clone().unwrap_or_default(),
            vips: self.ips(id, wanted.into_iter()),
            families: (families.iter().any(|f| f == "IPv4"), families.iter().any(|f| f == "IPv6")),
            ports: self.service_ports(id, spec),
            local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            distribution: spec.traffic_distribution.as_deref().or_else(annotated).map(distribution),
            publish_not_ready: spec.publish_not_ready_addresses == Some(true),
            asked: self.asked(metadata, &namespace),
            is_gateway: managed.is_some_and(|by| MANAGED_BY.contains(&by)),
            name,
        })
    }

    /// The ports of a service. One number may occur for several transports; TCP counts before others.
    fn service_ports(&mut self, id: Id<'_>, spec: &api::ServiceSpec) -> Vec<ServicePort> {
        let mut ports: Vec<ServicePort> = Vec::new();
        let mut known = HashSet::new();
        let all = || spec.ports.iter().flatten();
        let tcp_first = all().filter(|p| is_tcp(p.protocol.as_deref()));
        for port in tcp_first.chain(all().filter(|p| !is_tcp(p.protocol.as_deref()))) {
            let said = port.name.as_deref().unwrap_or_default();
            let Some(number) = port.port.and_then(port_number) else {
                self.fault(id, &format!("port {said:?} has no valid number"));
                continue;
            };
            let target = match &port.target_port {
                None | Some(serde_json::Value::Null) => Some(Target::Number(number)),
                Some(serde_json::Value::String(name)) => match name.parse::<u16>() {
                    Ok(0) => None,
                    Ok(number) => Some(Target::Number(number)),
                    Err(_) => Some(Target::Name(self.names.text(name))).filter(|_| !name.is_empty()),
                },
                Some(target) => target.as_i64().and_then(port_number).map(Target::Number),
            };
            let Some(target) = target else {
                self.fault(id, &format!("port {number} has no valid target"));
                continue;
            };
            if known.len() >= PORTS_MAX {
                self.fault(id, &format!("more than {PORTS_MAX} ports; the rest is left out"));
                break;
            }
            if known.insert(number) {
                let (name, tcp) = (self.names.text(said), is_tcp(port.protocol.as_deref()));
                ports.push(ServicePort { number, name, target, tcp });
            }
        }
        ports
    }

    /// Reads a slice. `None` for one that belongs to no service.
    pub fn slice(&mut self, slice: &api::EndpointSlice) -> Option<Slice> {
        let metadata = &slice.metadata;
        let id = Id { kind: "EndpointSlice", metadata };
        let service = metadata.label(SERVICE_NAME)?;
        let (namespace, name) = self.key(id)?;
        let has_addresses = matches!(slice.address_type.as_deref(), Some("IPv4" | "IPv6"));
        let mut endpoints = Vec::new();
        for endpoint in slice.endpoints.iter().flatten().filter(|_| has_addresses) {
            if endpoints.len() >= ENDPOINTS_MAX {
                self.fault(id, &format!("more than {ENDPOINTS_MAX} endpoints; the rest is left out"));
                break;
            }
            let target = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
            if let Some(target) = target {
                let is_near = target.namespace.as_deref().is_none_or(|other| *other == *namespace);
                let Some(pod) = target.name.as_deref().filter(|name| is_near && !name.is_empty()) else {
                    let part = |part: &Option<String>| part.clone().unwrap_or_default();
                    let (of, pod) = (part(&target.namespace), part(&target.name));
                    self.fault(
                        id,
                        &format!("an endpoint stands for the pod {of}/{pod}: of another namespace, or without a name"),
                    );
                    continue;
                };
                let uid = target.uid.as_deref().filter(|uid| !uid.is_empty()).map(Text::from);
                endpoints.push(Endpoint::Pod(PodRef { name: self.names.text(pod), uid }));
                continue;
            }
            let said = endpoint.addresses.iter().flatten().next().map(String::as_str).unwrap_or_default();
            let Some(ip) = parse_ip(said) else {
                self.fault(id, &format!("{said:?} {NO_ADDRESS}"));
                continue;
            };
            let ready = endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
            endpoints.push(Endpoint::Address { ip, ready });
        }
        let ports = self.slice_ports(id, slice);
        Some(Slice { service: self.names.text(service), namespace, name, endpoints, ports })
    }

    /// The TCP ports of a slice. One without a number stands for all ports, of which nothing is known here.
    fn slice_ports(&mut self, id: Id<'_>, slice: &api::EndpointSlice) -> NamedPorts {
        let tcp = slice.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_deref()));
        let numbered = tcp.filter(|port| port.port.is_some());
        self.named_ports(id, numbered.map(|port| (port.name.as_deref().unwrap_or_default(), port.port)))
    }

    /// Reads a node.
    pub fn node(&mut self, node: &api::Node) -> Option<Node> {
        let metadata = &node.metadata;
        let name = metadata.name.as_deref().filter(|name| !name.is_empty())?;
        let mut label = |key: &str| self.names.text(metadata.label(key).unwrap_or_default());
        let locality = Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        };
        Some(Node { name: self.names.text(name), locality })
    }

    /// Reads a namespace.
    pub fn namespace(&mut self, namespace: &api::Namespace) -> Option<Namespace> {
        let metadata = &namespace.metadata;
        let name = metadata.name.as_deref().filter(|name| !name.is_empty())?;
        Some(Namespace {
            name: self.names.text(name),
            labels: self.shared(metadata.labels.as_ref()),
            asked: self.asked(metadata, name),
            distribution: metadata.annotation(DISTRIBUTION).map(distribution),
            network: self.text(metadata.label(NETWORK)),
        })
    }

    /// Reads a Gateway. `None` for one that has no address yet.
    pub fn gateway(&mut self, gateway: &api::Gateway) -> Option<super::object::Gateway> {
        let id = Id { kind: "Gateway", metadata: &gateway.metadata };
        let (namespace, name) = self.key(id)?;
        let mut faults = Vec::new();
        let read = waypoint::gateway(gateway, namespace, name, &mut faults);
        for fault in faults {
            self.fault(id, &fault);
        }
        read
    }
}

/// How a pod accepts traffic. Its own claim to speak HBONE counts as it does for istiod.
fn tunnel(metadata: &Metadata) -> Tunnel {
    if metadata.label(TUNNEL).is_some_and(|label| label.split(',').any(|word| word.trim() == "http")) {
        return Tunnel::Native;
    }
    match metadata.annotation(REDIRECTION.0) {
        Some(said) if said == REDIRECTION.1 => Tunnel::Captured,
        _ => Tunnel::None,
    }
}

/// Which endpoints are preferred.
fn distribution(text: &str) -> Distribution {
    match text.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => Distribution::SameZone,
        "prefersamenode" => Distribution::SameNode,
        _ => Distribution::Any,
    }
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("TCP" | ""))
}

fn port_number(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// An address that others can reach: not the unspecified one, nor loopback, nor of one link, nor of a group.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let ip = text.parse::<IpAddr>().ok()?.to_canonical();
    let is_odd = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_link_local(ip);
    (!is_odd).then_some(ip)
}
