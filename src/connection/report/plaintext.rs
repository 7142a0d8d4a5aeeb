//! The plaintext connections of a pod, in all and by peer: how many, and when the last one was. The time of the last one
//! answers since when a pod has sent or received no plaintext.

use super::direction::Direction;
use crate::mesh::Text;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::time::SystemTime;

/// Peers of a pod that are counted by name. Further ones are counted together.
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

    /// Adds those of another pod or peer.
    pub fn add(&mut self, other: &Self) {
        for (own, other) in self.0.iter_mut().zip(other.0) {
            own.count += other.count;
            own.open += other.open;
            own.ended = own.ended.max(other.ended);
        }
    }
}

/// The plaintext connections of one pod.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// All of them.
    pub total: Counts,
    /// Those with each peer.
    pub peers: HashMap<Peer, Counts>,
    /// Those with peers for which there was no room.
    pub others: Counts,
}

impl Ledger {
    fn change(&mut self, action: Action, peer: &Peer, change: impl Fn(&mut Tally)) {
        self.total.change(action, &change);
        // A peer that has an entry keeps it, so what begins in an entry also ends there.
        if let Some(counts) = self.peers.get_mut(peer) {
            counts.change(action, change);
        } else if self.peers.len() < PEERS_MAX && self.others == Counts::default() {
            self.peers.entry(peer.clone()).or_default().change(action, change);
        } else {
            self.others.change(action, change);
        }
    }

    /// A connection is carried.
    pub(super) fn begin(&mut self, action: Action, peer: &Peer) {
        self.change(action, peer, |tally| {
            tally.count += 1;
            tally.open += 1;
        });
    }

    /// It has ended.
    pub(super) fn end(&mut self, action: Action, peer: &Peer) {
        let now = SystemTime::now();
        self.change(action, peer, |tally| {
            tally.open = tally.open.saturating_sub(1);
            tally.ended = tally.ended.max(Some(now));
        });
    }

    /// A connection was refused.
    pub(super) fn refuse(&mut self, peer: &Peer) {
        let now = SystemTime::now();
        self.change(Action::Refused, peer, |tally| {
            tally.count += 1;
            tally.ended = tally.ended.max(Some(now));
        });
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
        ledger.begin(Action::Accepted, &peer);
        assert_eq!(ledger.total.of(Action::Accepted).last(later), Some(later));
        ledger.end(Action::Accepted, &peer);
        let accepted = ledger.total.of(Action::Accepted);
        assert!(accepted.last(later).is_some_and(|last| last < later) && accepted.count == 1, "{accepted:?}");
        assert_eq!(ledger.total.of(Action::Opened).last(later), None);
        ledger.refuse(&peer);
        assert_eq!(ledger.peers.get(&peer).map(|counts| counts.of(Action::Refused).count), Some(1));
    }

    #[test]
    fn peers_without_room_are_counted_together_and_nothing_is_lost() {
        let (mut ledger, peer) = (Ledger::default(), |n: u8| Peer::Address([10, 0, 0, n].into()));
        for round in 0..2 {
            for n in 0..200 {
                ledger.begin(Action::Opened, &peer(n));
                ledger.end(Action::Opened, &peer(n));
            }
            let of_peers: u64 = ledger.peers.values().map(|counts| counts.of(Action::Opened).count).sum();
            let others = ledger.others.of(Action::Opened);
            assert_eq!((of_peers, others.count, others.open), (64 * (round + 1), 136 * (round + 1), 0));
        }
        assert_eq!((ledger.total.of(Action::Opened).count, ledger.peers.len()), (400, PEERS_MAX));
    }
}
