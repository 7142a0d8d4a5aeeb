//! Services and slices.

use super::*;
use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancingMode, RoutingScope};
use crate::mesh::workload::{Health, NetworkMode, Ports};
use crate::mesh::{Protocol, ServiceKey};

fn key() -> ServiceKey {
    ServiceKey::parse("a/s.a.svc.cluster.local").unwrap()
}

/// The port map of the service at the pod.
fn ports_at_pod(pod: Value, ports: Value) -> Ports {
    let world = World::of(&[pod, service(json!({"spec": {"ports": ports}}))]);
    world.pod("a", "p").unwrap().services[&key()].clone()
}

#[test]
fn a_service_is_a_service() {
    let s = World::of(&[service(json!({}))]).service("a", "s").unwrap();
    assert_eq!((&*s.name, s.canonical, s.vips.len()), ("s", true, 1));
    assert_eq!(
        (s.vips[0].to_string().as_str(), s.ports, s.ip_families),
        ("/10.96.0.1", [(80, 8080)].into(), Some(IpFamilies::V4))
    );
    assert_eq!((s.load_balancer, s.waypoint, s.subject_alt_names.len()), (None, None, 0));
}

#[test]
fn services_by_type_and_address() {
    for (spec, vips) in [
        (json!({}), Some(vec!["10.96.0.1"])),
        (json!({"type": "NodePort"}), Some(vec!["10.96.0.1"])),
        (json!({"type": "ExternalName", "externalName": "example.com"}), None),
        (json!({"clusterIP": "None", "clusterIPs": ["None"]}), Some(vec![])),
        (json!({"clusterIP": "", "clusterIPs": null}), Some(vec![])),
        (json!({"clusterIP": "10.96.0.2", "clusterIPs": null}), Some(vec!["10.96.0.2"])),
        (json!({"clusterIPs": ["10.96.0.1", "fd00::96"]}), Some(vec!["10.96.0.1", "fd00::96"])),
        (json!({"clusterIPs": ["10.96.0.1", "10.96.0"]}), None),
        (json!({"clusterIPs": ["10.96.0.1", "0.0.0.0"]}), None),
    ] {
        let world = World::of(&[service(json!({"spec": spec})), pod(json!({}))]);
        let s = world.service("a", "s");
        let expected = vips.as_ref().map(|vips| vips.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>());
        let found = s.map(|s| s.vips.iter().map(|vip| vip.ip.to_string()).collect::<Vec<_>>());
        assert_eq!(found, expected, "{spec}");
        assert_eq!(world.pod("a", "p").unwrap().services.contains_key(&key()), vips.is_some(), "{spec}");
    }
}

#[test]
fn families_are_those_that_it_says() {
    for (families, expected) in [
        (json!(null), None),
        (json!([]), None),
        (json!(["IPv4"]), Some(IpFamilies::V4)),
        (json!(["IPv6"]), Some(IpFamilies::V6)),
        (json!(["IPv6", "IPv4"]), Some(IpFamilies::Dual)),
    ] {
        let s = World::of(&[service(json!({"spec": {"ipFamilies": families}}))]).service("a", "s").unwrap();
        assert_eq!(s.ip_families, expected, "{families}");
    }
}

#[test]
fn ports_lead_to_numbers_or_to_the_names_of_container_ports() {
    let named = json!([{"port": 80, "targetPort": "http"}, {"port": 81, "targetPort": "other"}]);
    let containers =
        |containers: Value, init: Value| pod(json!({"spec": {"containers": containers, "initContainers": init}}));
    let http = |number: u32, protocol: &str| json!({"ports": [{"name": "http", "containerPort": number, "protocol": protocol}]});
    for (pod, ports, expected) in [
        (pod(json!({})), json!([{"port": 80}]), vec![(80, 80)]),
        (pod(json!({})), json!([{"port": 80, "targetPort": null}]), vec![(80, 80)]),
        (pod(json!({})), json!([{"port": 80, "targetPort": "8081"}]), vec![(80, 8081)]),
        (pod(json!({})), named.clone(), vec![(80, 8080)]),
        (
            containers(json!([http(1, "UDP"), http(2, "TCP"), http(3, "TCP")]), json!(null)),
            named.clone(),
            vec![(80, 2)],
        ),
        (
            containers(json!([]), json!([with(http(4, "TCP"), json!({"restartPolicy": "Always"}))])),
            named.clone(),
            vec![(80, 4)],
        ),
        (containers(json!([]), json!([http(5, "TCP")])), named.clone(), vec![]),
        (containers(json!(null), json!(null)), named.clone(), vec![]),
        // TCP counts before other transports, whatever the order.
        (
            pod(json!({})),
            json!([{"port": 53, "protocol": "UDP", "targetPort": 5}, {"port": 53, "targetPort": 6}]),
            vec![(53, 6)],
        ),
        (pod(json!({})), json!([{"port": 53, "protocol": "UDP", "targetPort": 5}]), vec![(53, 5)]),
    ] {
        assert_eq!(ports_at_pod(pod, ports.clone()), expected.into_iter().collect(), "{ports}");
    }
    let s = World::of(&[service(json!({"spec": {"ports": named}}))]).service("a", "s").unwrap();
    assert_eq!(s.ports, [(80, 0), (81, 0)].into());
}

