//! Waypoints that cannot be found or do not have the expected identity: connections are refused, never sent past them.

use crate::istio::Istio;
use crate::world::wire::ADDRESS;
use crate::world::{World, apps, ask};
use serde_json::json;
use std::io::{Read, Write};

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

#[test]
fn a_pod_with_the_old_address_of_a_waypoint_or_endpoint_never_connects_to_itself() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    for pod in [&client, &server] {
        apps::serve(&pod.netns, 8080, apps::who);
    }
    // Facts that are old: the waypoint and an endpoint had the address that the client has now.
    for (uid, name) in [("c1//Pod/ns/a-way", "a-way"), ("c1//Pod/ns/an-endpoint", "an-endpoint")] {
        let mut old = w.mesh.of("server").clone();
        (old["uid"], old["name"], old["serviceAccount"]) = (json!(uid), json!(name), json!(name));
        (old["workloadIps"], old["node"]) = (json!([client.v4]), json!("n9"));
        w.mesh.workloads.push(old);
    }
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.of("an-endpoint")["services"] = w.mesh.of("server")["services"].clone();
    w.mesh.of("server")["waypoint"] = json!({"destination": format!("/{}", client.v4), "hboneMtlsPort": 15008});
    w.start();
    assert!(ask(&client.netns, (server.v4, 8080), "x").is_err());
    let line = w.log_line(1, "refused", |l| l["reason"] == "loop");
    assert!(line["error"].as_str().unwrap().contains(&client.v4.to_string()), "{line}");
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&client.netns, (vip, 80), "x").unwrap(), format!("{} x", client.v4));
    }
    assert_eq!(w.metric(1, "istio_tcp_connections_opened_total", &["reporter=\"destination\""]), 0.0);
    assert_eq!(w.metric(1, "culvert_connection_failures_total", &[]), 1.0, "nothing else was tried");
    assert_eq!(w.metric(1, "culvert_connection_retries_total", &[]), 0.0);
}

#[test]
fn an_application_tunnel_is_told_by_proxy_protocol_who_asks_for_what() {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    // A gateway behind the daemon: it listens on loopback only, and reads the header first.
    let listener = crate::world::inside(&server.netns, || std::net::TcpListener::bind("127.0.0.1:15088")).unwrap();
    let gateway = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
        stream.read_exact(&mut rest).unwrap();
        // Read the whole question before closing. A socket closed with unread bytes is reset, and the answer would be
        // lost.
        stream.read_exact(&mut [0; 2]).unwrap();
        stream.write_all(b"from the gateway").unwrap();
        (head, rest)
    });
    w.mesh.of("server")["applicationTunnel"] = json!({"protocol": "PROXY", "port": 15088});
    w.start();
    assert_eq!(ask(&client.netns, (server.v4, 8080), "x").unwrap(), "from the gateway");
    let (head, rest) = gateway.join().unwrap();
    assert_eq!((&head[..12], head[12], head[13]), (&b"\r\n\r\n\0\r\nQUIT\n"[..], 0x21, 0x11));
    let octets = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    assert_eq!((&rest[..4], &rest[4..8]), (&octets(client.v4)[..], &octets(server.v4)[..]));
    assert_eq!(u16::from_be_bytes([rest[10], rest[11]]), 8080);
    assert_eq!((rest[12], &rest[15..]), (0xd0, &b"spiffe://cluster.local/ns/ns/sa/client"[..]));
}

#[test]
fn who_bypasses_the_waypoint_of_a_workload_is_reported_or_refused_at_the_destination() {
    for (check, refused) in [("report", false), ("enforce", true), ("off", false)] {
        let mut w = World::new();
        let (client, way) = (w.mesh_pod("client", 1), w.mesh_pod("way", 1));
        let (server, stranger) = (w.mesh_pod("server", 2), w.plain_pod("stranger", 1));
        apps::serve(&server.netns, 8080, apps::who);
        w.write_mesh();
        // The clients' node does not know of the waypoint.
        w.mesh.of("server")["waypoint"] = json!({"destination": format!("/{}", way.v4), "hboneMtlsPort": 15008});
        crate::world::replace(&w.mesh_file(2), &w.mesh.json());
        for node in [1, 2] {
            w.write_pods(node, &w.captured_pods(node));
            w.start_node(node, &[("CULVERT_WAYPOINT_CHECK", check)]);
            w.wait_captured(node);
        }
        let to = (server.v4, 8080);
        assert!(ask(&way.netns, to, "x").is_ok(), "the waypoint itself");
        let bypassed = || w.metric(2, "culvert_waypoint_bypassed_total", &[]);
        assert_eq!(bypassed(), 0.0);
        for from in [&client, &stranger] {
            assert_eq!(ask(&from.netns, to, "x").is_err(), refused, "{check}: {}", from.name);
        }
        assert_eq!(bypassed(), if check == "off" { 0.0 } else { 2.0 }, "{check}");
        let said = |line: &serde_json::Value, key: &str| {
            line[key].as_str().is_some_and(|text| text.contains("bypassed the waypoint") && text.contains("sa/client"))
        };
        match check {
            "report" => drop(w.log_line(2, "it is reported", |line| said(line, "message"))),
            "enforce" => {
                let line = w.log_line(2, "it is refused", |line| said(line, "error"));
                assert_eq!(line["reason"], "waypoint_bypassed");
                w.log_line(1, "the client's node says so", |line| line["reason"] == "peer_denied");
                w.log_line(2, "plaintext too", |line| {
                    line["error"]
                        .as_str()
                        .is_some_and(|error| error.contains(&format!("{} without identity", stranger.v4)))
                });
            }
            _ => {}
        }
    }
}

#[test]
fn no_connection_waits_for_a_report_about_its_waypoint() {
    let mut istio = Istio::new();
    let stranger = istio.w.plain_pod("stranger", 1);
    istio.w.mesh.of("server")["waypoint"] = json!({"destination": "/10.2.0.250", "hboneMtlsPort": 15008});
    istio.tell();
    istio.start_with(&[("XDS_ON_DEMAND", "true")]);
    istio.plane.change(|state| state.silent = Some(ADDRESS));
    assert!(ask(&stranger.netns, (istio.server(), 8080), "x").is_ok(), "it is allowed");
    // Nobody was asked about the waypoint, so nobody was waited for.
    let state = istio.plane.state();
    let asked: Vec<&String> = state.requests.iter().flat_map(|request| &request.resource_names_subscribe).collect();
    assert!(!asked.iter().any(|name| name.contains("10.2.0.250")), "{asked:?}");
    drop(state);
    let by = |line: &serde_json::Value| line["direction"] == "inbound" && line["message"] == "connection complete";
    istio.w.log_line(2, "it was carried by the daemon", by);
}
