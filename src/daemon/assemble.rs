//! `culvert node`: puts the parts together, runs them, and ends them in order.
//!
//! Threads: this one runs control (files, certificates, pods, admin) on a runtime of its own; each worker has another.
//! Ending: no new connections, GOAWAY to peers, wait for what is open until the deadline, cut the rest and say how much.

use super::signals::Signals;
use super::{dump, pods, profile, version};
use crate::admin::{Pages, Ports, Rendered};
use crate::config::{CaSource, Config, MeshSource};
use crate::connection::authorize::revoke::Registry as Permits;
use crate::connection::budget::Budget;
use crate::connection::report::Reporter;
use crate::connection::{Shared, Workers};
use crate::control::xds::Freshness;
use crate::dns::{self, Dns};
use crate::hbone::Buffers;
use crate::identity::istio_ca::IstioCa;
use crate::identity::revoked::Revocations;
use crate::identity::{Authority, Builtin, Store as Identities};
use crate::mesh::{SpiffeName, Store as Mesh};
use crate::node::capture::Capturer;
use crate::node::status::Board;
use crate::sys::netns::Netns;
use crate::task::thread::Dedicated;
use crate::task::{Drain, Group, Ready, thread};
use crate::telemetry::log::{self, LogControl, brief};
use crate::{admin, control, identity, node, rpc, sys, telemetry};
use anyhow::Context;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;

/// What readiness and whoever needs facts wait for.
const FACTS: &str = "mesh facts";

/// What peers may make this node hold where its memory has no limit, and at most.
const BUFFER_BYTES: usize = 1 << 30;

/// How long whoever has something left to do when the process ends may take, after the time that connections have.
const LAST_WORDS: Duration = Duration::from_secs(4);

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
    pub(super) freshness: Arc<Freshness>,
    pub(super) identities: Arc<Identities>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) reporter: Arc<Reporter>,
    pub(super) board: Arc<Board>,
    pub(super) dns: Arc<Dns>,
    /// Metrics of the revocation list, where there is one.
    crl: Option<Arc<identity::revoked::Metrics>>,
}

