//! The cases: which load, which figures, and which of them decides.

use crate::load::{Client, Load};
use crate::process::Use;
use crate::subject::{Kind, Layout, Subject};
use std::collections::BTreeMap;
use std::time::Duration;

/// Waits for memory to settle before it is read.
const SETTLE: Duration = Duration::from_millis(500);

/// A figure of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
    pub higher_is_better: bool,
}

const fn low(name: &'static str, unit: &'static str) -> Figure {
    Figure { name, unit, higher_is_better: false }
}

const fn high(name: &'static str, unit: &'static str) -> Figure {
    Figure { name, unit, higher_is_better: true }
}

const RATE: Figure = high("rate", "1/s");
const P50: Figure = low("p50", "µs");
const P99: Figure = low("p99", "µs");
const P999: Figure = low("p99.9", "µs");
const CPU_EACH: Figure = low("CPU each", "µs");
const CPU_KIB: Figure = low("CPU per KiB", "ns");
const CPU_CORES: Figure = low("CPU", "cores");
const SWITCHES: Figure = low("switches each", "");
const SWITCHES_MIB: Figure = low("switches per MiB", "");
const THROUGHPUT: Figure = high("throughput", "Gbit/s");
const BESIDE: Figure = high("throughput beside", "Gbit/s");
const P50_ALONE: Figure = low("p50 alone", "µs");
const P99_ALONE: Figure = low("p99 alone", "µs");
const P99_RATIO: Figure = low("p99 / p99 alone", "");
const STORM_RATE: Figure = high("connections beside", "1/s");
const START: Figure = low("memory at the start", "MiB");
const EACH: Figure = low("memory each", "KiB");
const EACH_AFTER: Figure = low("memory each after 1 MB", "KiB");
const ERRORS: Figure = low("errors", "");

/// The work of a case.
enum Work {
    /// A load for some seconds, beside others that began earlier.
    Steady { load: Load, connections: usize, beside: Vec<(Load, usize)>, plain: bool },
    /// One connection to each of many addresses, and the tunnels that remain.
    Cold,
    /// Connections that stay open.
    Idle,
    /// A load alone, and then beside another pod of its node that opens connections and sends without end.
    Fair { load: Load, connections: usize },
}

/// A case of the table.
pub struct Case {
    pub name: &'static str,
    pub title: &'static str,
    /// The figure by which two runs of one subject are compared.
    pub decides: Figure,
    pub quick: bool,
    /// Whether it needs proxies that have served nothing else, because it reads their memory, and that serve nothing
    /// afterwards, because stalled connections may block them.
    pub fresh: bool,
    figures: &'static [Figure],
    work: Work,
}

/// How long and how much.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub seconds: f64,
    pub idle_connections: usize,
    pub tunnels: u32,
}

pub type Figures = BTreeMap<&'static str, f64>;

const EXCHANGE: &[Figure] = &[RATE, P50, P99, P999, CPU_EACH, SWITCHES, ERRORS];
const BULK: &[Figure] = &[THROUGHPUT, CPU_KIB, SWITCHES_MIB, ERRORS];
const FAIR: &[Figure] = &[P50_ALONE, P99_ALONE, P50, P99, P99_RATIO, P999, STORM_RATE, BESIDE, ERRORS];
const MIXED: &[Figure] = &[RATE, P50, P99, P999, BESIDE, CPU_CORES, ERRORS];

fn steady(name: &'static str, title: &'static str, figures: &'static [Figure], load: Load, connections: usize) -> Case {
    let decides = if figures == BULK { CPU_KIB } else { CPU_EACH };
    let work = Work::Steady { load, connections, beside: vec![], plain: false };
    Case { name, title, decides, quick: false, fresh: false, figures, work }
}

impl Case {
    fn quick(mut self) -> Self {
        self.quick = true;
        self
    }

    fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    fn beside(mut self, decides: Figure, others: Vec<(Load, usize)>) -> Self {
        (self.decides, self.figures) = (decides, MIXED);
        if let Work::Steady { beside, .. } = &mut self.work {
            *beside = others;
        }
        self
    }

    fn in_plaintext(mut self) -> Self {
        if let Work::Steady { plain, .. } = &mut self.work {
            *plain = true;
        }
        self
    }

    /// What it needs of a subject.
    pub fn layout(&self, extent: Extent) -> Layout {
        let further = if matches!(self.work, Work::Cold) { extent.tunnels } else { 0 };
        Layout { further, single_core: matches!(self.work, Work::Fair { .. }) }
    }

    /// Whether a kind of subject can do it.
    pub fn suits(&self, kind: &Kind) -> bool {
        match self.work {
            Work::Steady { plain: true, .. } => kind.relays_plaintext(),
            Work::Steady { .. } => true,
            Work::Cold => kind.takes_any_destination(),
            Work::Idle => *kind != Kind::Direct,
            // Each of the others is one program in each pod.
            Work::Fair { .. } => matches!(kind, Kind::Culvert | Kind::Ztunnel(_)),
        }
    }

