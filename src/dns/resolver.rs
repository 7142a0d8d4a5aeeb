//! A pod's own resolvers: which they are, as the pod itself sees it, and what they answer.

use super::cache::Cache;
use super::config::Config;
use super::lookup::SearchDomain;
use super::message;
use super::metrics::Metrics;
use super::resolv_conf::ResolvConf;
use super::upstream::{Carrier, Servers, Upstream, UpstreamAnswer, UpstreamError};
use crate::mesh::{Text, Workload};
use crate::sys::netns::Netns;
use crate::sys::process::read_file_in_netns;
use crate::task::thread;
use parking_lot::Mutex;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// Where a process finds its resolvers, below its root.
const PATH: &str = "etc/resolv.conf";
/// How long what a pod's file says is believed before it is read again.
const READ_EVERY: Duration = Duration::from_secs(30);
/// Host names that are resolved at the same time for connections of one pod.
const RESOLVING_MAX: usize = 32;
/// How soon it is read again where none of the pod's resolvers answers.
const READ_AGAIN: Duration = Duration::from_secs(2);
/// How long the first reading may take before the daemon's own resolvers are used.
const READ_WAIT: Duration = Duration::from_secs(2);

/// Why a host name could not be resolved for a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// It is no host name.
    #[error("{0:?} is no host name")]
    Name(String),
    /// No resolver has answered.
    #[error("{0} cannot be resolved: {1}")]
    Upstream(String, String),
    /// The resolvers cannot say.
    #[error("{0} cannot be resolved: the pod's resolvers fail, or refuse")]
    Refused(String),
    /// Too many others are being resolved.
    #[error("{0} is not resolved: too many names of this pod are")]
    TooMany(String),
    /// It has no address.
    #[error("{0} has no address")]
    NoAddress(String),
}

/// Name servers and search domains that a pod uses, and where they are from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodResolvers {
    /// Name servers that can be asked.
    pub servers: Vec<SocketAddr>,
    /// SearchDomain domains.
    pub search: Vec<SearchDomain>,
    /// Whether the servers are those of the pod's own file.
    pub from_pod: bool,
}

/// Asks the resolvers of one pod.
#[derive(Debug)]
pub struct Resolver {
    /// Settings.
    pub config: Arc<Config>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    upstream: Upstream,
    cache: Cache,
    reader: Arc<ResolvConfReader>,
    resolving: Semaphore,
}

/// Reads the pod's file, and keeps what it says.
#[derive(Debug)]
struct ResolvConfReader {
    config: Arc<Config>,
    namespace: Text,
    netns: (u64, u64),
    read: Mutex<Option<Reading>>,
    /// Held while the file is read, and until what it says is kept.
    reading: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Debug)]
struct Reading {
    used: Arc<PodResolvers>,
    process: Option<u32>,
    at: Instant,
    old: bool,
}

impl PodResolvers {
    /// Whom to ask: first the one that the pod has asked, then the others that it uses.
    pub fn in_order(&self, asked: Option<SocketAddr>) -> Servers {
        // What is asked on the pod's loopback is not redirected to us: we were asked directly.
        let asked = asked.filter(|server| elsewhere(*server));
        let others = self.servers.iter().copied().filter(|server| Some(*server) != asked);
        let first_is_foreign = asked.is_some_and(|asked| !self.servers.contains(&asked));
        Servers { list: asked.into_iter().chain(others).collect(), first_is_foreign }
    }
}

/// Whether a resolver is outside of the pod. One on its loopback has sent us the question, if there is one: asking it would go
/// on for ever.
fn elsewhere(server: SocketAddr) -> bool {
    let ip = server.ip().to_canonical();
    !ip.is_loopback() && !ip.is_unspecified()
}