async fn run(config: Config, log: LogControl) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot take over signals")?;
    let (background, drain, ready) = (Group::default(), Drain::default(), Ready::default());
    let pods_pending = ready.wait_for("pods");
    let mut registry = Registry::default();
    if config.only_post_quantum {
        rpc::tls::only_post_quantum();
    }

    let facts = Facts::start(&config, &ready, &background, &mut registry)?;
    let mesh = facts.mesh.clone();
    let revocations = Arc::<Revocations>::default();
    let identities = certificates(&config, &revocations, &background, &mut registry);
    let crl = config.crl.as_ref().map(|_| revocation_metrics(&mut registry));

    let (reporter, permits) = (Arc::new(Reporter::default()), Arc::new(Permits::default()));
    reporter.metrics.register(&mut registry);
    let buffers = Buffers::new(buffer_bytes());
    let shared = Arc::new(Shared {
        config: config.connection,
        mesh: mesh.clone(),
        identities: identities.clone(),
        reporter: reporter.clone(),
        permits: permits.clone(),
        budget: Arc::new(Budget::new(config.connection.max_connections, buffers.clone())),
        buffers: buffers.clone(),
        handshakes: Shared::handshakes(buffers.limit() / 2),
    });
    let workers = Arc::new(Workers::start(&shared).context("cannot start a worker")?);

    let dns = names(&config, &mesh, &mut registry)?;
    let board = Arc::new(Board::default());
    board.register(&mut registry);
    let build = vec![("component", "culvert".to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    telemetry::process::register(&mut registry, sys::limits::open_files, sys::limits::raise_open_files(), build);
    registry.register_collector(Box::new(Gauges {
        workers: workers.clone(),
        log: log.clone(),
        identities: identities.clone(),
        freshness: facts.freshness.clone(),
        buffers: shared.buffers.clone(),
    }));
    let for_pods = pods::Metrics::register(&config, &mut registry);

    let quit = Arc::new(Notify::new());
    let parts = Arc::new(Parts {
        config,
        mesh: mesh.clone(),
        freshness: facts.freshness.clone(),
        identities: identities.clone(),
        revocations,
        reporter,
        board: board.clone(),
        dns: dns.clone(),
        crl,
    });
    let _admin = open_ports(pages(&parts, log, &quit, registry, ready.clone()), ports_config(&parts.config)).await?;
    let _enforcing = enforce(&parts, permits).context("cannot start the thread that enforces")?;
    let budget = shared.budget.clone();
    background.spawn(async move { budget.watch().await });
    let capturer = capturer(&parts, &workers, &drain, &background);
    own_pod(&parts.config, &capturer, &ready, &background)?;
    let last =
        pods::follow((&parts.config, &capturer, &board), for_pods, pods_pending, (&ready, FACTS), &background).await?;
    tracing::info!(workers = parts.config.connection.workers, "{} is running", version::text());

    tokio::select! {
        name = signals.next() => tracing::info!(signal = name, "ending"),
        () = quit.notified() => tracing::info!("ending: asked to by /quitquitquit"),
    }
    let _ending = ready.wait_for("ending");
    end(&parts, &drain, &workers, (&last.tasks, &background), &mut signals).await;
    facts.stop();
    if last.own_set.nothing_stays() {
        forget(&parts.config, &capturer);
    }
    Ok(())
}

/// Removes what is left on the node when nothing uses it any more.
fn forget(config: &Config, capturer: &Capturer) {
    if let node::Source::Kubernetes(kubernetes) = &config.node.source
        && capturer.turn.is_followed(&kubernetes.turns(&capturer.whose))
    {
        return tracing::info!("another daemon of this node has begun: what it uses stays");
    }
    let mut outcomes: Vec<_> = config.state_files.iter().map(|file| node::remains::remove_file(file)).collect();
    if let node::Source::Kubernetes(kubernetes) = &config.node.source {
        outcomes.extend(kubernetes.remove_meeting_places(&config.node.whose()));
    }
    node::kubernetes::leave::report(outcomes);
}

/// What captures pods.
fn capturer(parts: &Parts, workers: &Arc<Workers>, drain: &Drain, background: &Group) -> Arc<Capturer> {
    Arc::new(Capturer {
        config: parts.config.node.clone(),
        sockets: parts.config.connection.sockets,
        mesh: parts.mesh.clone(),
        identities: parts.identities.clone(),
        dns: parts.dns.clone(),
        workers: workers.clone(),
        drain: drain.clone(),
        claims: Default::default(),
        turn: pods::turn(&parts.config, drain, background),
        whose: parts.config.node.whose(),
    })
}

/// What peers may make this node hold: a quarter of its memory, where that is limited.
fn buffer_bytes() -> usize {
    let limit = sys::limits::Memory::of_process().and_then(|memory| memory.now()).map(|(_, max)| max / 4);
    limit.map_or(BUFFER_BYTES, |bytes| usize::try_from(bytes).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES))
}

/// Opens the ports and serves them on a thread of their own.
async fn open_ports(pages: Pages, config: admin::Config) -> anyhow::Result<Dedicated> {
    let (bound, opened) = tokio::sync::oneshot::channel();
    let serve = move || async move {
        match Ports::bind(pages, config).await {
            Ok(ports) => {
                // Nobody is there to be told when the start has been given up.
                let _ = bound.send(Ok(()));
                ports.serve().await;
            }
            Err(error) => drop(bound.send(Err(error))),
        }
    };
    let thread = Dedicated::start("culvert-admin", serve).context("cannot start the thread of the admin ports")?;
    opened.await.context("the thread of the admin ports ended")??;
    Ok(thread)
}

