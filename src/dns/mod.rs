//! DNS of captured pods: names of the mesh are answered from its facts, all else goes, byte for byte, to the resolver that
//! the pod has asked, and to the others of its own `resolv.conf` where that one does not answer. Where the mesh's part fails,
//! DNS alone fails open: the pod's resolvers are asked.
//!
//! [`lookup`] decides what a name means, [`message`] knows the wire, [`resolver`] asks a pod's resolvers, [`server`] listens
//! in the pod. All pods' servers share one thread, which no traffic waits for; each turn of a pod is short.

pub mod cache;
pub mod listeners;
pub mod lookup;
pub mod message;
pub mod metrics;
pub mod resolv_conf;
pub mod resolver;
pub mod server;
pub mod upstream;

pub use listeners::Listeners;
pub use metrics::Metrics;
pub use resolver::{ResolveError, Resolver};
pub use server::{Asker, Server};

use crate::mesh::{Store, Text};
use crate::sys::netns::Netns;
use crate::task::{Drain, Group, thread};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;

/// Settings of DNS.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether pods' DNS is taken, where the pod itself does not say.
    pub capture: bool,
    /// Domain of the cluster.
    pub cluster_domain: Text,
    /// Namespace preferred among several that have a service of the same host name.
    pub preferred_namespace: Text,
    /// Time to live of our own answers.
    pub ttl: Duration,
    /// Answers of its resolvers that are kept for each pod.
    pub cache_entries: usize,
    /// Whether IPv6 addresses are told.
    pub ipv6: bool,
    /// `SO_MARK` of sockets.
    pub mark: u32,
    /// The procfs in which pods' processes are seen.
    pub proc: PathBuf,
}

/// The DNS of all pods: one thread, and the servers on it.
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

/// A pod's server; it ends when this is dropped.
#[derive(Debug)]
pub struct Serving {
    dns: Arc<Dns>,
    uid: Text,
    server: Arc<Server>,
    tasks: Group,
}

impl Serving {
    /// Ends the server; its sockets are closed with that.
    pub async fn end(self) {
        self.tasks.cut();
        self.tasks.finished().await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.tasks.cut();
        let mut servers = self.dns.servers.lock();
        // A later life of the pod may have its place already.
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

    /// Whether pods' DNS is taken, where the pod itself does not say.
    pub fn captures(&self) -> bool {
        self.config.capture
    }

    /// The resolvers of a pod of `namespace` in `netns`.
    pub fn resolver(&self, namespace: &Text, netns: &Netns) -> Arc<Resolver> {
        Arc::new(Resolver::new(self.config.clone(), self.metrics.clone(), namespace.clone(), netns.clone()))
    }

    /// Serves a pod on sockets that are bound.
    pub fn serve(
        self: &Arc<Self>,
        uid: &Text,
        label: String,
        resolver: Arc<Resolver>,
        asker: Box<dyn Asker>,
        listeners: Listeners,
    ) -> Serving {
        let server = Arc::new(Server::new(label, resolver, asker, self.mesh.clone()));
        {
            // Held until it is in: `log_only` sees it, or it sees what that wanted.
            let mut servers = self.servers.lock();
            let logged = self.logged.lock().contains(&server.label);
            server.logged.store(logged, Ordering::Relaxed);
            servers.insert(uid.clone(), server.clone());
        }
        let tasks = Group::default();
        server.serve(listeners, &tasks, &self.runtime);
        Serving { dns: self.clone(), uid: uid.clone(), server, tasks }
    }

    /// Requests of a pod by how they ended; `None` where its DNS is not taken.
    pub fn counts(&self, uid: &Text) -> Option<BTreeMap<&'static str, u64>> {
        let servers = self.servers.lock();
        servers.get(uid).map(|server| server.counts.list())
    }

    /// What a pod's resolvers are, as far as that has been looked at.
    pub fn resolvers(&self, uid: &Text) -> Option<Arc<resolver::Used>> {
        let servers = self.servers.lock();
        servers.get(uid).and_then(|server| server.resolver.used_last())
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

    /// Ends the thread, with whatever it still serves.
    pub fn stop(&self) {
        self.stop.at_once();
        let thread = self.thread.lock().take();
        // A thread that panicked has nothing left to end.
        let _ = thread.map(JoinHandle::join);
    }
}
