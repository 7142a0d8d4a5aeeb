//! A pod's own resolvers: which they are, from the pod's `resolv.conf`, and what they answer.

use super::answer::{MeshRecord, QueryKind};
use super::answered::AnsweredNames;
use super::cache::Cache;
use super::config::Config;
use super::lookup::{self, LookupContext, Plan, SearchDomain};
use super::message;
use super::metrics::Metrics;
use super::resolv_conf::ResolvConf;
use super::upstream::{Carrier, Servers, Upstream, UpstreamAnswer, UpstreamError};
use crate::mesh::{Snapshot, Text, Workload};
use crate::sys::netns::Netns;
use crate::sys::process::read_file_in_netns;
use crate::task::thread;
use parking_lot::Mutex;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// Path of the resolver configuration, below a process's root.
const PATH: &str = "etc/resolv.conf";
/// How long the content of a pod's file is used before the file is read again.
const READ_EVERY: Duration = Duration::from_secs(30);
/// How soon the file is read again if none of the pod's resolvers answers.
const READ_AGAIN: Duration = Duration::from_secs(2);
/// How long the first reading may take before the daemon's own resolvers are used instead.
const READ_WAIT: Duration = Duration::from_secs(2);
/// How many host names are resolved at the same time for connections of one pod.
const RESOLVING_MAX: usize = 32;

/// Why a host name could not be resolved for a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// It is not a host name.
    #[error("{0:?} is not a host name")]
    Name(String),
    /// No resolver has answered.
    #[error("{0} cannot be resolved: {1}")]
    Upstream(String, String),
    /// The resolvers answered with an error.
    #[error("{0} cannot be resolved: the pod's resolvers fail, or refuse")]
    Refused(String),
    /// Too many other names are being resolved.
    #[error("{0} cannot be resolved: too many other names of this pod are being resolved")]
    TooMany(String),
    /// It has no address.
    #[error("{0} has no address")]
    NoAddress(String),
}

/// What a name leads to.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The addresses, at least one.
    pub addresses: Vec<IpAddr>,
    /// The name, in lower case and without a final dot, and how long it counts that it leads there. `None` unless one
    /// of the daemon's own name servers has said so just now, and an egress policy asks for names.
    pub proven: Option<(Text, Duration)>,
}

/// The name servers and search domains of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodResolvers {
    /// Usable name servers.
    pub servers: Vec<SocketAddr>,
    /// Search domains.
    pub search: Vec<SearchDomain>,
    /// Whether the servers come from the pod's own file.
    pub from_pod: bool,
    /// The daemon's own name servers. Only what these answer is taken for true: the pod writes its own file.
    pub trusted: Vec<SocketAddr>,
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
    /// Names that the pod was answered.
    pub answered: AnsweredNames,
    reader: Arc<ResolvConfReader>,
    resolving: Semaphore,
}

/// Reads the pod's file and remembers its content.
#[derive(Debug)]
struct ResolvConfReader {
    config: Arc<Config>,
    namespace: Text,
    netns: (u64, u64),
    last: Mutex<Option<Reading>>,
    /// Held while the file is read, until its content is in `last`.
    lock: Arc<tokio::sync::Mutex<()>>,
}

/// The result of reading the file.
#[derive(Clone, Debug)]
struct Reading {
    resolvers: Arc<PodResolvers>,
    /// The process in whose root the file was found.
    process: Option<u32>,
    at: Instant,
    /// Whether the file must be read again before the time.
    is_outdated: bool,
}

impl PodResolvers {
    /// The resolvers for one question: the one that the pod asked, if it is known, then the others.
    pub fn in_order(&self, asked: Option<SocketAddr>) -> Servers {
        // Questions to the pod's loopback are not redirected, so in that case the pod has asked us directly.
        let asked = asked.filter(|server| is_outside(*server));
        let others = self.servers.iter().copied().filter(|server| Some(*server) != asked);
        let first_is_unlisted = asked.is_some_and(|asked| !self.servers.contains(&asked));
        Servers { list: asked.into_iter().chain(others).collect(), first_is_unlisted }
    }
}

/// Whether a resolver is outside the pod. A resolver on the pod's loopback may have forwarded the question to us;
/// asking it would cause a loop.
fn is_outside(server: SocketAddr) -> bool {
    let ip = server.ip().to_canonical();
    !ip.is_loopback() && !ip.is_unspecified()
}

