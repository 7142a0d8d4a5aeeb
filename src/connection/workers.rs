//! The worker threads. Each has its own runtime, tunnels and connections. A connection is given to the least loaded
//! worker when it is accepted and stays there: nothing that belongs to it crosses threads afterwards.

use super::accept::listener::{self, Place};
use super::budget::Reservation;
use super::dial::Pool;
use super::dial::pool::TunnelKey;
use super::journeys;
use super::pod::Pod;
use super::report::{Direction, Failure, Record};
use super::worker::{Accepted, Counted, LoadGuard, Shared, Worker};
use crate::connection::choose::Witness;
use crate::hbone::{Engine, TunnelError};
use crate::mesh::SpiffeName;
use crate::mesh::address::canonical;
use crate::sys::original_dst::original_dst;
use crate::sys::socket::reset_on_close;
use crate::task::slots::Slot;
use crate::task::{Group, thread};
use parking_lot::Mutex;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Most accepted sockets that may wait for one worker.
const QUEUE_MAX: usize = 4096;
/// How many more connections than another worker the accepting one may have, before the other gets new ones although it
/// is not prompt.
const UNEVEN_MAX: usize = 16;

/// How long connections may take to report their end when they are cut.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// The listener that accepted a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// Port 15001: opened by the pod.
    Outbound,
    /// Port 15006: to the pod, in plaintext.
    Plaintext,
    /// Port 15008: a tunnel to the pod.
    Tunnel,
    /// Port 15080: asked for by the pod by SOCKS5.
    Socks,
}

impl Entrance {
    /// Direction of its connections.
    pub fn direction(self) -> Direction {
        match self {
            Self::Outbound | Self::Socks => Direction::Outbound,
            Self::Plaintext | Self::Tunnel => Direction::Inbound,
        }
    }
}

/// An accepted socket on its way to its worker.
struct AcceptedSocket {
    journey: Journey,
    /// Counts it as a connection of its pod, also while it waits for the worker.
    active: TaskTrackerToken,
    accepted: Accepted,
    pod: Arc<Pod>,
    place: Place,
}

/// The journey that begins, with what counts it until it ends.
enum Journey {
    Outbound(Reservation),
    Socks(Reservation),
    Plaintext(Reservation),
    Tunnel(Slot),
}

/// A worker, as the other threads see it.
#[derive(Debug)]
struct WorkerHandle {
    worker: Arc<Worker>,
    deliver: mpsc::Sender<AcceptedSocket>,
    runtime: tokio::runtime::Handle,
}

impl WorkerHandle {
    /// Whether it has begun all that it was given. A worker that has not is waiting for a processor: where there are more
    /// workers than free processors, each hand-over would wait for the other worker's turn.
    fn is_prompt(&self) -> bool {
        self.deliver.capacity() == self.deliver.max_capacity()
    }
}

/// All workers of a process.
#[derive(Debug)]
pub struct Workers {
    all: Arc<Vec<WorkerHandle>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Counts the accept loops, so that an end can wait for them.
    accepts: TaskTracker,
    /// Numbers of the workers that get the next accept loops of each [`Entrance`], modulo the number of workers.
    turns: [AtomicUsize; 4],
    stop: CancellationToken,
}

