//! The server's side of the protocol against our own client, against requests in the form of ztunnel's, and against a
//! list from scratch.

use super::*;
use crate::control::xds::delta::Delta;
use crate::control_plane::Catalog;
use crate::control_plane::catalog::{Change, Resource};
use crate::control_plane::serve::difference::Differences;
use crate::control_plane::serve::index::Index;
use crate::mesh::FactKey;
use crate::mesh::address::parse_network_address;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Node, Status};
use crate::proto::istio::{security, workload as wl};
use parking_lot::RwLock;
use proptest::prelude::*;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What all streams of a server share.
#[derive(Default)]
struct Server {
    catalog: Catalog,
    differences: Differences,
    index: RwLock<Index>,
    /// The edition for first answers; the current one if it is not set.
    checkpoint: Option<Arc<Edition>>,
}

impl Server {
    fn current(&self) -> Arc<Edition> {
        self.catalog.follow().borrow().clone()
    }

    fn next(&self, session: &mut Session) -> Option<DeltaDiscoveryResponse> {
        let current = &self.current();
        self.index.write().advance(current);
        let checkpoint = self.checkpoint.as_ref().unwrap_or(current);
        let view = View { current, checkpoint, differences: &self.differences, index: &self.index };
        let response = session.next(&view)?;
        Some(DeltaDiscoveryResponse::decode(response.bytes().concat().as_slice()).unwrap())
    }

    /// Sends, and has acknowledged, everything. Returns it in short.
    fn all(&self, session: &mut Session) -> Vec<String> {
        let mut said = Vec::new();
        while let Some(response) = self.next(session) {
            said.push(short(&response));
            session.receive(answer(&response, None)).unwrap();
        }
        said
    }
}

fn kind_of(url: &str) -> Kind {
    Kind::ALL.into_iter().find(|kind| kind.url() == url).unwrap()
}

/// A response in short: the type, resources, and what is removed after a minus.
fn short(response: &DeltaDiscoveryResponse) -> String {
    let kind = if kind_of(&response.type_url) == Kind::Address { "address" } else { "authorization" };
    let mut resources: Vec<&str> = response.resources.iter().map(|resource| resource.name.as_str()).collect();
    let mut removed: Vec<&str> = response.removed_resources.iter().map(String::as_str).collect();
    resources.sort();
    removed.sort();
    let removed = if removed.is_empty() { String::new() } else { format!(" - {}", removed.join(" ")) };
    format!("{kind}: {}{removed}", resources.join(" "))
}

fn answer(response: &DeltaDiscoveryResponse, refusal: Option<&str>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail: refusal.map(|text| Status { message: text.into(), ..Default::default() }),
        ..Default::default()
    }
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// A first request.
fn first(kind: Kind, subscribe: &[&str], unsubscribe: &[&str], held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node::default()),
        type_url: kind.url().into(),
        resource_names_subscribe: strings(subscribe),
        resource_names_unsubscribe: strings(unsubscribe),
        initial_resource_versions: held.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        ..Default::default()
    }
}

/// A later request.
fn later(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { node: None, ..first(Kind::Address, subscribe, unsubscribe, &[]) }
}

/// A resource with these further names, services and node.
fn resource(version: &str, aliases: &[&str], services: &[&str], node: &str) -> Option<Arc<Resource>> {
    let texts = |all: &[&str]| all.iter().map(|text| Text::from(*text)).collect();
    let (aliases, services) = (texts(aliases), texts(services));
    Some(Arc::new(Resource { content: Bytes::new(), version: version.into(), aliases, services, node: node.into() }))
}

fn plain(version: &str) -> Option<Arc<Resource>> {
    resource(version, &[], &[], "")
}

fn set(kind: Kind, name: &str, resource: Option<Arc<Resource>>) -> Change {
    (kind, name.into(), resource)
}

/// Two workloads of a service, another workload on node n1, and a policy.
fn served() -> Server {
    let server = Server::default();
    server.catalog.apply(vec![
        set(Kind::Address, "c//Pod/a/w1", resource("1", &["/10.0.0.1"], &["a/web.a"], "n2")),
        set(Kind::Address, "c//Pod/a/w2", resource("1", &["/10.0.0.2"], &["a/web.a"], "n3")),
        set(Kind::Address, "c//Pod/a/own", resource("1", &["/10.0.0.3"], &[], "n1")),
        set(Kind::Address, "a/web.a", resource("1", &["/10.96.0.1", "/10.97.0.0/16"], &[], "")),
        set(Kind::Authorization, "a/p", plain("1")),
    ]);
    server.catalog.set_complete();
    server
}

