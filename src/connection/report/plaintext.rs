//! The plaintext connections of a pod, in all and by peer: how many, and when the last one was. The time of the last one
//! answers since when a pod has sent or received no plaintext.

use super::direction::Direction;
use crate::mesh::Text;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::time::SystemTime;

/// Peers of a pod that are counted by name in each [`Table`]. Further ones are counted together.
const PEERS_MAX: usize = 64;

/// What has become of a plaintext connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The pod received it.
    Accepted,
    /// The pod opened it.
    Opened,
    /// It was not carried: a policy or limit refused it, or, towards the pod, anything else stood against it.
    Refused,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Accepted, Self::Opened, Self::Refused];

    /// The word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Opened => "opened",
            Self::Refused => "refused",
        }
    }

    /// What a connection that is carried is to the pod.
    pub fn of(direction: Direction) -> Self {
        match direction {
            Direction::Inbound => Self::Accepted,
            Direction::Outbound => Self::Opened,
        }
    }
}

/// The far end of a plaintext connection, by the best name that is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Namespace and name of a workload.
    Workload(Text, Text),
    /// Host name of a service.
    Service(Text),
    /// An address.
    Address(IpAddr),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(namespace, name) => write!(f, "{namespace}/{name}"),
            Self::Service(name) => f.write_str(name),
            Self::Address(ip) => write!(f, "{ip}"),
        }
    }
}

/// Connections of one action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many there were.
    pub count: u64,
    /// How many are open now.
    pub open: u64,
    /// When the last one ended, or was refused.
    ended: Option<SystemTime>,
}

impl Tally {
    /// When the last one was open, or was refused: `now` if one is open; `None` if there was none.
    pub fn last(&self, now: SystemTime) -> Option<SystemTime> {
        if self.open > 0 { Some(now) } else { self.ended }
    }

    /// As it is when all that are open have ended.
    fn ended_by(&self, now: SystemTime) -> Self {
        Self { count: self.count, open: 0, ended: self.last(now) }
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.open += other.open;
        self.ended = self.ended.max(other.ended);
    }
}

/// Connections by action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([Tally; 3]);

impl Counts {
    /// Those of one action.
    pub fn of(&self, action: Action) -> Tally {
        self.0.get(action as usize).copied().unwrap_or_default()
    }

    fn change(&mut self, action: Action, change: impl FnOnce(&mut Tally)) {
        if let Some(tally) = self.0.get_mut(action as usize) {
            change(tally);
        }
    }

    /// As they are when all that are open have ended.
    pub fn ended_by(&self, now: SystemTime) -> Self {
        Self(self.0.map(|tally| tally.ended_by(now)))
    }

    /// Adds those of another pod or peer.
    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| own.add(other));
    }
}

/// Connections of one action and one direction by peer. Each has its own, so that a pod that opens plaintext to many
/// addresses does not hide who sends it plaintext, nor do many that are refused.
#[derive(Clone, Debug, Default)]
struct Table {
    peers: HashMap<Peer, Tally>,
    /// Those with peers for which there was no room.
    others: Tally,
}

impl Table {
    /// A peer that has an entry keeps it, and one without gets none later, so what begins in an entry also ends there.
    fn entry(&mut self, peer: &Peer) -> &mut Tally {
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(peer) {
            return &mut self.others;
        }
        self.peers.entry(peer.clone()).or_default()
    }
}

/// The plaintext connections of one pod.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// All of them.
    pub total: Counts,
    accepted: Table,
    opened: Table,
    refused_inbound: Table,
    refused_outbound: Table,
}

impl Ledger {
    fn change(&mut self, action: Action, direction: Direction, peer: &Peer, change: impl Fn(&mut Tally)) {
        self.total.change(action, &change);
        let table = match (action, direction) {
            (Action::Accepted, _) => &mut self.accepted,
            (Action::Opened, _) => &mut self.opened,
            (Action::Refused, Direction::Inbound) => &mut self.refused_inbound,
            (Action::Refused, Direction::Outbound) => &mut self.refused_outbound,
        };
        change(table.entry(peer));
    }

