//! `culvert node`: assembles the parts, runs them, and ends them in order.
//!
//! The calling thread runs control (files, certificates, pods, the Kubernetes API, signals) on a single-threaded
//! runtime. Workers, enforcement, DNS, the admin ports and the control plane's client have threads of their own.
//!
//! Ending: no new connections, GOAWAY to peers, open connections have until the deadline to end, the rest is cut, and
//! the log says how many.

use super::metrics::{Metrics, Read, Readings};
use super::pages::pages;
use super::parts::Parts;
use super::signals::Signals;
use super::{pods, startup};
use crate::admin::{Pages, Ports};
use crate::config::{CaSource, Config, MeshSource};
use crate::connection::authorize::revoke::Permits;
use crate::connection::budget::Budget;
use crate::connection::choose::EndpointLists;
use crate::connection::dial::direct::OpenLegs;
use crate::connection::{Shared, Workers};
use crate::control::xds::Freshness;
use crate::dns::Dns;
use crate::hbone::Buffers;
use crate::identity::istio_ca::IstioCa;
use crate::identity::revoked::{self, Revocations};
use crate::identity::{Builtin, CertificateAuthority, CertificateStore, Signer};
use crate::mesh::{SpiffeName, Store as Mesh, Update};
use crate::node::capture::Capturer;
use crate::otlp::Exporter;
use crate::sys::netns::Netns;
use crate::task::thread::Dedicated;
use crate::task::{Drain, Group, Ready, thread};
use crate::telemetry::log::{self, LogControl, brief};
use crate::{admin, control, crypto, node, sys};
use anyhow::Context;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;

/// What readiness, and every task that needs mesh facts, waits for.
const FACTS: &str = "mesh facts";

/// Limit on the bytes that peers may make this node hold where its memory has no limit; and the most that the limit can
/// be.
const BUFFER_BYTES: usize = 1 << 30;

/// How long tasks that have work to do when the process ends may take, after the time that connections have.
const FINAL_TASKS: Duration = Duration::from_secs(4);

/// Runs the daemon until it is told to end.
pub fn node(config: Config) -> anyhow::Result<()> {
    let (log, guard) = log::start(&config.log, |work| thread::named("culvert-log", work).map(drop))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let result = runtime.block_on(run(config, log));
    drop(guard);
    result
}

async fn run(config: Config, log: LogControl) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot install signal handlers")?;
    let (background, drain, ready) = (Group::default(), Drain::default(), Ready::default());
    let pods_pending = ready.wait_for("pods");
    // The exporter is dropped at the end, after all connections: it then sends what waits.
    let (metrics, _exporter) = measure(&config).context("cannot start the OpenTelemetry thread")?;
    if config.only_post_quantum {
        crypto::only_post_quantum();
    }

    let facts = Facts::start(&config, &ready, &background, &metrics)?;
    let mesh = facts.mesh.clone();
    let revocations = Arc::<Revocations>::default();
    let identities = certificates(&config, &revocations, &background, &metrics);

    let (reporter, permits) = (metrics.reporter.clone(), Arc::new(Permits::default()));
    let shared = shared(&config, (&mesh, &identities), &metrics, &permits);
    let endpoints = shared.endpoints.clone();
    let workers = Arc::new(Workers::start(&shared).context("cannot start a worker")?);
    let dns = Dns::start(config.dns.clone(), metrics.dns.clone(), mesh.clone());
    let dns = Arc::new(dns.context("cannot start the DNS thread")?);

    let quit = Arc::new(Notify::new());
    let board = metrics.board.clone();
    let parts = Arc::new(Parts {
        config,
        mesh: mesh.clone(),
        freshness: facts.freshness.clone(),
        identities,
        revocations,
        reporter,
        endpoints,
        board: board.clone(),
        dns: dns.clone(),
        changes: metrics.changes.clone(),
        mesh_file: metrics.mesh_file.clone(),
        egress_file: metrics.egress_file.clone(),
        started: SystemTime::now(),
    });
    let registry = metrics.register(&parts.config, readings(&parts, &workers, &shared, &metrics, &log));
    let own_legs = OpenLegs::default();
    let pages = pages(&parts, (&shared, &own_legs), log, (&quit, ready.clone()), registry);
    let _admin = open_ports(pages, ports_config(&parts.config)).await?;
    let _enforcing = enforce(&parts, permits, metrics.crl.clone()).context("cannot start the enforcement thread")?;
    let budget = shared.budget.clone();
    background.spawn(async move { budget.watch().await });
    let capturer = capturer(&parts, &workers, &drain, &background);
    own_pod(&parts.config, &capturer, &ready, &background, own_legs)?;
    let enrolment = pods::Enrolment {
        config: &parts.config,
        capturer: &capturer,
        board: &board,
        ready: &ready,
        facts: FACTS,
        background: &background,
    };
    let last = enrolment.follow(metrics, pods_pending).await?;
    startup::say(&parts.config).await;

    tokio::select! {
        name = signals.next() => tracing::info!(signal = name, "ending"),
        () = quit.notified() => tracing::info!("ending: requested by /quitquitquit"),
    }
    let _ending = ready.wait_for("ending");
    let ending = Ending { parts: &parts, drain: &drain, workers: &workers, last: &last.tasks, background: &background };
    ending.run(&mut signals).await;
    facts.stop();
    if last.own_set.nothing_stays() {
        remove_leftovers(&parts.config, &capturer);
    }
    Ok(())
}

