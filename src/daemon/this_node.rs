//! What commands need to know about this machine, and about the daemon that may run on it.

use crate::config::args::NodeArgs;
use crate::config::ask::of_environment;
use crate::config::check::{Machine, check};
use crate::config::environment::Environment;
use crate::{doctor, sys};

/// Admin port of this node's daemon.
pub(super) fn admin_port(args: &NodeArgs) -> u16 {
    let own = check(args, &Environment::of_process(), machine());
    own.map_or(crate::ports::ADMIN, |config| config.admin.admin_port)
}

/// What the machine offers.
pub(super) fn machine() -> Machine {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Machine { cpus, open_files: sys::limits::raise_open_files() }
}

/// What `culvert doctor` says about this node, for a report.
pub(super) async fn doctor_text() -> String {
    let port = admin_port(&of_environment());
    // The admin port is asked by blocking calls.
    let settings = crate::task::thread::run_blocking(move || doctor::settings(port)).await;
    let of_daemon = settings.unwrap_or_else(|| Err("the check panicked".to_owned()));
    let (args, environment) = match &of_daemon {
        Ok(settings) => (NodeArgs::of(settings), Environment::of_machine()),
        Err(_) => (of_environment(), Environment::of_process()),
    };
    let mut text = String::new();
    match check(&args, &environment, machine()) {
        Ok(config) => {
            let say = |line: &str| text.extend([line, "\n"]);
            doctor::run(&config, of_daemon.map(drop), say).await;
        }
        Err(faults) => text = faults.to_string(),
    }
    text
}
