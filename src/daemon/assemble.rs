//! `culvert node`: puts the parts together, runs them, and ends them in order.
//!
//! Threads: this one runs control (files, certificates, pods, admin) on a runtime of its own; each worker has another.
//! Ending: no new connections, GOAWAY to peers, wait for what is open until the deadline, cut the rest and say how much.

use super::dump;
use super::signals::Signals;
use crate::admin::{Pages, Ports};
use crate::config::Config;
use crate::connection::authorize::revoke::Registry as Permits;
use crate::connection::report::Reporter;
use crate::connection::{Shared, Workers};
use crate::identity::{Authority, Store as Identities};
use crate::mesh::Store as Mesh;
use crate::node::Pods;
use crate::node::capture::Capturer;
use crate::node::status::Board;
use crate::task::{Drain, Group, Ready};
use crate::telemetry::log::{self, LogControl};
use crate::{control, identity, sys, telemetry};
use anyhow::Context;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// Runs the daemon until it is told to end.
pub fn node(config: Config) -> anyhow::Result<()> {
    let (log, guard) = log::start(&config.log)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let result = runtime.block_on(run(config, log));
    drop(guard);
    result
}

/// The parts that pages and metrics look into.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) mesh: Arc<Mesh>,
    pub(super) identities: Arc<Identities>,
    pub(super) reporter: Arc<Reporter>,
    pub(super) board: Arc<Board>,
}

async fn run(config: Config, log: LogControl) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot take over signals")?;
    let (background, drain, ready) = (Group::default(), Drain::default(), Ready::default());
    let (facts_pending, pods_pending) = (ready.wait_for("mesh facts"), ready.wait_for("pods"));
    let mut registry = Registry::default();

    let mesh = Arc::new(Mesh::default());
    let control_metrics = Arc::new(control::Metrics::default());
    control_metrics.register(&mut registry);
    mesh.replace(control::file::read(&config.mesh_file)?);
    drop(facts_pending);

    let identity_metrics = Arc::new(identity::store::Metrics::default());
    identity_metrics.register(&mut registry);
    let aliases = config.trust_domain_aliases.iter().map(|alias| alias.as_str().into()).collect();
    let authority = Authority::new(&config.ca_dir, config.secret_ttl);
    let identities = Identities::new(authority, aliases, background.clone(), identity_metrics);

    let (reporter, permits) = (Arc::new(Reporter::default()), Arc::new(Permits::default()));
    reporter.metrics.register(&mut registry);
    let shared = Arc::new(Shared {
        config: config.connection,
        mesh: mesh.clone(),
        identities: identities.clone(),
        reporter: reporter.clone(),
        permits: permits.clone(),
        open: Default::default(),
    });
    let workers = Arc::new(Workers::start(&shared).context("cannot start a worker")?);

    let board = Arc::new(Board::default());
    board.register(&mut registry);
    let build = vec![("component", "culvert".to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    telemetry::process::register(&mut registry, sys::limits::open_files, sys::limits::raise_open_files(), build);
    registry.register_collector(Box::new(Gauges { workers: workers.clone(), log: log.clone() }));

    let quit = Arc::new(Notify::new());
    let parts =
        Arc::new(Parts { config, mesh: mesh.clone(), identities: identities.clone(), reporter, board: board.clone() });
    let pages = pages(&parts, log, &quit, registry, ready.clone());
    for port in Ports::bind(pages, parts.config.node.ipv6).await?.serve() {
        background.spawn(port);
    }
    background.spawn(control::file::follow(parts.config.mesh_file.clone(), mesh.clone(), control_metrics));
    background.spawn(async move { permits.watch(&mesh).await });
    let capturer = Arc::new(Capturer {
        config: parts.config.node.clone(),
        mesh: parts.mesh.clone(),
        identities,
        workers: workers.clone(),
        drain: drain.clone(),
        claims: Default::default(),
    });
    let pods_file = parts.config.node.pods_file.clone().unwrap_or_default();
    background.spawn(Pods::new(capturer, board).follow(pods_file, pods_pending));
    tracing::info!(workers = parts.config.connection.workers, "{} is running", super::version());

    tokio::select! {
        name = signals.next() => tracing::info!(signal = name, "ending"),
        () = quit.notified() => tracing::info!("ending: asked to by /quitquitquit"),
    }
    let _ending = ready.wait_for("ending");
    end(&parts, &drain, &workers, &background, &mut signals).await;
    Ok(())
}

async fn end(parts: &Parts, drain: &Drain, workers: &Workers, background: &Group, signals: &mut Signals) {
    drain.gently();
    let (open, deadline) = (parts.reporter.live.len(), parts.config.drain_deadline);
    tracing::info!(open, ?deadline, "no new connections; waiting for those that are open");
    tokio::select! {
        () = workers.finished() => {}
        () = tokio::time::sleep(deadline) => {}
        name = signals.next() => tracing::warn!(signal = name, "second signal: ending at once"),
    }
    let cut = parts.reporter.live.len();
    drain.at_once();
    workers.cut().await;
    background.cut();
    background.finished().await;
    if cut > 0 {
        tracing::warn!(cut, "ended; connections were cut, their time was over");
    } else {
        tracing::info!("ended; every connection had finished");
    }
}

fn pages(parts: &Arc<Parts>, log: LogControl, quit: &Arc<Notify>, registry: Registry, ready: Ready) -> Pages {
    let (for_dump, for_connections, for_pods, quit) = (parts.clone(), parts.clone(), parts.clone(), quit.clone());
    Pages {
        config_dump: Box::new(move || dump::config_dump(&for_dump)),
        connections: Box::new(move || dump::connections(&for_connections)),
        pods: Box::new(move || dump::pods(&for_pods)),
        logging: Box::new(move |query| logging(&log, query)),
        quit: Box::new(move || quit.notify_one()),
        registry: Mutex::new(registry),
        ready,
    }
}

/// `level=<directives>` adds, `reset` goes back to the start's filter first, nothing shows (the reference's page).
fn logging(log: &LogControl, query: Option<&str>) -> Result<String, String> {
    for part in query.unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            None if part == "reset" => log.reset(),
            Some(("reset", _)) => log.reset(),
            Some(("level", directives)) => {
                let directives =
                    directives.replace("%3D", "=").replace("%3d", "=").replace("%2C", ",").replace("%3A", ":");
                log.add(&directives)
            }
            _ => return Err(format!("{part:?} is not understood: use level=debug, level=access=debug, or reset\n")),
        }
        .map_err(|error| format!("{error}\n"))?;
    }
    Ok(format!("current log level is {}\n", log.current()))
}

/// Numbers that are looked up at each scrape.
#[derive(Debug)]
struct Gauges {
    workers: Arc<Workers>,
    log: LogControl,
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let tunnels = ConstGauge::new(number(self.workers.tunnels()));
        let help = "Tunnels open towards peers";
        tunnels.encode(encoder.encode_descriptor("culvert_tunnels_open", help, None, tunnels.metric_type())?)?;
        let tasks = ConstGauge::new(number(self.workers.running()));
        let help = "Tasks of the data plane: connections, streams, tunnels";
        tasks.encode(encoder.encode_descriptor("culvert_data_plane_tasks", help, None, tasks.metric_type())?)?;
        let dropped = ConstCounter::new(self.log.dropped_lines() as u64);
        let help = "Log lines dropped because standard output was not read";
        dropped.encode(encoder.encode_descriptor("culvert_log_lines_dropped", help, None, dropped.metric_type())?)
    }
}
