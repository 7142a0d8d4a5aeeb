//! Waypoints that cannot be found or are not whom they should be: refused, never bypassed.

use crate::world::{World, apps, ask};
use serde_json::json;

#[test]
fn a_waypoint_that_cannot_be_resolved_is_never_bypassed() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.services[0]["waypoint"] = json!({"destination": "ns/gone.ns.svc.cluster.local", "hboneMtlsPort": 15008});
    w.mesh.of("server")["waypoint"] = json!({"destination": "/10.2.0.250", "hboneMtlsPort": 15008});
    w.start();
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    assert!(ask(&client.netns, (vip, 80), "x").is_err());
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_err());
    for (reference, of) in
        [("ns/gone.ns.svc.cluster.local", "web.ns.svc.cluster.local"), ("/10.2.0.250", "c1//Pod/ns/server")]
    {
        let line = w.log_line(1, reference, |l| l["error"].as_str().is_some_and(|e| e.contains(reference)));
        let error = line["error"].as_str().unwrap();
        assert!(error.starts_with("unknown waypoint") && error.contains(of), "{error}");
    }
    assert_eq!(w.metric(1, "culvert_connection_failures_total", &["reason=\"waypoint_unknown\""]), 2.0);
    assert_eq!(w.metric(2, "istio_tcp_connections_opened_total", &[]), 0.0);
}

#[test]
fn a_waypoint_of_another_identity_gets_nothing() {
    let mut w = World::new();
    let (client, server, way) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2), w.mesh_pod("way", 2));
    apps::serve(&server.netns, 8080, apps::who);
    apps::serve(&way.netns, 8080, apps::who);
    w.mesh.of("server")["waypoint"] = json!({"destination": format!("/{}", way.v4), "hboneMtlsPort": 15008});
    w.start();
    let mut mesh = w.mesh.clone();
    mesh.of("way")["serviceAccount"] = json!("somebody-else");
    crate::world::replace(&w.mesh_file(1), &mesh.json());
    crate::world::eventually("node 1 has the new facts", || w.metric(1, "culvert_mesh_file_applied_total", &[]) >= 2.0);
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_err());
    let line = w.log_line(1, "refused", |l| l["reason"] == "tunnel_tls");
    assert!(line["error"].as_str().unwrap().contains("sa/somebody-else"), "{line}");
}
