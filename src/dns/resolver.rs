//! A pod's own resolvers: which they are, as the pod itself sees it, and what they answer.

use super::cache::Cache;
use super::message;
use super::resolv_conf::ResolvConf;
use super::upstream::{Upstream, UpstreamError};
use super::{Config, Metrics};
use crate::mesh::{Text, Workload};
use crate::sys::netns::Netns;
use crate::sys::process::read_file_in_netns;
use crate::task::thread;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Where a process finds its resolvers, below its root.
const PATH: &str = "etc/resolv.conf";
/// How long what a pod's file says is believed before it is read again.
const READ_EVERY: Duration = Duration::from_secs(30);
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
    pub search: Vec<String>,
    /// Whether the pod's own file said so.
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
    reading: tokio::sync::Mutex<()>,
}

#[derive(Clone, Debug)]
struct Read {
    used: Arc<Used>,
    process: Option<u32>,
    at: Instant,
    old: bool,
}

impl Used {
    /// Whom to ask, in this order: first the one that the pod has asked.
    pub fn in_order(&self, asked: Option<SocketAddr>) -> Vec<SocketAddr> {
        // One on the pod's loopback is not redirected to us; that we find ourselves there means that we were asked directly.
        let asked = asked.filter(|server| !server.ip().is_loopback());
        let others = self.servers.iter().copied().filter(|server| Some(*server) != asked);
        asked.into_iter().chain(others).collect()
    }
}

impl Resolver {
    /// Of a pod of `namespace` in `netns`.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>, namespace: Text, netns: Netns) -> Self {
        let (upstream, cache) = (Upstream::new(netns, config.mark), Cache::new(config.cache_entries));
        Self { config, metrics, namespace, upstream, cache, read: Mutex::default(), reading: Default::default() }
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
        let Ok(_reading) = self.reading.try_lock() else {
            if let Some(read) = self.last() {
                return read.used;
            }
            let _reading = tokio::time::timeout(READ_WAIT, self.reading.lock()).await;
            return self.last().map_or_else(|| Arc::new(self.used_of(None, &ResolvConf::default())), |read| read.used);
        };
        let (netns, last) = (self.upstream.netns.id(), self.last());
        let process = last.as_ref().and_then(|read| read.process);
        let work = thread::beside(move || {
            let has_servers = |text: &str| Some(ResolvConf::parse(text)).filter(|conf| !conf.servers.is_empty());
            let of_pod = read_file_in_netns(netns, PATH, process, has_servers);
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
        // A resolver on the pod's loopback has sent us the question, if there is one: asking it would go on for ever.
        let elsewhere =
            |servers: &[SocketAddr]| servers.iter().copied().filter(|server| !server.ip().is_loopback()).collect();
        let mut servers: Vec<SocketAddr> = elsewhere(&pod.servers);
        if servers.is_empty() {
            servers = elsewhere(&own.servers);
        }
        let defaults = || ResolvConf::kubernetes_search(&self.namespace, &self.config.cluster_domain);
        Used { servers, search: if by_pod { pod.search } else { defaults() }, by_pod }
    }

    /// What the resolver that was asked (or whichever there is) has answered to this before, and still holds.
    pub fn cached(&self, asked: Option<SocketAddr>, request: &[u8]) -> Option<Vec<u8>> {
        self.cache.get(asked, request)
    }

    /// Keeps what they have answered by datagrams, for as long as it says.
    pub fn keep_answer(&self, asked: Option<SocketAddr>, request: &[u8], answer: &[u8]) {
        self.cache.put(asked, request, answer);
    }

    /// What they answer, by datagrams.
    pub async fn datagram(&self, servers: &[SocketAddr], request: &[u8]) -> Result<Vec<u8>, UpstreamError> {
        self.upstream.datagram(servers, request).await.inspect_err(|_| self.read_again())
    }

    /// They may have been replaced by others where none of them answers.
    fn read_again(&self) {
        if let Some(read) = &mut *self.read.lock().unwrap_or_else(PoisonError::into_inner) {
            read.old = read.at.elapsed() >= READ_AGAIN;
        }
    }

    /// What they answer, over a connection, on which more may follow.
    pub async fn stream(&self, servers: &[SocketAddr], request: &[u8]) -> Result<(TcpStream, Vec<u8>), UpstreamError> {
        self.upstream.stream(servers, request).await.inspect_err(|_| self.read_again())
    }

    /// The addresses of a host, as the pod's resolvers know it; of the wanted family where there are any.
    pub async fn addresses(&self, source: &Workload, host: &str, v4: bool) -> Result<Vec<IpAddr>, ResolveError> {
        self.metrics.on_demand(source, host);
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
        let mut answer = match self.cached(None, &question) {
            Some(answer) => answer,
            None => {
                let answer = self.datagram(&used.servers, &question).await.map_err(failed)?;
                self.keep_answer(None, &question, &answer);
                answer
            }
        };
        if message::is_cut(&answer) {
            answer = self.stream(&used.servers, &question).await.map_err(failed)?.1;
        }
        Ok(message::addresses(&answer))
    }
}
