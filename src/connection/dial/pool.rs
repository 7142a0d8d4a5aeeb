//! The tunnels of one worker. Connections that agree in [`TunnelKey`] share a tunnel. All connections that wait for a
//! dial share it, and its error as well, so that a dead destination costs one timeout and not one per connection.
//!
//! ```text
//!   (none) ──first checkout──► dialling ──up──► open ──idle · GOAWAY · broken──► gone
//!                                 └──failed──► (none), and every waiter gets the same error
//! ```

use super::direct::OpenLeg;
use super::error::TunnelDialError;
use crate::connection::accept::TunnelStop;
use crate::hbone::client::Driver;
use crate::hbone::{Authority, Tunnel, TunnelError};
use crate::identity::{Chain, Proven, TlsFacts};
use crate::mesh::{SpiffeName, Text};
use crate::task::{Group, Signal};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How long a tunnel may last after its connections were told to stop, so that its peer learns of their end.
const STOP_GRACE: Duration = Duration::from_millis(500);

/// Tunnels of one key that may be busy with large transfers before further connections share them.
const BUSY_MAX: usize = 3;

/// Most tunnels through a gateway that are opened only to reach further endpoints behind it.
const SPREAD_MAX: usize = 8;

/// How long a tunnel through a gateway takes new streams. The gateway chooses the endpoint of a tunnel, so each tunnel
/// leads to one, and new endpoints get connections once there are new tunnels.
const BEHIND_AGE: Duration = Duration::from_secs(60);

/// What two connections must have in common to share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Uid of the pod that the tunnel starts in: its namespace gives the tunnel its source address.
    pub pod: Text,
    /// Number of the pod's capture: a tunnel ends with the capture that opened it.
    pub capture: u64,
    /// The pod's identity.
    pub own: SpiffeName,
    /// Generation of the certificate that proves it.
    pub generation: u64,
    /// Identities that the far end may prove.
    pub expected: Vec<SpiffeName>,
    /// Address and port of the far end.
    pub to: SocketAddr,
    /// Uid of the workload there: if the address passes to another workload, that one gets another tunnel.
    pub uid: Text,
    /// For a tunnel inside the tunnel to a gateway; `to` and `uid` are the gateway's then.
    pub behind: Option<Behind>,
}

/// What two connections to another network must have in common in addition.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Behind {
    /// Identities that the gateway may prove.
    pub gateway: Vec<SpiffeName>,
    /// What the gateway is asked for.
    pub authority: Authority,
}

/// Settings of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Most streams on one tunnel; beyond it another tunnel is opened.
    pub max_streams: usize,
    /// Idle time after which a tunnel is closed.
    pub idle: Duration,
}

/// A dialled tunnel: a handle to open streams, and the future that moves its bytes.
pub struct DialledTunnel {
    /// Opens streams.
    pub tunnel: Tunnel,
    /// TLS version, key exchange and cipher.
    pub tls: TlsFacts,
    /// Identity that the far end has proven.
    pub peer: SpiffeName,
    /// The far end's certificate chain; it signals when a certificate in it is revoked or expires.
    pub chain: Chain,
    /// Runs until the tunnel ends.
    pub driver: Driver,
    /// The connection's entry in the list of the daemon's own.
    pub entry: Option<OpenLeg>,
    /// The gateway's tunnel that it is inside of.
    pub outer: Option<OuterTunnel>,
    /// How long TLS and HTTP/2 took.
    pub shake: Duration,
}

/// What is known of the tunnel to a gateway at a tunnel inside it.
#[derive(Clone, Debug)]
pub struct OuterTunnel {
    /// Identity that the gateway has proven.
    pub peer: SpiffeName,
    /// Why all its streams have been told to stop, if they have.
    stop: Arc<OnceLock<TunnelStop>>,
}

/// Called when a tunnel breaks, with its key, the far end's identity and the error.
pub type OnTunnelBroken = Box<dyn Fn(&TunnelKey, &SpiffeName, &TunnelError) + Send + Sync>;

/// Called when the far end of a tunnel says that it goes away, with the tunnel's key.
pub type OnGoingAway = Box<dyn Fn(&TunnelKey) + Send + Sync>;

impl fmt::Debug for DialledTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DialledTunnel")
    }
}

