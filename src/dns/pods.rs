//! DNS of all pods: one thread, with one server per pod on it. Traffic of workers never waits for this thread.

use super::client::ClientFacts;
use super::config::Config;
use super::listeners::Listeners;
use super::metrics::Metrics;
use super::resolver::{PodResolvers, Resolver};
use super::server::Server;
use crate::mesh::{Store, Text};
use crate::sys::netns::Netns;
use crate::task::{Drain, Group, thread};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use tokio::runtime::Handle;

/// The DNS of all pods.
#[derive(Debug)]
pub struct Dns {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    mesh: Arc<Store>,
    runtime: Handle,
    stop: Drain,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// By uid of the pod.
    servers: Mutex<HashMap<Text, Arc<Server>>>,
    /// `namespace/name` of the pods whose requests are logged.
    logged: Mutex<Vec<String>>,
}

/// A running server of a pod. Dropping it ends the server.
#[derive(Debug)]
pub struct Serving {
    dns: Arc<Dns>,
    uid: Text,
    server: Arc<Server>,
    tasks: Group,
}

impl Serving {
    /// Ends the server and waits until its sockets are closed.
    pub async fn end(self) {
        self.tasks.cut();
        self.tasks.finished().await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.tasks.cut();
        let mut servers = self.dns.servers.lock();
        // The pod may have been captured again, in which case the entry belongs to its newer server.
        if servers.get(&self.uid).is_some_and(|server| Arc::ptr_eq(server, &self.server)) {
            servers.remove(&self.uid);
        }
    }
}

impl Dns {
    /// Starts the thread.
    pub fn start(config: Config, metrics: Arc<Metrics>, mesh: Arc<Store>) -> io::Result<Self> {
        let stop = Drain::default();
        let signal = stop.signal();
        let (runtime, thread) = thread::start("culvert-dns".into(), move || async move { signal.now().await })?;
        Ok(Self {
            config: Arc::new(config),
            metrics,
            mesh,
            runtime,
            stop,
            thread: Mutex::new(Some(thread)),
            servers: Mutex::default(),
            logged: Mutex::default(),
        })
    }

    /// Whether DNS is captured for pods that do not say so themselves.
    pub fn captures(&self) -> bool {
        self.config.capture
    }

    /// The resolvers of a pod of `namespace` in `netns`.
    pub fn resolver(&self, namespace: &Text, netns: &Netns) -> Arc<Resolver> {
        Arc::new(Resolver::new(self.config.clone(), self.metrics.clone(), namespace.clone(), netns.clone()))
    }

    /// Serves a pod on bound sockets.
    pub fn serve(
        self: &Arc<Self>,
        uid: &Text,
        label: String,
        resolver: Arc<Resolver>,
        client: Box<dyn ClientFacts>,
        listeners: Listeners,
    ) -> Serving {
        let server = Arc::new(Server::new(label, resolver, client, self.mesh.clone()));
        {
            // The lock of `servers` is held until the server is listed. `log_only` takes it first, so none is missed.
            let mut servers = self.servers.lock();
            let logged = self.logged.lock().contains(&server.label);
            server.logged.store(logged, Ordering::Relaxed);
            servers.insert(uid.clone(), server.clone());
        }
        let tasks = Group::default();
        server.serve(listeners, &tasks, &self.runtime);
        Serving { dns: self.clone(), uid: uid.clone(), server, tasks }
    }

    /// How many requests of a pod ended in each way; `None` if its DNS is not captured.
    pub fn counts(&self, uid: &Text) -> Option<BTreeMap<&'static str, u64>> {
        let servers = self.servers.lock();
        servers.get(uid).map(|server| server.counts.list())
    }

    /// A pod's resolvers as of the last time they were read; `None` before that.
    pub fn resolvers(&self, uid: &Text) -> Option<Arc<PodResolvers>> {
        let servers = self.servers.lock();
        servers.get(uid).and_then(|server| server.resolver.last_known())
    }

    /// Logs the requests of the pods with these labels (`namespace/name`), now and later, and of no others.
    pub fn log_only(&self, labels: Vec<String>) {
        let servers = self.servers.lock();
        for server in servers.values() {
            server.logged.store(labels.contains(&server.label), Ordering::Relaxed);
        }
        *self.logged.lock() = labels;
    }

    /// The pods whose requests are logged.
    pub fn logged(&self) -> Vec<String> {
        self.logged.lock().clone()
    }

    /// Ends the thread and all servers on it.
    pub fn stop(&self) {
        self.stop.at_once();
        let thread = self.thread.lock().take();
        // A thread that panicked has nothing left to end.
        let _ = thread.map(JoinHandle::join);
    }
}
