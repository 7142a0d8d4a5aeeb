//! The commands. Each checks its settings, assembles what it needs, runs it, and gives the exit code.

mod ask;
mod assemble;
mod control;
mod control_metrics;
mod control_pages;
mod dashboard;
pub mod docs;
mod dump;
mod dump_config;
pub(crate) mod explain;
mod history;
mod kernel;
mod manual;
mod metrics;
mod pages;
mod parts;
mod plaintext;
mod plugin;
mod pods;
mod print;
mod profile;
mod signals;
mod snapshot;
mod startup;
mod status;
mod tcp;
mod this_node;
mod version;

use self::print::{EXIT_CONFIG, fail, say};
use self::this_node::{admin_port, machine};
use crate::config::args::NodeArgs;
use crate::config::check::check;
use crate::config::command_line::{CaCommand, Cli, Command};
use crate::config::environment::Environment;
use crate::config::kind::File;
use crate::config::plugin::Call;
use crate::config::setting::Setting;
use crate::config::settings;
use crate::config::{Config, Faults, dedicated};
use crate::control::file as mesh_file;
use crate::doctor::cleanup::Cleaned;
use crate::identity::Builtin;
use crate::node::{PodSource, own_rules};
use crate::{demo, doctor};
use crate::{node, sys};
use clap::{CommandFactory, FromArgMatches};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Runs one command to its end.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Node(args) | Command::Proxy { node: args, .. } => node_command(&args),
        Command::Check(args) => check_command(&args),
        Command::Control { command, settings } => control::run(&settings, command),
        Command::Ca { command: CaCommand::Init { dir } } => match Builtin::init(&dir) {
            Ok(()) => say(&format!("CA created in {}: ca.pem, ca.key (mode 0600)", dir.display())),
            Err(error) => fail(1, &crate::telemetry::log::with_causes(&error)),
        },
        Command::Demo(args) => demo::run(&args),
        Command::Doctor(args) => match args.cluster() {
            Some(cluster) => ask::checkup(&cluster),
            None => doctor_command(&args.settings),
        },
        Command::Status(args) => ask::status(&args),
        Command::Pods(args) => ask::pods(&args),
        Command::Connections(args) => ask::connections(&args),
        Command::Top(args) => ask::top(&args),
        Command::Dashboard(args) => dashboard::dashboard(&args),
        Command::Logs(args) => ask::logs(&args),
        Command::Explain(args) => ask::explain(&args),
        Command::Report(args) => ask::report(&args),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { command } => manual::man(command.as_deref()),
        Command::Redirect { remove, node } => redirect_command(&node, remove),
        Command::Cleanup(args) if args.stay => stay(),
        Command::Cleanup(args) => {
            let config = check(&args.node, &Environment::of_process(), machine());
            run_checks(config, async |config, say| {
                let cleaned = doctor::cleanup::run(config, args.all, &mut *say).await;
                if cleaned == Cleaned::InUse && args.once {
                    signals::any().await;
                }
                cleaned == Cleaned::Yes
            })
        }
        Command::Cni => match Call::of_process() {
            Some(call) => plugin::run(&call),
            None => fail(
                EXIT_CONFIG,
                "CNI_COMMAND is not set. Container runtimes run this command (CNI specification, section 2)",
            ),
        },
        Command::Version => say(&version::text()),
    }
}

/// Writes or removes the rules of this network namespace.
fn redirect_command(args: &NodeArgs, remove: bool) -> ExitCode {
    let rules = match dedicated::redirect(args, &Environment::of_process()) {
        Ok(rules) => rules,
        Err(faults) => return fail(EXIT_CONFIG, &faults.to_string()),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error.to_string()),
    };
    let done = runtime.block_on(async {
        match remove {
            true => own_rules::remove().await.map(|there| match there {
                true => "the redirection is removed".to_owned(),
                false => "there is no redirection".to_owned(),
            }),
            false => own_rules::write(&rules).await.map(|mut lines| {
                lines.push(format!("the traffic of all users but {} is redirected to culvert", rules.user));
                lines.join("\n")
            }),
        }
    });
    match done {
        Ok(text) => say(&text),
        Err(error) => fail(1, &error.to_string()),
    }
}

/// Checks the node by the settings of its daemon, which the daemon's admin port shows; where no daemon runs, by the
/// settings of this command.
fn doctor_command(args: &NodeArgs) -> ExitCode {
    let (own, port) = (check(args, &Environment::of_process(), machine()), admin_port(args));
    let of_daemon = doctor::settings(port).and_then(|settings| {
        let config = check(&NodeArgs::of(&settings), &Environment::of_machine(), machine());
        config.map_err(|faults| faults.0.join("; "))
    });
    match of_daemon {
        Ok(config) => run_checks(Ok(config), async |config, say| doctor::run(config, Ok(()), say).await),
        Err(why) => run_checks(own, async |config, say| doctor::run(config, Err(why), say).await),
    }
}

