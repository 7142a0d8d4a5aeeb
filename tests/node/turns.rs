//! Two daemons on one node, as during an upgrade: one is active, the other one is on standby and serves what it has.

use crate::kubernetes::{Cluster, Cni, cluster, has_rules};
use crate::world::alive;
use crate::world::{Pod, ask, connect, eventually, http, inside, output_in, subject};
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// A setting that changes what is written in pods.
const WITHOUT_DNS: (&str, &str) = ("ISTIO_META_DNS_CAPTURE", "false");

struct Upgrade {
    c: Cluster,
    cni: Cni,
    own: Pod,
    /// Another version: a binary that differs in one byte.
    other: PathBuf,
}

fn upgrade() -> Upgrade {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let own = c.w.add_pod("beside", 1);
    let other = c.w.dir.join("culvert-other");
    fs::copy(subject(), &other).unwrap();
    fs::OpenOptions::new().append(true).open(&other).unwrap().write_all(b"\n").unwrap();
    Upgrade { c, cni, own, other }
}

impl Upgrade {
    /// The namespaces that the installed configuration excludes, which tell whose configuration it is.
    fn excluded(&self) -> String {
        let Some(ours) = self.cni.ours() else { return String::new() };
        ours["plugins"][1]["excludeNamespaces"].to_string()
    }

    fn takes_dns(&self) -> bool {
        output_in(&self.c.client.netns, "nft", &["list", "table", "inet", "culvert"]).contains(":15053")
    }

    /// Starts a daemon of the other version beside the node's own.
    fn start_beside(&mut self) -> u32 {
        let settings =
            [&self.cni.settings()[..], &[("EXCLUDE_NAMESPACES", "kube-system,second"), WITHOUT_DNS]].concat();
        self.c.w.start_kube_beside(&self.own, &self.other, &self.c.apis[0], &settings)
    }

    fn is_ready(&self) -> bool {
        inside(&self.own.netns, || http(15021, "GET", "/healthz/ready", "localhost"))
            .is_some_and(|(code, _)| code == 200)
    }

    fn plugin_is(&self, binary: &PathBuf) -> bool {
        fs::read(self.cni.bin.join("culvert-cni"))
            .is_ok_and(|plugin| plugin.len() as u64 == fs::metadata(binary).unwrap().len())
    }

    fn complaints(&self) -> usize {
        let logs =
            ["node1.log", "beside.log"].map(|name| fs::read_to_string(self.c.w.dir.join(name)).unwrap_or_default());
        logs.concat().matches("redirection was changed by another program").count()
    }
}

