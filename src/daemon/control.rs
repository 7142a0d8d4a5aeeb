//! `culvert control`.

use super::print::{EXIT_CONFIG, fail};
use crate::config::args::ControlArgs;
use crate::config::command_line::ControlCommand;
use crate::config::control::check;
use crate::control_plane::Config;
use std::process::ExitCode;

/// Runs the control plane, or one of its commands.
pub(super) fn run(args: &ControlArgs, command: Option<ControlCommand>) -> ExitCode {
    let config = match check(args) {
        Ok(config) => config,
        Err(faults) => return fail(EXIT_CONFIG, &faults.to_string()),
    };
    let done = match command {
        None => serve(config),
        Some(ControlCommand::RotateRoot) => rotate_root(config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &format!("{error:#}")),
    }
}

fn serve(_: Config) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}

fn rotate_root(_: Config) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