#[test]
fn ports_that_make_no_sense_are_left_out_by_name() {
    let many: Vec<Value> = (1..=5_000).map(|port| json!({"port": port, "targetPort": 8080})).collect();
    let odd = json!([{"name": "x", "port": 0}, {"name": "x", "port": 70_000}, {"port": -1}, {"port": 80, "targetPort": 65_536},
        {"port": 81, "targetPort": ""}, {"port": 82, "targetPort": {}}, {"port": 83, "targetPort": "0"}, {"port": 84}]);
    let mut world = World::of(&[service(json!({"spec": {"ports": odd}}))]);
    assert_eq!(world.service("a", "s").unwrap().ports, [(84, 84)].into());
    let faults = world.faults();
    assert_eq!(faults.len(), 7);
    assert!(faults.iter().all(|fault| fault.starts_with("Service a/s: port ")), "{faults:?}");
    let mut world = World::of(&[service(json!({"spec": {"ports": many}}))]);
    assert_eq!(world.service("a", "s").unwrap().ports.len(), 2_000);
    assert_eq!(world.faults(), ["Service a/s: more than 2000 ports; the rest is left out"]);
}

#[test]
fn faults_that_are_kept_are_bounded() {
    let ports: Vec<Value> = (0..1_000).map(|_| json!({"port": 0})).collect();
    let mut world = World::of(&[service(json!({"spec": {"ports": ports}}))]);
    let faults = world.reader.take_faults();
    assert_eq!((faults.named.len(), faults.count), (100, 1_000));
}

#[test]
fn traffic_is_kept_near_as_the_service_or_its_namespace_says() {
    use RoutingScope::{Network, Node, Region, Subzone, Zone};
    let said = |spec: Value, own: Option<&str>, of_namespace: Option<&str>| {
        let annotation = |text: Option<&str>| match text {
            Some(text) => json!({"networking.istio.io/traffic-distribution": text}),
            None => json!({}),
        };
        let own = json!({"metadata": {"annotations": annotation(own)}, "spec": spec});
        World::of(&[service(own), namespace("a", json!({}), annotation(of_namespace))])
            .service("a", "s")
            .unwrap()
            .load_balancer
    };
    let zone = Some((LoadBalancingMode::Failover, vec![Network, Region, Zone], HealthPolicy::OnlyHealthy));
    let node =
        Some((LoadBalancingMode::Failover, vec![Network, Region, Zone, Subzone, Node], HealthPolicy::OnlyHealthy));
    let local = Some((LoadBalancingMode::Strict, vec![Node], HealthPolicy::OnlyHealthy));
    let all = |lb: Option<(LoadBalancingMode, Vec<RoutingScope>, HealthPolicy)>| {
        let (mode, preferences, _) = lb.unwrap_or((LoadBalancingMode::Standard, vec![], HealthPolicy::AllowAll));
        Some((mode, preferences, HealthPolicy::AllowAll))
    };
    let prefer = |text: &str| json!({"trafficDistribution": text});
    for (spec, own, of_namespace, expected) in [
        (json!({}), None, None, None),
        (prefer("PreferClose"), None, None, zone.clone()),
        (prefer("PreferSameZone"), None, None, zone.clone()),
        (prefer("PreferSameNode"), None, None, node.clone()),
        (prefer("Other"), None, None, None),
        (json!({}), Some("preferclose"), None, zone.clone()),
        (json!({}), Some("PreferSameNode"), Some("PreferClose"), node.clone()),
        (json!({}), None, Some("PreferClose"), zone.clone()),
        (prefer("PreferSameNode"), Some("PreferClose"), None, node.clone()),
        (prefer("Other"), None, Some("PreferClose"), None),
        (json!({"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"}), None, None, local.clone()),
        (json!({"internalTrafficPolicy": "Cluster"}), None, None, None),
        (json!({"publishNotReadyAddresses": true}), None, None, all(None)),
        (json!({"publishNotReadyAddresses": true, "internalTrafficPolicy": "Local"}), None, None, all(local)),
        (json!({"publishNotReadyAddresses": true, "trafficDistribution": "PreferSameNode"}), None, None, all(node)),
        (json!({"publishNotReadyAddresses": true}), None, Some("PreferClose"), all(zone)),
    ] {
        let found = said(spec.clone(), own, of_namespace).map(|lb| (lb.mode, lb.preferences, lb.health_policy));
        assert_eq!(found, expected, "{spec} {own:?} {of_namespace:?}");
    }
}

