//! `culvert dashboard`: the live page about all nodes, on this machine. Each picture asks every daemon for its part; one
//! that does not answer is named on the page.

use super::nodes::page;
use crate::admin::dashboard::Dashboard;
use crate::admin::page::{Live, Site, Told};
use crate::admin::{Asked, Query};
use crate::cluster::{Daemon, Daemons, Question, Recent};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a node that has not answered is not asked again, so that it does not delay the others at each turn.
const DOWN_FOR: Duration = Duration::from_secs(20);

/// The longest part of one node, in bytes.
const PART_MAX: usize = 16 << 20;

/// The daemons that are shown.
struct Shown {
    daemons: Daemons,
    timeout: Duration,
    /// Daemons that have not answered: when, and why.
    down: Mutex<HashMap<Daemon, (Instant, String)>>,
}

/// Finds the daemons and opens the port. Returns the number of daemons too.
pub async fn open(
    daemons: Daemons,
    timeout: Duration,
    (port, title): (u16, &str),
) -> Result<(Dashboard, usize), String> {
    let count = daemons.find(timeout).await.map_err(|error| error.to_string())?.len();
    let shown = Arc::new(Shown { daemons, timeout, down: Mutex::default() });
    let site = Site { live: Live::new(feed(&shown)), title: title.into(), links: &[] };
    let opened = Dashboard::bind(port, site, explain(shown)).await;
    Ok((opened.map_err(|error| format!("{error} Or use --port"))?, count))
}

fn feed(shown: &Arc<Shown>) -> crate::admin::page::Feed {
    let shown = shown.clone();
    Box::new(move || {
        let shown = shown.clone();
        Box::pin(async move { shown.all().await })
    })
}

/// Asks the daemon on the pod's node.
fn explain(shown: Arc<Shown>) -> Asked {
    Box::new(move |query| {
        let shown = shown.clone();
        Box::pin(async move { shown.explain(&query).await })
    })
}

impl Shown {
    /// The parts of all nodes.
    async fn all(&self) -> Told {
        let Recent { all, error } = self.daemons.recent(self.timeout).await;
        let question = Question { max: PART_MAX, ..Question::get("/snapshot", self.timeout) };
        let down = self.down();
        let asked: Vec<Daemon> = all.iter().filter(|daemon| !down.contains_key(*daemon)).cloned().collect();
        let answers = self.daemons.ask_all(&asked, &question).await;
        let begun = Instant::now();
        let mut answers: HashMap<Daemon, Result<Value, String>> =
            asked.into_iter().zip(answers.into_iter().map(page)).collect();
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        all.iter().for_each(|daemon| *names.entry(daemon.name()).or_default() += 1);
        let mut nodes = Vec::new();
        for daemon in &all {
            let answer = match (answers.remove(daemon), down.get(daemon)) {
                (Some(Err(error)), _) => {
                    self.down.lock().insert(daemon.clone(), (Instant::now(), error.clone()));
                    Err(error)
                }
                (Some(answer), _) => answer,
                (None, Some((_, error))) => Err(error.clone()),
                (None, None) => continue,
            };
            let shared = names.get(daemon.name()).is_some_and(|count| *count > 1);
            let name = if shared { format!("{} ({})", daemon.name(), daemon.pod) } else { daemon.name().to_owned() };
            nodes.push(match answer {
                Ok(mut part) if part.is_object() => {
                    if let Some(part) = part.as_object_mut().filter(|_| !daemon.node.is_empty()) {
                        part.insert("node".to_owned(), name.into());
                    }
                    part
                }
                Ok(_) => unreachable(&name, "the answer is not what a daemon answers"),
                Err(error) => unreachable(&name, &error),
            });
        }
        nodes.extend(error.map(|error| unreachable("list of nodes", &error)));
        Told { said: json!({"nodes": nodes}), work: begun.elapsed() }
    }

    /// The daemons that have not answered lately.
    fn down(&self) -> HashMap<Daemon, (Instant, String)> {
        let mut down = self.down.lock();
        down.retain(|_, (at, _)| at.elapsed() < DOWN_FOR);
        down.clone()
    }

    async fn explain(&self, query: &Query) -> Result<Value, String> {
        let pod = query.iter().find(|(name, _)| name == "from").map(|(_, pod)| pod.as_str()).unwrap_or_default();
        if pod.split('/').count() != 2 {
            return Err(format!("{pod:?} is not NAMESPACE/POD"));
        }
        let place = self.daemons.place_of_pod(pod, self.timeout).await.map_err(|error| error.to_string())?;
        let daemon = place.daemon(&self.daemons.recent(self.timeout).await.all).map_err(|error| error.to_string())?;
        let asked = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
        let question = Question::get(format!("/explain?{asked}"), self.timeout);
        let answer = self.daemons.ask(&daemon, &question).await.map_err(|error| error.to_string())?;
        if answer.status == 400 { Err(answer.text().trim().to_owned()) } else { answer.json() }
    }
}

fn unreachable(node: &str, error: &str) -> Value {
    json!({"node": node, "reachable": false, "error": error})
}
