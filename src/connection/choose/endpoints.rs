//! The endpoints that connections of this node may use, as lists that are made once for each change of the facts: for
//! each service, port and place of the clients. Choosing walks no list and allocates nothing. What connections have
//! learnt about an endpoint ([`Standing`]) goes from one list to the next.

use super::metrics::{EvidenceLabel, Metrics};
use super::retry_budget::RetryBudget;
use super::standing::{Evidence, Failures, Standing, Witness};
use crate::mesh::workload::Locality;
use crate::mesh::{Service, ServiceKey, Text, Workload};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rpds::HashTrieMapSync;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Most lists that are kept, and most endpoints in all of them. Beyond that, those that were not used for longest go.
const LISTS_MAX: usize = 4096;
const ENDPOINTS_MAX: usize = 200_000;

/// How long a list that is not used is kept, in milliseconds.
const UNUSED_MAX: u64 = 600_000;

/// How often an endpoint is drawn before all are walked to find one that may be used.
const DRAWS: usize = 8;

/// An endpoint that a connection may use.
#[derive(Clone, Debug)]
pub struct Eligible {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The port on it.
    pub port: u16,
}

/// An endpoint of a list.
#[derive(Debug)]
pub struct Candidate {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The port on it.
    pub port: u16,
    /// How it stands with this node.
    pub standing: Arc<Standing>,
}

impl Candidate {
    /// Whether this is the endpoint of an older list: the same workload with the same addresses and port.
    fn is(&self, other: &Eligible) -> bool {
        self.port == other.port && self.workload.uid == other.workload.uid && self.workload.ips == other.workload.ips
    }
}

/// The endpoints among which a connection chooses, at one version of the facts.
#[derive(Debug, Default)]
pub struct Candidates {
    /// The service, and the version of its endpoints.
    of: Option<(Arc<Service>, u64)>,
    /// Ordered by uid. None has the weight 0.
    all: Box<[Candidate]>,
    /// The sums of the weights up to and including each candidate. Empty if all weights are 1.
    sums: Box<[u64]>,
    /// Whether some only have a host name.
    pub has_hosts: bool,
}

impl Candidates {
    /// Makes a list of endpoints, which are ordered by uid. Those of `before` keep their standing.
    pub fn new(eligible: Vec<Eligible>, before: &Self) -> Self {
        let mut old = before.all.iter().peekable();
        let has_hosts = eligible.iter().any(|one| one.workload.ips.is_empty());
        let usable = eligible.into_iter().filter(|one| one.workload.capacity > 0);
        let candidate = |one: Eligible| {
            while old.next_if(|candidate| candidate.workload.uid < one.workload.uid).is_some() {}
            let known = old.peek().filter(|candidate| candidate.is(&one));
            let standing = known.map(|candidate| candidate.standing.clone()).unwrap_or_default();
            Candidate { workload: one.workload, port: one.port, standing }
        };
        let all: Box<[Candidate]> = usable.map(candidate).collect();
        let weights = || all.iter().map(|candidate| u64::from(candidate.workload.capacity));
        let add = |sum: &mut u64, weight| {
            *sum += weight;
            Some(*sum)
        };
        let sums = if weights().all(|weight| weight == 1) { Box::default() } else { weights().scan(0, add).collect() };
        Self { of: None, all, sums, has_hosts }
    }

