//! `culvert demo`: two nodes and five pods on one machine, with real traffic between ordinary programs.
//!
//! It reports which pods were captured, what crossed the wire, which identities both sides saw, what was refused by
//! which rule, and how fast it was. It leaves nothing behind, also when it is interrupted.

mod account;
mod cancel;
mod nodes;
mod traffic;
mod wire;
mod world;

use crate::config::args::DemoArgs;
use crate::sys;
use crate::task::thread::blocking;
use account::{Account, Exchange, IdentityPair, Refusal};
use anyhow::{Context, bail};
use cancel::is_cancelled;
use parking_lot::Mutex;
use serde_json::Value;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use world::{PODS, World};

/// The programs that the demonstration runs, each with its Debian package.
const PROGRAMS: [(&str, &str); 4] = [("ip", "iproute2"), ("nft", "nftables"), ("curl", "curl"), ("python3", "python3")];

/// How long lines may take to appear in a log.
const LOG_DEADLINE: Duration = Duration::from_secs(5);

type Shared = Arc<Mutex<Option<World>>>;

/// Runs the demonstration.
pub fn run(args: &DemoArgs) -> ExitCode {
    let missing = lacking();
    if !missing.is_empty() {
        for line in missing {
            let _ = writeln!(std::io::stderr(), "culvert demo: {line}");
        }
        return ExitCode::FAILURE;
    }
    sys::limits::raise_open_files();
    let result =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime").and_then(
            |runtime| {
                let result = runtime.block_on(interruptible(args.clone()));
                // An interrupted scenario may still be in a system call. Its result is not needed.
                runtime.shutdown_background();
                result
            },
        );
    match result {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "culvert demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is missing on this machine, one line for each thing, with what to do.
fn lacking() -> Vec<String> {
    let mut lines = Vec::new();
    if sys::limits::user() != 0 {
        lines.push("must run as root, because it makes network namespaces and captures packets (try sudo)".to_owned());
    }
    for (program, package) in PROGRAMS {
        let found = Command::new(program)
            .arg("--help")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if found.is_err() {
            lines.push(format!("the program {program} is missing: apt-get install {package}"));
        }
    }
    lines
}

async fn interruptible(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = kinds.map(signal) else {
        bail!("cannot install signal handlers");
    };
    let mut signalled = async move || {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
    };
    let shared: Shared = Arc::default();
    let (keep, for_scenario) = (args.keep, shared.clone());
    let (done, scenario_done) = tokio::sync::oneshot::channel();
    let _scenario = blocking(move || done.send(scenario(&args, &for_scenario)));
    let result = tokio::select! {
        result = scenario_done => result.context("the demonstration panicked")?,
        () = signalled() => Err(anyhow::anyhow!("interrupted")),
    };
    if result.is_err() {
        cancel::cancel();
    }
    if keep && result.is_ok() {
        let _ =
            writeln!(std::io::stderr(), "\nEverything keeps running. Press Ctrl-C to end it and remove every trace.");
        signalled().await;
    }
    // This removes namespaces, rules and processes, whatever happened before.
    drop(shared.lock().take());
    result
}

fn with<T>(shared: &Shared, work: impl FnOnce(&mut World) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut world = shared.lock();
    work(world.as_mut().context("interrupted")?)
}

fn progress(args: &DemoArgs, text: &str) {
    if !args.json {
        let _ = writeln!(std::io::stderr(), "… {text}");
    }
}

fn scenario(args: &DemoArgs, shared: &Shared) -> anyhow::Result<ExitCode> {
    progress(args, "making two nodes and five pods");
    {
        // Under the lock, so that cleaning up waits until the world is complete.
        let mut world = shared.lock();
        if is_cancelled() {
            bail!("interrupted");
        }
        *world = Some(World::build()?);
    }
    let canary = format!("canary-{:032x}", rand::random::<u128>());
    let (client, server, node1) = with(shared, |w| Ok((w.netns("client")?, w.netns("server")?, w.netns("node1")?)))?;
    with(shared, |world| serve_files(world, &canary))?;
    traffic::serve(&server)?;
    let duration = Duration::from_secs(args.seconds.clamp(1, 60));
    let server_ip = "10.2.0.20".parse()?;

    progress(args, "measuring without culvert, in plaintext");
    let watch = wire::Watch::start(&node1, &canary)?;
    with(shared, |world| {
        fetch(world, "client", "http://10.2.0.20:8080/", Wait::ForServer)?
            .ok_or_else(|| anyhow::anyhow!("the server did not answer"))
    })?;
    let plain_wire = watch.take()?;
    let direct = traffic::measure(&client, server_ip, duration)?;

    progress(args, "starting culvert on both nodes");
    with(shared, nodes::start)?;
    let captured = with(shared, nodes::wait_until_captured)?;

    progress(args, "measuring with culvert");
    let watch = wire::Watch::start(&node1, &canary)?;
    let exchanges = with(shared, |world| exchange_all(world, &canary))?;
    let wire = watch.take()?;
    let tunnelled = traffic::measure(&client, server_ip, duration)?;
    let (identities, denied) = with(shared, from_logs)?;
    let (node_names, dead) = with(shared, |w| Ok(([w.name("node1"), w.name("node2")], w.ended())))?;
    if let Some(pid) = dead {
        bail!("process {pid} has ended unexpectedly");
    }
    let account = Account { captured, plain_wire, wire, exchanges, identities, denied, direct, tunnelled, node_names };
    let text = if args.json { account.json() } else { account.text() };
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(if account.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts an ordinary web server in the server pod, whose page is the canary.
fn serve_files(world: &mut World, canary: &str) -> anyhow::Result<()> {
    let site = world.folder.join("site");
    std::fs::create_dir_all(&site)?;
    std::fs::write(site.join("index.html"), canary)?;
    let mut command = Command::new("python3");
    command.args(["-m", "http.server", "8080", "--bind", "::"]).current_dir(&site);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    world.start("server", &mut command).map(drop)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForServer,
    No,
}

/// Fetches a page with curl in a pod. Returns `None` if there was no answer.
fn fetch(world: &World, pod: &str, url: &str, wait: Wait) -> anyhow::Result<Option<String>> {
    let mut command = Command::new("curl");
    // -q, because the user's own curlrc and proxies must not apply.
    command.args(["-q", "--silent", "--noproxy", "*", "--globoff", "--max-time", "10"]);
    if wait == Wait::ForServer {
        command.args(["--retry", "40", "--retry-connrefused", "--retry-delay", "0", "--retry-max-time", "10"]);
    }
    Ok(world.run(pod, command.arg(url))?.ok())
}

/// Makes all requests and checks whether each succeeds or fails as it should.
fn exchange_all(world: &mut World, canary: &str) -> anyhow::Result<Vec<Exchange>> {
    let vip = format!("http://{}/", nodes::SERVICE_VIP);
    let mut all = Vec::new();
    for (from, to, url, expected) in [
        ("client", "server, pod address", "http://10.2.0.20:8080/", true),
        ("client", "server, service address", vip.as_str(), true),
        ("dual", "server, IPv6", "http://[fd00:2::20]:8080/", true),
        ("forbidden", "server", "http://10.2.0.20:8080/", false),
        ("outside", "server (in plaintext)", "http://10.2.0.20:8080/", false),
    ] {
        let answered = fetch(world, from, url, Wait::No)?.is_some_and(|page| page.trim() == canary);
        all.push(Exchange { from, to, answered, expected });
    }
    Ok(all)
}

/// Reads the identities and the refusals from the access logs of both nodes. Waits until they are complete or the
/// deadline passes.
fn from_logs(world: &mut World) -> anyhow::Result<(Vec<IdentityPair>, Vec<Refusal>)> {
    let deadline = Instant::now() + LOG_DEADLINE;
    loop {
        let (mut identities, mut denied) = (Vec::new(), Vec::new());
        for node in [1, 2] {
            for line in nodes::access_log(world, node)? {
                let text = |key: &str| line.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                let direction = text("direction");
                if line.get("error").is_none() && line.get("src.identity").is_some() {
                    let pair = IdentityPair {
                        at: format!("node{node} {direction}"),
                        source: text("src.identity"),
                        destination: text("dst.identity"),
                    };
                    if !identities.contains(&pair) {
                        identities.push(pair);
                    }
                }
                if direction == "inbound" && text("error").contains("policy rejection") {
                    let source = text("src.addr");
                    let ip = source.rsplit_once(':').map_or(source.as_str(), |(ip, _)| ip);
                    let pod = PODS.iter().find(|pod| pod.v4 == ip).map_or(ip, |pod| pod.name);
                    denied.push(Refusal { pod: pod.to_owned(), reason: text("error") });
                }
            }
        }
        if denied.len() >= 2 && identities.len() >= 4 || is_cancelled() || Instant::now() > deadline {
            identities.sort();
            return Ok((identities, denied));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