#[test]
fn a_selector_selects_pods_of_its_namespace_with_all_its_labels() {
    let selector = |labels: Value| {
        let mut service = bare_service();
        service["spec"]["selector"] = labels;
        service
    };
    let labelled = pod(json!({"metadata": {"labels": {"app": "web", "tier": "1"}}}));
    for (labels, expected) in [
        (json!({"app": "web"}), true),
        (json!({"app": "web", "tier": "1"}), true),
        (json!({"app": "web", "tier": "2"}), false),
        (json!({"zone": "1"}), false),
        (json!({}), false),
        (json!(null), false),
    ] {
        let world = World::of(&[labelled.clone(), selector(labels.clone())]);
        assert_eq!(!world.pod("a", "p").unwrap().services.is_empty(), expected, "{labels}");
    }
    let elsewhere = with(labelled, json!({"metadata": {"namespace": "b"}}));
    assert!(World::of(&[elsewhere, service(json!({}))]).pod("b", "p").unwrap().services.is_empty());
}

#[test]
fn the_slices_of_a_service_without_selector_name_its_pods() {
    let target = |name: &str, uid: Value, namespace: Value| {
        slice(json!({"endpoints": [{"addresses": ["10.0.0.1"],
            "targetRef": {"kind": "Pod", "name": name, "uid": uid, "namespace": namespace}}]}))
    };
    let fine = target("p", json!("u1"), json!("a"));
    for (service, slice, expected) in [
        (bare_service(), fine.clone(), true),
        (bare_service(), target("p", json!(null), json!(null)), true),
        (bare_service(), target("p", json!("an earlier pod"), json!("a")), false),
        (bare_service(), target("q", json!("u1"), json!("a")), false),
        (bare_service(), target("p", json!("u1"), json!("b")), false),
        (service(json!({"spec": {"selector": {"app": "other"}}})), fine.clone(), false),
        (
            bare_service(),
            with(fine.clone(), json!({"metadata": {"labels": {"kubernetes.io/service-name": "t"}}})),
            false,
        ),
    ] {
        // The service first, then the slice, and the other way round.
        for order in [[&service, &slice], [&slice, &service]] {
            let mut world = World::of(&[pod(json!({}))]);
            for object in order {
                world.set(object);
                world.publish();
            }
            let w = world.pod("a", "p").unwrap();
            assert_eq!(w.services.contains_key(&key()), expected, "{slice}");
            assert_eq!(world.known.len(), 2, "an endpoint that is a pod has no workload of its own");
        }
    }
    let mut world = World::of(&[pod(json!({})), bare_service(), fine]);
    world.remove("EndpointSlice", "a", "s-1");
    world.publish();
    assert!(world.pod("a", "p").unwrap().services.is_empty());
}

#[test]
fn endpoints_that_are_no_pods_are_left_out_while_a_namespace_has_too_many() {
    let ports =
        |count: u32| (1..=count).map(|port| json!({"name": format!("p{port}"), "port": port})).collect::<Vec<_>>();
    let named = |name: &str, count: u32, each: u32| {
        let address = |n: u32| json!({"addresses": [format!("192.0.{}.{}", n / 250, n % 250)]});
        let endpoints = (1..=count).map(address).collect::<Vec<_>>();
        slice(json!({"metadata": {"name": name}, "endpoints": endpoints, "ports": ports(each)}))
    };
    let service = with(bare_service(), json!({"spec": {"ports": ports(20)}}));
    let mut world = World::of(&[service, named("s-1", 1_000, 20)]);
    let workloads = |world: &World| world.known.len() - 1;
    assert_eq!((workloads(&world), world.index.take_faults().count), (1_000, 0));
    for (count, each) in [(1_000, 99), (40, 2_000)] {
        world.set(&named("big", count, each));
        world.publish();
        assert_eq!((workloads(&world), world.index.take_faults().count), (0, 1), "{count} endpoints of {each} ports");
        world.set(&named("big", 1, each));
        world.publish();
        assert_eq!((workloads(&world), world.index.take_faults().count), (1_001, 0));
        world.remove("EndpointSlice", "a", "big");
        world.publish();
        assert_eq!(workloads(&world), 1_000);
    }
    // Pods are counted by nobody: they cost their owner more than anybody else.
    let pods = json!([{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "p"}}]);
    let of_pods =
        slice(json!({"metadata": {"name": "pods"}, "endpoints": vec![pods[0].clone(); 900], "ports": ports(500)}));
    world.set(&of_pods);
    world.publish();
    assert_eq!((workloads(&world), world.index.take_faults().count), (1_000, 0));
}