    /// The figures that the case can have, in the order of the table.
    pub fn figures(&self) -> &'static [Figure] {
        self.figures
    }

    /// Measures a subject once.
    pub fn measure(&self, subject: &Subject, extent: Extent) -> Figures {
        let figures = match &self.work {
            Work::Steady { load, connections, beside, plain } => {
                let to = if *plain { subject.plain() } else { subject.server() };
                let front = Client { to, connections: *connections, load: load.clone() };
                steady_load(subject, &front, beside, extent.seconds)
            }
            Work::Cold => cold(subject, extent.tunnels),
            Work::Idle => idle(subject, extent.idle_connections),
            Work::Fair { load, connections } => {
                let front = Client { to: subject.server(), connections: *connections, load: load.clone() };
                fair(subject, &front, extent.seconds)
            }
        };
        subject.check();
        figures.into_iter().filter(|(_, value)| value.is_finite()).collect()
    }
}

/// All cases, the most important ones first.
pub fn all() -> Vec<Case> {
    let exchange =
        |name, title, bytes, connections| steady(name, title, EXCHANGE, Load::Exchange { bytes }, connections);
    let bulk = |name, title, load, connections| steady(name, title, BULK, load, connections);
    let paced = Load::Paced { bytes: 1024, rate: 2000 };
    let fair = |name, title, load| Case {
        name,
        title,
        decides: P50,
        quick: false,
        fresh: true,
        figures: FAIR,
        work: Work::Fair { load, connections: 32 },
    };
    vec![
        exchange("rr-64-x1", "64 B and back, 1 connection", 64, 1).quick(),
        exchange("rr-1k-x32", "1 KiB and back, 32 connections", 1024, 32).quick(),
        exchange("rr-1k-x128", "1 KiB and back, 128 connections", 1024, 128),
        steady("rr-1k-paced", "1 KiB and back, 16 connections, 2,000 a second in all", EXCHANGE, paced, 16),
        bulk("up-1", "upload, 1 connection", Load::Up, 1).quick(),
        bulk("up-8", "upload, 8 connections", Load::Up, 8),
        bulk("down-1", "download, 1 connection", Load::Down, 1),
        bulk("down-8", "download, 8 connections", Load::Down, 8).quick(),
        steady("connect", "connect, 64 B and back, close, 4 at once, warm tunnel", EXCHANGE, Load::Connect, 4).quick(),
        Case {
            name: "connect-cold",
            title: "the same, a new tunnel each time; then the tunnels, idle",
            decides: CPU_EACH,
            quick: false,
            fresh: true,
            figures: &[P50, P99, CPU_EACH, SWITCHES, START, EACH, ERRORS],
            work: Work::Cold,
        },
        exchange("mixed", "1 KiB and back, 4 connections, beside 2 uploads", 1024, 4)
            .beside(P50, vec![(Load::Up, 2)])
            .quick(),
        exchange("stalled", "1 KiB and back, 4 connections, beside 8 uploads that nobody reads", 1024, 4)
            .beside(P50, vec![(Load::Stalled, 8)])
            .fresh()
            .quick(),
        exchange("slow", "1 KiB and back, 4 connections, beside a slow reader", 1024, 4)
            .beside(P50, vec![(Load::Slow, 1)])
            .fresh(),
        fair(
            "fair",
            "1 KiB and back, 100 a second, beside a pod with 5,000 new connections a second and 4 uploads, on one core",
            Load::Paced { bytes: 1024, rate: 100 },
        ),
        fair("fair-connect", "the same, with a new connection for each", Load::PacedConnect { rate: 100 }),
        Case {
            name: "idle",
            title: "idle connections",
            decides: EACH,
            quick: true,
            fresh: true,
            figures: &[START, EACH, EACH_AFTER, ERRORS],
            work: Work::Idle,
        },
        exchange("plain-rr", "to a pod outside of the mesh: 1 KiB and back, 32 connections", 1024, 32).in_plaintext(),
        bulk("plain-up", "to a pod outside of the mesh: upload, 1 connection", Load::Up, 1).in_plaintext(),
    ]
}

/// The time after which a load counts as steady.
fn warm_up(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds / 4.0)
}

