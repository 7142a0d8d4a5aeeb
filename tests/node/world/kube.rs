//! A Kubernetes API server, as far as a node daemon uses it: lists and watches of pods and namespaces, and status
//! patches. It has the quirks of real ones: bookmarks, expired history (410), streamed lists that work, are refused or
//! are silently not supported, slow answers, and outages. Also pods as the kubelet makes them: real processes in
//! cgroups with the paths of pods.

use super::forward::{self, Forward, Forwards};
use super::{Pod, World, inside, keeps_evidence};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How a request for a streamed list is answered.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Streaming {
    #[default]
    Offered,
    /// 422, as if the feature were switched off.
    Refused,
    /// The parameters are unknown: objects are sent, but never the end of the list.
    NotKnown,
}

#[derive(Default)]
pub struct State {
    version: u64,
    /// Objects by kind and "namespace/name".
    objects: BTreeMap<(&'static str, String), Value>,
    history: Vec<(u64, &'static str, &'static str, Value)>,
    /// Events up to this version have been forgotten.
    forgotten: u64,
    pub streaming: Streaming,
    /// Every answer is delayed by this time.
    pub slow: Duration,
    /// If not 0, status patches are answered with this code.
    pub refuse_patches: u16,
    /// If not 0, requests about DaemonSets are answered with this code.
    pub refuse_sets: u16,
    /// Method, path and query of each request.
    pub requests: Vec<String>,
    /// Status annotations in the order in which they were written: pod and value.
    pub patches: Vec<(String, Value)>,
    pub bookmarks: usize,
    /// Port-forwards to pods.
    pub forwards: Forwards,
    /// Files with the logs of pods, by name.
    pub logs: BTreeMap<String, PathBuf>,
    open: Vec<TcpStream>,
    away: bool,
}

pub struct Api {
    pub kubeconfig: PathBuf,
    state: Arc<(Mutex<State>, Condvar)>,
}

const KINDS: [(&str, &str); 3] = [("pods", "Pod"), ("namespaces", "Namespace"), ("daemonsets", "DaemonSet")];

impl Api {
    /// Serves on the node's own address, so that a daemon in a pod can reach it too.
    pub fn start(w: &World, node: u8) -> Self {
        let listener = inside(&w.ns(&format!("n{node}")), || TcpListener::bind((format!("10.{node}.0.1"), 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<(Mutex<State>, Condvar)>::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || serve(&shared, &stream));
            }
        });
        let kubeconfig = w.dir.join(format!("kubeconfig{node}"));
        let file = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": "secret-token"}}],
        });
        fs::write(&kubeconfig, file.to_string()).unwrap();
        Self { kubeconfig, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Changes how the server answers.
    pub fn change_state(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
    }

    /// Starts or ends an outage. During an outage nothing is answered and open connections are cut.
    pub fn away(&self, away: bool) {
        let mut state = self.state();
        state.away = away;
        state.open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    /// Cuts open connections. Clients may reconnect at once.
    pub fn cut(&self) {
        self.state().open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    /// Forgets the history, so that older watches are answered with 410, and cuts open connections.
    pub fn forget(&self) {
        let mut state = self.state();
        state.version += 1;
        state.forgotten = state.version;
        state.history.clear();
        // In one step, or a watch could continue as if nothing had been forgotten.
        state.open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    fn put(&self, kind: &'static str, key: &str, change: impl FnOnce(Option<Value>) -> Option<Value>) {
        put(&mut self.state(), kind, key, change);
        self.state.1.notify_all();
    }

    pub fn namespace(&self, name: &str, labels: Value) {
        let object = json!({"metadata": {"name": name, "uid": format!("ns-{name}"), "labels": labels},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
        self.put("namespaces", name, |_| Some(object));
    }

    /// Makes or replaces a pod of namespace `ns`.
    pub fn pod(&self, pod: &KubePod) {
        let object = pod.object();
        self.put("pods", &format!("ns/{}", pod.name), |before| {
            let mut object = object;
            // Annotations that others have written are kept.
            if let Some(said) = before.and_then(|b| b["metadata"]["annotations"].get(STATUS).cloned())
                && object["metadata"]["annotations"].get(STATUS).is_none()
            {
                object["metadata"]["annotations"][STATUS] = said;
            }
            Some(object)
        });
    }

    /// Adds a pod without address, in a namespace that is labelled for the mesh. Once the daemon lists it, the daemon
    /// has received every earlier change of pods and namespaces.
    pub fn mark(&self, number: usize) -> String {
        let name = format!("mark-{number}");
        self.namespace(&name, json!({"istio.io/dataplane-mode": "ambient"}));
        let object = json!({"metadata": {"name": name, "namespace": name, "uid": name},
            "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Pending"}});
        self.put("pods", &format!("{name}/{name}"), |_| Some(object));
        name
    }

    /// The last events and requests, for failure messages.
    pub fn recent(&self) -> Vec<String> {
        let state = self.state();
        let event = |(version, kind, what, object): &(u64, &str, &str, Value)| {
            let metadata = &object["metadata"];
            format!("{version} {what} {kind} {} {} {}", metadata["name"], metadata["uid"], metadata["labels"])
        };
        let (events, requests) = (state.history.iter().rev().take(40), state.requests.iter().rev().take(20));
        events.map(event).chain(requests.cloned()).collect()
    }

    /// Removes a mark.
    pub fn unmark(&self, name: &str) {
        self.put("pods", &format!("{name}/{name}"), |_| None);
        self.put("namespaces", name, |_| None);
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        self.put("pods", &format!("ns/{name}"), |before| {
            let mut object = before.expect("the pod is there");
            change(&mut object);
            Some(object)
        });
    }

    pub fn delete(&self, name: &str) {
        self.put("pods", &format!("ns/{name}"), |_| None);
    }

    /// Adds the pod of a node's daemon, in which port-forwards do what `forward` says.
    pub fn daemon(&self, node: u8, status: Value, forward: Forward) {
        let name = format!("ztunnel-{node}");
        let owner = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "ztunnel", "uid": "ztunnel", "controller": true});
        let object = json!({"metadata": {"name": name, "namespace": "istio-system", "uid": name, "labels": {"app": "ztunnel"},
                "ownerReferences": [owner]},
            "spec": {"nodeName": format!("n{node}"), "containers": []}, "status": status});
        self.put("pods", &format!("istio-system/{name}"), |_| Some(object));
        self.change_state(|state| drop(state.forwards.insert(name, forward)));
    }

    /// Adds a replica of the control plane, or changes whether it is ready.
    pub fn control(&self, node: u8, ready: bool) {
        let name = format!("culvert-control-{node}");
        let ready = if ready { "True" } else { "False" };
        let object = json!({"metadata": {"name": name, "namespace": "istio-system", "uid": name, "labels": {"app": "culvert-control"}},
            "spec": {"nodeName": format!("n{node}"), "containers": []},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}});
        self.put("pods", &format!("istio-system/{name}"), |_| Some(object));
    }

    /// Adds a pod of namespace `other` with the label of the daemons that is on a node too. Nothing can be forwarded to
    /// it.
    pub fn impostor(&self, node: u8) {
        let object = json!({"metadata": {"name": "impostor", "namespace": "other", "uid": "impostor", "labels": {"app": "ztunnel"},
                "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": format!("n{node}"), "containers": []}, "status": {"phase": "Running"}});
        self.put("pods", "other/impostor", |_| Some(object));
    }

    pub fn daemonset(&self, name: &str, object: Option<Value>) {
        self.put("daemonsets", name, |_| object);
    }

    /// The value of a pod's status annotation.
    pub fn said(&self, name: &str) -> Option<String> {
        let state = self.state();
        let pod = state.objects.get(&("pods", format!("ns/{name}")))?;
        Some(pod["metadata"]["annotations"].get(STATUS)?.as_str()?.to_owned())
    }
}

pub const STATUS: &str = "ambient.istio.io/redirection";

fn put(state: &mut State, kind: &'static str, key: &str, change: impl FnOnce(Option<Value>) -> Option<Value>) {
    state.version += 1;
    let version = state.version;
    let key = (kind, key.to_owned());
    let before = state.objects.remove(&key);
    let event = match change(before.clone()) {
        Some(mut object) => {
            object["metadata"]["resourceVersion"] = json!(version.to_string());
            let what = if before.is_some() { "MODIFIED" } else { "ADDED" };
            state.objects.insert(key, object.clone());
            Some((what, object))
        }
        None => before.map(|mut object| {
            object["metadata"]["resourceVersion"] = json!(version.to_string());
            ("DELETED", object)
        }),
    };
    if let Some((what, object)) = event {
        state.history.push((version, kind, what, object));
    }
}

pub struct Request {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub metadata_only: bool,
    /// Key of a request for a WebSocket.
    websocket: Option<String>,
    pub body: Vec<u8>,
}

pub fn read(reader: &mut BufReader<&TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|length| *length > 0)?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut metadata_only, mut token, mut websocket) = (0, false, false, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let as_sent = header.trim().to_owned();
        let header = as_sent.to_ascii_lowercase();
        if header.starts_with("sec-websocket-key:") {
            websocket = as_sent.split_once(':').map(|(_, key)| key.trim().to_owned());
        }
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        metadata_only |= header.starts_with("accept:") && header.contains("as=partialobjectmetadata");
        token |= header == "authorization: bearer secret-token";
    }
    assert!(token, "a request without the token: {target}");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let plain = |text: &str| text.replace("%3D", "=").replace("%2F", "/").replace("%3B", ";");
    let query =
        query.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), plain(v))).collect();
    Some(Request { method, path: path.to_owned(), query, metadata_only, websocket, body })
}