/// The tunnels of one worker.
pub struct Pool {
    config: PoolConfig,
    pub(super) tasks: Group,
    broken: OnTunnelBroken,
    going_away: OnGoingAway,
    by_key: Mutex<HashMap<TunnelKey, KeyTunnels>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

/// The result of a dial; `None` while it is under way.
type DialOutcome = Option<Result<Arc<PooledTunnel>, Arc<TunnelDialError>>>;

/// The tunnels for one key.
#[derive(Debug, Default)]
struct KeyTunnels {
    open: Vec<Arc<PooledTunnel>>,
    /// The dial that is under way.
    dialling: Option<watch::Receiver<DialOutcome>>,
}

/// An open tunnel.
#[derive(Debug)]
struct PooledTunnel {
    handle: Tunnel,
    /// What its far end has proven, and the gateway on the way.
    proven: Arc<Proven>,
    chain: Chain,
    /// The gateway's tunnel that it is inside of.
    outer: Option<OuterTunnel>,
    /// Why all its connections have been told to stop, if they have.
    stop: Arc<OnceLock<TunnelStop>>,
    /// Leases that are held.
    streams: AtomicUsize,
    /// Whether it takes no more streams.
    gone: AtomicBool,
    /// Notified when a lease retires it.
    retired: Notify,
    last_used: Mutex<Instant>,
    /// When it was open.
    since: Instant,
    /// How long TLS and HTTP/2 took.
    shake: Duration,
    /// The daemon's port of its TCP connection; 0 inside another tunnel.
    port: u16,
}

/// A slot for one stream on a tunnel. It is free again when dropped.
#[derive(Debug)]
pub struct Lease {
    tunnel: Arc<PooledTunnel>,
}

impl Lease {
    /// The tunnel.
    pub fn tunnel(&self) -> &Tunnel {
        &self.tunnel.handle
    }

    /// The daemon's port of the tunnel's TCP connection; 0 for a tunnel inside another one.
    pub fn port(&self) -> u16 {
        self.tunnel.port
    }

    /// What the far end has proven, and the gateway on the way.
    pub fn proven(&self) -> &Arc<Proven> {
        &self.tunnel.proven
    }

    /// If the tunnel was not open at `begun`: how long TCP, and then TLS and HTTP/2, have been waited for since then.
    pub(super) fn waited(&self, begun: Instant) -> Option<(Duration, Duration)> {
        let waited = self.tunnel.since.checked_duration_since(begun)?;
        let shake = self.tunnel.shake.min(waited);
        Some((waited - shake, shake))
    }

    /// Why all connections of the tunnel have been told to stop, or those of the tunnel that it is inside of; `None` if
    /// they have not.
    pub fn stop(&self) -> Option<TunnelStop> {
        let outer = self.tunnel.outer.as_ref().and_then(|outer| outer.stop.get());
        self.tunnel.stop.get().or(outer).copied()
    }

    /// What a tunnel inside this one has to know.
    pub(super) fn as_outer(&self) -> OuterTunnel {
        OuterTunnel { peer: self.tunnel.proven.identity.clone(), stop: self.tunnel.stop.clone() }
    }