impl Resolver {
    /// Of a pod of `namespace` in `netns`.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>, namespace: Text, netns: Netns) -> Self {
        let (read, reading) = (Mutex::default(), Arc::default());
        let reader = Arc::new(ResolvConfReader { config: config.clone(), namespace, netns: netns.id(), read, reading });
        let (upstream, cache) = (Upstream::new(netns, config.mark), Cache::new(config.cache_entries));
        let resolving = Semaphore::new(RESOLVING_MAX);
        Self { config, metrics, upstream, cache, reader, resolving }
    }

    /// What the pod uses, if that is known and not old.
    pub fn current(&self) -> Option<Arc<PodResolvers>> {
        self.reader.now()
    }

    /// What the pod used when that was looked at last.
    pub fn last_known(&self) -> Option<Arc<PodResolvers>> {
        self.reader.last().map(|read| read.used)
    }

    /// What the pod uses; read where it is not known, or old.
    pub async fn resolvers(&self) -> Arc<PodResolvers> {
        if let Some(used) = self.current() {
            return used;
        }
        let deadline = Instant::now() + READ_WAIT;
        // One reading serves all who ask; what was read before does meanwhile.
        let reading = match (self.reader.reading.clone().try_lock_owned(), self.last_known()) {
            (Ok(reading), _) => Some(reading),
            (Err(_), Some(used)) => return used,
            (Err(_), None) => timeout_at(deadline, self.reader.reading.clone().lock_owned()).await.ok(),
        };
        if let Some(reading) = reading {
            let reader = self.reader.clone();
            let work = thread::beside(move || {
                let used = reader.now().unwrap_or_else(|| reader.read());
                // Held to the end of the reading, not of the waiting: one that hangs must not be begun again and again. And until
                // its result is kept, or who comes next would find nothing.
                drop(reading);
                used
            });
            if let Ok(Some(used)) = timeout_at(deadline, work).await {
                return used;
            }
        }
        if let Some(used) = self.last_known() {
            return used;
        }
        // It hangs, and keeps its result when it is there. Nothing is kept of this.
        let reader = self.reader.clone();
        thread::beside(move || Arc::new(reader.used_of(None, &daemon_resolv_conf()))).await.unwrap_or_default()
    }

    /// What the resolver that was asked (or whichever there is) has answered to this before, and still holds.
    pub fn cached(&self, asked: Option<SocketAddr>, request: &[u8]) -> Option<Vec<u8>> {
        self.cache.get(asked, request)
    }

    /// Keeps what they have answered by datagrams, for as long as it says.
    pub fn keep_answer(&self, asked: Option<SocketAddr>, request: &[u8], answer: &[u8]) {
        self.cache.put(asked, request, answer);
    }

    /// What they answer.
    pub async fn ask(
        &self,
        carrier: Carrier,
        servers: &Servers,
        request: &[u8],
    ) -> Result<UpstreamAnswer, UpstreamError> {
        self.upstream.ask(carrier, servers, request).await.inspect_err(|_| self.read_again())
    }

    /// They may have been replaced by others where none of them answers.
    fn read_again(&self) {
        if let Some(read) = &mut *self.reader.read.lock() {
            read.old = read.at.elapsed() >= READ_AGAIN;
        }
    }

    /// The addresses of a host, as the pod's resolvers know it; of the wanted family where there are any.
    pub async fn addresses(&self, source: &Workload, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        self.metrics.on_demand(source, host);
        let waiting = tokio::time::timeout(READ_WAIT, self.resolving.acquire()).await;
        let Ok(Ok(_resolving)) = waiting else { return Err(ResolveError::TooMany(host.to_owned())) };
        let used = self.resolvers().await;
        let (first, second) = tokio::join!(self.family(&used, host, v4), async {
            if v4 && !self.config.ipv6 { Ok(Vec::new()) } else { self.family(&used, host, !v4).await }
        });
        match (first, second) {
            (Ok(first), _) if !first.is_empty() => Ok(first),
            (_, Ok(second)) if !second.is_empty() => Ok(second),
            (Err(error), _) | (_, Err(error)) => Err(error),
            (Ok(_), Ok(_)) => Err(ResolveError::NoAddress(host.to_owned())),
        }
    }

    async fn family(&self, used: &PodResolvers, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        let question =
            message::address_question(host, v4, rand::random()).ok_or_else(|| ResolveError::Name(host.to_owned()))?;
        let failed = |error: UpstreamError| ResolveError::Upstream(host.to_owned(), error.to_string());
        if let Some(answer) = self.cached(None, &question) {
            return Ok(message::addresses(&answer));
        }
        let servers = used.in_order(None);
        let mut answer = self.ask(Carrier::Datagram, &servers, &question).await.map_err(failed)?;
        self.keep_answer(None, &question, &answer.bytes);
        if message::is_truncated(&answer.bytes) {
            answer = self.ask(Carrier::Stream, &servers, &question).await.map_err(failed)?;
        }
        match answer.kind {
            message::ResponseKind::Failure => Err(ResolveError::Refused(host.to_owned())),
            _ => Ok(message::addresses(&answer.bytes)),
        }
    }
}

impl ResolvConfReader {
    fn last(&self) -> Option<Reading> {
        self.read.lock().clone()
    }

    fn now(&self) -> Option<Arc<PodResolvers>> {
        self.last().filter(|read| !read.old && read.at.elapsed() < READ_EVERY).map(|read| read.used)
    }

    /// Reads it and keeps what it says.
    fn read(&self) -> Arc<PodResolvers> {
        let last = self.last();
        let process = last.as_ref().and_then(|read| read.process);
        let has_servers = |text: &str| Some(ResolvConf::parse(text)).filter(|conf| !conf.servers.is_empty());
        let of_pod = read_file_in_netns(&self.config.proc, self.netns, PATH, process, has_servers);
        // No process was to be seen this time: what one said before still holds.
        if let (None, Some(read)) = (&of_pod, last.filter(|read| read.used.from_pod)) {
            return self.keep(read.used, read.process);
        }
        let process = of_pod.as_ref().map(|(process, _)| *process);
        self.keep(Arc::new(self.used_of(of_pod.map(|(_, conf)| conf), &daemon_resolv_conf())), process)
    }