/// What ends connections that are not allowed any more has a thread of its own: nothing else may hold it up.
fn enforce(parts: &Parts, permits: Arc<Permits>) -> std::io::Result<Dedicated> {
    let (mesh, identities, revocations) = (parts.mesh.clone(), parts.identities.clone(), parts.revocations.clone());
    let crl = parts.config.crl.clone().zip(parts.crl.clone());
    Dedicated::start("culvert-judge", move || async move {
        let lists = async {
            match crl {
                Some((path, metrics)) => revocations.follow(path, metrics).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(permits.watch(&mesh), identities.follow_revocations(), lists);
    })
}

fn names(config: &Config, mesh: &Arc<Mesh>, registry: &mut Registry) -> anyhow::Result<Arc<Dns>> {
    let metrics = Arc::new(dns::Metrics::default());
    metrics.register(registry);
    let started = Dns::start(config.dns.clone(), metrics, mesh.clone());
    Ok(Arc::new(started.context("cannot start the thread of DNS")?))
}

/// Loopback has no IPv6 address where the daemon's own namespace has it switched off.
fn ports_config(config: &Config) -> admin::Config {
    let own = Netns::open(Path::new("/proc/self/ns/net")).and_then(|netns| netns.has_ipv6());
    admin::Config { ipv6: config.admin.ipv6 && own.unwrap_or(false), ..config.admin }
}

/// Serves the daemon's own pod, where it is one.
fn own_pod(config: &Config, capturer: &Arc<Capturer>, ready: &Ready, background: &Group) -> anyhow::Result<()> {
    let Some(own) = &config.own_pod else { return Ok(()) };
    let identity = SpiffeName::new(&config.trust_domain, &own.namespace, &own.service_account);
    let identity = identity.context("the daemon's own identity is not valid")?;
    let (facts, serve) =
        (ready.clone().until(FACTS), node::own::serve(capturer.clone(), own.name.as_str().into(), identity));
    background.spawn(async move {
        facts.await;
        serve.await;
    });
    Ok(())
}

/// The facts about the mesh, and whoever keeps them.
struct Facts {
    mesh: Arc<Mesh>,
    freshness: Arc<Freshness>,
    stop: Drain,
    /// The client of the control plane has a thread of its own: a whole mesh in one message takes it a while.
    thread: Option<JoinHandle<()>>,
}

impl Facts {
    fn start(config: &Config, ready: &Ready, background: &Group, registry: &mut Registry) -> anyhow::Result<Self> {
        let pending = ready.wait_for(FACTS);
        let (freshness, stop) = (Arc::<Freshness>::default(), Drain::default());
        let on_demand = matches!(&config.mesh, MeshSource::Xds(xds) if xds.on_demand);
        let aliases = config.trust_domain_aliases.iter().map(|alias| alias.as_str().into());
        let (node, cluster) = (config.node_name.as_str().into(), config.node.cluster_id.as_str().into());
        let mesh = Arc::new(Mesh::new(node, cluster, on_demand).with_trust_domain_aliases(aliases));
        let thread = match &config.mesh {
            MeshSource::File(path) => {
                let metrics = Arc::new(control::Metrics::default());
                metrics.register(registry);
                mesh.replace(control::file::read(path)?);
                background.spawn(control::file::follow(path.clone(), mesh.clone(), metrics));
                None
            }
            MeshSource::Xds(xds) => {
                let metrics = Arc::new(control::xds::Metrics::default());
                metrics.register(registry);
                let xds = (**xds).clone();
                let client = control::xds::Client::new(xds, mesh.clone(), metrics, freshness.clone(), pending);
                let signal = stop.signal();
                let started = thread::start("culvert-xds".into(), move || client.run(signal));
                Some(started.context("cannot start the control plane's client")?.1)
            }
        };
        Ok(Self { mesh, freshness, stop, thread })
    }

    fn stop(self) {
        self.stop.at_once();
        // A thread that panicked has nothing left to keep.
        let _ = self.thread.map(JoinHandle::join);
    }
}

fn certificates(
    config: &Config,
    revocations: &Arc<Revocations>,
    background: &Group,
    registry: &mut Registry,
) -> Arc<Identities> {
    let metrics = Arc::new(identity::store::Metrics::default());
    metrics.register(registry);
    let aliases = config.trust_domain_aliases.iter().map(|alias| alias.as_str().into()).collect();
    let authority = match &config.ca {
        CaSource::Builtin(dir) => Authority::Builtin(Builtin::new(dir, config.secret_ttl)),
        CaSource::Istio(rpc) => Authority::Istio(Box::new(IstioCa::new((**rpc).clone(), config.secret_ttl))),
    };
    Identities::new(authority, aliases, revocations.clone(), background.clone(), metrics)
}

fn revocation_metrics(registry: &mut Registry) -> Arc<identity::revoked::Metrics> {
    let metrics = Arc::new(identity::revoked::Metrics::default());
    metrics.register(registry);
    metrics
}

async fn end(
    parts: &Parts,
    drain: &Drain,
    workers: &Workers,
    (last, background): (&Group, &Group),
    signals: &mut Signals,
) {
    let mut last_from = tokio::time::Instant::now() + parts.config.drain_deadline;
    drain.gently();
    let (open, deadline) = (parts.reporter.live.len(), parts.config.drain_deadline);
    tracing::info!(open, deadline = %brief(deadline), "no new connections; waiting for those that are open");
    tokio::select! {
        () = workers.finished() => {}
        () = tokio::time::sleep(deadline) => {}
        name = signals.next() => {
            tracing::warn!(signal = name, "second signal: ending at once");
            last_from = tokio::time::Instant::now();
        }
    }
    let cut = parts.reporter.live.len();
    drain.at_once();
    workers.cut().await;
    // Also a node without connections has this time.
    if tokio::time::timeout_at(last_from + LAST_WORDS, last.finished()).await.is_err() {
        tracing::warn!("what was left to do at the end is cut; its time was over");
        last.cut();
    }
    background.cut();
    background.finished().await;
    parts.dns.stop();
    if cut > 0 {
        tracing::warn!(cut, "ended; connections were cut, their time was over");
    } else {
        tracing::info!("ended; every connection had finished");
    }
}

fn pages(parts: &Arc<Parts>, log: LogControl, quit: &Arc<Notify>, registry: Registry, ready: Ready) -> Pages {
    let (for_dump, for_connections, for_pods) = (parts.clone(), parts.clone(), parts.clone());
    let (dns, quit) = (parts.dns.clone(), quit.clone());
    Pages {
        config_dump: Box::new(move || dump::config_dump(&for_dump)),
        connections: Box::new(move || dump::connections(&for_connections)),
        pods: Box::new(move || dump::pods(&for_pods)),
        logging: Box::new(move |query| logging(&log, &dns, query)),
        cpu_profile: Box::new(|query| Box::pin(profile::cpu(query))),
        quit: Box::new(move || quit.notify_one()),
        metrics: Rendered::new(registry),
        ready,
    }
}

/// `level=<directives>` adds, `reset` goes back to the start's filter first, nothing shows (the reference's page);
/// `dns=<namespace>/<pod>` logs the DNS requests of that pod, several where it is said several times, until a reset.
fn logging(log: &LogControl, dns: &Dns, query: Option<&str>) -> Result<String, String> {
    let parts = || query.unwrap_or_default().split('&').filter(|part| !part.is_empty());
    let is_reset = |part: &str| part == "reset" || part.starts_with("reset=");
    if parts().any(is_reset) {
        log.reset().map_err(|error| format!("{error}\n"))?;
        dns.log_only(Vec::new());
    }
    for part in parts().filter(|part| !is_reset(part)) {
        match part.split_once('=') {
            Some(("level", directives)) => {
                let directives =
                    directives.replace("%3D", "=").replace("%3d", "=").replace("%2C", ",").replace("%3A", ":");
                log.add(&directives)
            }
            Some(("dns", pod)) if pod.split('/').count() == 2 => {
                let mut pods = dns.logged();
                pods.push(pod.to_owned());
                dns.log_only(pods);
                Ok(())
            }
            _ => {
                let instead = "use level=debug, level=access=debug, dns=NAMESPACE/POD, or reset";
                return Err(format!("{part:?} is not understood: {instead}\n"));
            }
        }
        .map_err(|error| format!("{error}\n"))?;
    }
    let of_dns = match dns.logged() {
        pods if pods.is_empty() => String::new(),
        pods => format!("DNS requests are logged of {}\n", pods.join(", ")),
    };
    Ok(format!("current log level is {}\n{of_dns}", log.current()))
}

/// Numbers that are looked up at each scrape.
#[derive(Debug)]
struct Gauges {
    workers: Arc<Workers>,
    log: LogControl,
    identities: Arc<Identities>,
    freshness: Arc<Freshness>,
    buffers: Arc<Buffers>,
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut put = |name, help, value: u64| {
            let gauge = ConstGauge::new(number(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        put("culvert_tunnels_open", "Tunnels open towards peers", self.workers.tunnels() as u64)?;
        let help = "Tasks of the data plane: connections, streams, tunnels";
        put("culvert_data_plane_tasks", help, self.workers.running() as u64)?;
        let help = "Bytes held for peers: received and not passed on, or not read by them";
        put("culvert_buffers_held_bytes", help, self.buffers.held() as u64)?;
        let help = "Bytes that may be held before the tunnel that holds most is cut";
        put("culvert_buffers_max_bytes", help, self.buffers.limit() as u64)?;
        if let Some(left) = self.identities.time_to_outage() {
            let help = "Time until the first identity of this node is without certificate if no renewal succeeds";
            put("culvert_seconds_to_certificate_outage", help, left.as_secs())?;
        }
        if let Some(age) = self.freshness.report().age {
            let help = "Time since the control plane was last heard; 0 while it tells us of changes";
            put("culvert_mesh_age_seconds", help, age.as_secs())?;
        }
        let dropped = ConstCounter::new(self.log.dropped_lines() as u64);
        let help = "Log lines dropped because standard output was not read";
        dropped.encode(encoder.encode_descriptor("culvert_log_lines_dropped", help, None, dropped.metric_type())?)
    }
}
