//! A Kubernetes API in memory: lists by pages, watches, and fails as it is told.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// The API.
#[derive(Clone, Default)]
pub struct Api {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By kind (the plural), namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    /// Events by version.
    events: Vec<(u64, String, Value)>,
    /// Versions before this one are forgotten.
    oldest: u64,
    /// Kinds that it does not know.
    unknown: BTreeSet<String>,
    /// Whether it answers every request with an error.
    away: bool,
    /// Lists that were requested, by kind.
    lists: BTreeMap<String, usize>,
}

impl Api {
    /// Adds an object or replaces it.
    pub fn set(&self, plural: &str, mut object: Value) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
        let key = (plural.to_owned(), text("namespace"), text("name"));
        let kind = if state.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        state.events.push((version, plural.to_owned(), json!({"type": kind, "object": object})));
        self.changed.notify_waiters();
    }

    /// Removes an object.
    pub fn remove(&self, plural: &str, namespace: &str, name: &str) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        let mut object = state.objects.remove(&(plural.into(), namespace.into(), name.into())).expect("it is there");
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.events.push((version, plural.to_owned(), json!({"type": "DELETED", "object": object})));
        self.changed.notify_waiters();
    }

    /// Forgets all events: watches that ask for them have to list again.
    pub fn forget(&self) {
        let mut state = self.state.lock();
        state.version += 1;
        state.oldest = state.version;
        state.events.clear();
        self.changed.notify_waiters();
    }

    /// Whether it answers every request with an error.
    pub fn set_away(&self, away: bool) {
        self.state.lock().away = away;
        self.changed.notify_waiters();
    }

    /// Whether it knows a kind.
    pub fn set_unknown(&self, plural: &str, unknown: bool) {
        let mut state = self.state.lock();
        if unknown {
            state.unknown.insert(plural.into());
        } else {
            state.unknown.remove(plural);
        }
    }

    /// How often a kind was listed, page by page.
    pub fn lists(&self, plural: &str) -> usize {
        self.state.lock().lists.get(plural).copied().unwrap_or(0)
    }

    async fn answer(self, request: Request<Body>) -> Response<Body> {
        let plural = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let query: HashMap<String, String> =
            form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes()).into_owned().collect();
        if query.get("watch").is_none_or(|watch| watch != "true") {
            return self.state.lock().list(&plural, &query);
        }
        let since: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        loop {
            let changed = self.changed.notified();
            if let Some(answer) = self.state.lock().watch(&plural, since) {
                return answer;
            }
            changed.await;
        }
    }
}

impl State {
    fn refusal(&self, plural: &str) -> Option<Response<Body>> {
        let code = match (self.away, self.unknown.contains(plural)) {
            (true, _) => 503,
            (false, true) => 404,
            (false, false) => return None,
        };
        Some(response(code, vec![status(code)]))
    }

    fn list(&mut self, plural: &str, query: &HashMap<String, String>) -> Response<Body> {
        *self.lists.entry(plural.into()).or_default() += 1;
        if let Some(refusal) = self.refusal(plural) {
            return refusal;
        }
        let number = |name: &str| query.get(name).and_then(|text| text.parse::<usize>().ok());
        let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX));
        let all = self.objects.iter().filter(|((kind, ..), _)| kind == plural).map(|(_, object)| object);
        let mut items: Vec<&Value> = all.skip(from).collect();
        let has_more = items.len() > limit;
        items.truncate(limit);
        let next = if has_more { (from + limit).to_string() } else { String::new() };
        let metadata = json!({"resourceVersion": self.version.to_string(), "continue": next});
        response(200, vec![json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})])
    }

    /// The events since a version; `None` if there are none yet.
    fn watch(&self, plural: &str, since: u64) -> Option<Response<Body>> {
        if let Some(refusal) = self.refusal(plural) {
            return Some(refusal);
        }
        if since < self.oldest {
            return Some(response(200, vec![json!({"type": "ERROR", "object": status(410)})]));
        }
        let news = self.events.iter().filter(|(version, kind, _)| *version > since && kind == plural);
        let lines: Vec<Value> = news.map(|(_, _, event)| event.clone()).collect();
        (!lines.is_empty()).then(|| response(200, lines))
    }
}

fn status(code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "no", "reason": "No", "code": code})
}

fn response(code: u16, lines: Vec<Value>) -> Response<Body> {
    let text = |line: Value| match line.get("object") {
        // The type comes first, so that readers know what follows.
        Some(object) => format!("{{\"type\":{},\"object\":{object}}}\n", line["type"]),
        None => format!("{line}\n"),
    };
    let text: String = lines.into_iter().map(text).collect();
    Response::builder().status(code).body(Body::from(text.into_bytes())).unwrap()
}

impl tower_service::Service<Request<Body>> for Api {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.clone().answer(request).map(Ok).boxed()
    }
}