fn serve(shared: &(Mutex<State>, Condvar), stream: &TcpStream) {
    let mut reader = BufReader::new(stream);
    {
        let mut state = shared.0.lock().unwrap();
        if state.away {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
        state.open.push(stream.try_clone().unwrap());
    }
    while let Some(request) = read(&mut reader) {
        let slow = {
            let mut state = shared.0.lock().unwrap();
            let query: Vec<String> = request.query.iter().map(|(k, v)| format!("{k}={v}")).collect();
            state.requests.push(format!("{} {}?{}", request.method, request.path, query.join("&")));
            state.slow
        };
        std::thread::sleep(slow);
        if let (Some(key), Some(pod)) = (&request.websocket, request.path.strip_suffix("/portforward")) {
            let pod = pod.rsplit('/').next().unwrap();
            let to = shared.0.lock().unwrap().forwards.get(pod).cloned();
            let port = request.query["ports"].parse().unwrap();
            let refused = match to {
                Some(Forward::Refused(code)) => code,
                Some(to) => {
                    forward::serve(stream, &mut reader, key, port, &to);
                    return;
                }
                None => 404,
            };
            if send(stream, refused, &status(refused, "port-forwards are refused")).is_none() {
                return;
            }
            continue;
        }
        if answer(shared, stream, &request).is_none() {
            return;
        }
    }
}

pub fn send(mut stream: &TcpStream, code: u16, body: &Value) -> Option<()> {
    let body = body.to_string();
    let head = format!("HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).ok()
}

pub fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        404 => "NotFound",
        410 => "Expired",
        422 => "Invalid",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code})
}

