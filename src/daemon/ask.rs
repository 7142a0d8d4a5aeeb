//! The commands that ask daemons: each finds them, asks, and prints.

use super::print::{fail, say, warn};
use super::this_node::{admin_port, doctor_text};
use super::version;
use crate::cluster::{ClusterError, Daemons, LogLines, Place, Question};
use crate::config::ask::{
    AskArgs, ConnectionsArgs, ExplainArgs, LogsArgs, PodsArgs, ReportArgs, Sort, StatusArgs, TopArgs, of_environment,
    wants_colour,
};
use crate::doctor;
use crate::inspect::connections::Filter;
use crate::inspect::logs::Line;
use crate::inspect::top::Order;
use crate::inspect::{Outcome, Style, checkup, connections, logs, nodes, plaintext, report, status, top};
use crate::telemetry::printable::printable_lines;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::SystemTime;

/// `culvert status`.
pub(super) fn status(args: &StatusArgs) -> ExitCode {
    asked(&args.ask, async |daemons| match args.plaintext {
        true => plaintext::run(daemons, args.ask.timeout, (args.json, style())).await,
        false => status::run(daemons, args.ask.timeout, args.wait, (args.json, style())).await,
    })
}

/// `culvert connections`.
pub(super) fn connections(args: &ConnectionsArgs) -> ExitCode {
    let filter = Filter { pod: args.pod.clone(), refused: args.refused, since: args.since, limit: args.limit };
    asked(&args.ask, async |daemons| connections::run(daemons, args.ask.timeout, &filter, (args.json, style())).await)
}

/// `culvert top`.
pub(super) fn top(args: &TopArgs) -> ExitCode {
    let order = match args.sort {
        Sort::Rate => Order::Rate,
        Sort::Bytes => Order::Bytes,
        Sort::Connections => Order::Connections,
        Sort::Connect => Order::Connect,
        Sort::Pod => Order::Pod,
    };
    let on_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    asked(&args.ask, async |daemons| {
        top::run(daemons, args.ask.timeout, (args.interval, order), (args.json, on_terminal)).await
    })
}

/// `culvert logs`.
pub(super) fn logs(args: &LogsArgs) -> ExitCode {
    let lines = LogLines { follow: args.follow, since: args.since, tail: args.tail };
    asked(&args.ask, async |daemons| {
        logs::run(daemons, &args.pod, &lines, args.ask.timeout, |line| match line {
            // Not a line of the log, so that it is in nobody's way.
            Line::About(text) => writeln!(io::stderr(), "culvert: {text}").is_ok(),
            Line::Log(text) => writeln!(io::stdout(), "{text}").is_ok(),
        })
        .await?;
        Ok((String::new(), Outcome::Green))
    })
}

/// `culvert doctor` for a cluster.
pub(super) fn checkup(args: &AskArgs) -> ExitCode {
    asked(args, async |daemons| checkup::run(daemons, args.timeout, style()).await)
}

/// `culvert pods`.
pub(super) fn pods(args: &PodsArgs) -> ExitCode {
    asked(&args.ask, async |daemons| {
        let question = Question::get("/pods", args.ask.timeout);
        match args.json && is_cluster(daemons) {
            true => each_json(daemons, &question, "pods").await,
            false => each(daemons, &question, |status, body| doctor::pod_table::shown(status, body, args.json)).await,
        }
    })
}

/// `culvert explain`.
pub(super) fn explain(args: &ExplainArgs) -> ExitCode {
    let timeout = args.ask.timeout;
    asked(&args.ask, async |daemons| match (&args.policy, &args.from, &args.to) {
        (Some(file), ..) => {
            let text = std::fs::read_to_string(file);
            let text = text.map_err(|error| ClusterError::NotFound(format!("{}: {error}", file.display())))?;
            let question = Question::post("/explain/policies", text, timeout);
            match args.json && is_cluster(daemons) {
                true => each_json(daemons, &question, "explain").await,
                false => {
                    each(daemons, &question, |status, body| doctor::explain::changes_of(status, body, args.json)).await
                }
            }
        }
        (None, Some(from), Some(to)) => {
            let (daemon, _) = daemons.find_of_pod(from, timeout).await?;
            let question = Question::get(doctor::explain::path(from, to), timeout);
            let answer = daemons.ask(&daemon, &question).await;
            let answer = answer.map_err(|error| ClusterError::NotFound(not_asked(daemons, daemon.name(), &error)))?;
            let text = doctor::explain::steps_of(answer.status, answer.text(), args.json);
            text.map(|text| (text, Outcome::Green)).map_err(ClusterError::NotFound)
        }
        _ => Err(ClusterError::NotFound("use --from and --to, or --policy".to_owned())),
    })
}