    /// A connection is carried.
    pub(super) fn begin(&mut self, direction: Direction, peer: &Peer) {
        self.change(Action::of(direction), direction, peer, |tally| {
            tally.count += 1;
            tally.open += 1;
        });
    }

    /// It has ended.
    pub(super) fn end(&mut self, direction: Direction, peer: &Peer) {
        let now = SystemTime::now();
        self.change(Action::of(direction), direction, peer, |tally| {
            tally.open = tally.open.saturating_sub(1);
            tally.ended = tally.ended.max(Some(now));
        });
    }

    /// A connection was refused.
    pub(super) fn refuse(&mut self, direction: Direction, peer: &Peer) {
        let now = SystemTime::now();
        self.change(Action::Refused, direction, peer, |tally| {
            tally.count += 1;
            tally.ended = tally.ended.max(Some(now));
        });
    }

    /// Those with each peer that is counted by name, and all those with others.
    pub fn peers(&self) -> (HashMap<&Peer, Counts>, Counts) {
        let (mut peers, mut others) = (HashMap::<&Peer, Counts>::new(), Counts::default());
        for (action, table) in [
            (Action::Accepted, &self.accepted),
            (Action::Opened, &self.opened),
            (Action::Refused, &self.refused_inbound),
            (Action::Refused, &self.refused_outbound),
        ] {
            for (peer, tally) in &table.peers {
                peers.entry(peer).or_default().change(action, |own| own.add(tally));
            }
            others.change(action, |own| own.add(&table.others));
        }
        (peers, others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_open_connection_counts_as_of_now_and_an_ended_one_as_of_its_end() {
        let (mut ledger, peer) = (Ledger::default(), Peer::Address([10, 0, 0, 1].into()));
        let later = SystemTime::now() + Duration::from_secs(3600);
        ledger.begin(Direction::Inbound, &peer);
        assert_eq!(ledger.total.of(Action::Accepted).last(later), Some(later));
        ledger.end(Direction::Inbound, &peer);
        let accepted = ledger.total.of(Action::Accepted);
        assert!(accepted.last(later).is_some_and(|last| last < later) && accepted.count == 1, "{accepted:?}");
        assert_eq!(ledger.total.of(Action::Opened).last(later), None);
        ledger.refuse(Direction::Inbound, &peer);
        assert_eq!(ledger.peers().0.get(&peer).map(|counts| counts.of(Action::Refused).count), Some(1));
    }

    #[test]
    fn peers_without_room_are_counted_together_and_nothing_is_lost() {
        let (mut ledger, peer) = (Ledger::default(), |n: u8| Peer::Address([10, 0, 0, n].into()));
        for round in 0..2 {
            for n in 0..200 {
                ledger.begin(Direction::Outbound, &peer(n));
                ledger.end(Direction::Outbound, &peer(n));
            }
            let (peers, others) = ledger.peers();
            let of_peers: u64 = peers.values().map(|counts| counts.of(Action::Opened).count).sum();
            let others = others.of(Action::Opened);
            assert_eq!((of_peers, others.count, others.open), (64 * (round + 1), 136 * (round + 1), 0));
        }
        assert_eq!((ledger.total.of(Action::Opened).count, ledger.peers().0.len()), (400, PEERS_MAX));
    }

    #[test]
    fn peers_of_one_kind_do_not_hide_those_of_another() {
        let (mut ledger, peer) = (Ledger::default(), |n: u8| Peer::Address([10, 0, 0, n].into()));
        for n in 0..200 {
            ledger.begin(Direction::Outbound, &peer(n));
            ledger.refuse(Direction::Outbound, &peer(n));
            ledger.refuse(Direction::Inbound, &peer(n));
        }
        // One that no table knows, and one that all know.
        for n in [250, 3] {
            ledger.begin(Direction::Inbound, &peer(n));
        }
        let (peers, others) = ledger.peers();
        let of = |n| Action::ALL.map(|action| peers.get(&peer(n)).map_or(0, |counts| counts.of(action).count));
        assert_eq!((of(250), of(3)), ([1, 0, 0], [1, 1, 2]));
        assert_eq!(Action::ALL.map(|action| others.of(action).count), [0, 136, 272]);
    }
}
