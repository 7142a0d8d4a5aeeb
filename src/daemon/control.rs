//! `culvert control`: assembles the control plane, runs it, and ends it in order.
//!
//! All parts share one runtime with a thread for each CPU; the debug and metrics ports have a thread of their own.
//!
//! Ending: nothing new is accepted, streams are ended one after the other within a few seconds, and their daemons
//! connect elsewhere or wait; what they know stays in force.

use super::control_metrics::ControlMetrics;
use super::control_pages::{Shown, pages};
use super::print::{EXIT_CONFIG, fail, say};
use super::signals::Signals;
use super::version;
use crate::admin::{ControlPages, ControlPorts};
use crate::config::args::ControlArgs;
use crate::config::command_line::ControlCommand;
use crate::config::control::check;
use crate::control_plane::ca::{self, Authority, ReviewError, Reviewer, Rules, Source, publish};
use crate::control_plane::serve::{self, Denied, Server};
use crate::control_plane::{Catalog, Config, RunningPods, policies, watch};
use crate::node::kubernetes::client_with;
use crate::ports;
use crate::sys::netns::Netns;
use crate::task::thread::Dedicated;
use crate::task::{Drain, Group, Ready, thread};
use crate::telemetry::log::{self, LogControl};
use anyhow::Context;
use futures_util::future::BoxFuture;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How many statuses of policies may wait to be written. More stay with the watch.
const STATUSES: usize = 256;
/// How long streams may take to end.
const LAST_STREAMS: Duration = Duration::from_secs(15);
/// How long blocking work may continue after its runtime has ended.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);

/// Runs the control plane, or one of its commands.
pub(super) fn run(args: &ControlArgs, command: Option<ControlCommand>) -> ExitCode {
    let config = match check(args) {
        Ok(config) => config,
        Err(faults) => return fail(EXIT_CONFIG, &faults.to_string()),
    };
    let done = match command {
        None => serve(config).map(|()| ExitCode::SUCCESS),
        Some(ControlCommand::RotateRoot { again }) => rotate_root(&config, again).map(|text| say(&text)),
    };
    done.unwrap_or_else(|error| fail(1, &format!("{error:#}")))
}

fn rotate_root(config: &Config, again: bool) -> anyhow::Result<String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        let client = client(config).await?;
        Ok(ca::rotate::run(client, &config.ca, again).await?)
    })
}

async fn client(config: &Config) -> anyhow::Result<kube::Client> {
    client_with(config.kubeconfig.as_deref(), watch::READ_TIMEOUT).await.map_err(anyhow::Error::msg)
}

fn serve(config: Config) -> anyhow::Result<()> {
    let (log, guard) = log::start(&config.log, |work| thread::named("culvert-log", work).map(drop))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    let result = runtime.block_on(Box::pin(assemble(config, log)));
    runtime.shutdown_timeout(BLOCKING_GRACE);
    drop(guard);
    result
}

async fn assemble(config: Config, log: LogControl) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot install signal handlers")?;
    let (background, serving, drain, ready) = (Group::default(), Group::default(), Drain::default(), Ready::default());
    let (metrics, catalog, pods) =
        (ControlMetrics::default(), Arc::<Catalog>::default(), Arc::<RunningPods>::default());
    // Before the metrics, which show the limit.
    let registry = metrics.registry();
    let client = client(&config).await?;
    let own = Netns::open(Path::new("/proc/self/ns/net")).and_then(|netns| netns.has_ipv6());
    let ipv6 = own.unwrap_or(false);

    // Without one of its parts, even one that panicked, it would serve old facts and stay ready.
    let whole = CancellationToken::new();
    let part = |work: BoxFuture<'static, ()>| background.spawn_part(&whole, work);
    watch_objects(&config, &client, (&catalog, &pods), &metrics, part);
    let authority = Authority::new(client.clone(), &config.ca, metrics.ca.clone()).context("TLS cannot be set up")?;
    let reviewer = Reviewer::new(client.clone(), config.ca.audiences.clone(), metrics.ca.clone());
    let reviewer = Arc::new(reviewer);
    keep_certificates(&client, &authority, &metrics, part);
    wait_until_ready(&ready, &catalog, &authority, &background);

    let server = Server::new(
        serve_config(&config),
        callers(&config, &authority, reviewer, pods, &metrics),
        metrics.serve.clone(),
    );
    let shown = Shown { config: config.clone(), catalog: catalog.clone(), nodes: server.nodes(), authority };
    let _admin = open_ports(pages(shown, log, ready.clone(), registry), ipv6).await?;
    let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let address = SocketAddr::new(any, config.port);
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let stop = drain.signal();
    serving.spawn_part(&whole, server.serve(listener, catalog, stop));
    say_start(&config, any);

    tokio::select! {
        name = signals.next() => tracing::info!(signal = name, "ending: daemons go on with what they know"),
        () = whole.cancelled() => anyhow::bail!("a part of the control plane has ended; start it again, and report this"),
    }
    let _ending = ready.wait_for("ending");
    drain.gently();
    tokio::select! {
        () = serving.finished() => {}
        () = tokio::time::sleep(LAST_STREAMS) => tracing::warn!("some streams did not end in time and are cut"),
        name = signals.next() => tracing::warn!(signal = name, "second signal: ending at once"),
    }
    drain.at_once();
    serving.cut();
    background.cut();
    background.finished().await;
    tracing::info!("ended");
    Ok(())
}