    fn eligible(&self) -> Vec<Eligible> {
        let one = |candidate: &Candidate| Eligible { workload: candidate.workload.clone(), port: candidate.port };
        self.all.iter().map(one).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Chooses: of two that are drawn by weight, the one with fewer connections for its weight. Endpoints that are set
    /// aside are used only if there are no others. `None` if nothing is `allowed`.
    pub fn choose(
        &self,
        random: &mut dyn FnMut(u64) -> u64,
        (pod, now): (Witness, u64),
        allowed: impl Fn(&Candidate) -> bool,
    ) -> Option<&Candidate> {
        let is_good = |one: &Candidate| allowed(one) && !one.standing.is_aside(pod, now);
        let first = match self.draw(random, is_good) {
            Some(good) => good,
            None => return self.draw(random, &allowed),
        };
        let other = |one: &Candidate| is_good(one) && !std::ptr::eq(one, first);
        let Some(second) = self.draw(random, other) else { return Some(first) };
        let load = |one: &Candidate, of: &Candidate| {
            u64::from(one.standing.in_flight()).saturating_mul(u64::from(of.workload.capacity))
        };
        let rank = |one, other| (Candidate::is_doubted(one, pod, now), load(one, other));
        Some(if rank(second, first) < rank(first, second) { second } else { first })
    }

    /// Draws one by weight for which `test` holds.
    fn draw(&self, random: &mut dyn FnMut(u64) -> u64, test: impl Fn(&Candidate) -> bool) -> Option<&Candidate> {
        let total = self.sums.last().copied().unwrap_or(self.all.len() as u64);
        if total == 0 {
            return None;
        }
        for _ in 0..DRAWS {
            let drawn = random(total);
            let at = match self.sums.is_empty() {
                true => usize::try_from(drawn).unwrap_or(usize::MAX),
                false => self.sums.partition_point(|sum| *sum <= drawn),
            };
            if let Some(found) = self.all.get(at).filter(|one| test(one)) {
                return Some(found);
            }
        }
        let weight = |one: &&Candidate| u64::from(one.workload.capacity);
        let total: u64 = self.all.iter().filter(|one| test(one)).map(|one| weight(&one)).sum();
        let mut left = if total > 0 { random(total) } else { return None };
        self.all.iter().filter(|one| test(one)).find(|one| {
            let is_here = left < weight(one);
            left = left.saturating_sub(weight(one));
            is_here
        })
    }
}

impl Candidate {
    fn is_doubted(&self, pod: Witness, now: u64) -> bool {
        self.standing.is_doubted(pod, now)
    }
}

/// The place of a client, as far as the choice of an endpoint depends on it.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    network: Text,
    node: Text,
    cluster: Text,
    locality: Locality,
}

impl Place {
    fn of(client: &Workload) -> Self {
        let Workload { network, node, cluster_id, locality, .. } = client;
        Self { network: network.clone(), node: node.clone(), cluster: cluster_id.clone(), locality: locality.clone() }
    }

    fn is_of(&self, client: &Workload) -> bool {
        self.network == client.network
            && self.node == client.node
            && self.cluster == client.cluster_id
            && self.locality == client.locality
    }
}

/// The list for a service, port and place, through all changes of the facts.
#[derive(Debug)]
pub struct EndpointList {
    service: ServiceKey,
    port: u16,
    place: Place,
    current: ArcSwap<Candidates>,
    /// Locked while the list is made again, and while an endpoint is set aside.
    writing: Mutex<()>,
    /// Limits retries.
    pub retries: RetryBudget,
    used: AtomicU64,
}

impl EndpointList {
    fn new(service: &ServiceKey, port: u16, client: &Workload) -> Self {
        Self {
            service: service.clone(),
            port,
            place: Place::of(client),
            current: ArcSwap::default(),
            writing: Mutex::default(),
            retries: RetryBudget::default(),
            used: AtomicU64::new(0),
        }
    }

    /// The current endpoints.
    pub fn candidates(&self) -> Arc<Candidates> {
        self.current.load_full()
    }

    /// The endpoints at a version of the facts; makes the list again if it is of another one.
    fn at(&self, service: &Arc<Service>, version: u64, eligible: impl FnOnce() -> Vec<Eligible>) -> Arc<Candidates> {
        let is_current = |list: &Candidates| {
            list.of.as_ref().is_some_and(|(known, at)| Arc::ptr_eq(known, service) && *at == version)
        };
        let current = self.current.load_full();
        if is_current(&current) {
            return current;
        }
        let _writing = self.writing.lock();
        let current = self.current.load_full();
        if is_current(&current) {
            return current;
        }
        let made = Candidates::new(eligible(), &current);
        let made = Arc::new(Candidates { of: Some((service.clone(), version)), ..made });
        self.current.store(made.clone());
        made
    }

