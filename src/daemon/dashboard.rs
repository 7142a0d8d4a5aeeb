//! `culvert dashboard`: opens the live page about all nodes, says where it is, and serves it until a signal.

use super::print::{fail, say};
use super::signals;
use super::this_node::admin_port;
use crate::cluster::{Daemons, Place};
use crate::config::ask::{DashboardArgs, of_environment};
use crate::inspect::{Outcome, dashboard as page};
use std::process::ExitCode;

/// Runs the command.
pub(super) fn dashboard(args: &DashboardArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(Outcome::Unknown as u8, &error.to_string()),
    };
    let done = runtime.block_on(serve(args));
    // The resolver or a helper of the kubeconfig may hang, which must not keep the command from ending.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(Outcome::Unknown as u8, &error),
    }
}

async fn serve(args: &DashboardArgs) -> Result<(), String> {
    let daemons = Daemons::open(args.ask.place(admin_port(&of_environment()))).await;
    let daemons = daemons.map_err(|error| error.to_string())?;
    let title = match (&args.ask.context, daemons.place()) {
        (Some(context), _) => format!("cluster {context}"),
        (None, Place::Cluster(_)) => "cluster".to_owned(),
        (None, Place::Here(_)) => "this node".to_owned(),
    };
    let (dashboard, count) = page::open(daemons, args.ask.timeout, (args.port, &title)).await?;
    let address = dashboard.address().map_err(|error| error.to_string())?;
    let nodes = if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
    say(&format!("{nodes}: http://{address}/   (Ctrl-C ends it)"));
    tokio::select! {
        () = dashboard.serve() => {}
        () = signals::any() => {}
    }
    Ok(())
}
