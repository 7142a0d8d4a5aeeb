//! The server's side of the protocol: requests in the form of ztunnel's, and each rule by itself.

use super::*;
use crate::control_plane::Catalog;
use crate::control_plane::catalog::{Change, Resource};
use crate::control_plane::serve::difference::Differences;
use crate::control_plane::serve::index::Index;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Node, Status};
use parking_lot::RwLock;
use prost::Message;

/// What all streams of a server share.
#[derive(Default)]
pub(super) struct Server {
    pub(super) catalog: Catalog,
    differences: Differences,
    index: RwLock<Index>,
    /// The edition for first answers; the current one if it is not set.
    pub(super) checkpoint: Option<Arc<Edition>>,
}

impl Server {
    pub(super) fn current(&self) -> Arc<Edition> {
        self.catalog.follow().borrow().clone()
    }

    pub(super) fn next(&self, session: &mut Session) -> Option<DeltaDiscoveryResponse> {
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

pub(super) fn kind_of(url: &str) -> Kind {
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
