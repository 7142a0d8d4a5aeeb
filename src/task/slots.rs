//! Slots for connections whose peer is not authenticated yet: a number in all, and a number for each source address, so
//! that one source cannot take them all.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Slots that each source may have even when the others have taken all. This reserve ends at twice the total.
const SPARE: usize = 4;

/// The slots.
#[derive(Debug)]
pub struct Slots {
    max: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// Why no slot is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSlot {
    /// The source has reached its own limit.
    #[error("{0} has {1} of them open, the limit for one address")]
    Source(IpAddr, usize),
    /// The limit for all sources is reached.
    #[error("{0} of them are open, the limit for all addresses")]
    All(usize),
}

/// A taken slot, which becomes free again when dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    source: IpAddr,
}

impl Slots {
    /// `max` slots, of which one source may take `each`.
    pub fn new(max: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { max, each, taken: Mutex::default() })
    }

    /// Takes a slot for `source`.
    pub fn take(self: &Arc<Self>, source: IpAddr) -> Result<Slot, NoSlot> {
        let source = same_owner(source);
        let mut taken = self.taken.lock();
        let all = taken.all;
        let own = taken.by_source.get(&source).copied().unwrap_or(0);
        if own >= self.each {
            return Err(NoSlot::Source(source, own));
        }
        if all >= self.max && (own >= SPARE || all >= self.max * 2) {
            return Err(NoSlot::All(all));
        }
        taken.all += 1;
        *taken.by_source.entry(source).or_default() += 1;
        Ok(Slot { slots: self.clone(), source })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
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

/// The key under which a source is counted. For IPv6 it is the /64, because whoever has one address of it has all.
fn same_owner(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(slots: &Arc<Slots>, source: &str, times: usize) -> Vec<Slot> {
        (0..times).map_while(|_| slots.take(source.parse().unwrap()).ok()).collect()
    }

    #[test]
    fn one_source_leaves_slots_to_others() {
        let slots = Slots::new(100, 60);
        let greedy = take(&slots, "10.0.0.1", 1000);
        assert_eq!(greedy.len(), 60);
        let second = take(&slots, "::ffff:10.0.0.2", 1000);
        assert_eq!(second.len(), 40, "all the others");
        assert_eq!(take(&slots, "10.0.0.3", 1000).len(), 4, "from the reserve");
        drop(greedy);
        assert_eq!(take(&slots, "10.0.0.2", 1000).len(), 20);
        drop(second);
        assert!(slots.taken.lock().by_source.is_empty(), "sources without a slot are forgotten");
    }

    #[test]
    fn an_ipv6_subnet_is_one_source() {
        let slots = Slots::new(100, 2);
        let held = [take(&slots, "fd00::1", 1), take(&slots, "fd00::2", 1)];
        assert!(matches!(slots.take("fd00::3".parse().unwrap()), Err(NoSlot::Source(_, 2))));
        assert!(slots.take("fd00:0:0:1::1".parse().unwrap()).is_ok());
        drop(held);
    }

    #[test]
    fn the_reserve_ends_at_twice_the_total() {
        let slots = Slots::new(10, 10);
        let held: Vec<_> = (0..100).flat_map(|n| take(&slots, &format!("10.0.0.{n}"), 1)).collect();
        assert_eq!(held.len(), 20);
        assert_eq!(slots.take("10.0.1.1".parse().unwrap()).err(), Some(NoSlot::All(20)));
    }
}
