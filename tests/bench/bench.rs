//! Measures culvert beside other proxies in one run and prints one table of ratios. `scripts/bench` builds and starts
//! it.
//!
//! Each subject is two nodes in network namespaces with a client and a server, made by the code that the scenarios use.
//! All subjects run at once and are measured in turn, in rounds. culvert is a subject twice: if its two runs differ in
//! a case, that case is noise. Nothing asserts a time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a measurement that cannot be made ends by panicking"
)]
#![allow(missing_docs, missing_debug_implementations, reason = "the bench is run, not imported")]

mod case;
mod cubic;
mod load;
mod peers;
mod process;
mod report;
mod subject;
#[path = "../node/world/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the scenarios use the rest of it")]
mod world;

use case::{Case, Extent};
use clap::{Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use report::Report;
use serde_json::json;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;
use subject::{Kind, Subject};

/// Measures culvert beside other proxies on this machine, in one run.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench")]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Fewer cases, shorter: under three minutes.
    #[arg(long)]
    quick: bool,
    /// 10,000 idle connections instead of 2,000.
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Print JSON with the figures of each round instead of the table.
    #[arg(long)]
    json: bool,
    /// Cases to measure, with commas between them; `NAME-*` means all that begin so.
    #[arg(long, value_delimiter = ',', value_name = "CASES")]
    cases: Vec<String>,
    /// Measure another node proxy that takes ztunnel's environment; can be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = peer)]
    peer: Vec<(String, PathBuf)>,
    /// Subjects to leave out, with commas between them: direct, envoy, haproxy, nginx.
    #[arg(long, value_delimiter = ',', value_name = "SUBJECTS")]
    without: Vec<String>,
    /// Seconds of each measurement.
    #[arg(long)]
    seconds: Option<f64>,
    /// Rounds: how often each subject is measured in each case.
    #[arg(long)]
    rounds: Option<usize>,
    /// List the cases.
    #[arg(long)]
    list: bool,
}

/// What a process of this program is for; the bench starts these itself.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    LoadServer,
    #[command(hide = true)]
    LoadClient { what: String },
}

fn peer(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    let path = std::fs::canonicalize(path).map_err(|error| format!("{path}: {error}"))?;
    Ok((name.to_owned(), path))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.role {
        Some(Role::LoadServer) => load::serve(),
        Some(Role::LoadClient { what }) => load::client(&serde_json::from_str(what).unwrap()),
        None => return run(&arguments),
    }
    ExitCode::SUCCESS
}

fn run(arguments: &Arguments) -> ExitCode {
    let mut cases = case::all();
    if arguments.list {
        cases.iter().for_each(|case| println!("{:14} {}", case.name, case.title));
        return ExitCode::SUCCESS;
    }
    cases.retain(|case| match &arguments.cases[..] {
        [] => !arguments.quick || case.quick,
        wanted => wanted.iter().any(|wanted| is_named(case.name, wanted)),
    });
    if cases.is_empty() {
        eprintln!("no case has such a name; --list shows the names");
        return ExitCode::from(2);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the bench makes network namespaces and must run as root");
        return ExitCode::from(2);
    }
    clean_up_on_signals();
    let _cubic = cubic::Allowed::new();
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).unwrap();

    let extent = Extent {
        seconds: arguments.seconds.unwrap_or(if arguments.quick { 0.5 } else { 3.0 }),
        idle_connections: match (arguments.quick, arguments.full) {
            (true, _) => 500,
            (_, true) => 10_000,
            _ => 2000,
        },
        tunnels: if arguments.quick { 200 } else { subject::FURTHER_COUNT },
    };
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 5 }).max(1);
    let kinds = kinds(arguments);
    let names: Vec<String> = kinds.iter().map(|(name, _)| name.clone()).collect();
    let at = |name: &str| names.iter().position(|other| other == name).unwrap();
    let mut report = Report::new(names.clone(), at("culvert"), at("culvert again"));
    let start = (Instant::now(), processor_time());
    let running: Vec<Subject> = kinds
        .iter()
        .map(|(name, kind)| {
            eprintln!("starting {name}");
            Subject::start(kind, subject::Layout::default())
        })
        .collect();
    for round in 0..rounds {
        for case in &cases {
            // Memory varies less than time, and new proxies for each measurement take long.
            if case.fresh && round >= rounds.div_ceil(2) {
                continue;
            }
            eprintln!("round {} of {rounds}, {} s: {}", round + 1, start.0.elapsed().as_secs(), case.name);
            // Every other round backwards, so that no subject is always measured after the same one.
            let mut order: Vec<usize> = (0..kinds.len()).filter(|subject| case.suits(&kinds[*subject].1)).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let figures = if case.fresh {
                    case.measure(&Subject::start(&kinds[index].1, case.layout(extent)), extent)
                } else {
                    case.measure(&running[index], extent)
                };
                report.add(case, index, figures);
            }
        }
    }
    drop(running);
    finish(arguments, &report, &cases, about(extent, rounds, start))
}

