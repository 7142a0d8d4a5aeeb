//! The CA refuses, hangs, rotates its root or has another clock, and certificates are revoked. Pods with a valid
//! certificate keep it, and revoked peers are cut off.

use crate::istio::Istio;
use crate::world::certs::spiffe;
use crate::world::control_plane::{Ca, Root};
use crate::world::{Agent, World, alive, ask, eventually, replace};
use crate::xds::Load;
use serde_json::Value;
use std::time::{Duration, Instant};

/// When the current certificate of an account expires, in seconds since 1970.
fn ends(istio: &Istio, node: u8, account: &str) -> f64 {
    istio.w.metric(node, "culvert_certificate_expiry_seconds", &[&format!("\"{}\"", spiffe(account))])
}

/// The number of a node's warnings about certificates.
fn warnings(w: &World, node: u8) -> usize {
    let bad = |line: &&Value| {
        line["level"] == "warn" && line["scope"].as_str().is_some_and(|scope| scope.starts_with("identity::"))
    };
    w.log(node).iter().filter(bad).count()
}

#[test]
fn eight_are_asked_for_at_once_and_a_refusal_of_fresh_pods_is_quiet() {
    let mut istio = Istio::new();
    for n in 0..12 {
        let pod = istio.w.mesh_pod(&format!("p{n}"), 1);
        Agent::redirect(&pod);
        istio.agent(1).know(&pod);
    }
    istio.tell();
    istio.plane.change(|state| state.ca = Ca::Hang);
    for node in [1, 2] {
        istio.start_node(node, &[]);
    }
    // The server's node also requests certificates.
    eventually("eight ask, and the server's", || istio.plane.state().at_the_ca == 9);
    // A connection makes the certificate of its pod the most urgent one.
    let (ns, server) = (istio.w.ns("p11"), istio.server());
    let waiting = std::thread::spawn(move || ask(&ns, (server, 8080), "x"));
    eventually("it waits", || crate::world::output_in(&istio.w.ns("p11"), "ss", &["-tn"]).contains(":8080"));
    istio.plane.change(|state| state.ca = Ca::Refuse(7));
    eventually("refused", || istio.w.metric(1, "culvert_certificate_failures_total", &[]) >= 9.0);
    istio.plane.change(|state| state.ca = Ca::Sign);
    assert!(waiting.join().unwrap().is_ok());
    eventually("all have one", || istio.w.metric(1, "culvert_certificates_fetched_total", &[]) >= 13.0);
    assert!(istio.plane.state().most_at_the_ca <= 9);
    assert_eq!(warnings(&istio.w, 1), 0, "a CA that has not heard of a pod yet is no news");
}

#[test]
fn a_ca_that_refuses_and_hangs_for_twice_the_renewal_interval_costs_no_handshake() {
    let mut istio = Istio::new();
    // Certificates are renewed after 6.4 to 7.4 s.
    istio.plane.change(|state| state.life = 16);
    istio.start();
    let load = Load::start(&istio);
    let first = ends(&istio, 1, "client");
    istio.plane.change(|state| state.ca = Ca::Refuse(16));
    let start = Instant::now();
    eventually("renewals are refused", || warnings(&istio.w, 1) > 0 && warnings(&istio.w, 2) > 0);
    istio.plane.change(|state| state.ca = Ca::Hang);
    eventually("twice the interval", || start.elapsed() >= Duration::from_secs(13));
    assert_eq!(ends(&istio, 1, "client"), first, "what is held stays");
    let left = istio.w.metric(1, "culvert_seconds_to_certificate_outage", &[]);
    assert!((0.0..4.0).contains(&left), "{left} s left");
    istio.plane.change(|state| state.ca = Ca::Sign);
    eventually("renewed", || ends(&istio, 1, "client") > first && ends(&istio, 2, "server") > first);
    load.more(20);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
}

#[test]
fn a_root_is_rotated_under_load_in_either_order() {
    let mut istio = Istio::new();
    istio.plane.change(|state| state.life = 12);
    istio.start();
    let (load, mut open) = (Load::start(&istio), istio.open());
    let old = istio.plane.state().signer.clone();
    let renewed = |istio: &Istio, count: usize| {
        let before = ["client", "server"].map(|account| istio.plane.signed_for(account));
        eventually("both are renewed", || {
            ["client", "server"].iter().zip(before).all(|(a, n)| istio.plane.signed_for(a) >= n + count)
        });
    };
    // A correct rotation: the new root is announced first, then it signs, then the old root is removed.
    let new = Root::new("second root");
    istio.plane.change(|state| state.bundle.push(new.clone()));
    renewed(&istio, 1);
    istio.plane.change(|state| state.signer = new.clone());
    renewed(&istio, 1);
    istio.plane.change(|state| state.bundle.retain(|root| root.pem != old.pem));
    renewed(&istio, 1);
    // A wrong rotation: all steps at once.
    let third = Root::new("third root");
    istio.plane.change(|state| {
        state.bundle = vec![third.clone()];
        state.signer = third.clone();
    });
    renewed(&istio, 2);
    load.more(20);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    assert!(!alive(&mut open), "a tunnel ends with the certificates it began with");
    // Both certificates expire in the same second or so, and the node that acts first resets the connection.
    eventually("one node says why", || {
        [1, 2].iter().any(|node| istio.w.log(*node).iter().any(|l| l["reason"] == "cert_expired"))
    });
}

