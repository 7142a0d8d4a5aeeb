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
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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

/// Checks the settings, and that the files they name can be read and understood; all faults together.
fn checked(args: &NodeArgs) -> Result<Config, Faults> {
    let config = check(args, machine());
    let mut faults = config.as_ref().err().map_or_else(Vec::new, |faults| faults.0.clone());
    let path = |value: &Option<String>| value.as_deref().filter(|text| !text.is_empty()).map(PathBuf::from);
    if let Some(Err(error)) = path(&args.mesh_file).map(|path| control::file::read(&path)) {
        faults.push(error.to_string());
    }
    if let Some(Err(error)) = path(&args.pods_file).map(|path| node::pods::read(&path)) {
        faults.push(error.to_string());
    }
    if let Some(dir) = path(&args.ca_dir)
        && let Err(error) = Authority::new(&dir, Duration::from_secs(3600)).check()
    {
        faults.push(format!("{error}; `culvert ca init {}` makes a CA", dir.display()));
    }
    match config {
        Ok(config) if faults.is_empty() => Ok(config),
        _ => Err(Faults(faults)),
    }
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
    if !sys::limits::is_root() {
        return fail(
            1,
            "culvert node must run as root: it enters pods' network namespaces and writes nftables rules there \
             (CAP_SYS_ADMIN, CAP_NET_ADMIN)",
        );
    }
    match checked(args) {
        Ok(config) => match assemble::node(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &format!("{error:#}")),
        },
        Err(faults) => fail(EXIT_CONFIG, &faults.to_string()),
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