    /// Begins a connection to an endpoint. After a pause, one connection tries it before others do.
    fn begin(&self, standing: &Arc<Standing>, now: u64, percent: usize) {
        if standing.begin(now) {
            let _writing = self.writing.lock();
            if self.may_set_aside(standing, now, percent) {
                standing.await_trial(now);
            }
        }
    }

    /// Records that a connection to an endpoint failed. The endpoint is set aside, or only comes after others if too
    /// many are set aside. Says whether it is newly set aside.
    fn failed(&self, standing: &Arc<Standing>, why: Evidence, seen_by: Witness, now: u64, percent: usize) -> bool {
        let _writing = self.writing.lock();
        standing.failed(why, seen_by, now, self.may_set_aside(standing, now, percent))
    }

    /// Whether an endpoint may be set aside: with it, that is at most `percent` of the list, and not all of it.
    fn may_set_aside(&self, standing: &Arc<Standing>, now: u64, percent: usize) -> bool {
        let current = self.current.load();
        let most = (current.all.len() * percent / 100).min(current.all.len().saturating_sub(1));
        let others = current.all.iter().filter(|one| !Arc::ptr_eq(&one.standing, standing));
        others.filter(|one| one.standing.pause(now).is_some()).count() < most
    }
}

/// An endpoint that a connection has chosen.
#[derive(Clone, Debug)]
pub struct Pick {
    /// The list that it was chosen from.
    pub list: Arc<EndpointList>,
    /// How it stands.
    pub standing: Arc<Standing>,
    /// Whether it is a waypoint, which answers for others.
    pub is_waypoint: bool,
}

impl Pick {
    /// Whether its list has an endpoint beside it and those that were `left`.
    pub fn has_other(&self, left: &[Self]) -> bool {
        let is_left =
            |one: &Candidate| left.iter().chain([self]).any(|pick| Arc::ptr_eq(&pick.standing, &one.standing));
        self.list.current.load().all.iter().any(|one| !is_left(one))
    }
}

/// A connection to a chosen endpoint, from the choice to its end. It counts there until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    endpoints: Arc<EndpointLists>,
    pick: Pick,
    pod: Witness,
}

impl InFlight {
    /// Begins a connection of a pod.
    pub fn begin(endpoints: &Arc<EndpointLists>, pick: Pick, pod: Witness) -> Self {
        pick.list.begin(&pick.standing, endpoints.now(), endpoints.set_aside_max);
        Self { endpoints: endpoints.clone(), pick, pod }
    }

    /// The endpoint has accepted the connection.
    pub fn succeeded(&self) {
        self.pick.standing.succeeded(self.pod);
    }

    /// The endpoint has failed. Says whether it is newly set aside.
    pub fn failed(&self, why: Evidence) -> bool {
        let now = self.endpoints.now();
        self.endpoints.failed(&self.pick.list, &self.pick.standing, why, self.pod, now)
    }

    /// Takes a retry of the connection from the budget, because of what the endpoint did. Fails if there is none left.
    pub fn may_retry(&self, why: Evidence) -> bool {
        let (metrics, is_left) = (&self.endpoints.metrics, self.pick.list.retries.take(self.endpoints.now()));
        if is_left {
            metrics.retries.get_or_create(&EvidenceLabel { reason: why.word() }).inc();
        } else {
            metrics.over_budget.inc();
        }
        is_left
    }

    /// The endpoint.
    pub fn pick(&self) -> &Pick {
        &self.pick
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.pick.standing.end();
    }
}

/// An endpoint that is set aside, to be shown.
#[derive(Clone, Debug)]
pub struct SetAside {
    /// The service.
    pub service: ServiceKey,
    /// Port of the service.
    pub service_port: u16,
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// The port on it.
    pub port: u16,
    /// Why.
    pub failures: Failures,
    /// Milliseconds until it is tried again.
    pub left: u64,
    /// Whether all pods of the node avoid it, or one pod alone.
    pub for_everyone: bool,
}