fn is_cluster(daemons: &Daemons) -> bool {
    matches!(daemons.place(), Place::Cluster(_))
}

/// Asks every daemon one question. Returns one document, and says to people which nodes did not answer.
async fn each_json(daemons: &Daemons, question: &Question, key: &str) -> Result<(String, Outcome), ClusterError> {
    let all = daemons.find(question.deadline).await?;
    let nodes = nodes::ask_these(daemons, &all, question).await;
    for silence in nodes.iter().filter_map(nodes::Node::silence) {
        warn(&silence);
    }
    Ok((nodes::as_json(&nodes, key), nodes::outcome(&nodes)))
}

/// Asks every daemon one question, and shows each answer below the name of its node, if there are several.
async fn each(
    daemons: &Daemons,
    question: &Question,
    shown: impl Fn(u16, String) -> Result<String, String>,
) -> Result<(String, Outcome), ClusterError> {
    let all = daemons.find(question.deadline).await?;
    let answers = daemons.ask_all(&all, question).await;
    let (mut texts, mut failed) = (Vec::new(), Vec::new());
    for (daemon, answer) in all.iter().zip(answers) {
        let text = match answer {
            Ok(answer) => shown(answer.status, answer.text()),
            Err(error) => Err(not_asked(daemons, daemon.name(), &error)),
        };
        match text {
            Ok(text) if all.len() == 1 => texts.push(text.trim_end().to_owned()),
            Ok(text) => texts.push(format!("node {}\n{}\n", daemon.name(), text.trim_end())),
            Err(error) => failed.push(printable_lines(&error)),
        }
    }
    match (texts.is_empty(), failed.is_empty()) {
        (true, _) => Err(ClusterError::NotFound(failed.join("\n"))),
        (false, true) => Ok((texts.join("\n").trim_end().to_owned(), Outcome::Green)),
        (false, false) => Ok((format!("{}\n{}", texts.join("\n"), failed.join("\n")), Outcome::Red)),
    }
}

/// What to say if a daemon has not answered.
fn not_asked(daemons: &Daemons, name: &str, error: &crate::cluster::AskError) -> String {
    match daemons.place() {
        Place::Here(address) => doctor::not_asked(address.port(), &error.to_string()),
        Place::Cluster(_) => format!("{name}: no answer: {error}"),
    }
}

/// `culvert report`.
pub(super) fn report(args: &ReportArgs) -> ExitCode {
    let stamp = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "-");
    let name = args.output.clone().unwrap_or_else(|| format!("culvert-report-{stamp}.tar.gz").into());
    let to_stdout = name.as_os_str() == "-";
    asked(&args.ask, async |daemons| {
        let doctor = match daemons.place() {
            Place::Cluster(_) => checkup::run(daemons, args.ask.timeout, Style { colours: false }).await?.0,
            Place::Here(_) => doctor_text().await,
        };
        let about = [("version.txt", version::text() + "\n"), ("doctor.txt", doctor + "\n")];
        let written = match to_stdout {
            true => report::write(daemons, args.ask.timeout, &about, io::stdout()).await,
            false => report::to_file(daemons, args.ask.timeout, &about, &name).await,
        };
        let (text, outcome) =
            written.map_err(|error| ClusterError::NotFound(format!("{}: {error}", name.display())))?;
        match to_stdout {
            true => drop(writeln!(io::stderr(), "{text}")),
            false => return Ok((format!("{text}\nwritten to {}", name.display()), outcome)),
        }
        Ok((String::new(), outcome))
    })
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
            if !text.is_empty() {
                say(&text);
            }
            ExitCode::from(outcome as u8)
        }
        Err(error) => fail(Outcome::Unknown as u8, &error.to_string()),
    }
}

/// How text is printed.
fn style() -> Style {
    Style { colours: io::stdout().is_terminal() && wants_colour() }
}
