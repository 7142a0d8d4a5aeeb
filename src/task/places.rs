//! Places for those who have not said yet who they are: so many in all, and so many for each source address, so that
//! one source cannot take them all.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Places that each source has even when others have taken all; there are twice as many in all before it has not.
const SPARE: usize = 4;

/// A number of places.
#[derive(Debug)]
pub struct Places {
    max: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The source has as many as one may have.
    #[error("{0} has {1} of them open, as many as one address may have")]
    Source(IpAddr, usize),
    /// All are taken.
    #[error("{0} of them are open, as many as there may be")]
    All(usize),
}

/// A place that is taken; free again when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Places {
    /// `max` places, of which one source may have `each`.
    pub fn new(max: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { max, each, taken: Mutex::default() })
    }

    /// A place for `source`.
    pub fn take(self: &Arc<Self>, source: IpAddr) -> Result<Place, Full> {
        let source = same_owner(source);
        let mut taken = self.taken.lock();
        let all = taken.all;
        let own = taken.by_source.get(&source).copied().unwrap_or(0);
        if own >= self.each {
            return Err(Full::Source(source, own));
        }
        if all >= self.max && (own >= SPARE || all >= self.max * 2) {
            return Err(Full::All(all));
        }
        taken.all += 1;
        *taken.by_source.entry(source).or_default() += 1;
        Ok(Place { places: self.clone(), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.all = taken.all.saturating_sub(1);
        let left = taken.by_source.get_mut(&self.source).map_or(0, |own| {
            *own = own.saturating_sub(1);
            *own
        });
        if left == 0 {
            taken.by_source.remove(&self.source);
        }
    }
}

/// Who has one IPv6 address has all of its /64.
fn same_owner(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(places: &Arc<Places>, source: &str, times: usize) -> Vec<Place> {
        (0..times).map_while(|_| places.take(source.parse().unwrap()).ok()).collect()
    }

    #[test]
    fn one_source_leaves_places_for_others() {
        let places = Places::new(100, 60);
        let greedy = take(&places, "10.0.0.1", 1000);
        assert_eq!(greedy.len(), 60);
        let second = take(&places, "::ffff:10.0.0.2", 1000);
        assert_eq!(second.len(), 40, "until all are taken");
        assert_eq!(take(&places, "10.0.0.3", 1000).len(), 4, "and still each has a few");
        drop(greedy);
        assert_eq!(take(&places, "10.0.0.2", 1000).len(), 20);
        drop(second);
        assert!(places.taken.lock().by_source.is_empty(), "nothing is kept of who has gone");
    }

    #[test]
    fn a_whole_subnet_of_ipv6_is_one_source() {
        let places = Places::new(100, 2);
        let held = [take(&places, "fd00::1", 1), take(&places, "fd00::2", 1)];
        assert!(matches!(places.take("fd00::3".parse().unwrap()), Err(Full::Source(_, 2))));
        assert!(places.take("fd00:0:0:1::1".parse().unwrap()).is_ok());
        drop(held);
    }

    #[test]
    fn there_is_an_end_to_all_places() {
        let places = Places::new(10, 10);
        let held: Vec<_> = (0..100).flat_map(|n| take(&places, &format!("10.0.0.{n}"), 1)).collect();
        assert_eq!(held.len(), 20);
        assert_eq!(places.take("10.0.1.1".parse().unwrap()).err(), Some(Full::All(20)));
    }
}