impl Resolver {
    /// The resolver of a pod of `namespace` in `netns`.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>, namespace: Text, netns: Netns) -> Self {
        let (last, lock) = (Mutex::default(), Arc::default());
        let reader = Arc::new(ResolvConfReader { config: config.clone(), namespace, netns: netns.id(), last, lock });
        let (upstream, cache) = (Upstream::new(netns, config.mark), Cache::new(config.cache_entries));
        let resolving = Semaphore::new(RESOLVING_MAX);
        Self { config, metrics, upstream, cache, answered: AnsweredNames::default(), reader, resolving }
    }

    /// The pod's resolvers, if they have been read recently.
    pub fn current(&self) -> Option<Arc<PodResolvers>> {
        self.reader.current()
    }

    /// The pod's resolvers as of the last reading.
    pub fn last_known(&self) -> Option<Arc<PodResolvers>> {
        self.reader.last().map(|reading| reading.resolvers)
    }

    /// The pod's resolvers. Reads the file if it has not been read recently.
    pub async fn resolvers(&self) -> Arc<PodResolvers> {
        if let Some(resolvers) = self.current() {
            return resolvers;
        }
        let deadline = Instant::now() + READ_WAIT;
        // Only one task reads. The others use the previous content meanwhile, or wait if there is none.
        let reading = match (self.reader.lock.clone().try_lock_owned(), self.last_known()) {
            (Ok(reading), _) => Some(reading),
            (Err(_), Some(resolvers)) => return resolvers,
            (Err(_), None) => timeout_at(deadline, self.reader.lock.clone().lock_owned()).await.ok(),
        };
        if let Some(reading) = reading {
            let reader = self.reader.clone();
            let work = thread::run_blocking(move || {
                let resolvers = reader.current().unwrap_or_else(|| reader.read());
                // The lock is held until the reading ends, not until the caller stops waiting, so that a reading that
                // hangs is not started again and again. It is released only after the result is stored, so that the
                // next task finds it.
                drop(reading);
                resolvers
            });
            if let Ok(Some(resolvers)) = timeout_at(deadline, work).await {
                return resolvers;
            }
        }
        if let Some(resolvers) = self.last_known() {
            return resolvers;
        }
        // The reading hangs; it stores its result when it ends. This substitute is not stored.
        let reader = self.reader.clone();
        thread::run_blocking(move || Arc::new(reader.merge(None, &daemon_resolv_conf()))).await.unwrap_or_default()
    }

    /// The cached answer of the resolver that the pod asked, or what was cached without knowing which one was asked.
    pub fn cached(&self, asked: Option<SocketAddr>, request: &[u8]) -> Option<Vec<u8>> {
        self.cache.get(asked, request)
    }

    /// Caches an answer that came by datagram, for as long as it may be cached.
    pub fn keep_answer(&self, asked: Option<SocketAddr>, request: &[u8], answer: &[u8]) {
        self.cache.put(asked, request, answer);
    }

    /// Asks these resolvers.
    pub async fn ask(
        &self,
        carrier: Carrier,
        servers: &Servers,
        request: &[u8],
    ) -> Result<UpstreamAnswer, UpstreamError> {
        self.upstream.ask(carrier, servers, request).await.inspect_err(|_| self.reader.mark_outdated())
    }

    /// The addresses of a host according to the pod's resolvers. Those of the wanted family are preferred.
    pub async fn addresses(&self, source: &Workload, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        Ok(self.resolve(source, host, v4, false).await?.addresses)
    }

    /// The same. With `prove`, an answer is not taken from the cache unless it is known who gave it.
    async fn resolve(&self, source: &Workload, host: &str, v4: bool, prove: bool) -> Result<Found, ResolveError> {
        self.metrics.on_demand(source, host);
        let waiting = tokio::time::timeout(READ_WAIT, self.resolving.acquire()).await;
        let Ok(Ok(_resolving)) = waiting else { return Err(ResolveError::TooMany(host.to_owned())) };
        let resolvers = self.resolvers().await;
        let of_family = |v4| self.addresses_of_family(&resolvers, host, v4, prove);
        let (first, second) = tokio::join!(of_family(v4), async {
            if v4 && !self.config.ipv6 { Ok(Found::default()) } else { of_family(!v4).await }
        });
        match (first, second) {
            (Ok(first), _) if !first.addresses.is_empty() => Ok(first),
            (_, Ok(second)) if !second.addresses.is_empty() => Ok(second),
            (Err(error), _) | (_, Err(error)) => Err(error),
            (Ok(_), Ok(_)) => Err(ResolveError::NoAddress(host.to_owned())),
        }
    }

    /// What decides about the pod's questions.
    pub fn context<'a>(
        &'a self,
        (snapshot, workload): (&'a Snapshot, &'a Workload),
        resolvers: &'a PodResolvers,
    ) -> LookupContext<'a> {
        LookupContext {
            snapshot,
            workload,
            search: &resolvers.search,
            cluster_domain: &self.config.cluster_domain,
            preferred_namespace: &self.config.preferred_namespace,
            ipv6: self.config.ipv6,
        }
    }

    /// The addresses that the pod would get for a name: from the mesh, or from its resolvers.
    pub async fn look_up(
        &self,
        (snapshot, workload): (&Snapshot, &Workload),
        name: &str,
    ) -> Result<Found, ResolveError> {
        let resolvers = self.resolvers().await;
        let context = self.context((snapshot, workload), &resolvers);
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        // A resolver in the pod appends the search domains to a name with few dots.
        let mut full = resolvers.search.iter().map(|search| format!("{name}.{}", search.domain));
        let of_mesh = full.find_map(|full| of_mesh(&context, &full)).or_else(|| of_mesh(&context, &name));
        match of_mesh {
            Some(addresses) => Ok(Found { addresses, proven: None }),
            None => self.resolve(workload, &name, true, snapshot.egress.has_hosts()).await,
        }
    }

    async fn addresses_of_family(
        &self,
        resolvers: &PodResolvers,
        host: &str,
        v4: bool,
        prove: bool,
    ) -> Result<Found, ResolveError> {
        let question =
            message::address_question(host, v4, rand::random()).ok_or_else(|| ResolveError::Name(host.to_owned()))?;
        let failed = |error: UpstreamError| ResolveError::Upstream(host.to_owned(), error.to_string());
        if let Some(answer) = self.cached(None, &question) {
            let addresses = message::addresses(&answer);
            if !prove || self.answered.has_led(host, &addresses) {
                return Ok(Found { addresses, proven: None });
            }
        }
        let servers = resolvers.in_order(None);
        let mut answer = self.ask(Carrier::Datagram, &servers, &question).await.map_err(failed)?;
        self.keep_answer(None, &question, &answer.bytes);
        if message::is_truncated(&answer.bytes) {
            answer = self.ask(Carrier::Stream, &servers, &question).await.map_err(failed)?;
        }
        match answer.kind {
            message::ResponseKind::Failure => Err(ResolveError::Refused(host.to_owned())),
            _ => {
                // Servers that only the pod names prove nothing: the pod can run one.
                let is_proof = prove && resolvers.trusted.contains(&answer.from);
                let proven = is_proof.then(|| (Text::from(host), message::time_to_live(&answer.bytes)));
                Ok(Found { addresses: message::addresses(&answer.bytes), proven })
            }
        }
    }
}