impl Workers {
    /// Starts `config.workers` threads.
    pub fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let (mut all, mut threads) = (Vec::new(), Vec::new());
        for index in 0..shared.config.workers.max(1) {
            let tasks = Group::default();
            let reporter = shared.reporter.clone();
            let broken = move |key: &TunnelKey, peer: &SpiffeName, error: &TunnelError| {
                reporter.tunnel_ended(Direction::Outbound, key.to, peer, error);
            };
            let of_all = shared.clone();
            let going_away = move |key: &TunnelKey| {
                // Behind a gateway it is not known which endpoint it was; the next tunnel may lead to another one.
                if let (None, Some(workload)) = (&key.behind, of_all.mesh.load().workload(&key.uid)) {
                    of_all.endpoints.going_away(workload, key.to, Witness(key.capture));
                }
            };
            let pool = Pool::new(shared.config.pool, tasks.clone(), Box::new(broken), Box::new(going_away));
            let engine = Engine::new(&shared.config.hbone)?;
            let (ticks, load) = Default::default();
            let worker = Arc::new(Worker { shared: shared.clone(), pool, engine, tasks, ticks, load });
            let (deliver, accepted) = mpsc::channel(QUEUE_MAX);
            let (stop, main) = (stop.child_token(), worker.clone());
            let (runtime, thread) = thread::start(format!("culvert-w{index}"), move || run(main, accepted, stop))?;
            all.push(WorkerHandle { worker, deliver, runtime });
            threads.push(thread);
        }
        Ok(Self {
            all: Arc::new(all),
            threads: Mutex::new(threads),
            accepts: TaskTracker::new(),
            turns: Default::default(),
            stop,
        })
    }

    /// Accepts on a pod's listener until the pod drains. The accept loop runs on one worker, as a task of `accepting`.
    /// Each socket goes to the worker with the fewest connections. It stays here if that is this one, or the other is
    /// not prompt and has not far fewer: then no other thread has to wake up.
    pub fn serve(&self, pod: &Arc<Pod>, listener: TcpListener, entrance: Entrance, accepting: &Group) {
        let (all, pod) = (self.all.clone(), pod.clone());
        let [outbound, plaintext, tunnel, socks] = &self.turns;
        let turn = match entrance {
            Entrance::Outbound => outbound,
            Entrance::Plaintext => plaintext,
            Entrance::Tunnel => tunnel,
            Entrance::Socks => socks,
        };
        let home = turn.fetch_add(1, Ordering::Relaxed) % self.all.len().max(1);
        let Some(WorkerHandle { worker, runtime, .. }) = self.all.get(home) else { return };
        let (drain, accepts) = (pod.signal(), self.accepts.token());
        let shared = &worker.shared;
        shared.budget.register(&pod.usage);
        shared.pods.add(&pod);
        shared.reporter.pods.add(&pod.uid, (&pod.namespace, &pod.name), |uid| shared.pods.by_uid(uid).is_some());
        let work = listener::run(listener, drain, move |socket, peer, place| {
            let _accepts = &accepts;
            dispatch(&all, home, &pod, (socket, peer, place), entrance);
        });
        accepting.spawn_on(work, runtime);
    }

    /// Number of tasks of connections, streams and tunnels that are running.
    pub fn running(&self) -> usize {
        self.all.iter().map(|handle| handle.worker.tasks.len()).sum()
    }

    /// Number of tunnels to peers that are open.
    pub fn tunnels(&self) -> usize {
        self.all.iter().map(|handle| handle.worker.pool.len()).sum()
    }

    /// Waits until all accept loops have ended, and then every connection and tunnel. The caller must have given the
    /// order to end before.
    pub async fn finished(&self) {
        self.accepts.close();
        self.accepts.wait().await;
        let idle = |h: &WorkerHandle| h.worker.tasks.len() == 0 && h.is_prompt();
        while !self.all.iter().all(idle) {
            for handle in self.all.iter() {
                handle.worker.tasks.finished().await;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Ends all remaining connections with resets, and then the threads.
    pub async fn cut(&self) {
        // Most connections react to the drain signal and report their own end. The rest is ended after a moment.
        let _ = tokio::time::timeout(CUT_GRACE, self.finished()).await;
        for handle in self.all.iter() {
            handle.worker.tasks.cut();
            handle.worker.engine.cut();
        }
        self.finished().await;
        self.stop.cancel();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // An error means that the thread panicked. There is nothing left to end then.
            let _ = thread.join();
        }
    }
}

/// Runs a worker until `stop` fires.
async fn run(worker: Arc<Worker>, accepted: mpsc::Receiver<AcceptedSocket>, stop: CancellationToken) {
    // As tasks: to wake the future that a runtime blocks on takes two system calls, also on the runtime's own thread.
    let (own, engine, main) = (Group::default(), worker.engine.clone(), worker.clone());
    // Without one of its parts, even one that panicked, a worker would take connections and not carry them.
    own.spawn_part(&stop, async move { main.ticks.run().await });
    own.spawn_part(&stop, begin_journeys(worker, accepted));
    own.spawn_part(&stop, async move {
        if let Err(error) = engine.run().await {
            tracing::error!(%error, "cannot watch the sockets of tunnels; the worker ends");
        }
    });
    stop.cancelled().await;
    own.cut();
    own.finished().await;
}

/// Begins the journeys of the sockets that are given to a worker.
async fn begin_journeys(worker: Arc<Worker>, mut sockets: mpsc::Receiver<AcceptedSocket>) {
    while let Some(AcceptedSocket { journey, active, accepted, pod, place }) = sockets.recv().await {
        let worker = worker.clone();
        worker.tasks.clone().spawn(async move {
            // The next one of this listener may be accepted; it begins after those that wait now.
            drop(place);
            let load = LoadGuard(worker.clone());
            let counted = |load, active, reservation| Counted {
                _load: Some(load),
                _active: active,
                _reservation: reservation,
                _task: worker.tasks.token(),
                _socket: None,
            };
            match journey {
                // Boxed, so that each needs only the memory of its own kind.
                Journey::Outbound(reservation) => {
                    Box::pin(journeys::outbound(&worker, &pod, accepted, counted(load, active, reservation))).await;
                }
                Journey::Socks(reservation) => {
                    Box::pin(journeys::socks(&worker, &pod, accepted, counted(load, active, reservation))).await;
                }
                Journey::Plaintext(_reservation) => {
                    Box::pin(journeys::plaintext(&worker, &pod, accepted)).await;
                    drop((load, active));
                }
                Journey::Tunnel(slot) => {
                    Box::pin(journeys::tunnel(&worker, &pod, accepted, slot)).await;
                    drop((load, active));
                }
            }
        });
    }
}

/// Counts a new socket in the budget, and gives it to the least loaded worker or refuses it. It stays with `home` if no
/// other worker has fewer connections and is prompt, or has far fewer.
fn dispatch(
    all: &[WorkerHandle],
    home: usize,
    pod: &Arc<Pod>,
    (socket, peer, place): (TcpStream, SocketAddr, Place),
    entrance: Entrance,
) {
    if matches!(entrance, Entrance::Plaintext | Entrance::Tunnel) && pod.capture_checks.take_inbound(canonical(peer)) {
        return reset_on_close(&socket);
    }
    let load = |at: usize| all.get(at).map_or(0, |handle| handle.worker.load.load(Ordering::Relaxed));
    let own = load(home);
    let may = |at: usize, handle: &WorkerHandle| at == home || handle.is_prompt() || load(at) + UNEVEN_MAX < own;
    let least = all.iter().enumerate().filter(|(at, handle)| !handle.deliver.is_closed() && may(*at, handle));
    let least = least.min_by_key(|(at, handle)| (handle.worker.load.load(Ordering::Relaxed), *at != home));
    let Some((_, handle)) = least else { return };
    let shared = &handle.worker.shared;
    let refuse = |socket: &TcpStream, failure: Failure| {
        let mut record = Record::begin(&shared.reporter, &pod.uid, entrance.direction(), canonical(peer));
        if entrance == Entrance::Plaintext {
            record.arrived_in_plaintext();
        }
        record.finish(Err(failure));
        reset_on_close(socket);
    };
    let reserve = || shared.budget.reserve(&pod.usage, None);
    let journey = match entrance {
        Entrance::Outbound => reserve().map(Journey::Outbound).map_err(Failure::from),
        Entrance::Socks => reserve().map(Journey::Socks).map_err(Failure::from),
        Entrance::Plaintext => reserve().map(Journey::Plaintext).map_err(Failure::from),
        Entrance::Tunnel => shared.handshakes.take(peer.ip()).map(Journey::Tunnel).map_err(Failure::from),
    };
    let journey = match journey {
        Ok(journey) => journey,
        Err(failure) => {
            // A capture check only has to arrive. It must succeed also on a full node: the pod is still captured.
            let is_check = entrance == Entrance::Outbound
                && original_dst(&socket, peer).is_ok_and(|to| pod.capture_checks.take(canonical(to)));
            return if is_check { reset_on_close(&socket) } else { refuse(&socket, failure) };
        }
    };
    handle.worker.load.fetch_add(1, Ordering::Relaxed);
    let accepted = Accepted { socket, peer, at: Instant::now() };
    let accepted = AcceptedSocket { journey, active: pod.active.token(), accepted, pod: pod.clone(), place };
    if let Err(full) = handle.deliver.try_send(accepted) {
        handle.worker.load.fetch_sub(1, Ordering::Relaxed);
        refuse(&full.into_inner().accepted.socket, Failure::Queue(QUEUE_MAX));
    }
}