    fn keep(&self, used: Arc<PodResolvers>, process: Option<u32>) -> Arc<PodResolvers> {
        let read = Reading { used: used.clone(), process, at: Instant::now(), old: false };
        *self.read.lock() = Some(read);
        used
    }

    /// The pod's own servers and search domains; else the daemon's servers and what Kubernetes gives by default.
    fn used_of(&self, of_pod: Option<ResolvConf>, own: &ResolvConf) -> PodResolvers {
        let from_pod = of_pod.is_some();
        let pod = of_pod.unwrap_or_default();
        let usable = |servers: &[SocketAddr]| servers.iter().copied().filter(|s| elsewhere(*s)).collect::<Vec<_>>();
        let of_pod = usable(&pod.servers);
        let servers = if of_pod.is_empty() { usable(&own.servers) } else { of_pod.clone() };
        let domain = &self.config.cluster_domain;
        let search = if from_pod { pod.search } else { ResolvConf::kubernetes_search(&self.namespace, domain) };
        PodResolvers {
            servers,
            search: SearchDomain::list(&search, &self.namespace, domain),
            from_pod: !of_pod.is_empty(),
        }
    }
}

/// What the daemon's own file says.
fn daemon_resolv_conf() -> ResolvConf {
    std::fs::read_to_string(format!("/{PATH}")).map(|text| ResolvConf::parse(&text)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    /// A `/proc` with one process of our own network namespace, whose file says this.
    fn proc_of(name: &str, conf: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-resolver-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        for below in ["7/ns", "7/root/etc"] {
            std::fs::create_dir_all(folder.join(below)).unwrap();
        }
        for kind in ["net", "mnt"] {
            std::os::unix::fs::symlink(format!("/proc/self/ns/{kind}"), folder.join("7/ns").join(kind)).unwrap();
        }
        std::fs::write(folder.join("7/root").join(PATH), conf).unwrap();
        folder
    }

    fn resolver(proc: &Path) -> Arc<Resolver> {
        let config = Config {
            capture: true,
            ttl: Duration::from_secs(30),
            cache_entries: 0,
            cluster_domain: "cluster.local".into(),
            preferred_namespace: "".into(),
            ipv6: true,
            mark: 1337,
            proc: proc.to_owned(),
        };
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        Arc::new(Resolver::new(Arc::new(config), Arc::default(), "ns".into(), netns))
    }

    /// The first lookup of a pod asks for A and AAAA at once, as `getaddrinfo` does.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_who_ask_first_and_at_once_are_told_what_the_file_says() {
        let proc = proc_of("first", "nameserver 203.0.113.53\nsearch of.the.pod\n");
        for round in 0..20 {
            for askers in [1, 2, 32] {
                let resolver = resolver(&proc);
                let mut asked = tokio::task::JoinSet::new();
                for _ in 0..askers {
                    let resolver = resolver.clone();
                    asked.spawn(async move { resolver.resolvers().await });
                }
                while let Some(used) = asked.join_next().await {
                    let used = used.unwrap();
                    assert!(used.from_pod && used.search.len() == 1, "round {round} of {askers}: {used:?}");
                    assert_eq!(used.servers, ["203.0.113.53:53".parse().unwrap()], "round {round} of {askers}");
                }
            }
        }
        // Who leaves before the file is read leaves its reading to the others.
        let resolver = resolver(&proc);
        let reading = resolver.reader.reading.clone().lock_owned().await;
        let (left, stays) = (Box::pin(resolver.resolvers()), resolver.resolvers());
        let left = tokio::time::timeout(Duration::ZERO, left).await;
        assert!(left.is_err(), "the reading is not free");
        let (used, ()) = tokio::join!(stays, async { drop(reading) });
        assert!(used.from_pod);
        std::fs::remove_dir_all(&proc).unwrap();
    }

    /// A reading that hangs: the daemon's own servers are used, and forgotten again.
    #[tokio::test(start_paused = true)]
    async fn what_stands_in_for_a_reading_that_hangs_is_not_kept() {
        let proc = proc_of("hangs", "nameserver 203.0.113.53\n");
        let resolver = resolver(&proc);
        let hangs = resolver.reader.reading.clone().lock_owned().await;
        let begun = Instant::now();
        let stand_in = resolver.resolvers().await;
        assert!(!stand_in.from_pod && stand_in.search.len() == 3, "{stand_in:?}");
        assert_eq!(stand_in.servers, resolver.reader.used_of(None, &daemon_resolv_conf()).servers, "the daemon's own");
        assert_eq!(begun.elapsed(), READ_WAIT);
        drop(hangs);
        assert!(resolver.resolvers().await.from_pod);
        std::fs::remove_dir_all(&proc).unwrap();
    }
}