/// What all workers share.
fn shared(
    config: &Config,
    (mesh, identities): (&Arc<Mesh>, &Arc<CertificateStore>),
    metrics: &Metrics,
    permits: &Arc<Permits>,
) -> Arc<Shared> {
    let buffers = Buffers::new(buffer_bytes());
    let reporter = metrics.reporter.clone();
    let endpoints = EndpointLists::new(config.connection.set_aside_max, reporter.metrics.endpoints.clone());
    Arc::new(Shared {
        config: config.connection,
        mesh: mesh.clone(),
        identities: identities.clone(),
        reporter,
        pods: Default::default(),
        permits: permits.clone(),
        budget: Arc::new(Budget::new(config.connection.max_connections, buffers.clone())),
        endpoints: Arc::new(endpoints),
        handshakes: Shared::handshakes(buffers.limit() / 2),
        buffers,
    })
}

/// The metrics, and the thread that sends spans and log records, if there are to be any.
fn measure(config: &Config) -> std::io::Result<(Metrics, Option<Exporter>)> {
    let (host, stages, otlp) = (config.node.host_netns.clone(), config.access_log_stages, config.otlp.as_ref());
    let metrics = Metrics::new(host, config.node.ipv6, config.history, stages, config.series, otlp);
    let started = otlp.cloned().zip(metrics.reporter.outbox.clone());
    let exporter = started.map(|(otlp, outbox)| Exporter::start(otlp, outbox)).transpose()?;
    Ok((metrics, exporter))
}

/// Removes what is left on the node when nothing uses it any more.
fn remove_leftovers(config: &Config, capturer: &Capturer) {
    if let node::PodSource::Kubernetes(kubernetes) = &config.node.source
        && capturer.role.has_successor(&kubernetes.daemons_folder(&capturer.node_tag))
    {
        return tracing::info!("another daemon of this node has started: its files stay");
    }
    let mut outcomes: Vec<_> = config.state_files.iter().map(|file| node::cleanup::remove_file(file)).collect();
    if let node::PodSource::Kubernetes(kubernetes) = &config.node.source {
        outcomes.extend(kubernetes.remove_shared_files(&config.node.node_tag()));
    }
    node::kubernetes::uninstall::report(outcomes);
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
        role: pods::active_role(&parts.config, drain, background),
        node_tag: parts.config.node.node_tag(),
    })
}