fn steady_load(subject: &Subject, front: &Client, beside: &[(Load, usize)], seconds: f64) -> Figures {
    let others: Vec<Client> = beside
        .iter()
        .map(|(load, connections)| Client { to: front.to, connections: *connections, load: load.clone() })
        .collect();
    let mut others: Vec<_> = others.iter().map(|client| subject.client(client)).collect();
    for process in &mut others {
        process.wait_for("ready");
    }
    if !others.is_empty() {
        std::thread::sleep(warm_up(seconds));
    }
    let mut process = subject.client(front);
    process.wait_for("ready");
    std::thread::sleep(warm_up(seconds));
    let before = subject.used();
    for process in others.iter_mut().chain([&mut process]) {
        process.send("start");
    }
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let after = subject.used();
    let outcome = process.stop();
    let beside: f64 = others.into_iter().map(|process| process.stop()).map(|o| gigabits(o.bytes, o.seconds)).sum();
    let mut figures = Figures::new();
    let mut set = |figure: Figure, value: f64| {
        figures.insert(figure.name, value);
    };
    set(ERRORS, outcome.errors as f64);
    set(RATE, outcome.operations as f64 / outcome.seconds);
    set(THROUGHPUT, gigabits(outcome.bytes, outcome.seconds));
    set(BESIDE, beside);
    set(P50, outcome.p50);
    set(P99, outcome.p99);
    set(P999, outcome.p999);
    if subject.has_proxies() {
        let (cpu, switches) = (after.cpu - before.cpu, after.switches.saturating_sub(before.switches) as f64);
        let (each, unit) = (outcome.operations as f64, outcome.bytes as f64);
        if matches!(front.load, Load::Up | Load::Down) {
            set(CPU_KIB, cpu * 1e9 / (unit / 1024.0));
            set(SWITCHES_MIB, switches / (unit / 1_048_576.0));
        } else {
            set(CPU_EACH, cpu * 1e6 / each);
            set(SWITCHES, switches / each);
        }
        set(CPU_CORES, cpu / outcome.seconds);
    }
    figures
}

fn fair(subject: &Subject, front: &Client, seconds: f64) -> Figures {
    let run = || {
        let mut process = subject.client(front);
        process.wait_for("ready");
        std::thread::sleep(warm_up(seconds));
        process.send("start");
        std::thread::sleep(Duration::from_secs_f64(seconds));
        process.stop()
    };
    let alone = run();
    let beside = |load, connections| {
        let mut process = subject.greedy_client(&Client { to: front.to, connections, load });
        process.wait_for("ready");
        process
    };
    let (mut storm, mut bulk) = (beside(Load::Storm { rate: 5000 }, 1), beside(Load::Up, 4));
    std::thread::sleep(warm_up(seconds));
    storm.send("start");
    bulk.send("start");
    let outcome = run();
    let (storm, bulk) = (storm.stop(), bulk.stop());
    Figures::from([
        (P50_ALONE.name, alone.p50),
        (P99_ALONE.name, alone.p99),
        (P50.name, outcome.p50),
        (P99.name, outcome.p99),
        (P999.name, outcome.p999),
        (P99_RATIO.name, outcome.p99 / alone.p99),
        (STORM_RATE.name, storm.operations as f64 / storm.seconds),
        (BESIDE.name, gigabits(bulk.bytes, bulk.seconds)),
        (ERRORS.name, (alone.errors + outcome.errors) as f64),
    ])
}

fn cold(subject: &Subject, tunnels: u32) -> Figures {
    std::thread::sleep(SETTLE);
    let before = subject.used();
    let load = Load::Visit { addresses: tunnels };
    let mut process = subject.client(&Client { to: Subject::further(), connections: 4, load });
    process.wait_for("done");
    let after = subject.used();
    std::thread::sleep(SETTLE);
    let idle = subject.used();
    let outcome = process.stop();
    let each = outcome.operations as f64;
    let mut figures =
        Figures::from([(ERRORS.name, outcome.errors as f64), (P50.name, outcome.p50), (P99.name, outcome.p99)]);
    if subject.has_proxies() {
        figures.insert(CPU_EACH.name, (after.cpu - before.cpu) * 1e6 / each);
        figures.insert(SWITCHES.name, after.switches.saturating_sub(before.switches) as f64 / each);
        memory(&mut figures, EACH, before, idle, each);
        figures.insert(START.name, before.resident as f64 / 1024.0);
    }
    figures
}

fn idle(subject: &Subject, connections: usize) -> Figures {
    std::thread::sleep(SETTLE);
    let before = subject.used();
    let mut process = subject.client(&Client { to: subject.server(), connections, load: Load::Idle });
    process.wait_for("ready");
    std::thread::sleep(SETTLE);
    let open = subject.used();
    process.send("fill");
    process.wait_for("done");
    std::thread::sleep(SETTLE);
    let filled = subject.used();
    let errors = process.stop().errors as f64;
    let mut figures = Figures::from([(ERRORS.name, errors)]);
    memory(&mut figures, EACH, before, open, connections as f64);
    memory(&mut figures, EACH_AFTER, before, filled, connections as f64);
    figures.insert(START.name, before.resident as f64 / 1024.0);
    figures
}

fn memory(figures: &mut Figures, figure: Figure, before: Use, after: Use, count: f64) {
    figures.insert(figure.name, (after.resident as f64 - before.resident as f64) / count);
}

fn gigabits(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 * 8e-9 / seconds
}
