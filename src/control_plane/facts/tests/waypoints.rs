//! Waypoints.

use super::*;
use crate::mesh::workload::{ApplicationTunnel, Delivery};

/// A waypoint `a/wp`.
fn gateway(other: Value) -> Value {
    let gateway = json!({
        "kind": "Gateway",
        "metadata": {"namespace": "a", "name": "wp", "labels": {"istio.io/waypoint-for": "all"}},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        "status": {"addresses": [{"type": "Hostname", "value": "wp.a.svc.cluster.local"}]},
    });
    with(gateway, other)
}

fn using(name: &str) -> Value {
    json!({"metadata": {"labels": {"istio.io/use-waypoint": name}}})
}

/// The waypoints of the service and of the pod.
fn waypoints(objects: &[Value]) -> (Option<String>, Option<String>) {
    let world = World::of(objects);
    let text = |gateway: Option<crate::mesh::GatewayRef>| gateway.map(|g| format!("{}:{}", g.target, g.hbone_port));
    (text(world.service("a", "s").unwrap().waypoint), text(world.pod("a", "p").unwrap().waypoint))
}

#[test]
fn a_waypoint_takes_the_traffic_that_it_is_for() {
    let found = Some("a/wp.a.svc.cluster.local:15008".to_owned());
    for (label, service_has, pod_has) in [
        (json!("all"), true, true),
        (json!("service"), true, false),
        (json!(""), true, false),
        (json!("workload"), false, true),
        (json!("none"), false, false),
        (json!("odd"), false, false),
    ] {
        let gateway = gateway(json!({"metadata": {"labels": {"istio.io/waypoint-for": label}}}));
        let (of_service, of_pod) = waypoints(&[gateway, service(using("wp")), pod(using("wp"))]);
        assert_eq!(
            (of_service, of_pod),
            (found.clone().filter(|_| service_has), found.clone().filter(|_| pod_has)),
            "{label}"
        );
    }
}

#[test]
fn an_object_says_which_waypoint_it_uses_or_its_namespace_does() {
    let found = Some("a/wp.a.svc.cluster.local:15008".to_owned());
    let both = |has: bool| (found.clone().filter(|_| has), found.clone().filter(|_| has));
    let uses = |name: &str| namespace("a", json!({"istio.io/use-waypoint": name}), json!({}));
    let from = |ns: &str| with(using("wp"), json!({"metadata": {"labels": {"istio.io/use-waypoint-namespace": ns}}}));
    for (labels, of_namespace, has) in [
        (json!({}), namespace("a", json!({}), json!({})), false),
        (json!({}), uses("wp"), true),
        (json!({}), uses("none"), false),
        (json!({}), uses("other"), false),
        (using("none"), uses("wp"), false),
        (using("other"), uses("wp"), false),
        (using("wp"), uses("none"), true),
        (from("a"), uses("none"), true),
        (from("b"), uses("none"), false),
    ] {
        let objects = [gateway(json!({})), service(labels.clone()), pod(labels.clone()), of_namespace];
        assert_eq!(waypoints(&objects), both(has), "{labels}");
    }
}

#[test]
fn a_gateway_of_any_class_with_an_address_counts() {
    let address = |list: Value| json!({"status": {"addresses": list}});
    for (other, expected) in [
        (json!({"spec": {"gatewayClassName": "other"}}), Some("a/wp.a.svc.cluster.local:15008")),
        (address(json!([])), None),
        (address(json!(null)), None),
        (json!({"status": null}), None),
        (address(json!([{"type": "IPAddress", "value": "10.96.0.9"}])), Some("/10.96.0.9:15008")),
        (address(json!([{"value": "10.96.0.9"}])), Some("/10.96.0.9:15008")),
        (address(json!([{"type": "IPAddress", "value": "no"}])), None),
        (
            address(json!([{"type": "IPAddress", "value": "10.96.0.9"}, {"type": "Hostname", "value": "w.a"}])),
            Some("a/w.a:15008"),
        ),
        (address(json!([{"type": "Hostname", "value": "w/a"}])), None),
        (address(json!([{"type": "Named", "value": "w"}, 7])), None),
    ] {
        let (of_service, _) = waypoints(&[gateway(other.clone()), service(using("wp")), pod(json!({}))]);
        assert_eq!(of_service.as_deref(), expected, "{other}");
    }
}