/// Limit on the bytes that peers may make this node hold: a quarter of its memory, where that is limited.
fn buffer_bytes() -> usize {
    let limit = sys::limits::Memory::of_process().and_then(|memory| memory.now()).map(|(_, max)| max / 4);
    limit.map_or(BUFFER_BYTES, |bytes| usize::try_from(bytes).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES))
}

/// The numbers that are read at each scrape.
fn readings(
    parts: &Arc<Parts>,
    workers: &Arc<Workers>,
    shared: &Arc<Shared>,
    metrics: &Metrics,
    log: &LogControl,
) -> Read {
    let (parts, workers, dns, log) = (parts.clone(), workers.clone(), metrics.dns.clone(), log.clone());
    let (buffers, budget) = (shared.buffers.clone(), shared.budget.clone());
    Box::new(move || Readings {
        tunnels: workers.tunnels(),
        tasks: workers.running(),
        set_aside: parts.endpoints.set_aside_count(),
        held_bytes: buffers.held(),
        max_bytes: buffers.limit(),
        budget: budget.used(),
        to_outage: parts.identities.time_to_outage(),
        mesh_age: parts.freshness.report().age,
        overflows: [parts.reporter.metrics.traffic.overflowed(), dns.overflowed()],
        lines_dropped: log.dropped_lines(),
    })
}

