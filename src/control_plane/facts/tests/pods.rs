//! Pods.

use super::*;
use crate::mesh::Protocol;
use crate::mesh::workload::{Health, NetworkMode, WorkloadType};

/// What a change of the pod makes of its fact.
fn fact(other: Value) -> Option<Workload> {
    World::of(&[pod(other)]).pod("a", "p")
}

#[test]
fn a_pod_is_a_workload() {
    let node = json!({"kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/region": "r",
        "topology.kubernetes.io/zone": "z", "topology.istio.io/subzone": "s"}}});
    let world = World::of(&[pod(json!({})), service(json!({})), node]);
    let w = world.pod("a", "p").unwrap();
    assert_eq!(w.identity().unwrap().to_string(), "spiffe://cluster.local/ns/a/sa/web");
    assert_eq!((&*w.name, &*w.namespace, &*w.node, &*w.cluster_id), ("p", "a", "n1", "Kubernetes"));
    assert_eq!(w.ips, ["10.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!((w.protocol, w.native_tunnel, w.health), (Protocol::Tcp, false, Health::Healthy));
    assert_eq!((w.network_mode, w.workload_type, w.capacity), (NetworkMode::Standard, WorkloadType::Pod, 1));
    assert_eq!((&*w.locality.region, &*w.locality.zone, &*w.locality.subzone), ("r", "z", "s"));
    let (key, ports) = w.services.first_key_value().unwrap();
    assert_eq!((key.to_string().as_str(), ports.clone()), ("a/s.a.svc.cluster.local", [(80, 8080)].into()));
    let resource = &world.known["Kubernetes//Pod/a/p"];
    assert_eq!(resource.aliases, [Text::from("/10.0.0.1")]);
    assert_eq!((resource.services.as_slice(), &*resource.node), (&["a/s.a.svc.cluster.local".into()][..], "n1"));
    assert_eq!(resource.version.len(), 16);
}

#[test]
fn a_pod_has_a_fact_as_long_as_its_containers_may_run_and_it_has_an_address() {
    let none = json!({"status": {"podIP": "", "podIPs": []}});
    let mut no_status = pod(json!({}));
    no_status.as_object_mut().unwrap().remove("status");
    for (other, expected) in [
        (json!({}), true),
        (json!({"status": {"phase": "Pending"}}), true),
        (json!({"status": {"phase": "Succeeded"}}), false),
        (json!({"status": {"phase": "Failed"}}), false),
        (json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), true),
        (json!({"status": {"podIPs": null}}), true),
        (none, false),
    ] {
        assert_eq!(fact(other.clone()).is_some(), expected, "{other}");
    }
    assert!(World::of(&[no_status]).known.is_empty());
}

#[test]
fn a_pod_is_healthy_while_it_is_ready_and_not_being_deleted() {
    let ready = |status: &str| json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
    for (other, healthy) in [
        (ready("True"), true),
        (ready("False"), false),
        (ready("Unknown"), false),
        (json!({"status": {"conditions": [{"type": "ContainersReady", "status": "True"}]}}), false),
        (json!({"status": {"conditions": null}}), false),
        (json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), false),
    ] {
        assert_eq!(fact(other.clone()).unwrap().health == Health::Healthy, healthy, "{other}");
    }
}