impl ResolvConfReader {
    fn last(&self) -> Option<Reading> {
        self.last.lock().clone()
    }

    fn current(&self) -> Option<Arc<PodResolvers>> {
        let is_current = |reading: &Reading| !reading.is_outdated && reading.at.elapsed() < READ_EVERY;
        self.last().filter(is_current).map(|reading| reading.resolvers)
    }

    /// Has the file read again soon. Called when none of the resolvers answers, because they may have been replaced.
    fn mark_outdated(&self) {
        if let Some(reading) = &mut *self.last.lock() {
            reading.is_outdated = reading.at.elapsed() >= READ_AGAIN;
        }
    }

    /// Reads the file and stores its content.
    fn read(&self) -> Arc<PodResolvers> {
        let last = self.last();
        let process = last.as_ref().and_then(|reading| reading.process);
        let has_servers = |text: &str| Some(ResolvConf::parse(text)).filter(|conf| !conf.servers.is_empty());
        let of_pod = read_file_in_netns(&self.config.proc, self.netns, PATH, process, has_servers);
        // If no process of the pod is visible this time, the content found earlier is still valid.
        if let (None, Some(reading)) = (&of_pod, last.filter(|reading| reading.resolvers.from_pod)) {
            return self.store(reading.resolvers, reading.process);
        }
        let process = of_pod.as_ref().map(|(process, _)| *process);
        self.store(Arc::new(self.merge(of_pod.map(|(_, conf)| conf), &daemon_resolv_conf())), process)
    }

