//! Random changes: what daemons know equals a list from scratch, whatever came before.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// A change of the cluster.
#[derive(Clone, Debug)]
enum Op {
    Set(Value),
    Remove(&'static str, &'static str, &'static str),
    Policy(&'static str, Option<(&'static str, &'static str)>),
    /// Daemons learn of what has changed.
    Publish,
}

const SPACES: [&str; 3] = ["a", "b", "istio-system"];
const NODES: [&str; 2] = ["n1", "n2"];
const NAMES: [&str; 3] = ["x", "y", "z"];

fn labels() -> impl Strategy<Value = Value> {
    let pair = (select(vec!["app", "tier"]), select(vec!["1", "2"]));
    vec(pair, 0..3).prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), json!(v))).collect()))
}

/// Labels that ask for a waypoint, or not.
fn asking() -> impl Strategy<Value = Value> {
    let name = select(vec!["", "", "none", "x", "y"]);
    (name, select(vec!["", "a", "b"])).prop_map(
        |(name, namespace)| json!({"istio.io/use-waypoint": name, "istio.io/use-waypoint-namespace": namespace}),
    )
}

fn place() -> impl Strategy<Value = (&'static str, &'static str)> {
    (select(&SPACES[..]), select(&NAMES[..]))
}

prop_compose! {
    fn pods()(
        (namespace, name) in place(), labels in labels(), asking in asking(),
        (node, phase, ready) in (select(&NODES[..]), select(vec!["Running", "Running", "Pending", "Failed"]), any::<bool>()),
        (ip, uid) in (0u8..4, select(vec!["u1", "u2"])),
        (hbone, port, gateway) in (any::<bool>(), 0u16..3, select(vec!["", "", "", "x"])),
    ) -> Value {
        let ips = if ip == 0 { json!([]) } else { json!([{"ip": format!("10.0.0.{ip}")}]) };
        let labels = with(with(labels, asking), json!({"gateway.networking.k8s.io/gateway-name": gateway}));
        json!({"kind": "Pod", "metadata": {"namespace": namespace, "name": name, "uid": uid, "labels": labels,
                "annotations": {"ambient.istio.io/redirection": if hbone { "enabled" } else { "" }}},
            "spec": {"nodeName": node, "serviceAccountName": name, "containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": phase, "podIPs": ips, "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
    }
}

prop_compose! {
    fn services()(
        (namespace, name) in place(), selector in labels(), asking in asking(),
        (kind, ip, target) in (select(vec!["ClusterIP", "ClusterIP", "ExternalName"]), 0u8..3, select(vec![json!(80), json!("http")])),
        distribution in select(vec![json!(null), json!("PreferClose")]),
    ) -> Value {
        json!({"kind": "Service", "metadata": {"namespace": namespace, "name": name, "labels": asking},
            "spec": {"type": kind, "clusterIP": if ip == 0 { "None".into() } else { format!("10.96.0.{ip}") },
                "trafficDistribution": distribution, "selector": selector, "ports": [{"name": "p", "port": 80, "targetPort": target}]}})
    }
}

prop_compose! {
    fn slices()(
        (namespace, name) in place(), service in select(&NAMES[..]),
        endpoints in vec((select(&NAMES[..]), select(vec![json!(null), json!("u1")]), any::<bool>(), 1u8..4), 0..3),
    ) -> Value {
        let endpoint = |(pod, uid, is_pod, ip): (&str, Value, bool, u8)| {
            let target = if is_pod { json!({"kind": "Pod", "name": pod, "uid": uid}) } else { json!(null) };
            json!({"addresses": [format!("192.0.2.{ip}")], "targetRef": target})
        };
        let endpoints: Vec<Value> = endpoints.into_iter().map(endpoint).collect();
        json!({"kind": "EndpointSlice", "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "p", "port": 9000}]})
    }
}

prop_compose! {
    fn others()(
        (namespace, name) in place(), node in select(&NODES[..]), zone in select(vec!["", "z1", "z2"]),
        asking in asking(), labels in labels(), network in select(vec!["", "", "net1"]),
        distribution in select(vec!["", "PreferSameNode"]),
        (from, takes) in (select(vec!["Same", "All", "Selector"]), select(vec!["all", "service", "workload"])),
        (binding, address) in (select(vec!["", "PROXY/15088"]), select(vec!["", "wp.a"])),
        which in 0u8..3,
    ) -> Value {
        match which {
            0 => json!({"kind": "Node", "metadata": {"name": node, "labels": {"topology.kubernetes.io/zone": zone}}}),
            1 => super::namespace(
                namespace,
                with(with(labels, asking), json!({"topology.istio.io/network": network})),
                json!({"networking.istio.io/traffic-distribution": distribution}),
            ),
            _ => json!({"kind": "Gateway", "metadata": {"namespace": namespace, "name": name, "labels": {"istio.io/waypoint-for": takes},
                    "annotations": {"ambient.istio.io/waypoint-inbound-binding": binding}},
                "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"port": 15008, "protocol": "HBONE",
                    "allowedRoutes": {"namespaces": {"from": from, "selector": {"matchLabels": labels}}}}]},
                "status": {"addresses": [{"type": "Hostname", "value": address}]}}),
        }
    }
}

fn ops() -> impl Strategy<Value = Op> {
    let kinds = vec!["Pod", "Service", "EndpointSlice", "Namespace", "Gateway"];
    let remove = (select(kinds), place()).prop_map(|(kind, (namespace, name))| {
        if kind == "Namespace" { Op::Remove(kind, "", namespace) } else { Op::Remove(kind, namespace, name) }
    });
    let remove_node = select(&NODES[..]).prop_map(|node| Op::Remove("Node", "", node));
    let policy = (select(&SPACES[..]), proptest::option::of((select(vec!["app", "tier"]), select(vec!["1", "2"]))))
        .prop_map(|(namespace, selects)| Op::Policy(namespace, selects));
    prop_oneof![
        6 => pods().prop_map(Op::Set),
        4 => services().prop_map(Op::Set),
        4 => slices().prop_map(Op::Set),
        4 => others().prop_map(Op::Set),
        4 => remove,
        1 => remove_node,
        1 => policy,
        2 => Just(Op::Publish),
    ]
}

/// The identity of an object.
fn id(object: &Value) -> (String, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["kind"]), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// 64 runs of up to 320 changes: over 10,000.
    #[test]
    fn whatever_happens_the_facts_are_those_of_a_list(ops in vec(ops(), 1..320), seed in any::<usize>()) {
        let mut world = World::new();
        let mut objects: BTreeMap<(String, String, String), Value> = BTreeMap::new();
        for (at, op) in ops.into_iter().enumerate() {
            match op {
                Op::Set(object) => {
                    world.set(&object);
                    objects.insert(id(&object), object);
                }
                Op::Remove(kind, namespace, name) => {
                    world.remove(kind, namespace, name);
                    objects.remove(&(kind.into(), namespace.into(), name.into()));
                }
                Op::Policy(namespace, selects) => {
                    match selects {
                        Some((key, value)) => drop(world.policies.insert(namespace.into(), (key.into(), value.into()))),
                        None => drop(world.policies.remove(namespace)),
                    }
                    if namespace == "istio-system" {
                        world.index.mark_all_pods();
                    } else {
                        world.index.mark_pods_of(&namespace.into());
                    }
                }
                Op::Publish => drop(world.publish()),
            }
            if at % 16 != 0 {
                continue;
            }
            world.publish();
            // In another order, and in batches.
            let mut scratch = World { policies: world.policies.clone(), ..World::new() };
            let mut list: Vec<&Value> = objects.values().collect();
            list.sort_by_key(|object| id(object).2.len().wrapping_add(object.to_string().len()).wrapping_mul(seed | 1));
            for (count, object) in list.into_iter().enumerate() {
                scratch.set(object);
                if (count ^ seed) % 5 == 0 {
                    scratch.publish();
                }
            }
            scratch.publish();
            prop_assert_eq!(&world.known, &scratch.known);
        }
        for (kind, namespace, name) in objects.into_keys() {
            world.remove(&kind, &namespace, &name);
        }
        world.publish();
        prop_assert!(world.known.is_empty());
        prop_assert_eq!(world.index.facts(), 0);
        prop_assert!(world.index.is_empty(), "{:?}", world.index);
    }
}
