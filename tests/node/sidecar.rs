//! Dedicated mode: a daemon without any right serves the workload in whose network namespace it runs, as a sidecar
//! container does. `culvert redirect` has been run there before, as an init container does.

use crate::world::facts::principal;
use crate::world::names::{answer, container, kubernetes_conf};
use crate::world::sniffer::Sniffer;
use crate::world::{
    ControlPlane, Pod, World, alive, apps, ask, connect, eventually, http, inside, is_reset, output_in, subject,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::chown;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// The user of the daemon.
const USER: u32 = 1337;
/// The port of the application that plaintext reaches past the daemon.
const PROBED: u16 = 8081;

/// A workload that serves itself on the first node, and pods of the second node.
struct Sidecar {
    w: World,
    own: Pod,
    server: Pod,
    plain: Pod,
    daemon: u32,
    /// Rights of the daemon.
    rights: &'static [&'static str],
}

/// As in a container: no right at all.
const NO_RIGHTS: &[&str] = &["--bounding-set", "-all", "--inh-caps", "-all"];
/// As on a machine, by its systemd unit.
const NET_ADMIN: &[&str] =
    &["--bounding-set", "-all,+net_admin", "--inh-caps", "-all,+net_admin", "--ambient-caps", "+net_admin"];

impl Sidecar {
    /// Nothing runs in the workload's network namespace yet but its application.
    fn new() -> Self {
        let mut w = World::new();
        let own = w.mesh_pod("own", 1);
        let server = w.mesh_pod("server", 2);
        w.mesh_pod("bad", 2);
        let plain = w.plain_pod("plain", 2);
        apps::serve(&own.netns, PROBED, apps::who);
        apps::serve(&plain.netns, 8080, apps::who);
        for pod in [&own, &server] {
            apps::serve(&pod.netns, 8080, apps::who);
            apps::serve(&pod.netns, 9000, apps::echo);
        }
        w.mesh.policy("no-bad", "Namespace", "Deny", principal("bad"));
        w.write_mesh();
        w.write_pods(2, &w.captured_pods(2));
        w.start_node(2, &[]);
        w.wait_captured(2);
        for file in ["", "ca.pem", "ca.key"] {
            chown(w.ca().join(file), Some(USER), Some(USER)).unwrap();
        }
        w.start_resolver("");
        Self { w, own, server, plain, daemon: 0, rights: NO_RIGHTS }
    }

    /// The same, redirected and served.
    fn started() -> Self {
        let mut s = Self::new();
        s.redirect(&[]);
        s.start(&[]);
        eventually("the daemon is ready", || s.is_ready());
        s
    }

    /// Runs `culvert redirect` as the init container does, which must succeed.
    fn redirect(&self, more: &[&str]) -> String {
        let output = redirect(&self.own, more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts the daemon as the container does: as its user, with no right at all.
    fn start(&mut self, more: &[(&str, &str)]) {
        let file = self.w.dir.join("own-resolv.conf");
        fs::write(&file, kubernetes_conf()).unwrap();
        let mut command = container(&file.display().to_string());
        let user = USER.to_string();
        command.args(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--no-new-privs"]);
        command.args(self.rights).arg(subject()).arg("node");
        command.env("PROXY_MODE", "dedicated").env("PROXY_WORKLOAD_INFO", "ns/own/own").env("LOG_FORMAT", "json");
        command.env("LOCAL_XDS_PATH", self.w.mesh_file(1)).env("CULVERT_CA_DIR", self.w.ca());
        command.env("NODE_NAME", "n1").envs(more.iter().copied());
        self.daemon = self.w.start_in(&self.own.netns, &mut command, "own.log");
    }

    fn get(&self, port: u16, path: &str) -> Option<(u16, String)> {
        inside(&self.own.netns, || http(port, "GET", path, "localhost"))
    }

    fn is_ready(&self) -> bool {
        self.get(15021, "/healthz/ready").is_some_and(|(status, _)| status == 200)
    }

    /// The only entry of `/pods`.
    fn shown(&self) -> Option<Value> {
        let (_, text) = self.get(15000, "/pods")?;
        let pods: Value = serde_json::from_str(&text).unwrap();
        assert!(pods.as_array().unwrap().len() <= 1, "{pods}");
        pods.get(0).cloned()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.w.dir.join("own.log")).unwrap()
    }

    /// Asks as an application of the workload does.
    fn dig(&self, what: &[&str]) -> String {
        self.w.run_in(&self.own, &[&["dig", "+short", "+time=8", "+tries=1"], what].concat())
    }

    fn rules(&self) -> String {
        output_in(&self.own.netns, "nft", &["list", "ruleset"])
    }

    /// What the second node's log says of the last connection from the workload to this port.
    fn seen_from_own(&self, port: u16) -> Option<Value> {
        let to = format!(":{port}");
        let from_own = |l: &Value| {
            l["direction"] == "inbound"
                && l["src.workload"] == "own"
                && l["dst.hbone_addr"].as_str().is_some_and(|a| a.ends_with(&to))
        };
        self.w.log(2).into_iter().rev().find(from_own)
    }
}

fn redirect(pod: &Pod, more: &[&str]) -> Output {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &pod.netns]).arg(subject()).arg("redirect").args(more);
    command.args(["--exclude-inbound-ports", &PROBED.to_string()]).output().unwrap()
}

