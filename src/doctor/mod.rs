//! `culvert doctor`: checks a node as an operator would, in the daemon's container and with the daemon's settings.
//!
//! It prints one line for each check: whether the thing is well and, if not, what to do. Every check has a deadline, so
//! that one that hangs does not hide the others. Doctor changes nothing that outlasts it. `culvert pods` and `culvert
//! cleanup` are here too.

pub mod cleanup;
mod daemon;
pub mod explain;
mod finding;
mod network;
pub mod pod_table;
mod pods;
mod requirements;

use self::daemon::Daemon;
pub use self::daemon::{not_asked, settings};
use self::finding::{Finding, Verdict, fail, note, ok};
use crate::config::Config;
use crate::node::PodSource;
use crate::task::thread;
use std::sync::Arc;
use std::time::Duration;

/// How long a step, which may consist of several checks, may take.
const STEP: Duration = Duration::from_secs(15);

/// Runs all checks and passes each line to `say`. Returns whether none of them failed. `from_daemon`: whether `config`
/// has the settings of the running daemon, or why it does not.
pub async fn run(config: &Config, from_daemon: Result<(), String>, mut say: impl FnMut(&str)) -> bool {
    if let PodSource::Own(_) = config.node.source {
        say("FAIL  in dedicated mode there is no node to check; see /pods on the admin port, and readiness");
        return false;
    }
    let config = Arc::new(config.clone());
    let mut all_well = true;
    let mut report = |lines: Vec<Finding>| {
        for line in lines {
            all_well &= line.verdict != Verdict::Fail;
            say(&line.to_string());
        }
    };
    let port = config.admin.admin_port;
    report(vec![match from_daemon {
        Ok(()) => ok("settings", format!("using the settings of the daemon, read from its port {port}")),
        Err(why) => {
            let text = "using the settings of this command, because those of the daemon cannot be read";
            note("settings", format!("{text}: {why}"))
        }
    }]);
    let own = config.clone();
    report(blocking_step("rights", move || vec![requirements::privileges(&own), requirements::confinement()]).await);
    report(step("kernel", requirements::kernel(&config)).await);
    let own = config.clone();
    report(blocking_step("sysctls", move || requirements::sysctls(&own)).await);
    report(step("network", network::reachable(&config)).await);
    if let PodSource::Kubernetes(kubernetes) = &config.node.source {
        report(step("kubernetes", requirements::api(kubernetes)).await);
        report(step("host rules", requirements::host_rules(&config)).await);
        let own = kubernetes.clone();
        report(blocking_step("cni plugin", move || requirements::plugin(&own)).await);
    }
    let own = config.clone();
    let daemon = match thread::run_blocking(move || Daemon::query(&own)).await {
        Some(daemon) => daemon,
        None => Err("the check panicked; please report this as a bug".to_owned()),
    };
    match daemon {
        Ok(daemon) => {
            report(vec![daemon.readiness(), daemon.files(), daemon.clock(&config)]);
            report(step("pods", pods::all(&config, &daemon.pods)).await);
        }
        Err(error) => report(vec![fail(
            "daemon",
            format!(
                "the daemon does not answer on port {port}: {error}; until it runs, traffic of captured pods is refused"
            ),
        )]),
    }
    all_well
}

/// What a look at this machine finds missing when a daemon starts, and whether something does not work without it.
pub fn at_start(config: &Config) -> Vec<(bool, String)> {
    if let PodSource::Own(_) = config.node.source {
        return Vec::new();
    }
    let mut found = vec![requirements::privileges(config), requirements::confinement()];
    found.extend(requirements::sysctls(config));
    if let PodSource::Kubernetes(kubernetes) = &config.node.source
        && kubernetes.cni.is_none()
    {
        found.extend(requirements::plugin(kubernetes));
    }
    found.retain(|finding| finding.verdict != Verdict::Ok);
    found.into_iter().map(|finding| (finding.verdict == Verdict::Fail, finding.text)).collect()
}

/// Runs one step within the deadline of a step.
async fn step(check: &'static str, work: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    let late = || vec![fail(check, format!("the check did not end within {} s and was skipped", STEP.as_secs()))];
    tokio::time::timeout(STEP, work).await.unwrap_or_else(|_| late())
}

/// Runs one step that blocks its thread.
async fn blocking_step(check: &'static str, work: impl FnOnce() -> Vec<Finding> + Send + 'static) -> Vec<Finding> {
    step(check, async {
        thread::run_blocking(work)
            .await
            .unwrap_or_else(|| vec![fail(check, "the check panicked; please report this as a bug")])
    })
    .await
}