const ALL: &str = "address: a/web.a c//Pod/a/own c//Pod/a/w1 c//Pod/a/w2";

/// Requests in the form in which ztunnel sends them, and what follows.
#[test]
fn ztunnels_requests_are_answered() {
    use Kind::{Address, Authorization};
    let wildcard = || vec![first(Address, &[], &[], &[]), first(Authorization, &[], &[], &[])];
    let on_demand =
        |held: &[(&str, &str)]| vec![first(Address, &["*"], &["*"], held), first(Authorization, &[], &[], &[])];
    let everything = [("a/web.a", "1"), ("c//Pod/a/own", "1"), ("c//Pod/a/w1", "1"), ("c//Pod/a/w2", "1")];
    let changed = [("a/web.a", "0"), ("c//Pod/a/own", "1"), ("c//Pod/a/w1", ""), ("c//Pod/a/w2", "1"), ("gone", "1")];
    let cases: Vec<(&str, Vec<DeltaDiscoveryRequest>, Vec<&str>)> = vec![
        ("a first start", wildcard(), vec!["authorization: a/p", ALL]),
        (
            "the wildcard by its name",
            vec![first(Address, &["*"], &[], &[]), first(Authorization, &["*"], &[], &[])],
            vec!["authorization: a/p", ALL],
        ),
        (
            "a return with everything",
            vec![first(Address, &[], &[], &everything), first(Authorization, &[], &[], &[("a/p", "1")])],
            vec!["authorization: ", "address: "],
        ),
        (
            "a return after changes: one has another version, one was refused, one is gone",
            vec![first(Address, &[], &[], &changed), first(Authorization, &[], &[], &[("a/q", "1")])],
            vec!["authorization: a/p", "address: a/web.a c//Pod/a/w1 - gone", "authorization:  - a/q"],
        ),
        (
            "on demand, nothing asked: its own node's",
            on_demand(&[]),
            vec!["authorization: a/p", "address: c//Pod/a/own"],
        ),
        (
            "on demand, back with what it held: a name that was pending is answered too",
            on_demand(&[("c//Pod/a/w1", "1"), ("c//Pod/a/w2", ""), ("c//Pod/a/own", "1"), ("c//Pod/a/nobody", "")]),
            vec!["authorization: a/p", "address: c//Pod/a/w2 - c//Pod/a/nobody"],
        ),
        (
            "an unknown type",
            vec![DeltaDiscoveryRequest { type_url: "type.googleapis.com/x.Y".into(), ..first(Address, &[], &[], &[]) }],
            vec![],
        ),
    ];
    for (what, requests, expected) in cases {
        let (server, mut session) = (served(), Session::new("n1".into()));
        requests.into_iter().for_each(|request| drop(session.receive(request).unwrap()));
        assert_eq!(server.all(&mut session), expected, "{what}");
        assert!(server.next(&mut session).is_none(), "{what}: nothing more");
    }
}

#[test]
fn names_are_answered_on_demand() {
    let cases: [(&[&str], &str); 8] = [
        (&["c//Pod/a/w1"], "address: c//Pod/a/w1"),
        (&["/10.0.0.1"], "address: c//Pod/a/w1"),
        (&["/10.96.0.1"], "address: a/web.a c//Pod/a/w1 c//Pod/a/w2"),
        (&["/10.97.0.0/16"], "address: a/web.a c//Pod/a/w1 c//Pod/a/w2"),
        (&["a/web.a"], "address: a/web.a c//Pod/a/w1 c//Pod/a/w2"),
        (&["/10.9.9.9"], "address:  - /10.9.9.9"),
        (&["a/nobody.a", "/10.0.0.2"], "address: c//Pod/a/w2 - a/nobody.a"),
        // It has been told before, and is told again, because somebody waits for the answer.
        (&["c//Pod/a/own"], "address: c//Pod/a/own"),
    ];
    for (names, expected) in cases {
        let (server, mut session) = (served(), Session::new("n1".into()));
        session.receive(first(Kind::Address, &["*"], &["*"], &[])).unwrap();
        session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
        server.all(&mut session);
        session.receive(later(names, &[])).unwrap();
        assert_eq!(server.all(&mut session), [expected], "{names:?}");
        session.receive(later(names, &[])).unwrap();
        assert_eq!(server.all(&mut session), [expected], "{names:?} again");
        // The same by a client that is told everything, if the name is a resource's own.
        let mut session = Session::new("n1".into());
        session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
        session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
        server.all(&mut session);
        session.receive(later(&["c//Pod/a/w1", "nobody"], &[])).unwrap();
        assert_eq!(server.all(&mut session), ["address: c//Pod/a/w1 - nobody"]);
    }
}