    /// Takes the tunnel out of the pool, because it is going away. Its other streams continue.
    pub fn retire(&self) {
        self.tunnel.gone.store(true, Ordering::Relaxed);
        self.tunnel.retired.notify_one();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.tunnel.last_used.lock() = Instant::now();
        self.tunnel.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// An empty pool. Its tunnels run as tasks of `tasks`; `broken` is called for each that breaks, `going_away` for
    /// each whose far end goes away.
    pub fn new(config: PoolConfig, tasks: Group, broken: OnTunnelBroken, going_away: OnGoingAway) -> Arc<Self> {
        Arc::new(Self { config, tasks, broken, going_away, by_key: Mutex::default() })
    }

    /// A slot on a tunnel for `key`. If no tunnel has a free one, waits for the dial that is under way, or starts one
    /// with `dial`. The dial continues if its waiters leave. `drain` ends the tunnel. While there are fewer tunnels than
    /// `spread`, only one without streams has free slots.
    pub async fn checkout<D, F>(
        self: &Arc<Self>,
        key: &TunnelKey,
        drain: &Signal,
        spread: usize,
        dial: D,
    ) -> Result<Lease, Arc<TunnelDialError>>
    where
        D: Fn() -> F,
        F: Future<Output = Result<DialledTunnel, TunnelDialError>> + Send + 'static,
    {
        loop {
            let mut outcome = {
                let mut by_key = self.by_key.lock();
                let tunnels = by_key.entry(key.clone()).or_default();
                let (busy, mut quiet): (Vec<_>, Vec<_>) =
                    tunnels.open.iter().partition(|tunnel| tunnel.handle.is_busy());
                if spread > 1 {
                    quiet.sort_by_key(|tunnel| tunnel.streams.load(Ordering::Relaxed));
                }
                if tunnels.open.len() < spread.min(SPREAD_MAX) && tunnels.dialling.is_none() {
                    quiet.retain(|tunnel| tunnel.streams.load(Ordering::Relaxed) == 0);
                }
                if let Some(lease) = quiet.into_iter().find_map(|tunnel| self.lease_unless_gone(tunnel)) {
                    return Ok(lease);
                }
                // A small message would wait behind the large transfers of a busy tunnel, so there may be one more.
                if (busy.len() >= BUSY_MAX || tunnels.dialling.is_some())
                    && let Some(lease) = busy.into_iter().rev().find_map(|tunnel| self.lease_unless_gone(tunnel))
                {
                    return Ok(lease);
                }
                if let Some(outcome) = &tunnels.dialling {
                    outcome.clone()
                } else {
                    let (send, outcome) = watch::channel(None);
                    tunnels.dialling = Some(outcome.clone());
                    // Boxed: dialling needs more memory than an open tunnel, which must not keep it.
                    self.tasks.spawn(self.clone().dial(key.clone(), drain.clone(), Box::pin(dial()), send));
                    outcome
                }
            };
            let settled = match outcome.wait_for(Option::is_some).await {
                Ok(settled) => settled.clone(),
                Err(_) => return Err(Arc::new(TunnelDialError::Draining)),
            };
            match settled {
                Some(Err(error)) => {
                    // A busy tunnel is better than none.
                    let by_key = self.by_key.lock();
                    let open = by_key.get(key).into_iter().flat_map(|tunnels| &tunnels.open);
                    return open.into_iter().find_map(|tunnel| self.lease_unless_gone(tunnel)).ok_or(error);
                }
                // The tunnel may be leaving the pool already, because its pod drains. It still serves those that waited
                // for it.
                Some(Ok(tunnel)) => {
                    if let Some(lease) = self.lease(&tunnel) {
                        return Ok(lease);
                    }
                }
                None => {}
            }
        }
    }

    /// A slot, unless the tunnel takes no more streams.
    fn lease_unless_gone(&self, tunnel: &Arc<PooledTunnel>) -> Option<Lease> {
        if tunnel.gone.load(Ordering::Relaxed) { None } else { self.lease(tunnel) }
    }

    /// A slot, if one is free.
    fn lease(&self, tunnel: &Arc<PooledTunnel>) -> Option<Lease> {
        let limit = self.config.max_streams.min(tunnel.handle.max_streams()).max(1);
        let free = tunnel.streams.load(Ordering::Relaxed) < limit;
        free.then(|| {
            tunnel.streams.fetch_add(1, Ordering::Relaxed);
            Lease { tunnel: tunnel.clone() }
        })
    }

    /// Number of open tunnels.
    pub fn len(&self) -> usize {
        self.by_key.lock().values().map(|tunnels| tunnels.open.len()).sum()
    }

    async fn dial<F>(self: Arc<Self>, key: TunnelKey, drain: Signal, dialling: F, outcome: watch::Sender<DialOutcome>)
    where
        F: Future<Output = Result<DialledTunnel, TunnelDialError>>,
    {
        // Settles the dial also if this task is cancelled or panics; otherwise later checkouts would wait for ever.
        let settle = DialSettlement { pool: &self, key: &key, outcome: &outcome };
        let dialled = tokio::select! {
            () = drain.now() => Err(TunnelDialError::Draining),
            dialled = dialling => dialled,
        };
        let (tunnel, driver, entry) = match dialled {
            Err(error) => {
                settle.with(Err(Arc::new(error)));
                return;
            }
            Ok(dialled) => {
                let gateway = dialled.outer.as_ref().map(|outer| outer.peer.clone());
                let tunnel = PooledTunnel {
                    handle: dialled.tunnel,
                    proven: Arc::new(Proven { identity: dialled.peer, gateway, tls: dialled.tls }),
                    outer: dialled.outer,
                    chain: dialled.chain,
                    stop: Arc::default(),
                    streams: AtomicUsize::new(0),
                    gone: AtomicBool::new(false),
                    retired: Notify::new(),
                    last_used: Mutex::new(Instant::now()),
                    since: Instant::now(),
                    shake: dialled.shake,
                    port: dialled.entry.as_ref().map_or(0, OpenLeg::port),
                };
                (Arc::new(tunnel), dialled.driver, dialled.entry)
            }
        };
        settle.with(Ok(tunnel.clone()));
        drop(settle);
        // The outcome holds a handle to the tunnel, which would keep the tunnel open. Waiters can still read it.
        drop(outcome);
        self.keep(&key, tunnel, drain, driver).await;
        drop(entry);
    }

    /// Runs a tunnel until it ends. It leaves the pool when it is idle, retired or going away, and then lasts as long
    /// as its streams.
    async fn keep(&self, key: &TunnelKey, tunnel: Arc<PooledTunnel>, drain: Signal, driver: Driver) {
        let mut run = pin!(driver.run());
        let leave = async {
            loop {
                let last = *tunnel.last_used.lock();
                tokio::time::sleep_until(last + self.config.idle).await;
                let mut by_key = self.by_key.lock();
                let last = *tunnel.last_used.lock();
                if tunnel.streams.load(Ordering::Relaxed) == 0 && last.elapsed() >= self.config.idle {
                    remove(&mut by_key, key, &tunnel);
                    return;
                }
                drop(by_key);
                if last.elapsed() >= self.config.idle {
                    // It is in use; check again later.
                    tokio::time::sleep(self.config.idle).await;
                }
            }
        };
        let ended = tokio::select! {
            ended = &mut run => Some(ended),
            () = leave => None,
            () = drain.gentle() => None,
            // It takes no more streams, and ends with its last one.
            () = tunnel.retired.notified() => None,
            () = driver.going_away() => None,
            () = tokio::time::sleep(BEHIND_AGE), if key.behind.is_some() => None,
            // The far end's certificate has expired or is revoked. No new stream may begin.
            () = tunnel.chain.ending() => None,
        };
        remove(&mut self.by_key.lock(), key, &tunnel);
        if driver.is_going_away() {
            (self.going_away)(key);
        }
        let (proven, chain, stop) = (tunnel.proven.clone(), tunnel.chain.clone(), tunnel.stop.clone());
        drop(tunnel);
        let ended = match ended {
            Some(ended) => ended,
            None => {
                let why = tokio::select! {
                    ended = &mut run => Err(ended),
                    () = drain.now() => Ok(TunnelStop::Drained),
                    why = chain.distrusted() => Ok(TunnelStop::Distrusted(why)),
                };
                match why {
                    Err(ended) => ended,
                    Ok(why) => {
                        // Fails only if there is a reason already.
                        let _ = stop.set(why);
                        driver.stop_all();
                        // The streams are reset before the tunnel ends.
                        tokio::time::timeout(STOP_GRACE, run).await.unwrap_or(Ok(()))
                    }
                }
            }
        };
        if let Err(error) = ended {
            (self.broken)(key, &proven.identity, &error);
        }
    }
}

fn remove(by_key: &mut HashMap<TunnelKey, KeyTunnels>, key: &TunnelKey, tunnel: &Arc<PooledTunnel>) {
    tunnel.gone.store(true, Ordering::Relaxed);
    if let Some(tunnels) = by_key.get_mut(key) {
        tunnels.open.retain(|other| !Arc::ptr_eq(other, tunnel));
        if tunnels.open.is_empty() && tunnels.dialling.is_none() {
            by_key.remove(key);
        }
    }
}

/// Settles a dial: at the latest when dropped, and only once.
struct DialSettlement<'a> {
    pool: &'a Pool,
    key: &'a TunnelKey,
    outcome: &'a watch::Sender<DialOutcome>,
}

impl DialSettlement<'_> {
    fn with(&self, result: Result<Arc<PooledTunnel>, Arc<TunnelDialError>>) {
        let mut by_key = self.pool.by_key.lock();
        let tunnels = by_key.entry(self.key.clone()).or_default();
        tunnels.dialling = None;
        tunnels.open.retain(|tunnel| !tunnel.gone.load(Ordering::Relaxed));
        tunnels.open.extend(result.iter().cloned());
        if tunnels.open.is_empty() {
            by_key.remove(self.key);
        }
        drop(by_key);
        self.outcome.send_replace(Some(result));
    }
}

