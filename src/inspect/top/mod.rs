//! `culvert top`: the live flows of all nodes, by bytes or connections; refreshed on a terminal, otherwise once.

mod flows;
mod look;
mod screen;

pub use self::flows::Order;
use self::flows::{Flow, sort};
use self::look::{HEAD, Look, Looks, cells};
use super::Outcome;
use super::text::columns;
use crate::cluster::{ClusterError, Daemons};
use serde_json::{Value, json};
use std::time::Duration;

/// Flows that are printed as text.
const ROWS: usize = 50;

/// Shows the flows: refreshed every `interval` until the user ends it, on a terminal; otherwise once, after one
/// interval. Returns what to print.
pub async fn run(
    daemons: &Daemons,
    timeout: Duration,
    (interval, order): (Duration, Order),
    (json, on_terminal): (bool, bool),
) -> Result<(String, Outcome), ClusterError> {
    let mut looks = Looks::new(daemons, timeout).await?;
    if on_terminal && !json {
        let shown = screen::show(&mut looks, interval, order).await;
        return Ok(match shown {
            Ok(outcome) => (String::new(), outcome),
            Err(error) => (format!("the terminal: {error}"), Outcome::Red),
        });
    }
    looks.next().await;
    tokio::time::sleep(interval).await;
    let mut look = looks.next().await;
    sort(&mut look.flows, order);
    Ok((if json { as_json(&look) } else { as_text(&look) }, look.outcome))
}

fn as_json(look: &Look) -> String {
    let flows: Vec<Value> = look.flows.iter().map(Flow::json).collect();
    serde_json::to_string_pretty(&json!({"flows": flows, "silent": look.silent})).unwrap_or_default()
}

fn as_text(look: &Look) -> String {
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    rows.extend(look.flows.iter().take(ROWS).map(|flow| cells(flow).to_vec()));
    let mut lines = columns(&rows);
    if look.flows.is_empty() {
        // Of nodes that do not answer nothing is known.
        let known = look.outcome != Outcome::Unknown;
        lines = known.then(|| "no connection is open".to_owned()).into_iter().collect();
    }
    if look.flows.len() > ROWS {
        lines.push(format!("and {} more, which --json lists", look.flows.len() - ROWS));
    }
    lines.extend(look.silent.iter().cloned());
    lines.join("\n")
}