/// Asks as [`ask`] does, with the rights of another user.
fn ask_as(user: u32, pod: &Pod, to: (IpAddr, u16), line: &str) -> Option<String> {
    let program = "import socket, sys\ns = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)\n\
                   s.sendall((sys.argv[3] + '\\n').encode()); s.shutdown(1)\n\
                   sys.stdout.write(s.makefile().read())";
    let user = user.to_string();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &pod.netns, "setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"]);
    command.args(["/usr/bin/python3", "-c", program, &to.0.to_string(), &to.1.to_string(), line]);
    let output = command.output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_workload_that_serves_itself_talks_to_a_node_in_both_directions_and_nothing_is_in_plaintext() {
    let mut s = Sidecar::started();
    let capabilities = fs::read_to_string(format!("/proc/{}/status", s.daemon)).unwrap();
    assert!(capabilities.contains("CapEff:\t0000000000000000"), "{capabilities}");
    let canary = "canary-77b0c1d2e3";
    let sniffer = Sniffer::start(&mut s.w, "sniffer", canary);
    for to in [s.server.v4, s.server.v6] {
        // The test is root, as an application may be.
        assert!(ask(&s.own.netns, (to, 8080), canary).unwrap().ends_with(canary));
        for user in [0, 65_534] {
            let answer = ask_as(user, &s.own, (to, 8080), canary).expect("an answer");
            assert!(answer.ends_with(canary), "{user}: {answer}");
        }
    }
    let own = |line: Value| line["src.identity"] == "spiffe://cluster.local/ns/ns/sa/own";
    eventually("the identity is in the peer's log", || s.seen_from_own(8080).is_some_and(own));
    assert!(s.w.metric(2, "istio_tcp_connections_opened_total", &["mutual_tls", "source_workload=\"own\""]) >= 6.0);
    for (to, from) in [(s.own.v4, s.own.v4), (s.own.v6, s.own.v6)] {
        let answer = ask(&s.server.netns, (to, 8080), canary).unwrap();
        assert_eq!(answer, format!("{from} {canary}"), "the client's address is not kept");
    }
    let inbound = || s.log().lines().filter(|l| l.contains("\"inbound\"") && l.contains("ns/ns/sa/server")).count();
    eventually("both are in its log", || inbound() == 2);
    let seen = sniffer.seen(&mut s.w);
    assert!(seen["frames"].as_u64().unwrap() > 20, "{seen}");
    assert_eq!((&seen["found"], &seen["dropped"]), (&json!(0), &json!(0)), "{seen}");
    // Policy, at both entrances.
    assert!(is_reset(&s.w.ns("bad"), (s.own.v4, 8080)), "the policy is enforced on tunnels");
    assert!(ask(&s.plain.netns, (s.own.v4, 8080), "x").is_ok(), "permissive without a policy that says otherwise");
    s.w.mesh.policy("mesh-only", "Namespace", "Deny", json!({"notPrincipals": ["Presence"]}));
    s.w.write_mesh();
    eventually("and on plaintext", || ask(&s.plain.netns, (s.own.v4, 8080), "x").is_err());
    assert!(ask(&s.plain.netns, (s.own.v4, PROBED), "x").is_ok(), "but not on ports that are excluded");
    assert!(ask(&s.server.netns, (s.own.v4, 8080), "x").is_ok());
    // The kubelet's probe comes from the node.
    assert!(ask(&s.w.ns("n1"), (s.own.v4, 15021), "GET /healthz/ready HTTP/1.0\r\n\r").unwrap().contains("ready"));
    // What cannot be known is said.
    let shown = s.shown().unwrap();
    assert_eq!(shown["state"], "captured");
    assert!(shown["rulesUnread"].as_str().unwrap().contains("no rights"), "{shown}");
    assert!(shown["inboundUnverified"].as_str().unwrap().contains("cannot be checked"), "{shown}");
    assert_eq!(s.log().matches("dedicated mode: serving this workload only").count(), 1);
    assert!(!s.log().contains("ermitted"), "nothing is tried without a right to it: {}", s.log());
}