#[test]
fn of_two_daemons_the_newer_one_writes_and_nothing_is_undone() {
    let mut u = upgrade();
    u.c.start_one(&[&u.cni.settings()[..], &[("EXCLUDE_NAMESPACES", "kube-system,first")]].concat());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    eventually("the plugin is installed", || u.excluded() == r#"["first","kube-system"]"# && u.takes_dns());
    let beside = u.start_beside();
    eventually("the newer one is ready", || u.is_ready());
    eventually("its settings are in force", || u.excluded() == r#"["kube-system","second"]"# && !u.takes_dns());
    eventually("and its plugin", || u.plugin_is(&u.other));
    assert_eq!(u.complaints(), 0);
    // Whatever both daemons see, the newer one responds to it and the older one does not.
    let place = u.cni.conf.join("00-culvert.conflist");
    let netns = u.c.client.netns.clone();
    for round in 0..5 {
        fs::write(u.cni.conf.join("99-x.conflist"), format!("{round}")).unwrap();
        fs::remove_file(&place).unwrap();
        output_in(&netns, "nft", &["flush", "table", "inet", "culvert"]);
        eventually("it is written again", || place.exists());
        eventually("and the rules", || {
            output_in(&netns, "nft", &["list", "table", "inet", "culvert"]).contains(":15006")
        });
        let after = fs::metadata(&place).unwrap().ino();
        assert_eq!((u.excluded().as_str(), u.takes_dns()), (r#"["kube-system","second"]"#, false), "round {round}");
        assert_eq!(fs::metadata(&place).unwrap().ino(), after, "and written once");
    }
    assert!(u.plugin_is(&u.other));
    let complaints = u.complaints();
    assert!(
        complaints <= 5,
        "each change of ours is noticed by one of them, and neither takes the other for somebody else"
    );
    let ips = [u.c.client.v4.to_string()];
    assert!(u.cni.call("CHECK", ("ns", "client"), &netns, &ips).0, "the plugin is answered");
    // The newer daemon dies: the older one must take over.
    u.c.w.take(beside).kill();
    eventually("the older one has it back", || u.excluded() == r#"["first","kube-system"]"# && u.takes_dns());
    eventually("with its own plugin", || u.plugin_is(&subject()));
    eventually("which is answered", || u.cni.call("CHECK", ("ns", "client"), &netns, &ips).0);
    assert_eq!(u.complaints(), complaints);
    // The older daemon dies beside a newer one, which continues.
    u.start_beside();
    eventually("the newer one has taken over", || u.excluded() == r#"["kube-system","second"]"# && !u.takes_dns());
    u.c.w.take_node(1).kill();
    fs::remove_file(&place).unwrap();
    eventually("it writes", || u.excluded() == r#"["kube-system","second"]"#);
    assert!(has_rules(&u.c.client) && u.cni.call("CHECK", ("ns", "client"), &netns, &ips).0);
}

#[test]
fn a_newer_daemon_that_knows_nothing_yet_takes_nothing_over() {
    let mut u = upgrade();
    u.c.start_one(&[&u.cni.settings()[..], &[("EXCLUDE_NAMESPACES", "kube-system,first")]].concat());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    // A control plane that never answers: the daemon never learns the mesh facts.
    let nowhere =
        [("LOCAL_XDS_PATH", ""), ("XDS_ADDRESS", "127.0.0.1:9"), ("EXCLUDE_NAMESPACES", "kube-system,second")];
    let settings = [&u.cni.settings()[..], &nowhere].concat();
    let beside = u.c.w.start_kube_beside(&u.own, &u.other, &u.c.apis[0], &settings);
    let log = u.c.w.dir.join("beside.log");
    eventually("it runs", || fs::read_to_string(&log).is_ok_and(|text| text.contains("is running")));
    let pods =
        || inside(&u.own.netns, || http(15000, "GET", "/pods", "localhost")).map(|(_, body)| body).unwrap_or_default();
    eventually("it has heard of the pod", || pods().contains("has not sent"));
    assert!(u.plugin_is(&subject()), "nothing is written by it");
    fs::remove_file(u.cni.conf.join("00-culvert.conflist")).unwrap();
    eventually("the older one writes", || u.excluded() == r#"["first","kube-system"]"#);
    let (netns, ips) = (u.c.client.netns.clone(), [u.c.client.v4.to_string()]);
    assert!(u.cni.call("CHECK", ("ns", "client"), &netns, &ips).0, "and answers");
    assert!(!u.is_ready());
    // Alone on the node, it does what it can.
    u.c.w.take_node(1).kill();
    eventually("it writes", || u.excluded() == r#"["kube-system","second"]"#);
    u.c.w.take(beside).kill();
    let _ = ask(&netns, (u.c.server.v4, 8080), "x");
}

#[test]
fn a_question_that_waits_when_another_daemon_takes_over_is_answered_then() {
    let mut u = upgrade();
    u.c.start_one(&[&u.cni.settings()[..], &[("EXCLUDE_NAMESPACES", "kube-system,first")]].concat());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    eventually("the plugin is installed", || u.excluded() == r#"["first","kube-system"]"#);
    // A pod that the API does not list: the runtime asks, and waits.
    let unknown = u.c.w.add_pod("unknown", 1);
    let done = AtomicBool::new(false);
    let (cni, netns, ips) = (u.cni.clone(), unknown.netns.clone(), [unknown.v4.to_string()]);
    let answers = std::thread::scope(|scope| {
        let asks = scope.spawn(|| {
            let mut answers = Vec::new();
            while !done.load(Ordering::Relaxed) {
                answers.push(cni.call("ADD", ("ns", "unknown"), &netns, &ips).1.to_string());
            }
            answers
        });
        u.start_beside();
        eventually("the newer one has taken over", || u.excluded() == r#"["kube-system","second"]"# && !u.takes_dns());
        done.store(true, Ordering::Relaxed);
        asks.join().unwrap()
    });
    assert!(answers.iter().any(|answer| answer.contains("has taken over; try again")), "{answers:?}");
}

#[test]
fn the_newer_daemon_has_a_socket_also_where_an_older_one_has_removed_it() {
    let mut u = upgrade();
    u.c.start_one(&u.cni.settings());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    fs::remove_file(&u.cni.socket).unwrap();
    let (netns, ips) = (u.c.client.netns.clone(), [u.c.client.v4.to_string()]);
    eventually("it is there again", || u.cni.call("CHECK", ("ns", "client"), &netns, &ips).0);
}

#[test]
fn a_daemon_that_hangs_does_not_keep_the_node_from_a_newer_one() {
    use nix::sys::signal::Signal;
    let mut u = upgrade();
    u.c.start_one(&[&u.cni.settings()[..], &[("EXCLUDE_NAMESPACES", "kube-system,first")]].concat());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    eventually("the plugin is installed", || u.excluded() == r#"["first","kube-system"]"#);
    u.c.w.node(1).signal(Signal::SIGSTOP);
    u.start_beside();
    eventually("the newer one does not wait for ever", || u.excluded() == r#"["kube-system","second"]"#);
    u.c.w.node(1).signal(Signal::SIGCONT);
    let hands_on = |c: &Cluster| {
        c.w.log(1).iter().any(|line| line["message"].to_string().contains("another daemon of this node takes over"))
    };
    eventually("the older one sees that it has lost its turn", || hands_on(&u.c));
    let place = u.cni.conf.join("00-culvert.conflist");
    for _ in 0..3 {
        let _ = fs::remove_file(&place);
        eventually("it is written again", || place.exists());
        eventually("by the newer one", || u.excluded() == r#"["kube-system","second"]"# && u.plugin_is(&u.other));
    }
}

#[test]
fn a_daemon_that_compares_its_plugin_does_not_hold_it_in_memory() {
    let mut u = upgrade();
    let settings = u.cni.settings();
    u.c.w.start_kube_node(1, &u.c.apis[0], &settings);
    eventually("it is installed", || u.cni.ours().is_some());
    u.c.w.take_node(1).kill();
    // The second daemon finds it, and compares.
    u.c.w.start_kube_node(1, &u.c.apis[0], &settings);
    eventually("it is there", || u.c.w.metric(1, "culvert_cni_plugin_in_place", &[]) == 1.0);
    let status = fs::read_to_string(format!("/proc/{}/status", u.c.w.pid(1))).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB");
    let most = most.parse::<u64>().unwrap() * 1024;
    let binary = fs::metadata(subject()).unwrap().len();
    assert!(most < binary * 3 / 2, "{most} bytes at most, and the binary has {binary}");
}

#[test]
fn what_an_older_daemon_is_letting_go_of_has_its_time_after_a_newer_one_has_taken_over() {
    let mut u = upgrade();
    let (ns, server) = (u.c.client.netns.clone(), u.c.server.clone());
    let slow = [("CONNECTION_TERMINATION_DEADLINE", "20s")];
    u.c.w.start_kube_node(2, &u.c.apis[1], &[]);
    u.c.w.wait_captured(2);
    u.c.start_one(&[&u.cni.settings()[..], &slow].concat());
    eventually("it is captured", || u.c.apis[0].said("client").as_deref() == Some("enabled"));
    let mut open = connect(&ns, (server.v4, 9000)).unwrap();
    assert!(alive(&mut open));
    u.c.apis[0].namespace("ns", serde_json::json!({}));
    eventually("it is being released", || u.c.state("client") == "releasing");
    let rules = || output_in(&ns, "nft", &["list", "table", "inet", "culvert"]);
    // The state changes first and the rules after it. The older daemon removes what is added before that.
    eventually("nothing new is captured", || !rules().contains("15001"));
    // The newer daemon also empties the chains that capture new connections, which shows that it has checked.
    output_in(&ns, "nft", &["add", "rule", "inet", "culvert", "out_nat", "tcp", "dport", "1", "accept"]);
    assert!(rules().contains("dport 1 "));
    let settings = [&u.cni.settings()[..], &slow, &[("EXCLUDE_NAMESPACES", "kube-system,second")]].concat();
    u.c.w.start_kube_beside(&u.own, &u.other, &u.c.apis[0], &settings);
    eventually("the newer one has looked", || !rules().contains("dport 1 "));
    assert!(alive(&mut open), "cut before its time");
    drop(open);
    eventually("then nothing is left", || !has_rules(&u.c.client));
}