/// Whether a case is meant by a name, or by the beginning of one and a `*`.
fn is_named(case: &str, wanted: &str) -> bool {
    wanted.strip_suffix('*').map_or(case == wanted, |beginning| case.starts_with(beginning))
}

/// The subjects and their names, in the order of the table.
fn kinds(arguments: &Arguments) -> Vec<(String, Kind)> {
    // Beside another node proxy, culvert runs in the same way: the same rules in the pods, the same control plane.
    let ours = if arguments.peer.is_empty() { Kind::Culvert } else { Kind::Ztunnel(world::subject()) };
    let mut kinds = vec![
        ("direct", Kind::Direct),
        ("culvert", ours.clone()),
        ("culvert again", ours),
        ("envoy", Kind::Envoy),
        ("haproxy", Kind::Haproxy),
        ("nginx", Kind::Nginx),
    ];
    kinds.retain(|(name, _)| name.starts_with("culvert") || !arguments.without.iter().any(|other| other == name));
    let mut kinds: Vec<(String, Kind)> = kinds.into_iter().map(|(name, kind)| (name.to_owned(), kind)).collect();
    let peers = arguments.peer.iter().map(|(name, path)| (name.clone(), Kind::Ztunnel(path.clone())));
    let after_ours = kinds.iter().rposition(|(name, _)| name.starts_with("culvert")).unwrap() + 1;
    kinds.splice(after_ours..after_ours, peers);
    kinds
}

fn finish(arguments: &Arguments, report: &Report, cases: &[Case], about: serde_json::Value) -> ExitCode {
    let noise: Vec<String> = cases.iter().filter_map(|case| report.noise(case)).collect();
    if arguments.json {
        println!("{:#}", report.json(cases, &about));
    } else {
        println!("{}", report.table(cases));
        for (name, value) in about.as_object().unwrap() {
            println!("{name}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        println!(
            "\nEach figure is the median of all rounds, with half of the distance between the lowest and the highest round.\n\
             CPU, context switches and memory are those of both proxies together. A ratio is the median of the ratios of\n\
             each round. The figure with * decides whether the two runs of culvert agree. haproxy and nginx open a TLS\n\
             connection for each connection; they and Envoy write no access log."
        );
    }
    if noise.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("this machine was too noisy for these cases; their figures prove nothing:");
    noise.iter().for_each(|line| eprintln!("  {line}"));
    ExitCode::FAILURE
}

/// The time of all processors together by kind: user, nice, system, idle, waiting, interrupts, soft interrupts, stolen.
fn processor_time() -> Vec<u64> {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = text.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
    fields.filter_map(|field| field.parse().ok()).collect()
}

/// What a reader needs in order to judge the figures.
fn about(extent: Extent, rounds: usize, start: (Instant, Vec<u64>)) -> serde_json::Value {
    let spent: Vec<u64> =
        processor_time().iter().zip(&start.1).map(|(now, before)| now.saturating_sub(*before)).collect();
    let steal = *spent.get(7).unwrap_or(&0) as f64 / spent.iter().sum::<u64>().max(1) as f64;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo");
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let version = Command::new(world::subject()).arg("version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    json!({
        "culvert": version.lines().next().unwrap_or_default(),
        "processor": processor.trim_start_matches([' ', '\t', ':']),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").trim(),
        "date": humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
        "rounds": rounds,
        "seconds of each measurement": extent.seconds,
        "idle connections": extent.idle_connections,
        "idle tunnels": extent.tunnels,
        "time taken by the hypervisor": format!("{:.1} %", steal * 100.0),
        "took seconds": start.0.elapsed().as_secs(),
    })
}

/// Removes all namespaces of this run, and the processes in them, when the run is interrupted.
fn clean_up_on_signals() {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().unwrap();
    std::thread::spawn(move || {
        let signal = signals.wait().unwrap();
        eprintln!("interrupted: removing the namespaces");
        // The measurement fails as well, once its processes have gone. That needs no account.
        std::panic::set_hook(Box::new(|_| std::thread::park()));
        let prefix = format!("ct{}-", std::process::id());
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with(&prefix) {
                continue;
            }
            let inside = Command::new("ip").args(["netns", "pids", &name]).output().map(|output| output.stdout);
            for pid in String::from_utf8_lossy(&inside.unwrap_or_default()).split_whitespace() {
                // Threads of this process are in some of them.
                if let Ok(pid) = pid.parse::<i32>()
                    && u32::try_from(pid) != Ok(std::process::id())
                {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
        for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        cubic::restore();
        std::process::exit(128 + signal as i32);
    });
}