#[test]
fn without_its_daemon_the_workload_is_cut_off_and_the_rules_come_and_go_as_a_whole() {
    let mut s = Sidecar::started();
    let (own, server, plain) = (s.own.clone(), s.server.clone(), s.plain.clone());
    let (before, routing) = (s.rules(), output_in(&own.netns, "ip", &["rule", "list"]));
    let mut live = connect(&own.netns, (server.v4, 9000)).unwrap();
    assert!(alive(&mut live));
    s.redirect(&[]);
    assert_eq!(s.rules(), before, "the second time changes nothing");
    assert!(alive(&mut live), "and no connection");
    s.w.take(s.daemon).kill();
    for _ in 0..10 {
        for (mine, theirs, plain_ip) in [(own.v4, server.v4, plain.v4), (own.v6, server.v6, plain.v6)] {
            assert!(ask(&own.netns, (theirs, 8080), "x").is_err(), "root's");
            assert!(ask_as(65_534, &own, (plain_ip, 8080), "x").is_none(), "another user's");
            assert!(ask(&server.netns, (mine, 8080), "x").is_err(), "through a tunnel");
            assert!(ask(&plain.netns, (mine, 8080), "x").is_err(), "in plaintext");
            assert!(ask(&plain.netns, (mine, PROBED), "x").is_ok(), "an excluded port");
        }
    }
    s.start(&[]);
    eventually("it is ready again", || s.is_ready());
    assert!(ask(&own.netns, (server.v4, 8080), "x").is_ok());
    s.w.take(s.daemon).kill();
    assert!(s.redirect(&["--remove"]).contains("is removed"));
    assert_eq!((s.rules().as_str(), output_in(&own.netns, "ip", &["rule", "list"])), ("", routing), "nothing is left");
    assert!(ask(&own.netns, (plain.v4, 8080), "x").is_ok(), "as any other client");
    assert!(s.redirect(&["--remove"]).contains("there is no redirection"));
    // What is captured by a node is not captured again, nor released.
    for more in [&[][..], &["--remove"]] {
        let refused = redirect(&server, more);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("captured by the daemon of a node already"), "{said}");
    }
    assert_eq!(s.w.state(2, "server").0, "captured");
}

#[test]
fn names_of_the_mesh_are_answered_and_others_by_the_resolver_of_the_pod() {
    let mut s = Sidecar::new();
    let server = s.server.clone();
    s.w.mesh.service("shop", &["10.96.0.20", "fd96::20"], &json!({"80": 8080}), &[&server]);
    s.w.write_mesh();
    s.redirect(&[]);
    s.start(&[]);
    eventually("the daemon is ready", || s.is_ready());
    for transport in ["+notcp", "+tcp"] {
        assert_eq!(s.dig(&[transport, "shop.ns.svc.cluster.local"]), "10.96.0.20\n");
        assert_eq!(s.dig(&[transport, "shop.ns.svc.cluster.local", "AAAA"]), "fd96::20\n");
        assert_eq!(s.dig(&[transport, "google.com"]), "203.0.113.80\n");
    }
    // A question for another resolver than that of the file reaches it only if the daemon may ask the kernel for whom
    // it was.
    let other = s.w.start_scripted(9, |request| vec![answer(request, [203, 0, 113, 9])]);
    let at_other = ["@10.1.0.9", "+noedns", "a.example"];
    assert_eq!(s.dig(&at_other), "203.0.113.1\n203.0.113.2\n");
    s.w.take(s.daemon).kill();
    s.rights = NET_ADMIN;
    s.start(&[]);
    eventually("the daemon is ready again", || s.is_ready());
    assert_eq!(s.dig(&at_other), "203.0.113.9\n");
    drop(other);
    let vip: IpAddr = "10.96.0.20".parse().unwrap();
    assert!(ask_as(65_534, &s.own, (vip, 80), "x").is_some_and(|answer| answer.ends_with(" x")));
    eventually("through the mesh", || s.seen_from_own(8080).is_some());
}