fn answer(shared: &(Mutex<State>, Condvar), stream: &TcpStream, request: &Request) -> Option<()> {
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    match (request.method.as_str(), parts.as_slice()) {
        ("GET", ["api", "v1", kind @ ("pods" | "namespaces")]) => {
            let (kind, _) = KINDS.into_iter().find(|(name, _)| name == kind)?;
            assert_eq!(
                request.metadata_only,
                kind == "namespaces",
                "namespaces, and only these, by their metadata alone"
            );
            if request.query.get("watch").is_some_and(|watch| watch == "true") {
                return watch(shared, stream, kind, request);
            }
            let state = shared.0.lock().unwrap();
            let items: Vec<Value> = state.listed(kind, request).collect();
            let version = state.version.to_string();
            drop(state);
            let list =
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
            send(stream, 200, &list)
        }
        ("GET", ["api", "v1", "namespaces", _, "pods"]) => {
            let state = shared.0.lock().unwrap();
            let items: Vec<Value> = state.listed("pods", request).collect();
            drop(state);
            let list =
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items});
            send(stream, 200, &list)
        }
        ("GET", ["api", "v1", "namespaces", _, "pods", name, "log"]) => {
            let file = shared.0.lock().unwrap().logs.get(*name).cloned();
            match file {
                Some(file) => log(stream, &file, request.query.get("follow").is_some_and(|follow| follow == "true")),
                None => send(stream, 404, &status(404, "no such pod")),
            }
        }
        ("PATCH", ["api", "v1", "namespaces", namespace, "pods", name, "status"]) => {
            let (code, object) = patched(shared, &format!("{namespace}/{name}"), &request.body);
            send(stream, code, &object)
        }
        ("GET", ["version"]) => send(stream, 200, &version()),
        ("GET", ["apis", "apps", "v1", "namespaces", _, "daemonsets"]) => watch(shared, stream, "daemonsets", request),
        ("GET", ["apis", "apps", "v1", "namespaces", _, "daemonsets", name]) => {
            let refused = shared.0.lock().unwrap().refuse_sets;
            if refused != 0 {
                return send(stream, refused, &status(refused, "DaemonSets are refused"));
            }
            let found = shared.0.lock().unwrap().objects.get(&("daemonsets", (*name).to_owned())).cloned();
            match found {
                Some(object) => send(stream, 200, &object),
                None => send(stream, 404, &status(404, "no such daemonset")),
            }
        }
        ("GET", ["api", "v1", "namespaces", namespace, "pods", name]) => {
            let found = shared.0.lock().unwrap().objects.get(&("pods", format!("{namespace}/{name}"))).cloned();
            match found {
                Some(object) => send(stream, 200, &object),
                None => send(stream, 404, &status(404, "no such pod")),
            }
        }
        _ => send(stream, 404, &status(404, "not served here")),
    }
}

