//! The names that led a pod to an address: what its questions were answered, for egress policies that name hosts.

use crate::mesh::Text;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// Most addresses that are remembered for one pod. Then the oldest ones are dropped.
const ADDRESSES_MAX: usize = 4096;

/// Most names that are remembered for one address. Many names may share the address of a proxy.
const NAMES_MAX: usize = 32;

/// How long an answer counts at least. Applications keep addresses for longer than answers say.
const TTL_MIN: Duration = Duration::from_secs(600);

/// The names that led one pod to an address.
#[derive(Debug, Default)]
pub struct AnsweredNames {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_address: HashMap<IpAddr, VecDeque<(Text, Instant)>>,
    by_age: VecDeque<IpAddr>,
}

impl AnsweredNames {
    /// Remembers that a question for `name` was answered with these addresses, for `ttl` or [`TTL_MIN`].
    pub fn note(&self, name: &str, addresses: &[IpAddr], ttl: Duration) {
        let until = Instant::now() + ttl.max(TTL_MIN);
        let name = Text::from(name);
        let mut known = self.known.lock();
        let Known { by_address, by_age } = &mut *known;
        for ip in addresses {
            let names = by_address.entry(*ip).or_insert_with(|| {
                by_age.push_back(*ip);
                VecDeque::new()
            });
            names.retain(|(other, _)| *other != name);
            names.push_back((name.clone(), until));
            if names.len() > NAMES_MAX {
                names.pop_front();
            }
        }
        while by_age.len() > ADDRESSES_MAX {
            if let Some(oldest) = by_age.pop_front() {
                by_address.remove(&oldest);
            }
        }
    }

    /// Whether a name has led to all these addresses, and still counts.
    pub fn has_led(&self, name: &str, addresses: &[IpAddr]) -> bool {
        addresses.iter().all(|ip| self.of(*ip).iter().any(|other| **other == *name))
    }

    /// The names that have led to an address and still count.
    pub fn of(&self, ip: IpAddr) -> Vec<Text> {
        let now = Instant::now();
        let known = self.known.lock();
        let names = known.by_address.get(&ip).into_iter().flatten();
        names.filter(|(_, until)| now < *until).map(|(name, _)| name.clone()).collect()
    }
}

/// The names that have led a pod to the address of one connection. Those that counted when it was opened count for as
/// long as it lasts, because a connection outlives the answer that it came from.
#[derive(Clone, Debug)]
pub struct ConnectionNames {
    ip: IpAddr,
    at_opening: Vec<Text>,
}

impl ConnectionNames {
    /// Those of a connection to `ip` that is opened now.
    pub fn at_opening(answered: &AnsweredNames, ip: IpAddr) -> Self {
        Self { ip, at_opening: answered.of(ip) }
    }

    /// Counts a name too.
    pub fn add(&mut self, name: &Text) {
        if !self.at_opening.contains(name) {
            self.at_opening.push(name.clone());
        }
    }

    /// Those that count now.
    pub fn now(&self, answered: &AnsweredNames) -> Vec<Text> {
        let later = answered.of(self.ip).into_iter().filter(|name| !self.at_opening.contains(name));
        self.at_opening.iter().cloned().chain(later).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn ip(n: u32) -> IpAddr {
        Ipv4Addr::from(n).into()
    }

    #[tokio::test(start_paused = true)]
    async fn names_count_for_their_time_and_the_oldest_make_room() {
        let names = AnsweredNames::default();
        names.note("a.example", &[ip(1), ip(2)], Duration::ZERO);
        names.note("b.example", &[ip(1)], TTL_MIN * 2);
        names.note("a.example", &[ip(1)], Duration::ZERO);
        assert_eq!(names.of(ip(1)), ["b.example".into(), "a.example".into()] as [Text; 2]);
        tokio::time::advance(TTL_MIN).await;
        assert_eq!(names.of(ip(1)), ["b.example".into()] as [Text; 1]);
        assert!(names.of(ip(2)).is_empty());
        assert!(names.has_led("b.example", &[ip(1)]) && !names.has_led("b.example", &[ip(1), ip(2)]));
        for n in 0..NAMES_MAX {
            names.note(&format!("{n}.example"), &[ip(1)], TTL_MIN);
        }
        assert!(!names.of(ip(1)).contains(&"b.example".into()), "the oldest name of an address");
        for n in 0..ADDRESSES_MAX {
            names.note("c.example", &[ip(100 + u32::try_from(n).unwrap())], TTL_MIN);
        }
        assert!(names.of(ip(1)).is_empty(), "the oldest address");
        assert_eq!(names.known.lock().by_address.len(), ADDRESSES_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn names_that_count_when_a_connection_is_opened_count_for_its_life() {
        let answered = AnsweredNames::default();
        answered.note("a.example", &[ip(1)], Duration::ZERO);
        let mut first = ConnectionNames::at_opening(&answered, ip(1));
        tokio::time::advance(TTL_MIN * 2).await;
        assert!(answered.of(ip(1)).is_empty(), "the answer is forgotten");
        assert_eq!(first.now(&answered), ["a.example".into()] as [Text; 1]);
        assert!(ConnectionNames::at_opening(&answered, ip(1)).now(&answered).is_empty(), "not for a new connection");
        answered.note("b.example", &[ip(1)], Duration::ZERO);
        answered.note("a.example", &[ip(1)], Duration::ZERO);
        assert_eq!(first.now(&answered), ["a.example".into(), "b.example".into()] as [Text; 2], "and later ones, once");
        first.add(&"c.example".into());
        first.add(&"a.example".into());
        assert_eq!(first.now(&answered).len(), 3);
    }
}