#[test]
fn peers_open_tunnels_only_when_the_daemon_has_said_so_or_the_pod_speaks_hbone_itself() {
    let redirection = |value: &str| json!({"metadata": {"annotations": {"ambient.istio.io/redirection": value}}});
    let tunnel = |value: &str| json!({"metadata": {"labels": {"networking.istio.io/tunnel": value}}});
    for (other, protocol, native) in [
        (json!({}), Protocol::Tcp, false),
        (redirection("enabled"), Protocol::Hbone, false),
        (redirection("pending"), Protocol::Tcp, false),
        (redirection("disabled"), Protocol::Tcp, false),
        (redirection("Enabled"), Protocol::Tcp, false),
        (redirection("enabled "), Protocol::Tcp, false),
        (redirection(""), Protocol::Tcp, false),
        (tunnel("http"), Protocol::Hbone, true),
        (tunnel("none,http"), Protocol::Hbone, true),
        (tunnel("https"), Protocol::Tcp, false),
        (with(tunnel("http"), redirection("enabled")), Protocol::Hbone, true),
        (json!({"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}}), Protocol::Tcp, false),
    ] {
        let w = fact(other.clone()).unwrap();
        assert_eq!((w.protocol, w.native_tunnel), (protocol, native), "{other}");
    }
}

#[test]
fn names_for_telemetry_come_from_labels_first() {
    let labels = |labels: Value| json!({"metadata": {"labels": labels}});
    for (other, name, revision) in [
        (json!({}), "web", "latest"),
        (labels(json!({"app": ""})), "", "latest"),
        (labels(json!({"app.kubernetes.io/name": "k", "app.kubernetes.io/version": "2", "version": "1"})), "k", "2"),
        (
            labels(json!({"service.istio.io/canonical-name": "c", "app.kubernetes.io/name": "k", "version": "1"})),
            "c",
            "1",
        ),
        (labels(json!({"service.istio.io/canonical-revision": "r", "app.kubernetes.io/version": "2"})), "web", "r"),
    ] {
        let w = fact(other.clone()).unwrap();
        assert_eq!((&*w.canonical_name, &*w.canonical_revision, &*w.workload_name), (name, revision, "p"), "{other}");
    }
}

#[test]
fn pods_of_the_host_network_are_not_found_by_address() {
    let world = World::of(&[pod(json!({"spec": {"hostNetwork": true}}))]);
    assert_eq!(world.pod("a", "p").unwrap().network_mode, NetworkMode::HostNetwork);
    assert!(world.known["Kubernetes//Pod/a/p"].aliases.is_empty());
}

#[test]
fn all_addresses_count_and_each_once() {
    let ips = |list: Value| json!({"status": {"podIPs": list}});
    let of = |other: Value| fact(other).unwrap().ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(of(ips(json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]))), ["10.0.0.1", "fd00::1"]);
    assert_eq!(of(ips(json!([{"ip": "10.0.0.1"}, {"ip": "::ffff:10.0.0.1"}]))), ["10.0.0.1"]);
    assert_eq!(of(ips(json!([{"ip": "fd00::1"}]))), ["fd00::1"]);
    let mut world = World::of(&[pod(ips(json!([{"ip": "10.0.0.300"}, {"ip": "127.0.0.1"}, {"ip": "10.0.0.2"}])))]);
    assert_eq!(world.pod("a", "p").unwrap().ips.len(), 1);
    assert_eq!(
        world.faults(),
        [
            "Pod a/p: \"10.0.0.300\" is no address at which other nodes can reach it",
            "Pod a/p: \"127.0.0.1\" is no address at which other nodes can reach it"
        ]
    );
}

#[test]
fn a_pod_without_service_account_has_the_default_identity_and_one_with_an_odd_one_is_left_out() {
    let account = |name: &str| json!({"spec": {"serviceAccountName": name}});
    assert_eq!(&*fact(account("")).unwrap().service_account, "default");
    for bad in ["Web", "a/b", "*"] {
        let mut world = World::of(&[pod(account(bad))]);
        assert!(world.known.is_empty(), "{bad}");
        assert_eq!(world.faults().len(), 1, "{bad}");
    }
    for (namespace, name) in [("a/b", "p"), ("a", "p/q"), ("", "p"), ("a", ""), ("a", "P")] {
        let mut world = World::of(&[pod(json!({"metadata": {"namespace": namespace, "name": name}}))]);
        assert!(world.known.is_empty(), "{namespace} {name}");
        assert!(world.faults().iter().all(|fault| fault.contains("not valid")));
    }
}

#[test]
fn an_address_goes_with_its_pod() {
    let old = pod(json!({}));
    let ended = pod(json!({"status": {"phase": "Failed"}}));
    let new = pod(json!({"metadata": {"name": "q", "uid": "u2"}}));
    let mut world = World::of(&[old, new.clone()]);
    // Both claim it: which of them has it is not known here, so daemons get both and rank them.
    assert_eq!(world.known.len(), 2);
    world.set(&ended);
    world.publish();
    assert!(world.pod("a", "p").is_none() && world.pod("a", "q").is_some());
}

#[test]
fn policies_that_select_a_pod_are_listed() {
    let mut world = World::new();
    world.policies.insert("a".into(), ("app".into(), "web".into()));
    world.policies.insert("istio-system".into(), ("app".into(), "web".into()));
    world.set(&pod(json!({})));
    world.set(&pod(json!({"metadata": {"name": "other", "labels": {"app": "db"}}})));
    world.publish();
    assert_eq!(world.pod("a", "p").unwrap().policies, ["a/p".into(), "istio-system/p".into()]);
    assert!(world.pod("a", "other").unwrap().policies.is_empty());
    world.policies.remove("a");
    world.index.mark_pods_of(&"b".into());
    assert_eq!(world.publish(), 0);
    world.index.mark_pods_of(&"a".into());
    assert_eq!(world.publish(), 1, "only the pod whose list differs");
    world.policies.clear();
    world.index.mark_all_pods();
    world.publish();
    assert!(world.pod("a", "p").unwrap().policies.is_empty());
}

#[test]
fn the_network_is_that_of_the_control_planes_namespace() {
    let label = json!({"topology.istio.io/network": "net1"});
    let mut world = World::of(&[pod(json!({})), service(json!({})), namespace("a", label.clone(), json!({}))]);
    assert_eq!(&*world.pod("a", "p").unwrap().network, "");
    world.set(&namespace("istio-system", label, json!({})));
    assert_eq!(world.publish(), 2);
    assert_eq!(&*world.pod("a", "p").unwrap().network, "net1");
    assert_eq!(world.known["Kubernetes//Pod/a/p"].aliases, [Text::from("net1/10.0.0.1")]);
    assert_eq!(&*world.service("a", "s").unwrap().vips[0].network, "net1");
    world.remove("Namespace", "", "istio-system");
    assert_eq!(world.publish(), 2);
}

#[test]
fn other_domains_and_clusters_are_named_where_they_belong() {
    let cluster = Cluster {
        namespace: "cp".into(),
        trust_domain: "corp.example".into(),
        id: "east".into(),
        domain: "corp.local".into(),
    };
    let mut world = World { reader: Reader::new(cluster.domain.clone()), index: Index::new(&cluster), ..World::new() };
    world.set(&pod(json!({})));
    world.set(&service(json!({})));
    world.publish();
    let w = world.workload("east//Pod/a/p").unwrap();
    assert_eq!(w.identity().unwrap().to_string(), "spiffe://corp.example/ns/a/sa/web");
    assert_eq!(&*w.cluster_id, "east");
    assert!(world.known.contains_key("a/s.a.svc.corp.local"));
    world.remove("Service", "a", "s");
    world.publish();
    assert!(!world.known.contains_key("a/s.a.svc.corp.local"));
}