/// Sends a pod's log, and what is added to it for as long as somebody reads, if that was asked for.
fn log(mut stream: &TcpStream, file: &Path, follow: bool) -> Option<()> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).ok()?;
    let (mut file, mut text) = (fs::File::open(file).unwrap(), Vec::new());
    loop {
        text.clear();
        file.read_to_end(&mut text).unwrap();
        if !text.is_empty() {
            let chunk = [format!("{:x}\r\n", text.len()).as_bytes(), &text, b"\r\n"].concat();
            stream.write_all(&chunk).ok()?;
        } else if follow {
            std::thread::sleep(Duration::from_millis(20));
        }
        if !follow {
            return stream.write_all(b"0\r\n\r\n").ok();
        }
    }
}

fn version() -> Value {
    let names =
        ["major", "minor", "gitVersion", "gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"];
    names.into_iter().map(|name| (name.to_owned(), json!("v1.33.1"))).collect::<serde_json::Map<_, _>>().into()
}

/// Applies a patch of the status annotation.
fn patched(shared: &(Mutex<State>, Condvar), key: &str, body: &[u8]) -> (u16, Value) {
    let patch: Value = serde_json::from_slice(body).unwrap();
    let mut state = shared.0.lock().unwrap();
    let refused = state.refuse_patches;
    let Some(pod) = state.objects.get(&("pods", key.to_owned())).cloned() else {
        return (404, status(404, "no such pod"));
    };
    if refused != 0 {
        return (refused, status(refused, "patches are refused"));
    }
    let wanted = &patch["metadata"];
    if wanted.get("uid").is_some_and(|uid| *uid != pod["metadata"]["uid"]) {
        return (422, status(422, "metadata.uid: Invalid value: field is immutable"));
    }
    let value = wanted["annotations"][STATUS].clone();
    state.patches.push((key.to_owned(), value.clone()));
    put(&mut state, "pods", key, |object| {
        let mut object = object?;
        let annotations = &mut object["metadata"]["annotations"];
        if value.is_null() {
            annotations.as_object_mut().map(|annotations| annotations.remove(STATUS));
        } else {
            annotations[STATUS] = value;
        }
        Some(object)
    });
    let object = state.objects[&("pods", key.to_owned())].clone();
    drop(state);
    shared.1.notify_all();
    (200, object)
}

impl State {
    fn listed<'a>(&'a self, kind: &'static str, request: &'a Request) -> impl Iterator<Item = Value> + 'a {
        let all = self.objects.iter().filter(move |((k, _), object)| *k == kind && selects(request, object));
        all.map(move |(_, object)| shown(kind, request, object))
    }
}

fn selects(request: &Request, object: &Value) -> bool {
    let node = request.query.get("fieldSelector").and_then(|selector| selector.strip_prefix("spec.nodeName="));
    let name = request.query.get("fieldSelector").and_then(|selector| selector.strip_prefix("metadata.name="));
    let namespaced = request.path.strip_prefix("/api/v1/namespaces/").and_then(|rest| rest.strip_suffix("/pods"));
    let labels = request.query.get("labelSelector").map(String::as_str).unwrap_or_default();
    let labelled = labels.split(',').filter_map(|one| one.split_once('='));
    node.is_none_or(|node| object["spec"]["nodeName"] == node)
        && namespaced.is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
        && labelled.into_iter().all(|(name, value)| object["metadata"]["labels"][name] == value)
        && name.is_none_or(|name| object["metadata"]["name"] == name)
}