impl Drop for DialSettlement<'_> {
    fn drop(&mut self) {
        if self.outcome.borrow().is_none() {
            self.with(Err(Arc::new(TunnelDialError::Draining)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hbone::{self, testing};
    use crate::task::Drain;

    fn key() -> TunnelKey {
        TunnelKey {
            capture: 0,
            pod: "p".into(),
            own: SpiffeName::new("td", "a", "b").unwrap(),
            generation: 1,
            expected: vec![],
            to: "10.0.0.1:15008".parse().unwrap(),
            uid: "u".into(),
            behind: None,
        }
    }

    fn pool(max_streams: usize) -> Arc<Pool> {
        let config = PoolConfig { max_streams, idle: Duration::from_secs(300) };
        Pool::new(config, Group::default(), Box::new(|_, _, _| {}), Box::new(|_| {}))
    }

    /// A tunnel over a real socket, whose far end answers HTTP/2 and ends with `far`.
    async fn dialled(far: Group) -> Result<DialledTunnel, TunnelDialError> {
        dialled_until(far, Arc::default()).await
    }

    /// The same; the far end goes away when it is told to.
    async fn dialled_until(far: Group, leave: Arc<Notify>) -> Result<DialledTunnel, TunnelDialError> {
        let (near, end) = testing::ends().await;
        far.spawn(async move {
            let account = hbone::Buffers::new(1 << 20).account("client");
            let mut server = hbone::Server::start(&testing::engine(), end, &testing::CONFIG, &account).unwrap();
            let mut streams = Vec::new();
            loop {
                tokio::select! {
                    next = server.next() => match next {
                        Some(Ok(incoming)) => streams.push(incoming.accept(None)),
                        _ => return,
                    },
                    () = leave.notified() => server.go_away(),
                }
            }
        });
        let account = hbone::Buffers::new(1 << 20).account("server");
        let (tunnel, driver) = hbone::client::start(&testing::engine(), near, &testing::CONFIG, &account)
            .map_err(TunnelDialError::Http2)?;
        let tls = TlsFacts { version: "", key_exchange: "", cipher: "" };
        let peer = SpiffeName::new("td", "a", "far").unwrap();
        let chain = crate::identity::revoked::Revocations::default().watch(&[]);
        Ok(DialledTunnel { tunnel, tls, peer, chain, driver, entry: None, outer: None, shake: Duration::ZERO })
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_waiters_share_one_failed_dial() {
        let pool = pool(100);
        let (drain, dials) = (Drain::default(), Arc::new(AtomicUsize::new(0)));
        let start = Instant::now();
        let mut waiters = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (pool, signal, dials) = (pool.clone(), drain.signal(), dials.clone());
            waiters.spawn(async move {
                let dial = || {
                    dials.fetch_add(1, Ordering::Relaxed);
                    async {
                        tokio::time::sleep(Duration::from_secs(10)).await;
                        Err(TunnelDialError::Blocked("10.0.0.1:15008".parse().unwrap()))
                    }
                };
                pool.checkout(&key(), &signal, 1, dial).await.map(drop)
            });
        }
        let results = waiters.join_all().await;
        assert!(results.iter().all(|r| r.as_ref().is_err_and(|e| matches!(**e, TunnelDialError::Blocked(_)))));
        assert_eq!(dials.load(Ordering::Relaxed), 1);
        assert!(start.elapsed() < Duration::from_secs(11), "{:?}", start.elapsed());
        assert!(pool.by_key.lock().is_empty(), "a failed dial leaves nothing behind");
    }

    #[tokio::test(start_paused = true)]
    async fn streams_beyond_the_limit_get_a_second_tunnel_and_idle_ones_close() {
        let (pool, drain, far) = (pool(2), Drain::default(), Group::default());
        let signal = drain.signal();
        let mut leases = Vec::new();
        for expected in [1, 1, 2, 2] {
            leases.push(pool.checkout(&key(), &signal, 1, || dialled(far.clone())).await.unwrap());
            assert_eq!(pool.len(), expected);
        }
        leases.truncate(1);
        tokio::time::sleep(Duration::from_secs(301)).await;
        assert_eq!(pool.len(), 1, "the idle tunnel is closed, the used one is kept");
        leases.clear();
        tokio::time::sleep(Duration::from_secs(601)).await;
        assert_eq!(pool.len(), 0);
        assert_eq!(far.len(), 0, "a tunnel that has left the pool is closed, not only forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn behind_a_gateway_streams_are_spread_over_several_tunnels_for_a_while() {
        let (pool, drain, far) = (pool(100), Drain::default(), Group::default());
        let signal = drain.signal();
        let behind = Behind { gateway: Vec::new(), authority: Authority::Host("web".into(), 80) };
        let key = TunnelKey { behind: Some(behind), ..key() };
        let checkout = |spread| pool.checkout(&key, &signal, spread, || dialled(far.clone()));
        let mut leases = Vec::new();
        for (spread, expected) in [(1, 1), (1, 1), (3, 2), (3, 3), (3, 3), (3, 3)] {
            leases.push(checkout(spread).await.unwrap());
            assert_eq!(pool.len(), expected);
        }
        let mut shares: Vec<usize> =
            pool.by_key.lock()[&key].open.iter().map(|tunnel| tunnel.streams.load(Ordering::Relaxed)).collect();
        shares.sort_unstable();
        assert_eq!(shares, [2, 2, 2], "each new stream goes to the tunnel with the fewest");
        leases.truncate(1);
        drop(checkout(3).await.unwrap());
        assert_eq!(pool.len(), 3, "one without streams is used again");
        for _ in 0..20 {
            leases.push(checkout(1000).await.unwrap());
        }
        assert_eq!(pool.len(), SPREAD_MAX);
        tokio::time::sleep(BEHIND_AGE + Duration::from_secs(1)).await;
        assert_eq!((pool.len(), far.len()), (0, SPREAD_MAX), "they take no new streams, and the open ones continue");
        leases.clear();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(far.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_whose_far_end_has_gone_is_replaced() {
        let (pool, drain, far) = (pool(100), Drain::default(), Group::default());
        let signal = drain.signal();
        drop(pool.checkout(&key(), &signal, 1, || dialled(far.clone())).await.unwrap());
        far.cut();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(pool.len(), 0);
        let again = Group::default();
        assert!(pool.checkout(&key(), &signal, 1, || dialled(again.clone())).await.is_ok());
    }

    #[tokio::test]
    async fn a_tunnel_whose_far_end_goes_away_leaves_the_pool_at_once() {
        let config = PoolConfig { max_streams: 100, idle: Duration::from_secs(300) };
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let going_away = move |key: &TunnelKey| said.send(key.clone()).unwrap();
        let pool = Pool::new(config, Group::default(), Box::new(|_, _, _| {}), Box::new(going_away));
        let (drain, far) = (Drain::default(), Group::default());
        let signal = drain.signal();
        for has_stream in [false, true] {
            let leave = Arc::<Notify>::default();
            let dial = || dialled_until(far.clone(), leave.clone());
            let lease = pool.checkout(&key(), &signal, 1, dial).await.unwrap();
            let request = hbone::ConnectRequest {
                authority: Authority::Host("web".into(), 80),
                baggage: None,
                forwarded: None,
                traceparent: None,
                network: None,
            };
            let stream = if has_stream { Some(lease.tunnel().open(&request).await.unwrap()) } else { None };
            assert_eq!(pool.len(), 1);
            leave.notify_one();
            let about = tokio::time::timeout(Duration::from_secs(10), heard.recv()).await.unwrap().unwrap();
            assert_eq!((about, pool.len(), far.len()), (key(), 0, 1), "with a stream: {has_stream}");
            drop((stream, lease));
            far.finished().await;
        }
        assert!(heard.try_recv().is_err(), "once for each tunnel");
    }
}
