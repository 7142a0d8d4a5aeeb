//! Whatever happens, and in whatever order: what a node knows is what a list from scratch says.

use super::tests::{Server, kind_of};
use super::*;
use crate::control::xds::delta::Delta;
use crate::control_plane::catalog::Resource;
use crate::mesh::FactKey;
use crate::mesh::address::parse_network_address;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Node};
use crate::proto::istio::{security, workload as wl};
use proptest::prelude::*;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

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
        // Workloads of which an older state is held: because a later one could not be understood, or because the client has
        // given up a name for a moment, to ask for it again, and is told nothing of it meanwhile.
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
                    bad.extend(requests.iter().flat_map(|request| request.resource_names_unsubscribe.clone()));
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