type Lists = HashTrieMapSync<(ServiceKey, u16), Arc<[Arc<EndpointList>]>>;

/// All lists of the node.
#[derive(Debug)]
pub struct EndpointLists {
    lists: ArcSwap<Lists>,
    /// Locked while lists are added and removed.
    writing: Mutex<()>,
    began: Instant,
    /// Most endpoints of a list that may be set aside at once, in percent.
    set_aside_max: usize,
    metrics: Metrics,
}

impl EndpointLists {
    /// No lists. At most `set_aside_max` percent of the endpoints of a list are set aside at once.
    pub fn new(set_aside_max: usize, metrics: Metrics) -> Self {
        Self { lists: ArcSwap::default(), writing: Mutex::default(), began: Instant::now(), set_aside_max, metrics }
    }

    /// The time in milliseconds, for what is in the lists. It is never 0.
    pub fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// The list for a client's connection to a port of a service, and its endpoints at this version of the service's
    /// endpoints. `eligible` finds them if they are not known.
    pub fn list(
        &self,
        client: &Workload,
        service: &Arc<Service>,
        port: u16,
        version: u64,
        eligible: impl FnOnce() -> Vec<Eligible>,
    ) -> (Arc<EndpointList>, Arc<Candidates>) {
        let (key, now) = ((service.key.clone(), port), self.now());
        let find = |lists: &Lists| lists.get(&key)?.iter().find(|list| list.place.is_of(client)).cloned();
        let known = find(&self.lists.load());
        let Some(list) = known else {
            let made = Arc::new(EndpointList::new(&service.key, port, client));
            made.used.store(now, Ordering::Relaxed);
            let candidates = made.at(service, version, eligible);
            // A pod may ask for every port that a service does not have, and must not take the lists of others.
            if candidates.is_empty() {
                return (made, candidates);
            }
            let _writing = self.writing.lock();
            let lists = self.lists.load_full();
            if let Some(list) = find(&lists) {
                let candidates = list.at(service, version, || candidates.eligible());
                return (list, candidates);
            }
            let mut lists = kept(&lists, now);
            let others = lists.get(&key).into_iter().flat_map(|all| all.iter().cloned());
            let all = others.chain([made.clone()]).collect();
            lists.insert_mut(key.clone(), all);
            self.lists.store(Arc::new(lists));
            return (made, candidates);
        };
        // Written rarely, so that workers do not take the line from each other at every connection.
        if now.saturating_sub(list.used.load(Ordering::Relaxed)) > UNUSED_MAX / 100 {
            list.used.store(now, Ordering::Relaxed);
        }
        let candidates = list.at(service, version, eligible);
        (list, candidates)
    }

    /// The tunnel of a pod to a workload at `to` has said that it goes away. The workload counts as failed for all
    /// services that it is an endpoint of, also as a waypoint.
    pub fn going_away(&self, workload: &Workload, to: SocketAddr, pod: Witness) {
        let (lists, now) = (self.lists.load_full(), self.now());
        let of_it = lists.iter().filter(|((service, _), _)| workload.services.contains_key(service));
        for list in of_it.flat_map(|(_, all)| all.iter()) {
            let candidates = list.candidates();
            let at = candidates.all.binary_search_by(|one| one.workload.uid.cmp(&workload.uid));
            let one = at.ok().and_then(|at| candidates.all.get(at));
            if let Some(one) = one.filter(|one| one.workload.ips.contains(&to.ip())) {
                self.failed(list, &one.standing, Evidence::GoingAway, pod, now);
            }
        }
    }

    /// Records that an endpoint has failed. Says whether it is newly set aside.
    fn failed(&self, list: &EndpointList, standing: &Arc<Standing>, why: Evidence, pod: Witness, now: u64) -> bool {
        let is_new = list.failed(standing, why, pod, now, self.set_aside_max);
        if is_new {
            self.metrics.set_aside.get_or_create(&EvidenceLabel { reason: why.word() }).inc();
        }
        is_new
    }

