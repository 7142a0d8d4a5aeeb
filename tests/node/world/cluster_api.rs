//! A Kubernetes API server as a control plane uses it: objects of any kind that is installed, with lists page by page,
//! watches, merge patches, conflicts, and reviews of tokens. Objects are not checked.

use super::kube::{Request, read, send, status};
use super::{World, inside};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Kinds that every cluster has, by the path of their collection.
const BUILT_IN: [&str; 7] = [
    "api/v1/pods",
    "api/v1/services",
    "api/v1/nodes",
    "api/v1/namespaces",
    "api/v1/secrets",
    "api/v1/configmaps",
    "apis/discovery.k8s.io/v1/endpointslices",
];

/// Collections of policies.
pub const AUTHORIZATION: &str = "apis/security.istio.io/v1/authorizationpolicies";
pub const AUTHENTICATION: &str = "apis/security.istio.io/v1/peerauthentications";

/// Collection, and namespace and name joined by a slash.
type Key = (String, String);

#[derive(Default)]
pub struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Version, key, what happened, and the object.
    history: Vec<(u64, Key, &'static str, Value)>,
    /// Collections of custom resources that are installed.
    installed: BTreeSet<String>,
    /// By token: namespace, service account, pod, uid of the pod, node.
    pub tokens: BTreeMap<String, [String; 5]>,
    pub reviews: usize,
    open: Vec<TcpStream>,
}

pub struct ClusterApi {
    pub kubeconfig: PathBuf,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl ClusterApi {
    /// Serves on the first node's own address, which is reachable from everywhere.
    pub fn start(w: &World) -> Self {
        let listener = inside(&w.ns("n1"), || TcpListener::bind("10.1.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<(Mutex<State>, Condvar)>::default();
        state.0.lock().unwrap().installed.extend([AUTHORIZATION, AUTHENTICATION].map(ToOwned::to_owned));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || serve(&shared, &stream));
            }
        });
        let kubeconfig = w.dir.join("kubeconfig");
        let file = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": "secret-token"}}],
        });
        std::fs::write(&kubeconfig, file.to_string()).unwrap();
        Self { kubeconfig, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes, replaces or deletes an object. `key` is `namespace/name`, or the name alone.
    pub fn put(&self, collection: &str, key: &str, object: Option<Value>) {
        put(&mut self.state(), &(collection.to_owned(), key.to_owned()), |before| {
            let mut object = object?;
            let (namespace, name) = key.rsplit_once('/').unwrap_or(("", key));
            object["metadata"]["name"] = json!(name);
            if !namespace.is_empty() {
                object["metadata"]["namespace"] = json!(namespace);
            }
            let uid =
                before.as_ref().map_or_else(|| json!(format!("uid-{key}")), |before| before["metadata"]["uid"].clone());
            if object["metadata"].get("uid").is_none() {
                object["metadata"]["uid"] = uid;
            }
            Some(object)
        });
        self.state.1.notify_all();
    }

    pub fn get(&self, collection: &str, key: &str) -> Option<Value> {
        self.state().objects.get(&(collection.to_owned(), key.to_owned())).cloned()
    }

    /// Breaks all connections. Clients may come back at once.
    pub fn cut(&self) {
        self.state().open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

fn put(state: &mut State, key: &Key, change: impl FnOnce(Option<Value>) -> Option<Value>) {
    let before = state.objects.remove(key);
    let (what, mut object) = match (change(before.clone()), before) {
        (Some(new), Some(_)) => ("MODIFIED", new),
        (Some(new), None) => ("ADDED", new),
        (None, Some(old)) => ("DELETED", old),
        (None, None) => return,
    };
    state.version += 1;
    object["metadata"]["resourceVersion"] = json!(state.version.to_string());
    if what != "DELETED" {
        state.objects.insert(key.clone(), object.clone());
    }
    state.history.push((state.version, key.clone(), what, object));
}

/// A path: the collection, the namespace, the name and what is behind it.
struct Place {
    collection: String,
    namespace: Option<String>,
    name: Option<String>,
}

impl Place {
    fn of(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _, ..] => parts.split_at(2),
            ["apis", _, _, ..] => parts.split_at(3),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let (plural, rest) = rest.split_first()?;
        let name = rest.first().map(|name| (*name).to_owned());
        Some(Self { collection: format!("{}/{plural}", group.join("/")), namespace, name })
    }

    fn key(&self, name: &str) -> Key {
        let key = self.namespace.as_ref().map_or_else(|| name.to_owned(), |namespace| format!("{namespace}/{name}"));
        (self.collection.clone(), key)
    }
}

fn serve(shared: &(Mutex<State>, Condvar), stream: &TcpStream) {
    let mut reader = BufReader::new(stream);
    shared.0.lock().unwrap().open.push(stream.try_clone().unwrap());
    while let Some(request) = read(&mut reader) {
        if answer(shared, stream, &request).is_none() {
            return;
        }
    }
}

fn answer(shared: &(Mutex<State>, Condvar), stream: &TcpStream, request: &Request) -> Option<()> {
    let missing = || send(stream, 404, &status(404, "the server could not find the requested resource"));
    let Some(place) = Place::of(&request.path) else { return missing() };
    if place.collection.ends_with("/tokenreviews") {
        return send(stream, 201, &review(&mut shared.0.lock().unwrap(), &request.body));
    }
    let known =
        |state: &State| BUILT_IN.contains(&place.collection.as_str()) || state.installed.contains(&place.collection);
    if !known(&shared.0.lock().unwrap()) {
        return missing();
    }
    let body = || serde_json::from_slice::<Value>(&request.body).unwrap();
    let mut state = shared.0.lock().unwrap();
    let (code, said) = match (request.method.as_str(), &place.name) {
        ("GET", None) if request.query.get("watch").is_some_and(|watch| watch == "true") => {
            drop(state);
            return watch(shared, stream, &place, request);
        }
        ("GET", None) => (200, list(&state, &place, request)),
        ("GET", Some(name)) => match state.objects.get(&place.key(name)) {
            Some(object) => (200, shown(object, request)),
            None => (404, status(404, "no such object")),
        },
        ("POST", None) => {
            let object = body();
            let key = place.key(object["metadata"]["name"].as_str().unwrap());
            match state.objects.contains_key(&key) {
                true => (409, conflict("AlreadyExists")),
                false => {
                    put(&mut state, &key, |_| Some(object));
                    (201, state.objects[&key].clone())
                }
            }
        }
        ("PATCH", Some(name)) => patch(&mut state, &place.key(name), &body()),
        ("DELETE", Some(name)) => {
            put(&mut state, &place.key(name), |_| None);
            (200, json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
        }
        _ => (405, status(405, "not served here")),
    };
    drop(state);
    shared.1.notify_all();
    send(stream, code, &said)
}

fn conflict(reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason, "code": 409})
}

