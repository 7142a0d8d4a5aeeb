//! The daemons that are connected, for the debug page, and a limit on the streams of each.

use super::grpc::OF_ONE;
use super::node::Client;
use crate::control_plane::Caller;
use crate::control_plane::catalog::Kind;
use crate::mesh::Text;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::Semaphore;

/// How many streams one caller may have. A daemon has one, and for a moment two while it reconnects; on some nodes two
/// daemons run during an upgrade, with tokens of their own.
const STREAMS_OF_ONE: usize = 4;

/// What a client has been told of one type.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The edition that was sent last.
    pub sent: u64,
    /// When.
    pub sent_at: Option<SystemTime>,
    /// The edition that was acknowledged or refused last.
    pub acknowledged: u64,
    /// How many responses were refused.
    pub refused: u64,
    /// The words of the last refusal.
    pub last_refusal: Option<String>,
}

/// A connected client.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Who it is.
    pub client: Client,
    /// Whose token it has.
    pub caller: Caller,
    /// Its address.
    pub peer: SocketAddr,
    /// Since when.
    pub since: SystemTime,
    /// Whether it asks for addresses one by one.
    pub on_demand: bool,
    /// What it has been told of addresses and of authorizations.
    pub told: [Told; 2],
}

impl Connected {
    /// What it has been told of one type.
    pub fn told(&mut self, kind: Kind) -> &mut Told {
        let [addresses, authorizations] = &mut self.told;
        match kind {
            Kind::Address => addresses,
            Kind::Authorization => authorizations,
        }
    }
}

/// All connected clients.
#[derive(Debug, Default)]
pub struct Nodes(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    all: BTreeMap<u64, Arc<Mutex<Connected>>>,
    by_caller: BTreeMap<CallerKey, Streams>,
}

/// Namespace, service account, and uid of the pod.
type CallerKey = (Text, Text, Text);

/// The streams of one caller.
#[derive(Debug)]
struct Streams {
    count: usize,
    /// The memory that its large requests may have.
    large: Arc<Semaphore>,
}

/// The place of one stream among those of its caller. It is free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    nodes: Arc<Nodes>,
    caller: CallerKey,
    /// The memory that large requests of one caller may have, so that it leaves memory for others.
    pub large: Arc<Semaphore>,
}

/// The entry of one client, which goes when this is dropped.
#[derive(Debug)]
pub struct Entry {
    place: Place,
    number: u64,
    /// The entry.
    pub state: Arc<Mutex<Connected>>,
}

/// A caller has too many streams.
#[derive(Debug, thiserror::Error)]
#[error("{STREAMS_OF_ONE} streams of this caller are open already")]
pub struct TooMany;

impl Nodes {
    /// A place for a stream of this caller, before anything of it is read.
    pub fn place(self: &Arc<Self>, of: &Caller) -> Result<Place, TooMany> {
        let pod = of.pod.as_ref().map_or_else(|| "".into(), |pod| pod.uid.clone());
        let caller = (of.namespace.clone(), of.service_account.clone(), pod);
        let mut inner = self.0.lock();
        let new = || Streams { count: 0, large: Arc::new(Semaphore::new(OF_ONE)) };
        let streams = inner.by_caller.entry(caller.clone()).or_insert_with(new);
        if streams.count >= STREAMS_OF_ONE {
            return Err(TooMany);
        }
        streams.count += 1;
        let large = streams.large.clone();
        drop(inner);
        Ok(Place { nodes: self.clone(), caller, large })
    }

    /// Adds a client.
    pub fn add(self: &Arc<Self>, place: Place, connected: Connected) -> Entry {
        let mut inner = self.0.lock();
        inner.next += 1;
        let (number, state) = (inner.next, Arc::new(Mutex::new(connected)));
        inner.all.insert(number, state.clone());
        drop(inner);
        Entry { place, number, state }
    }

    /// All of them, in the order in which they came.
    pub fn list(&self) -> Vec<Connected> {
        let all: Vec<_> = self.0.lock().all.values().cloned().collect();
        all.iter().map(|state| state.lock().clone()).collect()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.place.nodes.0.lock().all.remove(&self.number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.nodes.0.lock();
        if let Some(streams) = inner.by_caller.get_mut(&self.caller) {
            streams.count = streams.count.saturating_sub(1);
            if streams.count == 0 {
                inner.by_caller.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::caller::CallerPod;

    #[test]
    fn one_caller_leaves_streams_to_others() {
        let nodes = Arc::<Nodes>::default();
        let add = |uid: &str| {
            let pod = Some(CallerPod { name: "p".into(), uid: uid.into(), node: None });
            let caller = Caller { namespace: "istio-system".into(), service_account: "ztunnel".into(), pod };
            let client = Client { id: "".into(), node: "".into(), version: "".into() };
            let (peer, since) = (([10, 0, 0, 1], 1).into(), SystemTime::UNIX_EPOCH);
            let place = nodes.place(&caller)?;
            let told = Default::default();
            Ok::<_, TooMany>(nodes.add(place, Connected { client, caller, peer, since, on_demand: false, told }))
        };
        let mut greedy: Vec<Entry> = (0..100).map_while(|_| add("1").ok()).collect();
        assert_eq!(greedy.len(), STREAMS_OF_ONE);
        // A client asks for each type at once, with a long list each.
        let half = u32::try_from(OF_ONE / 2).unwrap();
        let take = || greedy[0].place.large.clone().try_acquire_many_owned(half);
        let (_addresses, _policies) = (take().unwrap(), take().unwrap());
        assert!(take().is_err(), "and leaves memory for others");
        let other = add("2").unwrap();
        assert_eq!(nodes.list().len(), STREAMS_OF_ONE + 1);
        greedy.pop();
        assert!(add("1").is_ok());
        drop((greedy, other));
        let inner = nodes.0.lock();
        assert!(inner.all.is_empty() && inner.by_caller.is_empty());
    }
}