#[test]
fn on_demand_changes_reach_who_has_asked_and_nobody_else() {
    let (server, mut session) = (served(), Session::new("n1".into()));
    session.receive(first(Kind::Address, &["*", "/10.96.0.1", "/10.0.0.7"], &["*"], &[])).unwrap();
    session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    assert_eq!(
        server.all(&mut session),
        ["authorization: a/p", "address: a/web.a c//Pod/a/own c//Pod/a/w1 c//Pod/a/w2 - /10.0.0.7"]
    );
    let mut told = |changes: Vec<Change>| {
        server.catalog.apply(changes);
        server.all(&mut session)
    };
    let address = |name: &str, resource| set(Kind::Address, name, resource);
    let other = || resource("2", &["/10.0.0.8"], &["a/other.a"], "n4");
    assert!(told(vec![address("c//Pod/a/other", other()), address("a/other.a", plain("1"))]).is_empty());
    // A new workload of the service, one with an address that was asked for, and one on the client's own node.
    assert_eq!(told(vec![address("c//Pod/a/w3", resource("1", &[], &["a/web.a"], "n2"))]), ["address: c//Pod/a/w3"]);
    assert_eq!(
        told(vec![address("c//Pod/a/late", resource("1", &["/10.0.0.7"], &[], "n2"))]),
        ["address: c//Pod/a/late"]
    );
    assert_eq!(told(vec![address("c//Pod/a/here", resource("1", &[], &[], "n1"))]), ["address: c//Pod/a/here"]);
    // What it holds is kept current, whatever it was told for.
    assert_eq!(told(vec![address("c//Pod/a/w3", resource("2", &[], &[], "n2"))]), ["address: c//Pod/a/w3"]);
    assert_eq!(told(vec![address("c//Pod/a/w3", None), address("c//Pod/a/other", None)]), ["address:  - c//Pod/a/w3"]);
    // The address of the service moves to another one, whose workloads come with it.
    assert_eq!(told(vec![address("c//Pod/a/other", other())]), Vec::<String>::new());
    let moved = vec![address("a/web.a", None), address("a/other.a", resource("2", &["/10.96.0.1"], &[], ""))];
    assert_eq!(told(moved), ["address: a/other.a c//Pod/a/other - a/web.a"]);
    // What it gives up it is told no more.
    session.receive(later(&[], &["c//Pod/a/late", "/10.0.0.7"])).unwrap();
    assert!(
        told_by(&server, &mut session, address("c//Pod/a/late", resource("9", &["/10.0.0.7"], &[], "n2"))).is_empty()
    );
    // It changes its mind, and wants everything.
    session.receive(later(&["*"], &[])).unwrap();
    assert_eq!(server.all(&mut session), ["address: c//Pod/a/late"]);
    session.receive(later(&[], &["*"])).unwrap();
    assert!(told_by(&server, &mut session, address("c//Pod/a/w1", plain("9"))).is_empty());
}

fn told_by(server: &Server, session: &mut Session, change: Change) -> Vec<String> {
    server.catalog.apply(vec![change]);
    server.all(session)
}