#[test]
fn a_waypoint_of_another_namespace_must_admit_this_one() {
    let elsewhere = |allowed: Value, protocol: &str, port: u32, annotations: Value| {
        let listeners = json!([{"name": "x", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}},
            {"name": "mesh", "port": port, "protocol": protocol, "allowedRoutes": {"namespaces": allowed}}]);
        gateway(json!({"metadata": {"namespace": "w", "annotations": annotations}, "spec": {"listeners": listeners}}))
    };
    let labels =
        json!({"metadata": {"labels": {"istio.io/use-waypoint": "wp", "istio.io/use-waypoint-namespace": "w"}}});
    let selector = |value: &str| json!({"from": "Selector", "selector": {"matchLabels": {"team": value}}});
    let bound = json!({"ambient.istio.io/waypoint-inbound-binding": "PROXY/15088"});
    for (gateway, expected) in [
        (elsewhere(json!({"from": "All"}), "HBONE", 15008, json!({})), true),
        (elsewhere(json!({"from": "Same"}), "HBONE", 15008, json!({})), false),
        (elsewhere(json!({}), "HBONE", 15008, json!({})), false),
        (elsewhere(selector("red"), "HBONE", 15008, json!({})), true),
        (elsewhere(selector("blue"), "HBONE", 15008, json!({})), false),
        (elsewhere(json!({"from": "Selector", "selector": {"matchLabels": 1}}), "HBONE", 15008, json!({})), true),
        (
            elsewhere(json!({"from": "Selector", "selector": {"matchExpressions": [{}]}}), "HBONE", 15008, json!({})),
            false,
        ),
        (elsewhere(json!({"from": "All"}), "HBONE", 15009, json!({})), false),
        (elsewhere(json!({"from": "All"}), "istio.io/PROXY", 15088, json!({})), false),
        (elsewhere(json!({"from": "All"}), "istio.io/PROXY", 15088, bound), true),
    ] {
        let a = namespace("a", json!({"team": "red"}), json!({}));
        let (of_service, _) = waypoints(&[gateway.clone(), service(labels.clone()), pod(json!({})), a]);
        assert_eq!(of_service.is_some(), expected, "{gateway}");
    }
}

#[test]
fn the_pods_and_services_of_a_gateway_have_no_waypoint_but_a_listener() {
    let of_gateway =
        pod(with(using("wp"), json!({"metadata": {"labels": {"gateway.networking.k8s.io/gateway-name": "wp"}}})));
    let tunnel = |delivery, port| Some(ApplicationTunnel { delivery, port });
    for (binding, expected) in [
        ("PROXY/15088", tunnel(Delivery::Proxy, Some(15088))),
        ("PROXY", tunnel(Delivery::Proxy, None)),
        ("NONE/80", tunnel(Delivery::Plain, Some(80))),
        ("HTTP/80", None),
        ("PROXY/70000", None),
        ("", None),
    ] {
        let bound = json!({"metadata": {"annotations": {"ambient.istio.io/waypoint-inbound-binding": binding}}});
        let world = World::of(&[gateway(bound), of_gateway.clone()]);
        let w = world.pod("a", "p").unwrap();
        assert_eq!((w.waypoint, w.application_tunnel), (None, expected), "{binding}");
    }
    for (managed, expected) in
        [("istio.io-mesh-controller", false), ("istio.io-eastwest-controller", false), ("other", true)]
    {
        let labels = with(using("wp"), json!({"metadata": {"labels": {"gateway.istio.io/managed": managed}}}));
        let (of_service, _) = waypoints(&[gateway(json!({})), service(labels), pod(json!({}))]);
        assert_eq!(of_service.is_some(), expected, "{managed}");
    }
}
