//! A pod's own resolvers: which they are, as the pod itself sees it, and what they answer.

use super::cache::Cache;
use super::lookup::Search;
use super::message;
use super::resolv_conf::ResolvConf;
use super::upstream::{Answered, Carrier, Servers, Upstream, UpstreamError};
use super::{Config, Metrics};
use crate::mesh::{Text, Workload};
use crate::sys::netns::Netns;
use crate::sys::process::read_file_in_netns;
use crate::task::thread;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

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
pub struct Used {
    /// Name servers that can be asked.
    pub servers: Vec<SocketAddr>,
    /// Search domains.
    pub search: Vec<Search>,
    /// Whether the servers are those of the pod's own file.
    pub by_pod: bool,
}

/// Asks the resolvers of one pod.
#[derive(Debug)]
pub struct Resolver {
    /// Settings.
    pub config: Arc<Config>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    namespace: Text,
    upstream: Upstream,
    cache: Cache,
    read: Mutex<Option<Read>>,
    reading: Arc<tokio::sync::Mutex<()>>,
    resolving: Semaphore,
}

#[derive(Clone, Debug)]
struct Read {
    used: Arc<Used>,
    process: Option<u32>,
    at: Instant,
    old: bool,
}

impl Used {
    /// Whom to ask: first the one that the pod has asked, then the others that it uses.
    pub fn in_order(&self, asked: Option<SocketAddr>) -> Servers {
        // What is asked on the pod's loopback is not redirected to us: we were asked directly.
        let asked = asked.filter(|server| elsewhere(*server));
        let others = self.servers.iter().copied().filter(|server| Some(*server) != asked);
        let stranger = asked.is_some_and(|asked| !self.servers.contains(&asked));
        Servers { list: asked.into_iter().chain(others).collect(), stranger }
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
        let (upstream, cache) = (Upstream::new(netns, config.mark), Cache::new(config.cache_entries));
        let resolving = Semaphore::new(RESOLVING_MAX);
        let (read, reading) = (Mutex::default(), Arc::default());
        Self { config, metrics, namespace, upstream, cache, read, reading, resolving }
    }

    fn last(&self) -> Option<Read> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the pod uses, if that is known and not old.
    pub fn used_now(&self) -> Option<Arc<Used>> {
        self.last().filter(|read| !read.old && read.at.elapsed() < READ_EVERY).map(|read| read.used)
    }

    /// What the pod used when that was looked at last.
    pub fn used_last(&self) -> Option<Arc<Used>> {
        self.last().map(|read| read.used)
    }

    /// What the pod uses; read where it is not known, or old.
    pub async fn used(&self) -> Arc<Used> {
        if let Some(used) = self.used_now() {
            return used;
        }
        // One reading serves all who ask; what was read before does meanwhile.
        let Ok(reading) = self.reading.clone().try_lock_owned() else {
            if let Some(read) = self.last() {
                return read.used;
            }
            let _reading = tokio::time::timeout(READ_WAIT, self.reading.lock()).await;
            return self.last().map_or_else(|| Arc::new(self.used_of(None, &ResolvConf::default())), |read| read.used);
        };
        let (netns, last) = (self.upstream.netns.id(), self.last());
        let process = last.as_ref().and_then(|read| read.process);
        let proc = self.config.proc.clone();
        let work = thread::beside(move || {
            // Held to the end of the reading, not of the waiting: one that hangs must not be begun again and again.
            let _reading = reading;
            let has_servers = |text: &str| Some(ResolvConf::parse(text)).filter(|conf| !conf.servers.is_empty());
            let of_pod = read_file_in_netns(&proc, netns, PATH, process, has_servers);
            let own = std::fs::read_to_string(format!("/{PATH}")).map(|text| ResolvConf::parse(&text));
            (of_pod, own.unwrap_or_default())
        });
        let (of_pod, own) = tokio::time::timeout(READ_WAIT, work).await.ok().flatten().unwrap_or_default();
        // No process was to be seen this time: what one said before still holds.
        if let (None, Some(read)) = (&of_pod, last.filter(|read| read.used.by_pod)) {
            return self.keep(read.used, read.process);
        }
        let process = of_pod.as_ref().map(|(process, _)| *process);
        let used = self.used_of(of_pod.map(|(_, conf)| conf), &own);
        self.keep(Arc::new(used), process)
    }

    fn keep(&self, used: Arc<Used>, process: Option<u32>) -> Arc<Used> {
        let read = Read { used: used.clone(), process, at: Instant::now(), old: false };
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
        used
    }

    /// The pod's own servers and search domains; else the daemon's servers and what Kubernetes gives by default.
    fn used_of(&self, of_pod: Option<ResolvConf>, own: &ResolvConf) -> Used {
        let by_pod = of_pod.is_some();
        let pod = of_pod.unwrap_or_default();
        let usable = |servers: &[SocketAddr]| servers.iter().copied().filter(|s| elsewhere(*s)).collect::<Vec<_>>();
        let of_pod = usable(&pod.servers);
        let servers = if of_pod.is_empty() { usable(&own.servers) } else { of_pod.clone() };
        let domain = &self.config.cluster_domain;
        let search = if by_pod { pod.search } else { ResolvConf::kubernetes_search(&self.namespace, domain) };
        Used { servers, search: Search::list(&search, &self.namespace, domain), by_pod: !of_pod.is_empty() }
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
    pub async fn ask(&self, carrier: Carrier, servers: &Servers, request: &[u8]) -> Result<Answered, UpstreamError> {
        self.upstream.ask(carrier, servers, request).await.inspect_err(|_| self.read_again())
    }

    /// They may have been replaced by others where none of them answers.
    fn read_again(&self) {
        if let Some(read) = &mut *self.read.lock().unwrap_or_else(PoisonError::into_inner) {
            read.old = read.at.elapsed() >= READ_AGAIN;
        }
    }

    /// The addresses of a host, as the pod's resolvers know it; of the wanted family where there are any.
    pub async fn addresses(&self, source: &Workload, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        self.metrics.on_demand(source, host);
        let waiting = tokio::time::timeout(READ_WAIT, self.resolving.acquire()).await;
        let Ok(Ok(_resolving)) = waiting else { return Err(ResolveError::TooMany(host.to_owned())) };
        let used = self.used().await;
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

    async fn family(&self, used: &Used, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        let question =
            message::question(host, v4, rand::random()).ok_or_else(|| ResolveError::Name(host.to_owned()))?;
        let failed = |error: UpstreamError| ResolveError::Upstream(host.to_owned(), error.to_string());
        if let Some(answer) = self.cached(None, &question) {
            return Ok(message::addresses(&answer));
        }
        let servers = used.in_order(None);
        let mut answer = self.ask(Carrier::Datagram, &servers, &question).await.map_err(failed)?;
        self.keep_answer(None, &question, &answer.bytes);
        if message::is_cut(&answer.bytes) {
            answer = self.ask(Carrier::Stream, &servers, &question).await.map_err(failed)?;
        }
        match answer.outcome {
            message::Outcome::Refused => Err(ResolveError::Refused(host.to_owned())),
            _ => Ok(message::addresses(&answer.bytes)),
        }
    }
}