#[test]
fn each_type_waits_for_its_answer_and_a_refusal_is_one() {
    let (server, mut session) = (served(), Session::new("".into()));
    session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    let policies = server.next(&mut session).unwrap();
    let addresses = server.next(&mut session).unwrap();
    assert_ne!(policies.nonce, addresses.nonce);
    for n in 2..100 {
        server.catalog.apply(vec![set(Kind::Address, "x", plain(&n.to_string())), set(Kind::Address, "y", None)]);
        assert!(server.next(&mut session).is_none(), "what changes meanwhile waits");
    }
    server.catalog.apply(vec![set(Kind::Address, "c//Pod/a/w1", None), set(Kind::Authorization, "a/q", plain("1"))]);
    for stale in
        [answer(&DeltaDiscoveryResponse { nonce: "7".into(), ..addresses.clone() }, None), answer(&policies, None)]
    {
        let stale = DeltaDiscoveryRequest { type_url: addresses.type_url.clone(), ..stale };
        assert_eq!(session.receive(stale), Ok(Received::Stale));
    }
    assert!(server.next(&mut session).is_none());
    let refusal = answer(&addresses, Some("w1: is bad"));
    assert_eq!(session.receive(refusal), Ok(Received::Refused(Kind::Address, "w1: is bad".into())));
    assert!(server.next(&mut session).is_none(), "policies come first, and theirs are not acknowledged");
    assert_eq!(session.receive(answer(&policies, None)), Ok(Received::Acknowledged(Kind::Authorization)));
    // One response for everything, and nothing of what was refused.
    assert_eq!(server.all(&mut session), ["authorization: a/q", "address: x - c//Pod/a/w1"]);
    assert_eq!(session.receive(answer(&policies, None)), Ok(Received::Stale), "twice");
}

#[test]
fn a_policy_comes_before_the_workloads_that_list_it_and_goes_after_them() {
    let (server, mut session) = (served(), Session::new("".into()));
    session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    server.all(&mut session);
    let changes = [
        set(Kind::Address, "w", plain("2")),
        set(Kind::Authorization, "a/p", None),
        set(Kind::Authorization, "a/q", plain("1")),
    ];
    server.catalog.apply(changes.into());
    assert_eq!(server.all(&mut session), ["authorization: a/q", "address: w", "authorization:  - a/p"]);
}

#[test]
fn nothing_is_said_before_everything_is_listed_and_both_types_are_asked_for() {
    let (server, mut session) = (Server::default(), Session::new("".into()));
    server.catalog.apply(vec![set(Kind::Address, "w", plain("1"))]);
    session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    assert!(server.next(&mut session).is_none());
    server.catalog.set_complete();
    assert!(session.waits_for_policies() && server.next(&mut session).is_none());
    let (mut alone, mut both) = (session, Session::new("".into()));
    alone.stop_waiting();
    assert_eq!(server.all(&mut alone), ["address: w"]);
    both.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    both.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    // Without policies there is an empty answer, by which a client learns that there are none.
    assert_eq!(server.all(&mut both), ["authorization: ", "address: w"]);
    // Somebody who asks for policies later gets them.
    alone.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    assert_eq!(server.all(&mut alone), ["authorization: "]);
}

#[test]
fn the_first_answer_may_be_of_an_older_edition_and_the_rest_follows() {
    let (mut server, mut session) = (served(), Session::new("".into()));
    server.checkpoint = Some(server.current());
    server.catalog.apply(vec![set(Kind::Address, "new", plain("1")), set(Kind::Authorization, "a/p", None)]);
    session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    let all = server.all(&mut session);
    assert_eq!(all, ["authorization: a/p", ALL, "address: new", "authorization:  - a/p"]);
    // Never back: who is at a newer edition stays there.
    let mut session = Session::new("".into());
    session.receive(first(Kind::Authorization, &[], &[], &[])).unwrap();
    server.checkpoint = None;
    assert_eq!(server.all(&mut session), ["authorization: "]);
    let mut oldest = Edition::default();
    oldest.complete = true;
    server.checkpoint = Some(Arc::new(oldest));
    session.receive(first(Kind::Address, &[], &[], &[])).unwrap();
    assert_eq!(server.all(&mut session), [format!("{ALL} new")]);
}