#[test]
fn endpoints_that_are_no_pods_are_workloads_of_their_own() {
    let endpoints = json!([{"addresses": ["192.0.2.1", "192.0.2.9"]}, {"addresses": ["192.0.2.2"], "conditions": {"ready": false}},
        {"addresses": ["192.0.2.3"], "conditions": {"ready": true}}, {"addresses": ["192.0.2.3"]}, {"addresses": ["x"]},
        {"addresses": ["127.0.0.1"]}, {"addresses": null}]);
    let ports = json!([{"name": "http", "port": 9000}, {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "other", "port": 1}, {"name": "big", "port": 70_000}, {"name": "any", "port": null}]);
    let service = with(
        bare_service(),
        json!({"spec": {"ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "big", "port": 90}]}}),
    );
    let mut world = World::of(&[service.clone(), slice(json!({"endpoints": endpoints, "ports": ports}))]);
    let name = |ip: &str| format!("Kubernetes/discovery.k8s.io/EndpointSlice/a/s-1/{ip}");
    let names: Vec<&String> = world.known.keys().filter(|name| name.contains("Slice")).collect();
    assert_eq!(names, [&name("192.0.2.1"), &name("192.0.2.2"), &name("192.0.2.3")]);
    let w = world.workload(&name("192.0.2.1")).unwrap();
    assert_eq!((w.network_mode, w.protocol, w.health), (NetworkMode::HostNetwork, Protocol::Tcp, Health::Healthy));
    assert_eq!((w.services[&key()].clone(), &*w.node, w.policies.len()), ([(80, 9000)].into(), "", 0));
    assert_eq!(world.workload(&name("192.0.2.2")).unwrap().health, Health::Unhealthy);
    let resource = &world.known[&name("192.0.2.1")];
    assert_eq!((resource.aliases.len(), resource.services.clone()), (0, vec!["a/s.a.svc.cluster.local".into()]));
    assert_eq!(world.faults().len(), 4, "two addresses, one that is missing, and a port");
    // They go with the service, come with it, and follow the slice.
    world.remove("Service", "a", "s");
    world.publish();
    assert!(world.known.is_empty());
    world.set(&service);
    world.set(&slice(json!({"endpoints": [{"addresses": ["192.0.2.3"]}]})));
    world.publish();
    assert_eq!(world.known.len(), 2);
    world.set(&slice(json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]})));
    world.publish();
    assert_eq!(world.known.len(), 1);
    assert!(world.faults().is_empty());
}

#[test]
fn the_api_server_is_an_endpoint_of_its_service() {
    let service = json!({"kind": "Service", "metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443, "targetPort": 6443, "protocol": "TCP"}]}});
    let slice = json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "endpoints": [{"addresses": ["172.18.0.2"], "conditions": {"ready": true}}], "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}]});
    let world = World::of(&[service, slice]);
    let w = world.workload("Kubernetes/discovery.k8s.io/EndpointSlice/default/kubernetes/172.18.0.2").unwrap();
    assert_eq!(w.services.values().next(), Some(&[(443, 6443)].into()));
}

#[test]
fn the_services_and_ports_of_one_pod_are_bounded() {
    let named = |n: usize, ports: usize| {
        let ports: Vec<Value> = (1..=ports).map(|port| json!({"port": port})).collect();
        service(json!({"metadata": {"name": format!("s{n:03}")}, "spec": {"ports": ports}}))
    };
    for (services, ports, kept) in [(250, 1, 250), (251, 1, 250), (3, 2_000, 2)] {
        let mut objects: Vec<Value> = (0..services).map(|n| named(n, ports)).collect();
        objects.push(pod(json!({})));
        let mut world = World::of(&objects);
        assert_eq!(world.pod("a", "p").unwrap().services.len(), kept);
        assert_eq!(world.index.take_faults().count, u64::from(services > kept), "{services} of {ports}");
    }
}