/// Follows the cluster, and writes the statuses of policies.
fn watch_objects(
    config: &Config,
    client: &kube::Client,
    (catalog, pods): (&Arc<Catalog>, &Arc<RunningPods>),
    metrics: &ControlMetrics,
    part: impl Fn(BoxFuture<'static, ()>),
) {
    let (wanted, statuses) = mpsc::channel(STATUSES);
    part(Box::pin(policies::status::write(client.clone(), statuses)));
    let (config, client, catalog, pods) = (config.clone(), client.clone(), catalog.clone(), pods.clone());
    let metrics = metrics.watch.clone();
    part(Box::pin(async move { watch::run(client, &config, catalog, pods, metrics, wanted).await }));
}

/// Loads and renews the CA, and publishes its roots.
fn keep_certificates(
    client: &kube::Client,
    authority: &Arc<Authority>,
    metrics: &ControlMetrics,
    part: impl Fn(BoxFuture<'static, ()>),
) {
    part(Box::pin(authority.clone().run()));
    for what in [publish::ROOTS, publish::CRL] {
        part(Box::pin(publish::run(client.clone(), authority.clone(), what, metrics.ca.clone())));
    }
}

/// The process is ready once everything has been listed, and certificates can be signed.
fn wait_until_ready(ready: &Ready, catalog: &Arc<Catalog>, authority: &Arc<Authority>, background: &Group) {
    let (listed, signing) = (ready.wait_for("the objects of the cluster"), ready.wait_for("the CA"));
    let mut editions = catalog.follow();
    background.spawn(async move {
        // The catalog lives as long as the process.
        let _ = editions.wait_for(|edition| edition.complete).await.map(drop);
        drop(listed);
        tracing::info!("everything in the cluster has been listed; daemons are served");
    });
    let authority = authority.clone();
    background.spawn(async move {
        let mut changes = authority.changes();
        // The notice comes once the server is ready with the key. The authority lives as long as this task.
        while !authority.is_ready() && changes.changed().await.is_ok() {}
        drop(signing);
    });
}

fn serve_config(config: &Config) -> serve::Config {
    let trusted = config.ca.trusted.iter().map(|account| (account.namespace.clone(), account.name.clone()));
    serve::Config { trusted: trusted.collect(), cluster_id: config.cluster.id.clone() }
}

/// Who decides about those who call, and signs for them.
fn callers(
    config: &Config,
    authority: &Arc<Authority>,
    reviewer: Arc<Reviewer>,
    pods: Arc<RunningPods>,
    metrics: &ControlMetrics,
) -> serve::Authority {
    let rules = Rules { trusted: config.ca.trusted.clone(), trust_domain: config.ca.trust_domain.clone() };
    let service = ca::Service::new(authority.clone(), reviewer.clone(), pods, rules, metrics.ca.clone());
    let (service, authority) = (Arc::new(service), authority.clone());
    serve::Authority {
        review: Box::new(move |token| {
            let reviewer = reviewer.clone();
            Box::pin(async move {
                reviewer.review(&token).await.map_err(|error| match error {
                    ReviewError::Refused(_) => Denied::Refused(error.to_string()),
                    ReviewError::Unavailable(_) => Denied::Unavailable(error.to_string()),
                })
            })
        }),
        sign: Box::new(move |token, request| {
            let service = service.clone();
            Box::pin(async move { service.create_certificate(token.as_deref(), request).await })
        }),
        tls: Box::new(move || Some(authority.server_config())),
    }
}

/// Opens the debug, metrics and readiness ports, and serves them on a separate thread.
async fn open_ports(pages: ControlPages, ipv6: bool) -> anyhow::Result<Dedicated> {
    let (bound, opened) = tokio::sync::oneshot::channel();
    let serve = move || async move {
        match ControlPorts::bind(pages, ipv6).await {
            Ok(ports) => {
                // Nothing receives this when the start has been given up meanwhile.
                let _ = bound.send(Ok(()));
                ports.serve().await;
            }
            Err(error) => drop(bound.send(Err(error))),
        }
    };
    let thread = Dedicated::start("culvert-admin", serve).context("cannot start the thread of the debug ports")?;
    opened.await.context("the thread of the debug ports ended")??;
    Ok(thread)
}

/// Writes the first lines of the log.
fn say_start(config: &Config, any: IpAddr) {
    let cluster = &config.cluster;
    let (id, trust_domain, namespace) = (&*cluster.id, &*cluster.trust_domain, &*cluster.namespace);
    tracing::info!(cluster = id, trust_domain, namespace, "{} control is running", version::text());
    let api = config
        .kubeconfig
        .as_ref()
        .map_or_else(|| "the account of its own pod".to_owned(), |path| format!("kubeconfig {}", path.display()));
    tracing::info!("the mesh from the Kubernetes API, by {api}");
    match &config.ca.source {
        Source::Secrets => {
            tracing::info!("certificates by the Secret cacerts in {namespace}, else by the mesh's own root")
        }
        Source::Folder(folder) => tracing::info!("certificates by the signing key in {}", folder.display()),
        Source::CertManager(issuer) => {
            tracing::info!("certificates by an intermediate of cert-manager ({} {})", issuer.kind, issuer.name);
        }
    }
    let trusted = config.ca.trusted.iter().map(|account| format!("{}/{}", account.namespace, account.name));
    tracing::info!("daemons are {}", trusted.collect::<Vec<_>>().join(", "));
    let on = |port| SocketAddr::new(any, port);
    let (daemons, metrics, ready) = (on(config.port), on(ports::STATS), on(ports::READY));
    let dumps = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::ADMIN));
    tracing::info!(%daemons, %dumps, %metrics, %ready, "listening");
}