#[test]
fn nobody_asks_for_more_names_than_there_may_be() {
    let mut session = Session::new("".into());
    session.receive(first(Kind::Address, &["*"], &["*"], &[])).unwrap();
    let names: Vec<String> = (0..80_000).map(|n| n.to_string()).collect();
    let many = DeltaDiscoveryRequest { resource_names_subscribe: names.clone(), ..later(&[], &[]) };
    assert_eq!(session.receive(many), Err(TooMuch));
    let mut session = Session::new("".into());
    session.receive(first(Kind::Address, &["*"], &["*"], &[])).unwrap();
    for part in names.chunks(1000).cycle().take(500) {
        let asked = DeltaDiscoveryRequest { resource_names_subscribe: part.to_vec(), ..later(&[], &[]) };
        let given_up = DeltaDiscoveryRequest { resource_names_unsubscribe: part.to_vec(), ..later(&[], &[]) };
        session.receive(asked).unwrap();
        session.receive(given_up).unwrap();
    }
    let long = "x".repeat(17 << 20);
    assert_eq!(session.receive(later(&[&long], &[])), Err(TooMuch));
}

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// Changes are applied together: of workloads (address, service, policies by bits), of services, and of policies.
    Change(Vec<Thing>),
    /// The server sends one response, if it may.
    Send,
    /// The client takes one response, and answers.
    Take,
    /// The server takes one request.
    Request,
    /// The client asks for some names.
    Ask(Vec<u8>),
    /// The stream breaks, and the client comes back, perhaps without the versions of what it holds.
    Reconnect(bool),
    /// First answers are made of this edition from now on.
    Checkpoint,
}

#[derive(Clone, Debug)]
enum Thing {
    /// A workload; what the last number is not a multiple of 7 is good.
    Workload(u8, u8, u8, u8, u8),
    NoWorkload(u8),
    Service(u8, u8),
    NoService(u8),
    Policy(u8, u8),
    NoPolicy(u8),
}

fn thing() -> impl Strategy<Value = Thing> {
    prop_oneof![
        6 => (0..6u8, 0..4u8, 0..4u8, 0..8u8, 1..15u8).prop_map(|(id, ip, service, policies, version)| Thing::Workload(id, ip, service, policies, version)),
        3 => (0..6u8).prop_map(Thing::NoWorkload),
        2 => (0..3u8, 0..4u8).prop_map(|(id, vip)| Thing::Service(id, vip)),
        1 => (0..3u8).prop_map(Thing::NoService),
        3 => (0..3u8, 1..15u8).prop_map(|(id, version)| Thing::Policy(id, version)),
        2 => (0..3u8).prop_map(Thing::NoPolicy),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => prop::collection::vec(thing(), 1..5).prop_map(Step::Change),
        10 => Just(Step::Send),
        10 => Just(Step::Take),
        10 => Just(Step::Request),
        3 => prop::collection::vec(0..20u8, 1..4).prop_map(Step::Ask),
        1 => any::<bool>().prop_map(Step::Reconnect),
        1 => Just(Step::Checkpoint),
    ]
}

/// What is true in the cluster, from which resources are made.
#[derive(Clone, Debug, Default)]
struct Truth {
    /// Address, service, policies, version.
    workloads: BTreeMap<u8, (u8, u8, BTreeSet<u8>, u8)>,
    services: BTreeMap<u8, u8>,
    policies: BTreeMap<u8, u8>,
}

fn uid(id: u8) -> String {
    format!("c//Pod/a/w{id}")
}

/// Bytes that no client understands, for some versions.
fn or_bad(version: u8, good: Vec<u8>) -> Bytes {
    if version.is_multiple_of(7) { vec![255; 9].into() } else { good.into() }
}

impl Truth {
    fn apply(&mut self, thing: &Thing) {
        match thing.clone() {
            Thing::Workload(id, ip, service, policies, version) => {
                let listed = (0..3).filter(|bit| policies & (1 << bit) != 0).collect();
                self.workloads.insert(id, (ip, service, listed, version));
            }
            Thing::NoWorkload(id) => drop(self.workloads.remove(&id)),
            Thing::Service(id, vip) => drop(self.services.insert(id, vip)),
            Thing::NoService(id) => drop(self.services.remove(&id)),
            Thing::Policy(id, version) => drop(self.policies.insert(id, version)),
            Thing::NoPolicy(id) => drop(self.policies.remove(&id)),
        }
    }