/// Runs `work`, which prints a line for each of its findings, with the settings of the node. The command fails if
/// `work` returns false.
fn run_checks(
    config: Result<Config, Faults>,
    work: impl AsyncFnOnce(&Config, &mut dyn FnMut(&str)) -> bool,
) -> ExitCode {
    let config = match config {
        Ok(config) => config,
        Err(faults) => return fail(EXIT_CONFIG, &faults.to_string()),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error.to_string()),
    };
    // This fails only if nothing reads standard output.
    let mut say = |line: &str| drop(writeln!(std::io::stdout(), "{line}"));
    let is_well = runtime.block_on(work(&config, &mut say));
    // A check that was given up because it took too long must not keep the command from ending.
    runtime.shutdown_background();
    if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Waits for a signal.
fn stay() -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(signals::any()),
        Err(error) => return fail(1, &error.to_string()),
    }
    ExitCode::SUCCESS
}

/// The command line of this process. Under the name of a plugin of kubectl, the help says `kubectl culvert`.
pub fn cli() -> Cli {
    let name = std::env::args_os().next().unwrap_or_default();
    let is_plugin = std::path::Path::new(&name).file_name().is_some_and(|name| name == manual::PLUGIN);
    let command = if is_plugin { Cli::command().bin_name("kubectl culvert") } else { Cli::command() };
    // Both end the process where the command line is wrong, as `parse` does.
    Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

/// Runs as the CNI plugin if the file that was executed has the plugin's name. `None` otherwise.
pub fn run_as_plugin() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    let is_plugin = std::path::Path::new(&name).file_name()? == crate::node::cni::install::PLUGIN;
    if is_plugin { Some(run(Cli { command: Command::Cni })) } else { None }
}

/// Checks the settings, and that the files they name can be read and are valid. Returns every fault.
fn checked(args: &NodeArgs) -> Result<Config, Faults> {
    let config = check(args, &Environment::of_process(), machine());
    let mut faults = config.as_ref().err().map_or_else(Vec::new, |faults| faults.0.clone());
    let path = |setting: &Setting<File>| args.get(&setting.about).filter(|text| !text.is_empty()).map(PathBuf::from);
    if let Some(Err(error)) = path(&settings::mesh::MESH_FILE).map(|path| mesh_file::read(&path)) {
        faults.push(error.to_string());
    }
    if let Some(Err(error)) = path(&settings::mesh::EGRESS_FILE).map(|path| mesh_file::read_egress(&path)) {
        faults.push(error.to_string());
    }
    if let Some(Err(error)) = path(&settings::pods::PODS_FILE).map(|path| node::pods_file::read(&path)) {
        faults.push(error.to_string());
    }
    if let Some(dir) = path(&settings::certificates::CA_DIR)
        && let Err(error) = Builtin::new(&dir, Duration::from_secs(3600)).check()
    {
        faults.push(format!("{error}; `culvert ca init {}` creates a CA", dir.display()));
    }
    match config {
        Ok(config) if faults.is_empty() => Ok(config),
        _ => Err(Faults(faults)),
    }
}

fn check_command(args: &NodeArgs) -> ExitCode {
    match checked(args) {
        Ok(config) => say(&format!("ok: {}", startup::sources(&config, false).join(", "))),
        Err(faults) => fail(EXIT_CONFIG, &faults.to_string()),
    }
}

fn node_command(args: &NodeArgs) -> ExitCode {
    match checked(args) {
        Ok(config) => match may_run(&config).and_then(|()| assemble::node(config)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &format!("{error:#}")),
        },
        Err(faults) => fail(EXIT_CONFIG, &faults.to_string()),
    }
}

/// Whether this process has the user that it needs.
fn may_run(config: &Config) -> anyhow::Result<()> {
    let user = sys::limits::user();
    match &config.node.source {
        PodSource::Own(own) if user != own.user => anyhow::bail!(
            "in dedicated mode culvert node must run as user {} (CULVERT_REDIRECT_UID), because the redirection knows its traffic by that; \
             this is user {user}",
            own.user
        ),
        PodSource::Own(_) => Ok(()),
        _ if user != 0 => anyhow::bail!(
            "culvert node must run as root, because it enters pods' network namespaces and writes nftables rules there \
             (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod policy_twin;