    fn store(&self, resolvers: Arc<PodResolvers>, process: Option<u32>) -> Arc<PodResolvers> {
        let reading = Reading { resolvers: resolvers.clone(), process, at: Instant::now(), is_outdated: false };
        *self.last.lock() = Some(reading);
        resolvers
    }

    /// The pod's own servers and search domains. Without usable servers of the pod, the daemon's are used; without a
    /// file of the pod, the search domains are Kubernetes' defaults.
    fn merge(&self, of_pod: Option<ResolvConf>, of_daemon: &ResolvConf) -> PodResolvers {
        let has_file = of_pod.is_some();
        let pod = of_pod.unwrap_or_default();
        let usable = |servers: &[SocketAddr]| servers.iter().copied().filter(|s| is_outside(*s)).collect::<Vec<_>>();
        let of_pod = usable(&pod.servers);
        let servers = if of_pod.is_empty() { usable(&of_daemon.servers) } else { of_pod.clone() };
        let domain = &self.config.cluster_domain;
        let search = if has_file { pod.search } else { ResolvConf::kubernetes_search(&self.namespace, domain) };
        let search = SearchDomain::list(&search, &self.namespace, domain);
        PodResolvers { servers, search, from_pod: !of_pod.is_empty(), trusted: of_daemon.servers.clone() }
    }
}

/// The addresses that the mesh itself answers for a name, if it does.
fn of_mesh(context: &LookupContext<'_>, name: &str) -> Option<Vec<IpAddr>> {
    let (Plan::Answer(answer) | Plan::ForwardOr(answer)) = lookup::decide(context, name, QueryKind::Any) else {
        return None;
    };
    let address = |record: &MeshRecord| match record {
        MeshRecord::Address(ip) => Some(*ip),
        MeshRecord::Service { .. } => None,
    };
    let addresses: Vec<IpAddr> = answer.records.iter().filter_map(address).collect();
    (!addresses.is_empty()).then_some(addresses)
}

/// The daemon's own `resolv.conf`.
fn daemon_resolv_conf() -> ResolvConf {
    std::fs::read_to_string(format!("/{PATH}")).map(|text| ResolvConf::parse(&text)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    /// A `/proc` with one process in our own network namespace, whose file has this content.
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
    async fn concurrent_first_lookups_all_get_the_content_of_the_file() {
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
        // A task that stops waiting before the file is read leaves the reading to the others.
        let resolver = resolver(&proc);
        let reading = resolver.reader.lock.clone().lock_owned().await;
        let (left, stays) = (Box::pin(resolver.resolvers()), resolver.resolvers());
        let left = tokio::time::timeout(Duration::ZERO, left).await;
        assert!(left.is_err(), "another task holds the lock");
        let (used, ()) = tokio::join!(stays, async { drop(reading) });
        assert!(used.from_pod);
        std::fs::remove_dir_all(&proc).unwrap();
    }

    /// While a reading hangs, the daemon's own servers are used, but not stored.
    #[tokio::test(start_paused = true)]
    async fn the_substitute_for_a_reading_that_hangs_is_not_stored() {
        let proc = proc_of("hangs", "nameserver 203.0.113.53\n");
        let resolver = resolver(&proc);
        let hangs = resolver.reader.lock.clone().lock_owned().await;
        let started = Instant::now();
        let substitute = resolver.resolvers().await;
        assert!(!substitute.from_pod && substitute.search.len() == 3, "{substitute:?}");
        assert_eq!(substitute.servers, resolver.reader.merge(None, &daemon_resolv_conf()).servers, "the daemon's own");
        assert_eq!(started.elapsed(), READ_WAIT);
        drop(hangs);
        assert!(resolver.resolvers().await.from_pod);
        std::fs::remove_dir_all(&proc).unwrap();
    }
}
