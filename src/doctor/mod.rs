//! `culvert doctor`: looks at a node as an operator would, where the daemon runs and with its settings. One line for each
//! thing, well or not, and what to do where it is not. `culvert cleanup` is beside it.

pub mod cleanup;
mod daemon;
mod finding;
mod network;
pub mod pod_table;
mod pods;
mod requirements;

use self::daemon::Daemon;
pub use self::daemon::settings;
use self::finding::{Finding, Verdict, fail, note, ok};
use crate::config::Config;
use crate::node::Source;
use crate::task::thread;
use std::sync::Arc;
use std::time::Duration;

/// How long a whole step may take.
const STEP: Duration = Duration::from_secs(15);

/// Looks at everything and hands each line to `say`; whether all is well. `told`: whether the settings are those that the daemon
/// has told, or why not.
pub async fn run(config: &Config, told: Result<(), String>, mut say: impl FnMut(&str)) -> bool {
    let config = Arc::new(config.clone());
    let mut all_well = true;
    let mut tell = |lines: Vec<Finding>| {
        for line in lines {
            all_well &= line.verdict != Verdict::Fail;
            say(&line.to_string());
        }
    };
    let port = config.admin.admin_port;
    tell(vec![match told {
        Ok(()) => ok("settings", format!("those of the daemon, which its port {port} tells")),
        Err(why) => note("settings", format!("those of this command; the daemon cannot be asked for its own: {why}")),
    }]);
    let own = config.clone();
    tell(aside("rights", move || vec![requirements::privileges(&own), requirements::confinement()]).await);
    tell(step("kernel", requirements::kernel(&config)).await);
    let own = config.clone();
    tell(aside("sysctls", move || requirements::sysctls(&own)).await);
    tell(step("network", network::reachable(&config)).await);
    if let Source::Kubernetes(kubernetes) = &config.node.source {
        tell(step("kubernetes", requirements::api(kubernetes)).await);
        tell(step("host rules", requirements::host_rules(&config)).await);
        let own = kubernetes.clone();
        tell(aside("cni plugin", move || requirements::plugin(&own)).await);
    }
    let own = config.clone();
    let looked = match thread::run_blocking(move || Daemon::look(&own)).await {
        Some(looked) => looked,
        None => Err("it cannot be asked".to_owned()),
    };
    match looked {
        Ok(daemon) => {
            tell(vec![daemon.readiness(), daemon.files(), daemon.clock(&config)]);
            tell(step("pods", pods::all(&config, &daemon.pods)).await);
        }
        Err(error) => tell(vec![fail(
            "daemon",
            format!("does not answer on port {port}: {error}; captured pods' traffic is refused until it runs"),
        )]),
    }
    all_well
}

/// One step, whose lines come within a deadline: what does not answer must not keep the rest from being said.
async fn step(what: &'static str, work: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    let late = || vec![fail(what, format!("gave no answer within {} s; going on without", STEP.as_secs()))];
    tokio::time::timeout(STEP, work).await.unwrap_or_else(|_| late())
}

/// A step that blocks its thread.
async fn aside(what: &'static str, work: impl FnOnce() -> Vec<Finding> + Send + 'static) -> Vec<Finding> {
    step(what, async { thread::run_blocking(work).await.unwrap_or_else(|| vec![fail(what, "cannot be looked at")]) })
        .await
}
