//! Waypoints: who asks for which Gateway, and who gets it. A Gateway of any class is a waypoint if somebody asks for it.
//!
//! Only what attaches to a Gateway is told to daemons; the proxy behind it is the user's. A waypoint that does not
//! exist, is not ready, takes no such traffic or does not admit the namespace is not sent, and traffic goes direct, as
//! with istiod. Weights (canary waypoints) and the labels of GatewayClasses do not count.

use super::api::{self, Metadata};
use super::object::{Allowed, Asked, Gateway, GatewayAddress, Namespace, Selector, Takes};
use crate::control::xds::decode::Names;
use crate::mesh::address::NetworkAddress;
use crate::mesh::workload::{ApplicationTunnel, Delivery};
use crate::mesh::{GatewayRef, GatewayTarget, ServiceKey, Text};
use crate::ports;
use serde_json::Value;
use std::net::IpAddr;

const USE: &str = "istio.io/use-waypoint";
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const FOR: &str = "istio.io/waypoint-for";
const BINDING: &str = "ambient.istio.io/waypoint-inbound-binding";

/// The waypoint that an object asks for.
pub fn asked(metadata: &Metadata, namespace: &str, names: &mut Names) -> Asked {
    match metadata.label(USE) {
        None => Asked::Nothing,
        Some("none") => Asked::None,
        Some(name) => {
            let namespace = metadata.label(USE_NAMESPACE).unwrap_or(namespace);
            Asked::Gateway((names.text(namespace), names.text(name)))
        }
    }
}

/// Reads a waypoint; `None` if it has no address.
pub fn gateway(read: &api::Gateway, namespace: Text, name: Text, faults: &mut Vec<String>) -> Option<Gateway> {
    let address = address(&read.status, faults)?;
    let binding = read.metadata.annotation(BINDING).and_then(|text| {
        let understood = binding(text);
        if understood.is_none() {
            faults.push(format!("{BINDING}: {text:?} is not understood"));
        }
        understood
    });
    let takes = match read.metadata.label(FOR) {
        None | Some("service") => Takes { services: true, workloads: false },
        Some("workload") => Takes { services: false, workloads: true },
        Some("all") => Takes { services: true, workloads: true },
        Some("none") => Takes { services: false, workloads: false },
        Some(other) => {
            faults.push(format!("{FOR}: {other:?} is not understood, so it takes no traffic"));
            Takes { services: false, workloads: false }
        }
    };
    let allowed = allowed(&read.spec, binding.is_some());
    Some(Gateway { namespace, name, takes, address, allowed, binding })
}

/// The address that a Gateway's status gives it: a host name before an address.
fn address(status: &Value, faults: &mut Vec<String>) -> Option<GatewayAddress> {
    let all = || status.get("addresses").and_then(Value::as_array).into_iter().flatten();
    let value = |address: &Value| address.get("value").and_then(Value::as_str).map(str::to_owned);
    let of = |kind: &'static str| {
        all().find(move |address| address.get("type").and_then(Value::as_str).unwrap_or("IPAddress") == kind)
    };
    if let Some(hostname) = of("Hostname").and_then(value) {
        if !hostname.is_empty() && !hostname.contains('/') {
            return Some(GatewayAddress::Hostname(hostname.as_str().into()));
        }
        faults.push(format!("{hostname:?} is not a host name"));
    }
    let text = of("IPAddress").and_then(value)?;
    let ip = text.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    if ip.is_none() {
        faults.push(format!("{text:?} is not an address"));
    }
    ip.map(GatewayAddress::Ip)
}

/// Parses `PROTOCOL` or `PROTOCOL/port`.
fn binding(text: &str) -> Option<ApplicationTunnel> {
    let (protocol, port) = text.split_once('/').map_or((text, None), |(protocol, port)| (protocol, Some(port)));
    let delivery = match protocol {
        "NONE" => Delivery::Plain,
        "PROXY" => Delivery::Proxy,
        _ => return None,
    };
    let port = port.map(|port| port.parse::<u16>()).transpose().ok()?;
    Some(ApplicationTunnel { delivery, port: port.filter(|port| *port != 0) })
}

/// The namespaces that the listener for tunnels admits; without such a listener, or if what it says is not understood,
/// the Gateway's own.
fn allowed(spec: &Value, is_bound: bool) -> Allowed {
    let all = || spec.get("listeners").and_then(Value::as_array).into_iter().flatten();
    let speaks = |listener: &&Value, protocol: &str| listener.get("protocol").and_then(Value::as_str) == Some(protocol);
    let bound = all().find(|listener| is_bound && speaks(listener, "istio.io/PROXY"));
    let port = u64::from(ports::HBONE);
    let hbone = || all().find(|l| speaks(l, "HBONE") && l.get("port").and_then(Value::as_u64) == Some(port));
    let Some(listener) = bound.or_else(hbone) else { return Allowed::Same };
    let from = listener.pointer("/allowedRoutes/namespaces");
    match from.and_then(|from| from.get("from")).and_then(Value::as_str) {
        Some("All") => Allowed::All,
        Some("Selector") => {
            let selector = from.and_then(|from| from.get("selector")).and_then(Selector::read);
            selector.map_or(Allowed::Same, Allowed::Selected)
        }
        _ => Allowed::Same,
    }
}

impl Gateway {
    /// Whether objects of a namespace may use it.
    pub fn admits(&self, name: &str, namespace: Option<&Namespace>) -> bool {
        match &self.allowed {
            Allowed::Same => *self.namespace == *name,
            Allowed::All => true,
            Allowed::Selected(selector) => namespace.is_some_and(|namespace| selector.matches(&namespace.labels)),
        }
    }

    /// How daemons find it.
    pub fn reference(&self, network: &Text) -> GatewayRef {
        let target = match &self.address {
            GatewayAddress::Hostname(hostname) => {
                GatewayTarget::Hostname(ServiceKey { namespace: self.namespace.clone(), hostname: hostname.clone() })
            }
            GatewayAddress::Ip(ip) => GatewayTarget::Address(NetworkAddress { network: network.clone(), ip: *ip }),
        };
        GatewayRef { target, hbone_port: ports::HBONE }
    }
}
