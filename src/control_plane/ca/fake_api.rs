//! A Kubernetes API in this process, for tests: objects by path, merge patches with a precondition, watches, and
//! whatever goes wrong.

use bytes::Bytes;
use http::{Method, Request, Response};
use hyper::body::Frame;
use kube::Client;
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Answers a request, or leaves it to the objects: method, path, body.
type Hook = Box<dyn FnMut(&Method, &str, &Value) -> Answer + Send>;

/// What a hook decides.
pub enum Answer {
    /// The request is answered from the objects.
    Go,
    /// The request is answered with this.
    Is(u16, Value),
    /// The request is not answered.
    Hang,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<String, Value>,
    watches: Vec<(String, mpsc::UnboundedSender<Bytes>)>,
    hook: Option<Hook>,
    /// Method and path of each request.
    requests: Vec<String>,
}

/// The API.
#[derive(Clone, Default)]
pub struct FakeApi(Arc<Mutex<State>>);

impl FakeApi {
    pub fn client(&self) -> Client {
        Client::new(self.clone(), "default")
    }

    /// Decides about requests from now on.
    pub fn hook(&self, hook: impl FnMut(&Method, &str, &Value) -> Answer + Send + 'static) {
        self.0.lock().hook = Some(Box::new(hook));
    }

    /// Makes or replaces an object.
    pub fn put(&self, path: &str, object: Value) {
        self.0.lock().put(path, object);
    }

    pub fn delete(&self, path: &str) {
        self.0.lock().delete(path);
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.0.lock().objects.get(path).cloned()
    }

    /// The requests with this method whose path contains a text.
    pub fn count(&self, method: &str, part: &str) -> usize {
        let is = |request: &&String| request.starts_with(method) && request.contains(part);
        self.0.lock().requests.iter().filter(is).count()
    }
}

impl State {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        let parts: Vec<&str> = path.split('/').collect();
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        object["metadata"]["name"] = json!(parts.last());
        if let ["", "api", "v1", "namespaces", namespace, _, _] = parts[..] {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let kind = if self.objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        self.objects.insert(path.to_owned(), object.clone());
        self.tell(kind, path, &object);
        object
    }

    fn delete(&mut self, path: &str) {
        if let Some(object) = self.objects.remove(path) {
            self.version += 1;
            self.tell("DELETED", path, &object);
        }
    }

    fn tell(&mut self, kind: &str, path: &str, object: &Value) {
        let line = Bytes::from(json!({"type": kind, "object": object}).to_string() + "\n");
        self.watches
            .retain(|(collection, events)| collection_of(path) != *collection || events.send(line.clone()).is_ok());
    }

    /// Objects of a collection, which may be one of all namespaces.
    fn list(&self, collection: &str) -> Vec<Value> {
        let of = |(path, _): &(&String, &Value)| collection_of(path) == collection;
        self.objects.iter().filter(of).map(|(_, object)| object.clone()).collect()
    }

    fn answer(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> (u16, Value) {
        let error = |code: u16, reason: &str| {
            (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason}))
        };
        let existing = self.objects.get(path).cloned();
        match (method.as_str(), existing) {
            ("GET", _) if is_collection(path) => {
                let list = json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": self.list(path)});
                (200, list)
            }
            ("GET", Some(object)) => (200, object),
            ("POST", _) => {
                let metadata = &body["metadata"];
                let name = metadata["name"].as_str().map(str::to_owned);
                let generated = || format!("{}{}", metadata["generateName"].as_str().unwrap_or_default(), self.version);
                let name = name.unwrap_or_else(generated);
                let path = format!("{path}/{name}");
                if self.objects.contains_key(&path) {
                    return error(409, "AlreadyExists");
                }
                (201, self.put(&path, body.clone()))
            }
            ("PATCH", Some(mut object)) => {
                let precondition = &body["metadata"]["resourceVersion"];
                if precondition.is_string() && *precondition != object["metadata"]["resourceVersion"] {
                    return error(409, "Conflict");
                }
                merge(&mut object, body);
                (200, self.put(path, object))
            }
            ("DELETE", Some(object)) => {
                self.delete(path);
                (200, object)
            }
            _ => error(404, &format!("NotFound {query}")),
        }
    }
}

/// The collection of an object. Those of ConfigMaps are watched in all namespaces.
fn collection_of(path: &str) -> String {
    let (folder, _) = path.rsplit_once('/').unwrap_or_default();
    if folder.ends_with("/configmaps") { "/api/v1/configmaps".into() } else { folder.into() }
}

fn is_collection(path: &str) -> bool {
    matches!(path, "/api/v1/configmaps" | "/api/v1/namespaces")
}

fn merge(object: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else { return *object = patch.clone() };
    if !object.is_object() {
        *object = json!({});
    }
    for (name, value) in fields {
        match value {
            Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
            value => merge(&mut object[name], value),
        }
    }
}

/// The lines of a watch, or an answer in one piece.
pub struct Events(mpsc::UnboundedReceiver<Bytes>);

impl hyper::body::Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

impl tower_service::Service<Request<Body>> for FakeApi {
    type Response = Response<Events>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
            let bytes = body.collect_bytes().await.unwrap();
            let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let response = |code: u16, body: Events| Ok(Response::builder().status(code).body(body).unwrap());
            let (code, value) = {
                let mut state = this.0.lock();
                state.requests.push(format!("{} {path}", parts.method));
                let decided = match &mut state.hook {
                    Some(hook) => hook(&parts.method, &path, &body),
                    None => Answer::Go,
                };
                match decided {
                    Answer::Go if query.contains("watch=true") => {
                        let (send, events) = mpsc::unbounded_channel();
                        state.watches.push((path, send));
                        return response(200, Events(events));
                    }
                    Answer::Go => state.answer(&parts.method, &path, &query, &body),
                    Answer::Is(code, value) => (code, value),
                    Answer::Hang => (0, Value::Null),
                }
            };
            if code == 0 {
                std::future::pending::<()>().await;
            }
            let (send, whole) = mpsc::unbounded_channel();
            send.send(value.to_string().into()).unwrap();
            response(code, Events(whole))
        })
    }
}