/// Opens the admin, metrics and readiness ports, and serves them on a separate thread.
async fn open_ports(pages: Pages, config: admin::Config) -> anyhow::Result<Dedicated> {
    let (bound, opened) = tokio::sync::oneshot::channel();
    let serve = move || async move {
        match Ports::bind(pages, config).await {
            Ok(ports) => {
                // Nothing receives this when the start has been given up meanwhile.
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

/// Starts the thread that ends connections which are not allowed any more. Nothing else may delay it, so it shares the
/// thread with nothing.
fn enforce(parts: &Parts, permits: Arc<Permits>, metrics: Arc<revoked::Metrics>) -> std::io::Result<Dedicated> {
    let (mesh, identities, revocations) = (parts.mesh.clone(), parts.identities.clone(), parts.revocations.clone());
    let crl = parts.config.crl.clone();
    Dedicated::start("culvert-judge", move || async move {
        let lists = async {
            match crl {
                Some(path) => revocations.follow(path, metrics).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(permits.watch(&mesh), identities.follow_revocations(), lists);
    })
}

/// Settings of the ports. Loopback has no IPv6 address where IPv6 is switched off in the daemon's own network
/// namespace.
fn ports_config(config: &Config) -> admin::Config {
    let own = Netns::open(Path::new("/proc/self/ns/net")).and_then(|netns| netns.has_ipv6());
    admin::Config { ipv6: config.admin.ipv6 && own.unwrap_or(false), ..config.admin }
}

/// Accepts tunnels to the daemon's own pod, where it runs in one.
fn own_pod(
    config: &Config,
    capturer: &Arc<Capturer>,
    ready: &Ready,
    background: &Group,
    legs: OpenLegs,
) -> anyhow::Result<()> {
    let Some(own) = &config.own_pod else { return Ok(()) };
    let identity = SpiffeName::new(&config.trust_domain, &own.namespace, &own.service_account);
    let identity = identity.context("the daemon's own identity is not valid")?;
    let (facts, serve) =
        (ready.clone().until(FACTS), node::own_pod::serve(capturer.clone(), own.name.as_str().into(), identity, legs));
    background.spawn(async move {
        facts.await;
        serve.await;
    });
    Ok(())
}

/// The mesh facts, and what keeps them current.
struct Facts {
    mesh: Arc<Mesh>,
    freshness: Arc<Freshness>,
    stop: Drain,
    /// The control plane's client. It has a separate thread, because a whole mesh in one message takes it a while.
    thread: Option<JoinHandle<()>>,
}

impl Facts {
    fn start(config: &Config, ready: &Ready, background: &Group, metrics: &Metrics) -> anyhow::Result<Self> {
        let pending = ready.wait_for(FACTS);
        let (freshness, stop) = (Arc::<Freshness>::default(), Drain::default());
        let on_demand = config.xds().is_some_and(|xds| xds.on_demand);
        let aliases = config.trust_domain_aliases.iter().map(|alias| alias.as_str().into());
        let (node, cluster) = (config.node_name.as_str().into(), config.node.cluster_id.as_str().into());
        let mesh = Arc::new(Mesh::new(node, cluster, on_demand).with_trust_domain_aliases(aliases));
        if let Some(path) = &config.egress_file {
            // Before anything else is known, so that no destination is ever decided about without these policies.
            let egress = Some(control::file::read_egress(path)?);
            mesh.update(Update { egress, ..Update::default() });
            let follow = control::file::follow_egress(path.clone(), mesh.clone(), metrics.egress_file.clone());
            background.spawn(follow);
        }
        // Nothing has set it before.
        let _ = metrics.reporter.metrics.mesh.set(mesh.clone());
        let thread = match &config.mesh {
            MeshSource::File(path) => {
                mesh.replace(control::file::read(path)?);
                background.spawn(control::file::follow(path.clone(), mesh.clone(), metrics.mesh_file.clone()));
                None
            }
            MeshSource::Xds(xds) => {
                let (xds, metrics) = ((**xds).clone(), metrics.xds.clone());
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
        // A thread that panicked has nothing left to do.
        let _ = self.thread.map(JoinHandle::join);
    }
}

fn certificates(
    config: &Config,
    revocations: &Arc<Revocations>,
    background: &Group,
    metrics: &Metrics,
) -> Arc<CertificateStore> {
    let aliases = config.trust_domain_aliases.iter().map(|alias| alias.as_str().into()).collect();
    let signer = match &config.ca {
        CaSource::Builtin(dir) => Signer::Builtin(Builtin::new(dir, config.secret_ttl)),
        CaSource::Istio(rpc) => Signer::Istio(Box::new(IstioCa::new((**rpc).clone(), config.secret_ttl))),
    };
    let only = match &config.node.source {
        node::PodSource::Own(own) => Some((own.namespace.clone(), own.service_account.clone())),
        _ => None,
    };
    let authority = CertificateAuthority { signer, only };
    CertificateStore::new(authority, aliases, revocations.clone(), background.clone(), metrics.identities.clone())
}

/// The end of the process, in order.
struct Ending<'a> {
    parts: &'a Parts,
    drain: &'a Drain,
    workers: &'a Workers,
    /// Tasks that have work to do when the process ends.
    last: &'a Group,
    /// Tasks that are cut.
    background: &'a Group,
}

impl Ending<'_> {
    async fn run(self, signals: &mut Signals) {
        let deadline = self.parts.config.drain_deadline;
        let mut final_from = tokio::time::Instant::now() + deadline;
        self.drain.gently();
        let open = self.parts.reporter.live.len();
        tracing::info!(open, deadline = %brief(deadline), "no new connections; waiting for open ones to end");
        tokio::select! {
            () = self.workers.finished() => {}
            () = tokio::time::sleep(deadline) => {}
            name = signals.next() => {
                tracing::warn!(signal = name, "second signal: ending at once");
                final_from = tokio::time::Instant::now();
            }
        }
        let cut = self.parts.reporter.live.len();
        self.drain.at_once();
        self.workers.cut().await;
        // A node without connections has this time as well.
        if tokio::time::timeout_at(final_from + FINAL_TASKS, self.last.finished()).await.is_err() {
            tracing::warn!("the last tasks did not finish in time and are cut");
            self.last.cut();
        }
        self.background.cut();
        self.background.finished().await;
        self.parts.dns.stop();
        if cut > 0 {
            tracing::warn!(cut, "ended; open connections were cut");
        } else {
            tracing::info!("ended; every connection had finished");
        }
    }
}
