//! A node under random operations: pods are labelled and unlabelled, made, deleted, ended and restarted, their
//! addresses are reused, their rules are changed, the daemon is killed, the API is cut off. After each burst, once
//! everything is quiet, exactly the right pods are captured, nothing is left in the others, and nothing that a captured
//! pod sent was on the wire in the clear.

use crate::world::kube::{Api, KubePod};
use crate::world::sniffer::Sniffer;
use crate::world::{PATIENCE, Pod, World, apps, ask, eventually, output_in};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SLOTS: usize = 6;
const BURSTS: usize = 100;
const STEPS: usize = 100;
/// Log settings: without connections, because there are thousands.
const LOG: &[(&str, &str)] = &[("RUST_LOG", "info,access=off")];

/// A slot for a pod: a namespace with addresses. Pods of two names take turns in it.
struct Slot {
    pods: [Pod; 2],
    now: Option<Life>,
}

struct Life {
    kube: KubePod,
    running: bool,
}

impl Life {
    fn mode(&self) -> Option<&str> {
        self.kube.labels["istio.io/dataplane-mode"].as_str()
    }

    fn is_in(&self, namespace: bool) -> bool {
        let labelled = self.mode() == Some("ambient") || (namespace && self.mode() != Some("none"));
        labelled && self.kube.phase == "Running"
    }
}

struct Model {
    w: World,
    api: Api,
    slots: Vec<Slot>,
    /// Whether the Kubernetes namespace is labelled.
    labelled: bool,
    counts: BTreeMap<&'static str, usize>,
}

impl Model {
    fn step(&mut self, random: &mut StdRng) {
        let at = random.random_range(0..SLOTS);
        let what = match random.random_range(0..1000) {
            0..20 => self.label_namespace(),
            20..24 => self.kill(),
            24..30 => self.cut(random.random()),
            30..230 => self.make(at, random.random_range(0..2)),
            230..350 => self.delete(at, random.random()),
            350..400 => self.complete(at),
            400..500 => self.restart(at),
            500..560 => self.tamper(at),
            _ => self.label(at, random),
        };
        *self.counts.entry(what).or_default() += 1;
    }

