//! `culvert completions` and `culvert man`: made from the command line itself, so that they are never out of date.

use super::print::{EXIT_CONFIG, fail, say};
use crate::config::command_line::Cli;
use clap::CommandFactory;
use std::io::Write;
use std::process::ExitCode;

/// The name as a plugin of kubectl.
pub(super) const PLUGIN: &str = "kubectl-culvert";

/// Prints the completions of a shell.
pub(super) fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "culvert", &mut text);
    say(String::from_utf8_lossy(&text).trim_end())
}

/// Prints the manual page of the program, or of one of its commands.
pub(super) fn man(command: Option<&str>) -> ExitCode {
    let mut all = Cli::command();
    all.build();
    let page = match command {
        None => all,
        Some(name) => match all.find_subcommand(name) {
            Some(found) => found.clone().name(format!("culvert-{name}")).display_name(format!("culvert-{name}")),
            None => return fail(EXIT_CONFIG, &format!("there is no command {name:?}; see culvert --help")),
        },
    };
    let mut text = Vec::new();
    match clap_mangen::Man::new(page).render(&mut text).and_then(|()| std::io::stdout().write_all(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_no_faults() {
        Cli::command().debug_assert();
    }
}