/// An object as the API returns it: whole, or its metadata alone.
fn shown(kind: &str, request: &Request, object: &Value) -> Value {
    let mut object = object.clone();
    if request.metadata_only {
        return json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]});
    }
    let name = KINDS.into_iter().find(|(name, _)| *name == kind).map(|(_, name)| name);
    object["kind"] = json!(name);
    object["apiVersion"] = json!("v1");
    object
}

fn watch(
    shared: &(Mutex<State>, Condvar),
    mut stream: &TcpStream,
    kind: &'static str,
    request: &Request,
) -> Option<()> {
    let asked = |name: &str| request.query.get(name).is_some_and(|value| value == "true");
    let mut out = Vec::new();
    let mut event = |what: &str, object: Value| out.push(json!({"type": what, "object": object}));
    let mut state = shared.0.lock().unwrap();
    let from: u64 = request.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut seen = from;
    let bookmark = |version: u64, end: bool| {
        let annotations = if end { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
        let metadata =
            json!({"resourceVersion": version.to_string(), "annotations": annotations, "creationTimestamp": null});
        let (kind, version) = match request.metadata_only {
            true => ("PartialObjectMetadata", "meta.k8s.io/v1"),
            false => ("Pod", "v1"),
        };
        json!({"kind": kind, "apiVersion": version, "metadata": metadata, "spec": {"containers": []}})
    };
    if asked("sendInitialEvents") {
        if state.streaming == Streaming::Refused {
            drop(state);
            return send(stream, 422, &status(422, "sendInitialEvents is forbidden for watch"));
        }
        for object in state.listed(kind, request) {
            event("ADDED", object);
        }
        seen = state.version;
        if state.streaming == Streaming::Offered {
            event("BOOKMARK", bookmark(seen, true));
        }
    } else if kind == "daemonsets" {
        // From version 0: the existing objects, then changes.
        for object in state.listed(kind, request) {
            event("ADDED", object);
        }
        seen = state.version;
    } else if from < state.forgotten {
        event("ERROR", status(410, "too old resource version"));
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).ok()?;
    let seconds: u64 = request.query.get("timeoutSeconds").and_then(|s| s.parse().ok()).unwrap_or(300);
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        for (version, of, what, object) in &state.history {
            if *version > seen && *of == kind && selects(request, object) {
                out.push(json!({"type": what, "object": shown(kind, request, object)}));
            }
        }
        seen = state.version;
        if out.is_empty() && asked("allowWatchBookmarks") && state.streaming != Streaming::NotKnown {
            state.bookmarks += 1;
            out.push(json!({"type": "BOOKMARK", "object": bookmark(seen, false)}));
        }
        let slow = state.slow;
        drop(state);
        std::thread::sleep(slow);
        for line in out.drain(..) {
            let line = format!("{line}\n");
            stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).ok()?;
        }
        if Instant::now() > end {
            return stream.write_all(b"0\r\n\r\n").ok();
        }
        state = shared.0.lock().unwrap();
        if state.version == seen {
            // The time between bookmarks.
            state = shared.1.wait_timeout(state, Duration::from_millis(500)).unwrap().0;
        }
    }
}

/// The mount point of the version 2 cgroups.
fn cgroups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let found = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(found.expect("cgroup v2 is mounted").split(' ').nth(1).unwrap())
}

static NEXT: AtomicU32 = AtomicU32::new(1);

/// A pod as the API shows it and the kubelet runs it: its sandbox is a process in the pod's network namespace, in a
/// cgroup with the path of a pod.
pub struct KubePod {
    pub name: String,
    pub uid: String,
    pub node: u8,
    pub ips: Vec<String>,
    pub labels: Value,
    pub annotations: Value,
    pub phase: &'static str,
    pub host_network: bool,
    sandbox: Option<Sandbox>,
}

pub struct Sandbox {
    cgroup: PathBuf,
    child: std::process::Child,
}