    fn label_namespace(&mut self) -> &'static str {
        self.labelled = !self.labelled;
        let labels = if self.labelled { json!({"istio.io/dataplane-mode": "ambient"}) } else { json!({}) };
        self.api.namespace("ns", labels);
        "namespace labelled or unlabelled"
    }

    fn kill(&mut self) -> &'static str {
        self.w.take_node(1).kill();
        self.w.start_kube_node(1, &self.api, LOG);
        "daemon killed"
    }

    fn cut(&mut self, forget: bool) -> &'static str {
        if forget {
            self.api.forget();
        } else {
            self.api.cut();
        }
        "API cut"
    }

    fn make(&mut self, at: usize, who: usize) -> &'static str {
        let slot = &mut self.slots[at];
        if slot.now.is_some() {
            return "nothing";
        }
        let mut kube = KubePod::without_sandbox(&slot.pods[who]);
        kube.run(&slot.pods[who].netns);
        self.api.pod(&kube);
        slot.now = Some(Life { kube, running: true });
        "made, in a place that others had"
    }

    fn delete(&mut self, at: usize, object_first: bool) -> &'static str {
        let Some(mut life) = self.slots[at].now.take() else { return "nothing" };
        if object_first {
            self.api.delete(&life.kube.name);
            life.kube.stop();
        } else {
            life.kube.stop();
            self.api.delete(&life.kube.name);
        }
        "deleted"
    }

    fn complete(&mut self, at: usize) -> &'static str {
        let Some(life) = &mut self.slots[at].now else { return "nothing" };
        life.kube.stop();
        life.running = false;
        life.kube.phase = "Succeeded";
        self.api.pod(&life.kube);
        "ended"
    }

    fn restart(&mut self, at: usize) -> &'static str {
        let Slot { pods, now } = &mut self.slots[at];
        let Some(life) = now.as_mut().filter(|life| life.kube.phase == "Running") else { return "nothing" };
        life.kube.stop();
        life.kube.run(&pods[0].netns);
        life.running = true;
        self.api.pod(&life.kube);
        "sandbox restarted"
    }

    fn tamper(&mut self, at: usize) -> &'static str {
        let ns = &self.slots[at].pods[0].netns;
        // Without a table, this does nothing.
        let _ = Command::new("ip").args(["netns", "exec", ns, "nft", "flush", "table", "inet", "culvert"]).output();
        "rules flushed"
    }

    fn label(&mut self, at: usize, random: &mut impl Rng) -> &'static str {
        let Some(life) = &mut self.slots[at].now else { return "nothing" };
        let labels = match random.random_range(0..3) {
            0 => json!({"istio.io/dataplane-mode": "ambient"}),
            1 => json!({"istio.io/dataplane-mode": "none"}),
            _ => json!({}),
        };
        life.kube.labels = labels;
        self.api.pod(&life.kube);
        "pod labelled or unlabelled"
    }

    /// The pods that should be captured.
    fn desired(&self) -> Vec<String> {
        let lives = self.slots.iter().filter_map(|slot| slot.now.as_ref());
        let wanted = lives.filter(|life| life.running && life.is_in(self.labelled));
        let mut all: Vec<String> = wanted.map(|life| life.kube.name.clone()).chain(["steady".to_owned()]).collect();
        all.sort();
        all
    }

    /// The pods that are verified to be captured; `None` if any is in another state.
    fn verified(&self) -> Option<Vec<String>> {
        let mut states = self.w.states(1);
        states.sort();
        states
            .iter()
            .all(|(_, state, _)| state == "captured")
            .then(|| states.into_iter().map(|(name, _, _)| name).collect())
    }

    fn check(&self, burst: usize) -> Duration {
        let (quiet, desired, mark) = (Instant::now(), self.desired(), self.api.mark(burst));
        eventually("the daemon has heard of everything", || self.w.states(1).iter().any(|(name, _, _)| *name == mark));
        self.api.unmark(&mark);
        let deadline = quiet + PATIENCE;
        let rules = |slot: &Slot| output_in(&slot.pods[0].netns, "nft", &["list", "ruleset"]);
        let rules = |slot: &Slot| match rules(slot) {
            nothing if nothing.is_empty() => Some(false),
            whole if whole.contains("redirect to :15001") && whole.contains("redirect to :15006") => Some(true),
            _ => None,
        };
        let is_so = || {
            let names = |slot: &Slot| slot.now.as_ref().map(|life| life.kube.name.clone()).unwrap_or_default();
            let right = |slot: &Slot| rules(slot) == Some(desired.contains(&names(slot)));
            // In a cluster, the network namespace of a pod ends with the pod. Here other pods use it again.
            let running = |slot: &&Slot| slot.now.as_ref().is_some_and(|life| life.running);
            self.verified().as_ref() == Some(&desired) && self.slots.iter().filter(running).all(right)
        };
        while !is_so() {
            let lives = self.slots.iter().filter_map(|slot| slot.now.as_ref());
            let lives = || lives.clone().map(|l| (&l.kube.name, &l.kube.uid, l.running, l.mode())).collect::<Vec<_>>();
            assert!(
                Instant::now() < deadline,
                "burst {burst}: {desired:?} is not {:?}; pods are {:?}, the namespace is labelled: {}; {:#?}",
                self.w.states(1),
                lives(),
                self.labelled,
                self.api.recent()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        quiet.elapsed()
    }
}

#[test]
#[allow(clippy::disallowed_methods, reason = "the rule is about the daemon")]
fn after_any_life_what_is_captured_is_what_should_be() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    eprintln!("SEED={seed} repeats it");
    let mut random = StdRng::seed_from_u64(seed);
    let mut w = World::new();
    let (server, steady) = (w.mesh_pod("server", 2), w.mesh_pod("steady", 1));
    apps::serve(&server.netns, 8080, apps::who);
    let slots = (0..SLOTS).map(|number| {
        let first = w.mesh_pod(&format!("s{number}a"), 1);
        let second = Pod { name: format!("s{number}b"), ..first.clone() };
        w.mesh.workload(&second, "HBONE");
        Slot { pods: [first, second], now: None }
    });
    let slots: Vec<Slot> = slots.collect();
    w.write_mesh();
    w.write_pods(2, &[&server]);
    w.start_node(2, &[]);
    let api = Api::start(&w, 1);
    api.namespace("ns", json!({}));
    let mut kube = KubePod::new(&steady);
    kube.labels = json!({"istio.io/dataplane-mode": "ambient"});
    api.pod(&kube);
    w.start_kube_node(1, &api, LOG);
    let mut model = Model { w, api, slots, labelled: false, counts: BTreeMap::new() };
    model.check(0);

    // One pod stays captured all the time and keeps sending.
    let canary = "canary-9a41d7c0e2";
    let sniffer = Sniffer::start(&mut model.w, "sniffer", canary);
    let (stop, said) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let talker = std::thread::spawn({
        let (stop, said, ns, to) = (stop.clone(), said.clone(), steady.netns, (server.v4, 8080));
        move || {
            while !stop.load(Ordering::Relaxed) {
                match ask(&ns, to, canary) {
                    Ok(_) => drop(said.fetch_add(1, Ordering::Relaxed)),
                    // The daemon is down, so the connection is refused.
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
    });
    let mut longest = Vec::new();
    for burst in 1..=BURSTS {
        for _ in 0..STEPS {
            model.step(&mut random);
        }
        longest.push(model.check(burst));
        for slot in &model.slots {
            if let Some(life) = slot.now.as_ref().filter(|life| life.running && life.is_in(model.labelled)) {
                let answer = ask(&slot.pods[0].netns, (server.v4, 8080), canary);
                assert!(answer.is_ok(), "burst {burst}: {} is captured and carried: {answer:?}", life.kube.name);
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    talker.join().unwrap();
    let seen = sniffer.seen(&mut model.w);
    longest.sort();
    let late = longest.iter().filter(|time| **time > Duration::from_secs(2)).count();
    eprintln!("{} steps: {:?}", BURSTS * STEPS, model.counts);
    eprintln!(
        "quiet to verified: median {:?}, longest {:?}, {late} above 2 s; {} canaries, {seen}",
        longest[BURSTS / 2],
        longest[BURSTS - 1],
        said.load(Ordering::Relaxed)
    );
    assert!(seen["frames"].as_u64().unwrap() > 1000 && said.load(Ordering::Relaxed) > 100, "{seen}");
    assert_eq!((&seen["found"], &seen["dropped"]), (&json!(0), &json!(0)), "{seen}");
}