#[test]
fn a_workload_that_is_not_what_it_says_or_not_redirected_gets_no_identity_or_is_not_ready_and_learns_why() {
    let mut s = Sidecar::new();
    // As an application may be started too early.
    s.start(&[]);
    let not_redirected = |s: &Sidecar| {
        s.shown().is_some_and(|pod| {
            pod["state"] == "failed" && pod["reason"].as_str().unwrap().contains("run `culvert redirect`")
        })
    };
    eventually("it is not taken for captured", || not_redirected(&s));
    assert!(!s.is_ready());
    // As an administrator's session.
    let mut open = connect(&s.own.netns, (s.server.v4, 9000)).unwrap();
    assert!(alive(&mut open));
    let said = s.redirect(&[]);
    assert!(said.contains("connections that were open before go on without the mesh: 1\n"), "{said}");
    eventually("and is once it is", || s.is_ready());
    assert!(alive(&mut open));
    let said = s.redirect(&[]);
    assert!(
        alive(&mut open) && said.contains("open before go on without the mesh: 1\n"),
        "also at the second time: {said}"
    );
    s.redirect(&["--remove"]);
    eventually("it is noticed when the rules go", || not_redirected(&s) && !s.is_ready());
    s.w.take(s.daemon).kill();
    s.redirect(&[]);
    for (info, state, reason) in [
        ("ns/nobody/own", "pending", "no workload ns/nobody in the mesh facts yet"),
        ("elsewhere/own/own", "pending", "no workload elsewhere/own in the mesh facts yet"),
        ("ns/own/server", "failed", "the pod's service account is \"server\", the mesh facts say \"own\""),
        ("ns/server/server", "pending", "(NODE_NAME)"),
    ] {
        s.start(&[("PROXY_WORKLOAD_INFO", info)]);
        eventually(&format!("{info}: {reason}"), || {
            s.shown().is_some_and(|pod| pod["state"] == state && pod["reason"].as_str().unwrap().contains(reason))
        });
        let (_, dump) = s.get(15000, "/config_dump").unwrap();
        let dump: Value = serde_json::from_str(&dump).unwrap();
        assert_eq!(dump["certificates"], json!([]), "{info}");
        assert_eq!(dump["config"]["proxyMode"], "Dedicated");
        assert!(!s.is_ready());
        assert!(ask(&s.own.netns, (s.server.v4, 8080), "x").is_err(), "{info}");
        s.w.take(s.daemon).kill();
    }
    // Any other user's packets would be redirected to the daemon itself.
    let mut command = Command::new(subject());
    command.arg("node").env("PROXY_MODE", "dedicated").env("PROXY_WORKLOAD_INFO", "ns/own/own");
    command.env("LOCAL_XDS_PATH", s.w.mesh_file(1)).env("CULVERT_CA_DIR", s.w.ca());
    let output = inside(&s.own.netns, || command.output()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("must run as user 1337 (CULVERT_REDIRECT_UID)"), "{said}");
}

#[test]
fn istios_ca_is_asked_with_the_own_token_for_the_own_identity_and_no_other_is_ever_used() {
    let mut s = Sidecar::new();
    let plane = ControlPlane::start(&s.w.ns("n1"), &s.w.dir);
    plane.set(&s.w.mesh);
    chown(&plane.token_file, Some(USER), Some(USER)).unwrap();
    s.redirect(&[]);
    let mut settings = World::facts_from(&plane);
    let of_facts = |name: &str| settings.iter().find(|(n, _)| n == name).unwrap().1.clone();
    let ca = [("CA_ADDRESS", of_facts("XDS_ADDRESS")), ("ALT_CA_HOSTNAME", of_facts("ALT_XDS_HOSTNAME"))];
    settings.extend(ca.map(|(name, value)| (name.to_owned(), value)));
    settings.extend([
        ("CA_ROOT_CA".to_owned(), plane.root_file.display().to_string()),
        ("CULVERT_CA_DIR".to_owned(), String::new()),
        ("CLUSTER_ID".to_owned(), "c1".to_owned()),
    ]);
    let settings: Vec<(&str, &str)> = settings.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    // A token of another account.
    plane.change(|state| state.account = Some("server".into()));
    s.start(&settings);
    eventually("the CA has answered", || plane.signed_for("server") > 0);
    eventually("and it is said", || s.log().contains("the CA has signed for spiffe://cluster.local/ns/ns/sa/server"));
    assert!(!s.is_ready());
    plane.change(|state| state.account = Some("own".into()));
    eventually("with its own it is ready", || s.is_ready());
    let held: Value = serde_json::from_str(&s.get(15000, "/config_dump").unwrap().1).unwrap();
    let held: Vec<&Value> = held["certificates"].as_array().unwrap().iter().map(|c| &c["identity"]).collect();
    assert_eq!(held, ["spiffe://cluster.local/ns/ns/sa/own"]);
}

#[test]
fn the_daemon_of_a_workload_that_has_ended_ends_at_once() {
    let mut s = Sidecar::started();
    // Tunnels are left open in both directions, without a connection.
    assert!(ask(&s.own.netns, (s.server.v4, 8080), "x").is_ok());
    assert!(ask(&s.server.netns, (s.own.v4, 8080), "x").is_ok());
    let mut daemon = s.w.take(s.daemon);
    let from = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(from.elapsed() < Duration::from_secs(2), "{:?}: {}", from.elapsed(), s.log());
    assert!(s.log().contains("every connection had finished"));
}