impl Sandbox {
    /// Starts a process in a namespace and in the cgroup of a pod's container. `form` is the path below the mount
    /// point.
    pub fn start(ns: &str, form: &str) -> Self {
        let cgroup = cgroups().join(form.trim_start_matches('/'));
        fs::create_dir_all(&cgroup).unwrap();
        let child = inside(ns, || {
            Command::new("sleep")
                .arg("infinity")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        })
        .unwrap();
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
        Self { cgroup, child }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if keeps_evidence() {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut folder: &Path = &self.cgroup;
        // Up to the first folder that is still in use.
        while fs::remove_dir(folder).is_ok() {
            folder = folder.parent().unwrap();
        }
    }
}

impl KubePod {
    /// A running pod of the world.
    pub fn new(pod: &Pod) -> Self {
        let mut kube = Self::without_sandbox(pod);
        kube.run(&pod.netns);
        kube
    }

    pub fn without_sandbox(pod: &Pod) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{:08x}-{number:04x}-4000-8000-0123456789ab", std::process::id());
        let ips = vec![pod.v4.to_string(), pod.v6.to_string()];
        let (labels, annotations) = (json!({"app": pod.name}), json!({}));
        let (name, node) = (pod.name.clone(), pod.node);
        Self { name, uid, node, ips, labels, annotations, phase: "Running", host_network: false, sandbox: None }
    }

    /// The path of its cgroup as cgroupfs writes it.
    pub fn cgroup(&self) -> String {
        format!("/kubepods/burstable/pod{}/{:064x}", self.uid, NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Starts its sandbox in a namespace.
    pub fn run(&mut self, ns: &str) {
        self.sandbox = None;
        self.sandbox = Some(Sandbox::start(ns, &self.cgroup()));
    }

    /// Ends its sandbox.
    pub fn stop(&mut self) {
        self.sandbox = None;
    }

    fn object(&self) -> Value {
        let ips: Vec<Value> = self.ips.iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "metadata": {"name": self.name, "namespace": "ns", "uid": self.uid, "labels": self.labels,
                "annotations": self.annotations},
            "spec": {"nodeName": format!("n{}", self.node), "serviceAccountName": self.name,
                "hostNetwork": self.host_network, "containers": [{"name": "app", "image": "app"}]},
            "status": {"phase": self.phase, "podIP": self.ips.first(), "podIPs": ips},
        })
    }
}

impl World {
    /// Starts a node's daemon that finds its pods through the API by their labels.
    pub fn start_kube_node(&mut self, node: u8, api: &Api, settings: &[(&str, &str)]) {
        let mut command = self.kube_command(node, "node", api, settings);
        self.start_command(node, &mut command);
    }

    /// Runs another command of the binary on a node with the daemon's settings. Returns whether it succeeded, and its
    /// output.
    pub fn kube_run(&self, node: u8, what: &str, api: &Api, settings: &[(&str, &str)]) -> (bool, String) {
        let mut command = self.kube_command(node, what, api, settings);
        let output = inside(&self.ns(&format!("n{node}")), || command.output()).unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }

    fn kube_command(&self, node: u8, what: &str, api: &Api, settings: &[(&str, &str)]) -> Command {
        self.kube_command_of(&super::subject(), node, what, api, settings)
    }

    /// Starts a further daemon on a pod's node, inside that pod as in a cluster, from the given program.
    pub fn start_kube_beside(&mut self, own: &Pod, program: &Path, api: &Api, settings: &[(&str, &str)]) -> u32 {
        let mut command = self.kube_command_of(program, own.node, "node", api, settings);
        self.start_in(&own.netns, &mut command, &format!("{}.log", own.name))
    }

    fn kube_command_of(&self, program: &Path, node: u8, what: &str, api: &Api, settings: &[(&str, &str)]) -> Command {
        let host = format!("/run/netns/{}", self.ns(&format!("n{node}")));
        let mut command = Command::new(program);
        command.args(what.split(' ')).env("LOCAL_XDS_PATH", self.mesh_file(node)).env("CULVERT_CA_DIR", self.ca());
        command
            .env("CULVERT_PODS", "kubernetes")
            .env("KUBECONFIG", &api.kubeconfig)
            .env("NODE_NAME", format!("n{node}"))
            .env("CLUSTER_ID", "c1");
        command.env("CULVERT_HOST_NETNS", host).env("POD_NAMESPACE", "istio-system").env("LOG_FORMAT", "json");
        // The files that daemons of one node share must not be those of the machine.
        command.env("CULVERT_CNI_SOCKET", self.dir.join(format!("run{node}/cni.sock")));
        command.envs(settings.iter().copied());
        command
    }
}