#[test]
fn a_ca_with_another_clock_is_named_and_nothing_is_lost_while_it_has() {
    let mut istio = Istio::new();
    istio.plane.change(|state| state.life = 20);
    istio.start();
    let load = Load::start(&istio);
    let held = ends(&istio, 1, "client");
    for days in [7, -7] {
        istio.plane.change(|state| state.clock = days * 86_400);
        let signed = istio.plane.signed_for("client");
        eventually("it is renewed in vain", || istio.plane.signed_for("client") > signed);
        istio.w.log_line(1, "the clocks", |l| l["error"].as_str().is_some_and(|e| e.contains("clocks")));
        assert_eq!(ends(&istio, 1, "client"), held);
    }
    // There is no busy loop: each attempt waits.
    let signed = istio.plane.signed_for("client");
    assert!(signed < 12, "{signed} requests");
    istio.plane.change(|state| state.clock = 0);
    eventually("renewed", || ends(&istio, 1, "client") > held && ends(&istio, 2, "server") > held);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
}

#[test]
fn who_is_revoked_is_cut_and_refused_and_a_broken_list_changes_nothing() {
    let mut istio = Istio::new();
    let other = istio.w.mesh_pod("other", 1);
    Agent::redirect(&other);
    istio.agent(1).know(&other);
    istio.tell();
    let crl = istio.w.dir.join("ca-crl.pem");
    let path = crl.display().to_string();
    // The file appears later. That it is missing is logged, and delays nothing.
    istio.start_with(&[("CRL_PATH", &path)]);
    assert_eq!(istio.w.metric(2, "culvert_crl_stale", &[]), 1.0);
    let server = istio.server();
    let mut open = istio.open();
    let mut unconcerned = crate::world::connect(&other.netns, (server, 9000)).unwrap();
    assert!(alive(&mut unconcerned));
    let root = istio.plane.state().signer.clone();
    let serial = istio.plane.serial_of("client");
    let start = Instant::now();
    replace(&crl, &root.crl(&[serial.clone(), rcgen::SerialNumber::from(1)]));
    eventually("the live connection is cut", || !alive(&mut open));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let line = istio.w.log_line(2, "why", |l| l["reason"] == "cert_revoked" && l["src.workload"] == "client");
    assert!(line["error"].as_str().unwrap().contains("revoked by CRL"), "{line}");
    eventually("and a new one is refused", || istio.request().is_err());
    assert!(alive(&mut unconcerned) && ask(&other.netns, (server, 8080), "x").is_ok());
    assert!(istio.w.metric(2, "istio_crl_policy_rejections_total", &["reporter=\"destination\""]) >= 2.0);
    assert!(istio.w.metric(1, "istio_crl_policy_rejections_total", &["reporter=\"source\""]) >= 0.0);
    for broken in ["-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "not a list"] {
        let refused = istio.w.metric(2, "culvert_crl_refused_total", &[]);
        replace(&crl, broken);
        eventually("it is refused", || istio.w.metric(2, "culvert_crl_refused_total", &[]) > refused);
        assert_eq!(istio.w.metric(2, "culvert_crl_stale", &[]), 1.0);
        assert_eq!(istio.w.metric(2, "culvert_crl_entries", &[]), 2.0, "the list before stays");
        assert!(istio.request().is_err());
    }
    assert!(istio.w.json(2, "/config_dump")["revocationListError"].as_str().is_some_and(|e| !e.is_empty()));
    // The server's own certificate, as the client's node sees it.
    replace(&crl, &root.crl(&[istio.plane.serial_of("server")]));
    eventually("the client's side cuts", || !alive(&mut unconcerned));
    // Each worker has tunnels of its own, and they end one after the other.
    eventually("a new one is refused", || ask(&other.netns, (server, 8080), "x").is_err());
    eventually("counted there", || {
        istio.w.metric(1, "istio_crl_policy_rejections_total", &["reporter=\"source\""]) >= 1.0
    });
    replace(&crl, &root.crl(&[]));
    eventually("without entries all is well again", || istio.request().is_ok());
}
