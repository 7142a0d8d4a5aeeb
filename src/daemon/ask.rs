//! The commands that ask daemons: each finds them, asks, and prints.

use super::{admin_port, fail, say};
use crate::cluster::{ClusterError, Daemons};
use crate::config::ask::{AskArgs, StatusArgs, of_environment, wants_colour};
use crate::inspect::{Outcome, Style, status};
use std::io::IsTerminal;
use std::process::ExitCode;

/// `culvert status`.
pub(super) fn status(args: &StatusArgs) -> ExitCode {
    asked(&args.ask, async |daemons| status::run(daemons, args.ask.timeout, args.wait, (args.json, style())).await)
}

/// Runs a command that asks daemons, prints its text, and gives its exit code.
fn asked(args: &AskArgs, work: impl AsyncFnOnce(&Daemons) -> Result<(String, Outcome), ClusterError>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(Outcome::Unknown as u8, &error.to_string()),
    };
    let done = runtime.block_on(async {
        let daemons = Daemons::open(args.place(admin_port(&of_environment()))).await?;
        work(&daemons).await
    });
    // The resolver or a helper of the kubeconfig may hang, which must not keep the command from ending.
    runtime.shutdown_background();
    match done {
        Ok((text, outcome)) => {
            say(&text);
            ExitCode::from(outcome as u8)
        }
        Err(error) => fail(Outcome::Unknown as u8, &error.to_string()),
    }
}

/// How text is printed.
fn style() -> Style {
    Style { colours: std::io::stdout().is_terminal() && wants_colour() }
}