/// Applies a merge patch. One that names another version than the object's is a conflict.
fn patch(state: &mut State, key: &Key, patch: &Value) -> (u16, Value) {
    let Some(object) = state.objects.get(key) else { return (404, status(404, "no such object")) };
    let version = patch["metadata"].get("resourceVersion");
    if version.is_some_and(|version| *version != object["metadata"]["resourceVersion"]) {
        return (409, conflict("Conflict"));
    }
    let mut merged = object.clone();
    merge(&mut merged, patch);
    if merged != *object {
        put(state, key, |_| Some(merged));
    }
    (200, state.objects[key].clone())
}

fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else { return *object = patch.clone() };
    if !object.is_object() {
        *object = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => drop(object.as_object_mut().unwrap().remove(key)),
            value => merge(&mut object[key], value),
        }
    }
}

fn review(state: &mut State, body: &[u8]) -> Value {
    let mut review: Value = serde_json::from_slice(body).unwrap();
    state.reviews += 1;
    let known = review["spec"]["token"].as_str().and_then(|token| state.tokens.get(token));
    review["status"] = match known {
        Some([namespace, account, pod, uid, node]) => json!({
            "authenticated": true, "audiences": ["istio-ca"],
            "user": {"username": format!("system:serviceaccount:{namespace}:{account}"),
                "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{namespace}")], "extra": {
                "authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid],
                "authentication.kubernetes.io/node-name": [node],
            }},
        }),
        None => json!({"authenticated": false, "error": "the token is not known"}),
    };
    review
}

/// An object as the API returns it: whole, or its metadata alone.
fn shown(object: &Value, request: &Request) -> Value {
    let mut object = object.clone();
    if request.metadata_only {
        return json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]});
    }
    for (name, value) in [("kind", "Object"), ("apiVersion", "v1")] {
        if object.get(name).is_none() {
            object[name] = json!(value);
        }
    }
    object
}

fn concerns(place: &Place, key: &Key, request: &Request) -> bool {
    let in_namespace = |namespace: &String| key.1.strip_prefix(namespace).is_some_and(|rest| rest.starts_with('/'));
    let name = request.query.get("fieldSelector").and_then(|selector| selector.strip_prefix("metadata.name="));
    key.0 == place.collection
        && place.namespace.as_ref().is_none_or(in_namespace)
        && name.is_none_or(|name| key.1.rsplit('/').next() == Some(name))
}

/// A page of a list.
fn list(state: &State, place: &Place, request: &Request) -> Value {
    let number = |name: &str| request.query.get(name).and_then(|text| text.parse::<usize>().ok());
    let (skip, limit) = (number("continue").unwrap_or(0), number("limit").filter(|limit| *limit > 0));
    let all: Vec<&Value> =
        state.objects.iter().filter(|(key, _)| concerns(place, key, request)).map(|(_, object)| object).collect();
    let items: Vec<Value> =
        all.iter().skip(skip).take(limit.unwrap_or(usize::MAX)).map(|object| shown(object, request)).collect();
    let mut metadata = json!({"resourceVersion": state.version.to_string()});
    if skip + items.len() < all.len() {
        metadata["continue"] = json!((skip + items.len()).to_string());
    }
    json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})
}

fn watch(shared: &(Mutex<State>, Condvar), mut stream: &TcpStream, place: &Place, request: &Request) -> Option<()> {
    let number = |name: &str| request.query.get(name).and_then(|text| text.parse::<u64>().ok());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).ok()?;
    let end = Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(300));
    let mut seen = number("resourceVersion").unwrap_or(0);
    loop {
        let mut state = shared.0.lock().unwrap();
        if state.version == seen {
            // The time between two looks at the clock.
            state = shared.1.wait_timeout(state, Duration::from_millis(500)).unwrap().0;
        }
        let from = state.history.partition_point(|(version, ..)| *version <= seen);
        let events = state.history[from..].iter().filter(|(_, key, ..)| concerns(place, key, request));
        let lines: Vec<String> = events
            .map(|(_, _, what, object)| format!("{}\n", json!({"type": what, "object": shown(object, request)})))
            .collect();
        seen = state.version;
        drop(state);
        for line in lines {
            stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).ok()?;
        }
        if Instant::now() > end {
            return stream.write_all(b"0\r\n\r\n").ok();
        }
    }
}
