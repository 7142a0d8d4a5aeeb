//! The commands: each assembles what it needs and runs it. The only module, with `main`, that uses anyhow.

mod assemble;
mod dump;
mod signals;

use crate::config::args::{CaCommand, Cli, Command, NodeArgs};
use crate::config::check::{Machine, check};
use crate::config::{Config, Faults};
use crate::demo;
use crate::identity::Authority;
use crate::{control, node, sys};
use std::io::Write;
use std::process::ExitCode;

/// Exit code for a configuration that is not valid, as for a command line that is not.
const EXIT_CONFIG: u8 = 2;

/// Runs one command to its end.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Node(args) | Command::Proxy { node: args, .. } => node_command(&args),
        Command::Check(args) => check_command(&args),
        Command::Ca { command: CaCommand::Init { dir } } => match Authority::init(&dir) {
            Ok(()) => say(&format!("CA made in {}: ca.pem, ca.key (mode 0600)", dir.display())),
            Err(error) => fail(1, &crate::telemetry::log::with_causes(&error)),
        },
        Command::Demo(args) => demo::run(&args),
        Command::Version => say(&version()),
    }
}

/// Name and version.
pub fn version() -> String {
    format!("culvert {}", env!("CARGO_PKG_VERSION"))
}

fn machine() -> Machine {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Machine { cpus, open_files: sys::limits::raise_open_files() }
}

/// Checks the settings, and that the files they name can be read and understood.
fn checked(args: &NodeArgs) -> Result<Config, Faults> {
    let config = check(args, machine())?;
    let mut faults = Vec::new();
    if let Err(error) = control::file::read(&config.mesh_file) {
        faults.push(error.to_string());
    }
    if let Some(Err(error)) = config.node.pods_file.as_deref().map(node::pods::read) {
        faults.push(error.to_string());
    }
    if let Err(error) = Authority::new(&config.ca_dir, config.secret_ttl).check() {
        faults.push(format!("{error}; `culvert ca init {}` makes a CA", config.ca_dir.display()));
    }
    if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
}

fn check_command(args: &NodeArgs) -> ExitCode {
    match checked(args) {
        Ok(config) => say(&format!(
            "ok: {}, {} and the CA in {} are valid",
            config.mesh_file.display(),
            config.node.pods_file.unwrap_or_default().display(),
            config.ca_dir.display()
        )),
        Err(faults) => fail(EXIT_CONFIG, &faults.to_string()),
    }
}

fn node_command(args: &NodeArgs) -> ExitCode {
    let config = match checked(args) {
        Ok(config) => config,
        Err(faults) => return fail(EXIT_CONFIG, &faults.to_string()),
    };
    if !sys::limits::is_root() {
        return fail(
            1,
            "culvert node must run as root: it enters pods' network namespaces and writes nftables rules there (CAP_SYS_ADMIN, CAP_NET_ADMIN)",
        );
    }
    match assemble::node(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &format!("{error:#}")),
    }
}

fn say(text: &str) -> ExitCode {
    // A closed standard output is the reader's choice.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}

fn fail(code: u8, text: &str) -> ExitCode {
    for line in text.lines() {
        let _ = writeln!(std::io::stderr(), "culvert: {line}");
    }
    ExitCode::from(code)
}