    /// All endpoints that are set aside, with no order.
    pub fn set_aside(&self) -> Vec<SetAside> {
        let (lists, now) = (self.lists.load_full(), self.now());
        let mut found = Vec::new();
        for list in lists.values().flat_map(|all| all.iter()) {
            for one in &list.candidates().all {
                let Some((left, failures)) = one.standing.pause(now) else { continue };
                found.push(SetAside {
                    service: list.service.clone(),
                    service_port: list.port,
                    workload: one.workload.clone(),
                    port: one.port,
                    failures,
                    left,
                    for_everyone: one.standing.is_for_everyone(),
                });
            }
        }
        found
    }

    /// How many endpoints are set aside.
    pub fn set_aside_count(&self) -> usize {
        let (lists, now) = (self.lists.load_full(), self.now());
        let of = |list: &Arc<EndpointList>| {
            list.current.load().all.iter().filter(|one| one.standing.pause(now).is_some()).count()
        };
        lists.values().flat_map(|all| all.iter()).map(of).sum()
    }
}

/// The lists without those that have not been used for long, and without the least recently used half if there are too
/// many.
fn kept(lists: &Lists, now: u64) -> Lists {
    let mut all: Vec<&Arc<EndpointList>> = lists.values().flat_map(|all| all.iter()).collect();
    let endpoints: usize = all.iter().map(|list| list.current.load().all.len()).sum();
    let is_over = all.len() >= LISTS_MAX || endpoints >= ENDPOINTS_MAX;
    let last = |list: &EndpointList| list.used.load(Ordering::Relaxed);
    let is_old = |list: &EndpointList| now.saturating_sub(last(list)) > UNUSED_MAX;
    if !is_over && !all.iter().any(|list| is_old(list)) {
        return lists.clone();
    }
    all.sort_by_key(|list| std::cmp::Reverse(last(list)));
    let most = if is_over { all.len() / 2 } else { all.len() };
    let mut kept = Lists::default();
    for list in all.into_iter().take(most).filter(|list| !is_old(list)) {
        let key = (list.service.clone(), list.port);
        let others = kept.get(&key).into_iter().flat_map(|all: &Arc<[_]>| all.iter().cloned());
        let all = others.chain([list.clone()]).collect();
        kept.insert_mut(key, all);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::snapshot::tests::{service, workload};
    use proptest::prelude::*;

    const POD: Witness = Witness(1);

    /// Numbers as if at random, the same in every run.
    fn random(mut seed: u64) -> impl FnMut(u64) -> u64 {
        move |limit| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % limit
        }
    }

    fn endpoint(number: usize, capacity: u32) -> Eligible {
        let mut made = workload("a", &format!("w{number:05}"), &format!("10.0.{}.{}", number / 250, number % 250 + 1));
        made.capacity = capacity;
        Eligible { workload: Arc::new(made), port: 8080 }
    }

    /// A service whose endpoints have these weights.
    struct World {
        endpoints: Arc<EndpointLists>,
        service: Arc<Service>,
        version: u64,
        all: Vec<Eligible>,
    }

    impl World {
        fn new(weights: &[u32], percent: usize) -> Self {
            let all = weights.iter().enumerate().map(|(number, weight)| endpoint(number, *weight)).collect();
            let service = Arc::new(service("a", "web", "10.96.0.1", &[(80, 8080)]));
            let endpoints = Arc::new(EndpointLists::new(percent, Metrics::default()));
            Self { endpoints, service, version: 1, all }
        }

        fn list(&self) -> (Arc<EndpointList>, Arc<Candidates>) {
            let client = workload("a", "client", "10.0.0.99");
            self.endpoints.list(&client, &self.service, 80, self.version, || self.all.clone())
        }

        fn choose(&self, random: &mut dyn FnMut(u64) -> u64, now: u64) -> Option<(Pick, String)> {
            let (list, candidates) = self.list();
            let chosen = candidates.choose(random, (POD, now), |_| true)?;
            let pick = Pick { list, standing: chosen.standing.clone(), is_waypoint: false };
            Some((pick, chosen.workload.name.to_string()))
        }

        /// How many connections each endpoint gets.
        fn shares(&self, connections: usize, held: bool) -> Vec<usize> {
            let (mut random, mut shares) = (random(7), vec![0; self.all.len()]);
            for _ in 0..connections {
                let (pick, name) = self.choose(&mut random, 1).unwrap();
                shares[name[1..].parse::<usize>().unwrap()] += 1;
                if held {
                    pick.standing.begin(1);
                }
            }
            shares
        }
    }

    #[test]
    fn a_pod_that_tries_all_ports_of_a_service_takes_no_list_from_others() {
        let world = World::new(&[1, 1], 50);
        let (list, _) = world.list();
        let client = workload("a", "client", "10.0.0.99");
        for port in 1..=u16::MAX {
            if port != 80 {
                world.endpoints.list(&client, &world.service, port, 1, Vec::new);
            }
        }
        assert_eq!(world.endpoints.lists.load().size(), 1);
        assert!(Arc::ptr_eq(&world.list().0, &list), "what is known of its endpoints stays");
    }

    #[test]
    fn connections_are_spread_by_weight() {
        for shares in
            [World::new(&[1, 2, 3, 0], 50).shares(6000, false), World::new(&[1, 2, 3, 0], 50).shares(6000, true)]
        {
            for (share, expected) in shares.iter().zip([1000usize, 2000, 3000, 0]) {
                assert!(share.abs_diff(expected) <= 150, "{shares:?}");
            }
        }
        let shares = World::new(&[1; 10], 50).shares(10_000, false);
        assert!(shares.iter().all(|share| share.abs_diff(1000) < 150), "{shares:?}");
    }

    #[test]
    fn open_connections_are_spread_more_evenly_than_by_chance() {
        let shares = World::new(&[1; 50], 50).shares(5000, true);
        // By chance alone the largest differs from the smallest by about 45.
        let (most, least) = (shares.iter().max().unwrap(), shares.iter().min().unwrap());
        assert!(most - least <= 8, "{shares:?}");
    }

    #[test]
    fn a_standing_stays_through_changes_of_the_facts_and_goes_with_the_address() {
        let mut world = World::new(&[1, 1, 1], 50);
        let (pick, name) = world.choose(&mut |_| 1, 1).unwrap();
        let in_flight = InFlight::begin(&world.endpoints, pick, POD);
        assert!(in_flight.failed(Evidence::Refused));
        let aside = |world: &World| {
            world.list();
            let all = world.endpoints.set_aside();
            all.iter().map(|one| (one.workload.name.to_string(), one.failures.last)).collect::<Vec<_>>()
        };
        assert_eq!(aside(&world), [(name.clone(), Evidence::Refused)]);
        world.version = 2;
        world.all.insert(0, Eligible { workload: Arc::new(workload("a", "a", "10.9.9.9")), port: 8080 });
        world.all.push(endpoint(9, 1));
        assert_eq!(aside(&world), [(name, Evidence::Refused)]);
        world.version = 3;
        for one in &mut world.all {
            Arc::make_mut(&mut one.workload).ips = vec!["10.8.8.8".parse().unwrap()];
        }
        assert_eq!(aside(&world), [], "another pod of the same name");
        assert_eq!(in_flight.pick().standing.in_flight(), 1);
        let standing = in_flight.pick().standing.clone();
        drop(in_flight);
        assert_eq!(standing.in_flight(), 0);
    }

    #[test]
    fn lists_that_are_not_used_go_and_there_are_never_too_many() {
        let lists = EndpointLists::new(50, Metrics::default());
        let client = workload("a", "client", "10.0.0.99");
        let list = |number: usize| {
            let service = Arc::new(service("a", &format!("s{number}"), "10.96.0.1", &[(80, 8080)]));
            lists.list(&client, &service, 80, 1, || vec![endpoint(number, 1)]);
        };
        let count = |lists: &Lists| lists.values().map(|all| all.len()).sum::<usize>();
        (0..3).for_each(list);
        let (kept_all, now) = (kept(&lists.lists.load(), 2), lists.now());
        assert_eq!((count(&kept_all), count(&kept(&lists.lists.load(), now + UNUSED_MAX + 1))), (3, 0));
        (3..LISTS_MAX + 2).for_each(list);
        assert_eq!(count(&lists.lists.load()), LISTS_MAX / 2 + 2);
    }

    #[test]
    fn clients_in_different_places_have_lists_of_their_own() {
        let world = World::new(&[1, 1], 50);
        let mut client = workload("a", "client", "10.0.0.99");
        let list = |client: &Workload| world.endpoints.list(client, &world.service, 80, 1, || world.all.clone()).0;
        let first = list(&client);
        client.name = "another".into();
        assert!(Arc::ptr_eq(&first, &list(&client)), "on the same node");
        client.locality.zone = "elsewhere".into();
        assert!(!Arc::ptr_eq(&first, &list(&client)));
    }

    proptest! {
        /// Whatever fails, an endpoint is found; it is one of the list, with a weight; never more than the limit are set
        /// aside, and those are not chosen meanwhile.
        #[test]
        fn some_endpoint_is_always_found_and_few_are_set_aside(
            weights in prop::collection::vec(0..4u32, 1..12),
            percent in 0..=100usize,
            steps in prop::collection::vec((any::<u64>(), 0..4_000u64, 0..4u8), 1..200),
        ) {
            let (world, mut now) = (World::new(&weights, percent), 1);
            let usable = weights.iter().filter(|weight| **weight > 0).count();
            let most = (usable * percent / 100).min(usable.saturating_sub(1));
            for (seed, pause, outcome) in steps {
                now += pause;
                let Some((pick, name)) = world.choose(&mut random(seed), now) else {
                    prop_assert_eq!(usable, 0);
                    continue;
                };
                prop_assert!(weights[name[1..].parse::<usize>().unwrap()] > 0);
                prop_assert!(!pick.standing.is_aside(POD, now), "{} is set aside", name);
                pick.list.begin(&pick.standing, now, percent);
                let seen_by = if outcome == 3 { Witness::EVERYONE } else { POD };
                match outcome {
                    0 => pick.standing.succeeded(POD),
                    _ => drop(pick.list.failed(&pick.standing, Evidence::Refused, seen_by, now, percent)),
                }
                pick.standing.end();
                let aside = world.list().1.all.iter().filter(|one| one.standing.pause(now).is_some()).count();
                prop_assert!(aside <= most, "{aside} of {usable} at {percent} %");
            }
        }
    }

    #[test]
    fn a_workload_whose_tunnel_goes_away_is_set_aside_for_its_services() {
        // It names its ports itself, or has those of the service.
        leaves_with_ports(&[(80, 8080)]);
        leaves_with_ports(&[]);
    }

    fn leaves_with_ports(ports: &[(u16, u16)]) {
        let mut world = World::new(&[1; 4], 50);
        let key = world.service.key.clone();
        for one in &mut world.all {
            let mut workload = (*one.workload).clone();
            workload.services.insert(key.clone(), ports.iter().copied().collect());
            one.workload = Arc::new(workload);
        }
        world.list();
        let leaves = |number: usize, ip: std::net::IpAddr| {
            world.endpoints.going_away(&world.all[number].workload, SocketAddr::new(ip, 15008), POD);
        };
        leaves(1, "192.0.2.1".parse().unwrap());
        assert!(world.endpoints.set_aside().is_empty(), "the tunnel was to an address that it had before");
        for number in [1, 2, 3] {
            leaves(number, world.all[number].workload.ips[0]);
        }
        let mut aside: Vec<String> =
            world.endpoints.set_aside().iter().map(|one| one.workload.uid.to_string()).collect();
        aside.sort();
        let expected: Vec<String> = world.all[1..3].iter().map(|one| one.workload.uid.to_string()).collect();
        assert_eq!(aside, expected, "at most half of them");
        assert!(world.endpoints.set_aside().iter().all(|one| one.failures.last == Evidence::GoingAway));
    }
}