    /// All resources. A workload lists only policies that exist.
    fn resources(&self) -> BTreeMap<(Kind, Text), Arc<Resource>> {
        let mut all = BTreeMap::new();
        let mut put = |kind, name: &str, content: Bytes, aliases: Vec<Text>, services: Vec<Text>, node: &str| {
            let version = format!(
                "{:x}",
                content.iter().fold(7u64, |hash, byte| hash.wrapping_mul(1_000_003) ^ u64::from(*byte))
            );
            let (version, node) = (version.into(), node.into());
            all.insert((kind, Text::from(name)), Arc::new(Resource { content, version, aliases, services, node }));
        };
        for (id, (ip, service, policies, version)) in &self.workloads {
            let listed = policies.iter().filter(|id| self.policies.contains_key(id)).map(|id| format!("a/p{id}"));
            let services: Vec<Text> = if *service < 3 { vec![format!("a/s{service}.a").into()] } else { vec![] };
            let workload = wl::Workload {
                uid: uid(*id),
                name: format!("w{id}"),
                namespace: "a".into(),
                addresses: vec![vec![10, 0, 0, *ip].into()],
                authorization_policies: listed.collect(),
                services: services.iter().map(|key| (key.to_string(), wl::PortList::default())).collect(),
                canonical_revision: version.to_string(),
                ..Default::default()
            };
            let address = wl::Address { r#type: Some(wl::address::Type::Workload(workload)) };
            let node = if ip % 2 == 0 { "n1" } else { "n2" };
            put(
                Kind::Address,
                &uid(*id),
                or_bad(*version, address.encode_to_vec()),
                vec![format!("/10.0.0.{ip}").into()],
                services,
                node,
            );
        }
        for (id, vip) in &self.services {
            let service = wl::Service {
                name: format!("s{id}"),
                namespace: "a".into(),
                hostname: format!("s{id}.a"),
                addresses: vec![wl::NetworkAddress { address: vec![10, 96, 0, *vip].into(), ..Default::default() }],
                ..Default::default()
            };
            let address = wl::Address { r#type: Some(wl::address::Type::Service(service)) };
            put(
                Kind::Address,
                &format!("a/s{id}.a"),
                address.encode_to_vec().into(),
                vec![format!("/10.96.0.{vip}").into()],
                vec![],
                "",
            );
        }
        for (id, version) in &self.policies {
            let policy = security::Authorization {
                name: format!("p{id}"),
                namespace: "a".into(),
                action: i32::from(version % 2),
                ..Default::default()
            };
            put(Kind::Authorization, &format!("a/p{id}"), policy.encode_to_vec().into(), vec![], vec![], "");
        }
        all
    }
}

/// A name that a client may ask for.
fn wanted(number: u8) -> FactKey {
    match number {
        0..6 => FactKey::Workload(uid(number).into()),
        6..10 => FactKey::Address(parse_network_address(&format!("/10.0.0.{}", number - 6)).unwrap()),
        10..14 => FactKey::Address(parse_network_address(&format!("/10.96.0.{}", number - 10)).unwrap()),
        14..17 => FactKey::Service(crate::mesh::ServiceKey::parse(&format!("a/s{}.a", number - 14)).unwrap()),
        _ => FactKey::Workload("c//Pod/a/nobody".into()),
    }
}

/// One client with its stream.
struct Client {
    delta: Delta,
    session: Session,
    responses: VecDeque<DeltaDiscoveryResponse>,
    requests: VecDeque<DeltaDiscoveryRequest>,
    asked: BTreeSet<u8>,
}

impl Client {
    fn new(on_demand: bool) -> Self {
        let (delta, session) = (Delta::new(on_demand, true), Session::new("n1".into()));
        let mut client = Self { delta, session, responses: [].into(), requests: [].into(), asked: BTreeSet::new() };
        client.connect(false);
        client
    }

    fn connect(&mut self, without_versions: bool) {
        self.session = Session::new("n1".into());
        self.responses.clear();
        self.requests = self.delta.open(&Node::default(), without_versions).into();
    }

    fn take(&mut self) -> bool {
        let Some(response) = self.responses.pop_front() else { return false };
        self.requests.push_back(self.delta.receive(response).answer);
        true
    }

    fn request(&mut self) -> bool {
        let Some(request) = self.requests.pop_front() else { return false };
        self.session.receive(request).unwrap();
        true
    }

    fn send(&mut self, server: &Server) -> bool {
        let Some(response) = server.next(&mut self.session) else { return false };
        self.responses.push_back(response);
        true
    }

    /// What it holds.
    fn held(&self) -> BTreeMap<(Kind, Text), Vec<u8>> {
        let saved = self.delta.saved().into_iter();
        let of = saved.flat_map(|saved| saved.resources.into_iter().map(move |r| (kind_of(&saved.type_url), r)));
        of.map(|(kind, r)| ((kind, r.name.into()), r.resource.unwrap().value)).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 400 } else { 4000 }))]

    /// After whatever changes, breaks and delays, what a client knows is what a list from scratch would tell it; and at no
    /// time does it hold a workload without a policy that the workload lists.
    #[test]
    fn what_a_node_knows_is_what_a_list_from_scratch_says(
        on_demand: bool,
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let (mut server, mut truth) = (Server::default(), Truth::default());
        server.catalog.set_complete();
        let mut client = Client::new(on_demand);
        // Workloads of which an older state is held, because a later one could not be understood.
        let mut bad = BTreeSet::new();
        for step in steps {
            match step {
                Step::Change(things) => {
                    let before = truth.resources();
                    things.iter().for_each(|thing| truth.apply(thing));
                    let after = truth.resources();
                    let is_bad = |(_, workload): &(_, &(u8, u8, BTreeSet<u8>, u8))| workload.3.is_multiple_of(7);
                    bad.extend(truth.workloads.iter().filter(is_bad).map(|(id, _)| uid(*id)));
                    let gone = before.keys().filter(|key| !after.contains_key(key)).map(|(kind, name)| (*kind, name.clone(), None));
                    let new = after.iter().filter(|(key, new)| before.get(key) != Some(new));
                    let new = new.map(|((kind, name), new)| (*kind, name.clone(), Some(new.clone())));
                    server.catalog.apply(gone.chain(new).collect());
                }
                Step::Send => drop(client.send(&server)),
                Step::Take => drop(client.take()),
                Step::Request => drop(client.request()),
                Step::Ask(numbers) if on_demand => {
                    client.asked.extend(&numbers);
                    let (requests, _) = client.delta.ask(numbers.into_iter().map(wanted).collect());
                    client.requests.extend(requests);
                }
                Step::Ask(_) => {}
                Step::Reconnect(without_versions) => client.connect(without_versions),
                Step::Checkpoint => server.checkpoint = Some(server.current()),
            }
            let held = client.held();
            // On a new stream, a client that has not had both first answers decides nothing.
            if !client.delta.answered() {
                continue;
            }
            for content in held.iter().filter(|((kind, _), _)| *kind == Kind::Address).map(|(_, content)| content) {
                let Some(wl::address::Type::Workload(workload)) = wl::Address::decode(content.as_slice()).unwrap().r#type else { continue };
                for policy in workload.authorization_policies {
                    let is_held = held.contains_key(&(Kind::Authorization, policy.as_str().into()));
                    prop_assert!(is_held || bad.contains(&workload.uid), "{} lists {policy}, which is not held", workload.uid);
                }
            }
        }
        while client.request() || client.send(&server) || client.take() {}
        let (held, all) = (client.held(), truth.resources());
        for key in held.keys() {
            prop_assert!(all.contains_key(key), "{key:?} is gone and still held");
        }
        let services_wanted: BTreeSet<Text> = client.asked.iter().flat_map(|number| meant(&all, *number)).collect();
        for (key, resource) in &all {
            let (kind, name) = key;
            let is_wanted = !on_demand
                || *kind == Kind::Authorization
                || &*resource.node == "n1"
                || services_wanted.contains(name)
                || resource.services.iter().any(|service| services_wanted.contains(service))
                || held.contains_key(key);
            let is_good = resource.content[..] != [255; 9];
            if is_wanted && is_good {
                prop_assert_eq!(held.get(key).map(Vec::as_slice), Some(&resource.content[..]), "{:?}", key);
            }
        }
    }
}

/// The resources that a name means.
fn meant(all: &BTreeMap<(Kind, Text), Arc<Resource>>, number: u8) -> Vec<Text> {
    let name: Text = wanted(number).to_string().into();
    let addresses = all.iter().filter(|((kind, _), _)| *kind == Kind::Address);
    addresses
        .filter(|((_, own), resource)| *own == name || resource.aliases.contains(&name))
        .map(|((_, own), _)| own.clone())
        .collect()
}
