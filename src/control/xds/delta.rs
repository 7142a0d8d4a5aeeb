//! The delta protocol as a state machine: what is held, what is asked for, what is answered. Pure: messages in, messages
//! and an update of the facts out.
//!
//! One stream carries both types. Everything is told (wildcard), or for addresses, what was asked for (on demand). What was
//! refused is reported in no version, so that it comes again. A request beyond the server's limit is sent without versions;
//! the complete list that follows says what is gone.

use super::decode::{self, Names};
use super::policy;
use super::resources::{Accepted, ResourceSet};
use crate::mesh::address::{NetworkAddress, NetworkCidr, is_looked_for};
use crate::mesh::snapshot::Told;
use crate::mesh::workload::NetworkMode;
use crate::mesh::{Service, ServiceKey, Text, Update, Wanted, Workload};
use crate::proto::culvert::state::SavedType;
use crate::proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status,
};
use prost::Message;
use std::collections::{HashMap, HashSet, VecDeque};

/// Workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// Requests above this would be refused by istiod, which reads 4 MiB.
const REQUEST_BYTES_MAX: usize = (4 << 20) - (64 << 10);
/// Faults named in one refusal; more are counted.
const FAULTS_NAMED: usize = 20;
/// Bytes of each fault that are named.
const FAULT_BYTES: usize = 300;
/// Notes that are remembered, so that each is made once; beyond it they begin anew.
const NOTES_MAX: usize = 10_000;
/// How many names that nobody has are given up at once.
const EVICTED: usize = 1024;
/// Calls of [`Delta::expire`] after which an answer about ranges is one that is older. It is good for up to twice as many.
const RANGES_TICKS: u32 = 6;
/// Names that may be subscribed to on demand; beyond it some are given up.
const ASKED_MAX: usize = 65_536;

/// The state machine.
#[derive(Debug)]
pub struct Delta {
    address: ResourceSet,
    authorization: ResourceSet,
    on_demand: bool,
    /// Whether resources are kept as they came, for the state file.
    keep: bool,
    /// What was asked for on demand, by name, and in which order.
    asked: HashMap<String, Wanted>,
    asked_order: VecDeque<String>,
    /// Names told of on this stream: the server counts them as asked for.
    delivered: HashSet<String>,
    /// What was found not to exist, since the last call of [`Delta::expire`] and before.
    absent: [HashSet<Wanted>; 2],
    /// About which ranges there has been an answer: likewise, and longer, as each address outside of the mesh needs many.
    ranges: [HashSet<Wanted>; 2],
    /// Calls of [`Delta::expire`] since the last after which such an answer became an older one.
    ticks: u32,
    /// Names that were asked for and that nobody has.
    nobodys: HashSet<String>,
    /// Counts names that nobody has, see [`Delta::ask`].
    nobody: u64,
    names: Names,
    /// What has been noted of policies, and of ranges: by name.
    noted: HashMap<Text, HashSet<String>>,
    /// Ranges that are never looked for, by service; likewise, and not said yet.
    unfound: Vec<String>,
    /// What has been said of which facts are complete.
    told: Told,
}

/// What a response led to.
#[derive(Debug)]
pub struct Received {
    /// The change of the facts.
    pub update: Update,
    /// The answer: an acknowledgement, or a refusal of some resources by name.
    pub answer: DeltaDiscoveryRequest,
    /// What was refused, by name.
    pub faults: Vec<String>,
    /// What was taken as it is and may not do what its author believes, by name; each once.
    pub notes: Vec<String>,
    /// Bytes of the resources.
    pub bytes: usize,
}

/// What the content of a state file leads to.
#[derive(Debug)]
pub struct Restored {
    /// The change of the facts.
    pub update: Update,
    /// What this version does not understand, by name.
    pub faults: Vec<String>,
    /// As in [`Received`].
    pub notes: Vec<String>,
}

/// What is to be reported of the resources of one response.
#[derive(Default)]
struct Findings {
    faults: Vec<String>,
    notes: Vec<String>,
}

impl Delta {
    /// With nothing held.
    pub fn new(on_demand: bool, keep: bool) -> Self {
        Self {
            address: ResourceSet::default(),
            authorization: ResourceSet::default(),
            on_demand,
            keep,
            asked: HashMap::new(),
            asked_order: VecDeque::new(),
            delivered: HashSet::new(),
            absent: Default::default(),
            ranges: Default::default(),
            ticks: 0,
            nobodys: HashSet::new(),
            nobody: 0,
            names: Names::default(),
            noted: HashMap::new(),
            unfound: Vec::new(),
            told: Told::default(),
        }
    }

    /// The first requests of a stream, one for each type. `without_versions`: the server has refused them with versions.
    pub fn open(&mut self, node: &Node, without_versions: bool) -> [DeltaDiscoveryRequest; 2] {
        let first = |kind: &mut ResourceSet, type_url: &str| {
            let versions = kind.held.iter().map(|(name, held)| (name.to_string(), held.version.to_string()));
            kind.answered = false;
            kind.complete = false;
            DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: type_url.to_owned(),
                initial_resource_versions: versions.collect(),
                ..Default::default()
            }
        };
        let mut address = first(&mut self.address, ADDRESS);
        self.delivered = address.initial_resource_versions.keys().cloned().collect();
        if self.on_demand {
            // Both at once mean: nothing but what is named (source: how istiod reads a first request).
            address.resource_names_subscribe =
                std::iter::once("*".to_owned()).chain(self.asked.keys().cloned()).collect();
            address.resource_names_unsubscribe = vec!["*".to_owned()];
        }
        let mut authorization = first(&mut self.authorization, AUTHORIZATION);
        for (request, kind) in [(&mut address, &mut self.address), (&mut authorization, &mut self.authorization)] {
            if without_versions || request.encoded_len() > REQUEST_BYTES_MAX {
                request.initial_resource_versions.clear();
                kind.complete = true;
            }
        }
        [address, authorization]
    }

    /// Requests for what is wanted on demand. Who asks again for what is subscribed gets no answer, so that is given up
    /// first; and who asks for nothing is told by istiod that everything is gone, so a name that nobody has goes with it.
    pub fn ask(&mut self, wanted: Vec<Wanted>) -> (Vec<DeltaDiscoveryRequest>, Update) {
        let (mut again, mut names, mut update) = (Vec::new(), Vec::new(), Update::default());
        let mut once = HashSet::new();
        for wanted in wanted {
            let name = wanted.to_string();
            if !once.insert(name.clone()) {
                continue;
            }
            let asked_before = self.asked.insert(name.clone(), wanted).is_some();
            if !asked_before {
                self.asked_order.push_back(name.clone());
            }
            if asked_before || self.delivered.remove(&name) {
                again.push(name.clone());
            }
            names.push(name);
        }
        let excess = self.asked.len().saturating_sub(ASKED_MAX);
        if excess > 0 {
            // Names that nobody has make room first: of what is there, changes must be heard. What is asked for now stays.
            let now: HashSet<&String> = names.iter().collect();
            let nobodys = self.nobodys.iter().filter(|name| !now.contains(name)).take(excess.max(EVICTED));
            let mut out: HashSet<String> = nobodys.cloned().collect();
            let oldest = self.asked_order.iter().filter(|name| !now.contains(name) && !out.contains(*name));
            let oldest: Vec<String> = oldest.take(excess.saturating_sub(out.len())).cloned().collect();
            out.extend(oldest);
            for name in &out {
                update.forgotten.extend(self.asked.remove(name).into_iter().flat_map(same_name));
                self.nobodys.remove(name);
            }
            for wanted in &update.forgotten {
                for known in self.absent.iter_mut().chain(&mut self.ranges) {
                    known.remove(wanted);
                }
            }
            self.asked_order.retain(|name| !out.contains(name));
            again.extend(out);
        }
        let request = |subscribe: Vec<String>, unsubscribe: Vec<String>| DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..Default::default()
        };
        let mut requests = Vec::new();
        let mut given_up = Vec::new();
        if !again.is_empty() {
            self.nobody += 1;
            let nobody = format!("culvert/nobody-{}", self.nobody);
            requests.push(request(vec![nobody.clone()], again));
            given_up.push(nobody);
        }
        requests.push(request(names, given_up));
        (requests, update)
    }

    /// Takes a response: good resources are applied, bad ones named.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, .. } = response;
        let (mut update, mut findings) = (Update::default(), Findings::default());
        let bytes = resources.iter().map(|r| r.resource.as_ref().map_or(0, |any| any.value.len())).sum();
        match type_url.as_str() {
            ADDRESS => self.addresses(resources, removed_resources, &mut update, &mut findings),
            AUTHORIZATION => self.policies(resources, removed_resources, &mut update, &mut findings),
            other => findings.faults.push(format!("{other:?} was not asked for")),
        }
        // Of each stream anew: what came into being while nobody told us comes by one type first, and is not to be judged
        // without the other.
        let told = Told { addresses: self.address.answered, policies: self.authorization.answered };
        if self.told != told {
            self.told = told;
            update.told = Some(told);
        }
        let Findings { faults, notes } = findings;
        let error_detail = (!faults.is_empty()).then(|| Status {
            // INVALID_ARGUMENT of google.rpc.Code.
            code: 3,
            message: refusal(&faults),
            details: Vec::new(),
        });
        let answer =
            DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..DeltaDiscoveryRequest::default() };
        Received { update, answer, faults, notes, bytes }
    }

    /// Ranges that addresses are never looked for in, since the last call; each once.
    pub fn unfound(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unfound)
    }

    /// Whether each type has had a response, ever.
    pub fn synced(&self) -> bool {
        self.address.synced && self.authorization.synced
    }

    /// Whether each type has had a response on this stream.
    pub fn answered(&self) -> bool {
        self.address.answered && self.authorization.answered
    }

    fn addresses(
        &mut self,
        resources: Vec<Resource>,
        removed: Vec<String>,
        update: &mut Update,
        findings: &mut Findings,
    ) {
        let mut seen = HashSet::new();
        for resource in resources {
            let name = Text::from(resource.name.as_str());
            seen.insert(name.clone());
            let decode = |bytes: &[u8]| decode::address(&name, bytes, &mut self.names);
            let Some(Accepted { value: address, .. }) =
                self.address.accept(resource, self.keep, &mut findings.faults, decode)
            else {
                continue;
            };
            match address {
                decode::Address::Workload(workload) => {
                    self.note_workload(&workload, update);
                    update.workloads.push(*workload);
                }
                decode::Address::Service(service) => {
                    self.note_service(&service, update);
                    update.services.push(*service);
                }
            }
            if self.on_demand {
                self.nobodys.remove(&*name);
                self.delivered.insert(name.to_string());
            }
        }
        let gone = self.address.remove_gone(&seen, removed);
        for name in gone {
            if let Some(wanted) = self.asked.get(&name) {
                same_name(wanted.clone()).into_iter().for_each(|wanted| self.answered_absent(wanted, update));
                self.nobodys.insert(name.clone());
            }
            // A uid has slashes as well; what is neither is nobody's name.
            if let Ok(key) = ServiceKey::parse(&name) {
                update.gone_services.push(key);
            }
            update.gone_workloads.push(name.into());
        }
    }

    fn policies(
        &mut self,
        resources: Vec<Resource>,
        removed: Vec<String>,
        update: &mut Update,
        findings: &mut Findings,
    ) {
        let mut seen = HashSet::new();
        for resource in resources {
            let name = Text::from(resource.name.as_str());
            seen.insert(name.clone());
            let decode = |bytes: &[u8]| policy::policy(&name, bytes);
            let Some(Accepted { value: policy, notes: found }) =
                self.authorization.accept(resource, self.keep, &mut findings.faults, decode)
            else {
                continue;
            };
            update.policies.push(policy);
            findings.notes.extend(self.new_notes(&name, found));
        }
        let gone = self.authorization.remove_gone(&seen, removed);
        for name in &gone {
            self.noted.remove(name.as_str());
        }
        update.gone_policies.extend(gone.into_iter().map(Text::from));
    }

    /// Those of these notes on a policy that have not been made before.
    fn new_notes(&mut self, name: &Text, found: Vec<String>) -> Vec<String> {
        if self.noted.len() >= NOTES_MAX {
            self.noted.clear();
        }
        let found: HashSet<String> = found.into_iter().take(FAULTS_NAMED).collect();
        let before = match found.is_empty() {
            true => self.noted.remove(name),
            false => self.noted.insert(name.clone(), found.clone()),
        };
        let mut new: Vec<String> =
            found.difference(&before.unwrap_or_default()).map(|n| format!("{name}: {n}")).collect();
        new.sort();
        new
    }

    /// An address that was asked for and is that of a node names nobody: that is the answer. Nor does a range begin where a
    /// workload is, as far as istiod tells.
    fn note_workload(&mut self, workload: &Workload, update: &mut Update) {
        let nobodys = workload.network_mode == NetworkMode::HostNetwork;
        for ip in &workload.ips {
            self.note_address(NetworkAddress { network: workload.network.clone(), ip: *ip }, nobodys, update);
        }
    }

    /// An address that was asked for and begins a range of this service is nobody's own: the range is the answer. What istiod
    /// knows of other addresses in it, it says by their own names.
    fn note_service(&mut self, service: &Service, update: &mut Update) {
        let unfound = service.cidrs.iter().filter(|cidr| self.on_demand && !is_looked_for(&cidr.range));
        let unfound: Vec<String> = unfound.map(|cidr| cidr.range.to_string()).collect();
        if !unfound.is_empty() {
            // No policy has a blank in its name.
            let new = self.new_notes(&format!("service {}", service.key).into(), unfound);
            self.unfound.extend(new);
        }
        for vip in &service.vips {
            self.note_address(vip.clone(), false, update);
        }
        for NetworkCidr { network, range } in &service.cidrs {
            self.note_address(NetworkAddress { network: network.clone(), ip: range.network() }, true, update);
        }
    }

    /// Something with this address has come: where that was asked for, it is the answer.
    fn note_address(&mut self, at: NetworkAddress, nobodys: bool, update: &mut Update) {
        if !self.on_demand || !self.asked.contains_key(&at.to_string()) {
            return;
        }
        if nobodys {
            self.answered_absent(Wanted::Address(at.clone()), update);
        }
        self.answered_absent(Wanted::Range(at), update);
    }

    fn answered_absent(&mut self, wanted: Wanted, update: &mut Update) {
        let [newer, _] = if matches!(wanted, Wanted::Range(_)) { &mut self.ranges } else { &mut self.absent };
        newer.insert(wanted.clone());
        update.absent.push(wanted);
    }

    /// Forgets what was found not to exist before the last call but one: istiod tells of what comes into being by its uid,
    /// never by the address that was asked for, so that must be asked again.
    pub fn expire(&mut self) -> Update {
        let older = |[newer, older]: &mut [HashSet<Wanted>; 2]| std::mem::replace(older, std::mem::take(newer));
        let mut forgotten: Vec<Wanted> = older(&mut self.absent).into_iter().collect();
        self.ticks += 1;
        if self.ticks >= RANGES_TICKS {
            self.ticks = 0;
            forgotten.extend(older(&mut self.ranges));
        }
        Update { forgotten, ..Update::default() }
    }

    /// What is held, as it came, for the state file.
    pub fn saved(&self) -> Vec<SavedType> {
        let kind = |type_url: &str, kind: &ResourceSet| SavedType {
            type_url: type_url.to_owned(),
            resources: kind.held.values().filter_map(|held| held.resource.clone()).collect(),
        };
        vec![kind(ADDRESS, &self.address), kind(AUTHORIZATION, &self.authorization)]
    }

    /// Takes the content of a state file as if it had just come from the server.
    pub fn restore(&mut self, types: Vec<SavedType>) -> Restored {
        let (mut update, mut findings) = (Update::default(), Findings::default());
        for saved in types {
            match saved.type_url.as_str() {
                ADDRESS => self.addresses(saved.resources, Vec::new(), &mut update, &mut findings),
                AUTHORIZATION => self.policies(saved.resources, Vec::new(), &mut update, &mut findings),
                _ => {}
            }
        }
        for kind in [&mut self.address, &mut self.authorization] {
            (kind.answered, kind.synced) = (false, false);
        }
        // It is only ever written when it is complete.
        self.told = Told::ALL;
        update.told = Some(self.told);
        Restored { update, faults: findings.faults, notes: findings.notes }
    }
}

/// All that goes by the name of this.
fn same_name(wanted: Wanted) -> Vec<Wanted> {
    match wanted {
        Wanted::Address(at) | Wanted::Range(at) => vec![Wanted::Address(at.clone()), Wanted::Range(at)],
        Wanted::Service(_) | Wanted::Workload(_) => vec![wanted],
    }
}

/// The text of a refusal: some faults by name, the rest by number.
fn refusal(faults: &[String]) -> String {
    let cut = |fault: &String| fault.chars().take(FAULT_BYTES).collect::<String>();
    let mut text = faults.iter().take(FAULTS_NAMED).map(cut).collect::<Vec<_>>().join("; ");
    if faults.len() > FAULTS_NAMED {
        text.push_str(&format!("; and {} more", faults.len() - FAULTS_NAMED));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Store;
    use crate::proto::istio::workload as wire;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn resource(name: &str, version: &str, value: Vec<u8>) -> Resource {
        let any = prost_types::Any { type_url: String::new(), value };
        Resource { name: name.into(), version: version.into(), resource: Some(any), ..Default::default() }
    }

    #[test]
    fn on_demand_the_range_around_an_address_is_the_answer() {
        let at = |ip: &str| Wanted::Address(crate::mesh::address::parse_network_address(ip).unwrap());
        let (first, inside, outside) = (at("/10.97.0.0"), at("/10.97.3.4"), at("/10.98.0.1"));
        let service = wire::Service {
            name: "wide".into(),
            namespace: "a".into(),
            hostname: "wide.a".into(),
            addresses: vec![wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 97, 0, 0].into(),
                length: Some(16),
            }],
            ..Default::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        let answer = response(ADDRESS, vec![resource("a/wide.a", "1", address.encode_to_vec())], &[]);
        for on_demand in [true, false] {
            let mut delta = Delta::new(on_demand, false);
            if on_demand {
                delta.ask(vec![first.clone(), inside.clone(), outside.clone(), at("net/10.97.0.0")]);
            }
            let update = delta.receive(answer.clone()).update;
            // Of others in the range istiod says so itself: one may be a workload whose answer is under way.
            let Wanted::Address(begins) = first.clone() else { unreachable!() };
            let answered = vec![first.clone(), Wanted::Range(begins)];
            assert_eq!(update.absent, if on_demand { answered.clone() } else { vec![] });
            delta.receive(answer.clone());
            delta.expire();
            assert_eq!(delta.expire().forgotten.len(), usize::from(on_demand), "once, however often it is told");
            if on_demand {
                let later: Vec<Wanted> = (2..2 * RANGES_TICKS).flat_map(|_| delta.expire().forgotten).collect();
                assert_eq!(later, answered[1..], "an answer about ranges is good for longer");
            }
            let store = Store::new("".into(), "".into(), on_demand);
            store.update(update);
            let now = store.load();
            assert_eq!(now.unasked(first.clone()), None);
            assert!(now.service_around(&"".into(), "10.97.0.0".parse().unwrap(), "x").is_some());
        }
    }

    #[test]
    fn on_demand_a_range_that_is_never_looked_for_is_said_once() {
        let address = |first: [u8; 4], length| wire::NetworkAddress {
            network: String::new(),
            address: first.to_vec().into(),
            length: Some(length),
        };
        let service = wire::Service {
            name: "all".into(),
            namespace: "a".into(),
            hostname: "all.example".into(),
            addresses: vec![address([0; 4], 0), address([10, 97, 0, 0], 16), address([10, 98, 0, 1], 32)],
            ..Default::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) }.encode_to_vec();
        for on_demand in [true, false] {
            let mut delta = Delta::new(on_demand, false);
            let mut said = |version: &str| {
                delta.receive(response(ADDRESS, vec![resource("a/all.example", version, address.clone())], &[]));
                delta.unfound()
            };
            assert_eq!(said("1"), if on_demand { vec!["service a/all.example: 0.0.0.0/0"] } else { vec![] });
            assert!(said("2").is_empty());
        }
    }

    fn workload(name: &str, ip: u8, version: &str) -> Resource {
        let uid = format!("c1//Pod/a/{name}");
        let workload = wire::Workload {
            uid: uid.clone(),
            name: name.into(),
            namespace: "a".into(),
            addresses: vec![vec![10, 0, 0, ip].into()],
            ..Default::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
        resource(&uid, version, address.encode_to_vec())
    }

    fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "n".into(),
            resources,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_principal_that_can_never_match_is_acknowledged_and_noted_once() {
        use crate::proto::istio::security as wire;
        let policy = |version: &str, principal: &str| {
            let matches = wire::string_match::MatchType::Exact(principal.to_owned());
            let one =
                wire::Match { principals: vec![wire::StringMatch { match_type: Some(matches) }], ..Default::default() };
            let rules = vec![wire::Rule { clauses: vec![wire::Clause { matches: vec![one] }] }];
            let policy = wire::Authorization { name: "p".into(), namespace: "a".into(), rules, ..Default::default() };
            resource("a/p", version, policy.encode_to_vec())
        };
        let mut delta = Delta::new(false, false);
        delta.open(&Node::default(), false);
        let bad = "spiffe://cluster.local/ns/a/sa/b";
        let mut noted = |version: &str, principal: &str, removed: &[&str]| {
            let received = delta.receive(response(AUTHORIZATION, vec![policy(version, principal)], removed));
            assert!(received.answer.error_detail.is_none() && received.update.policies.len() == 1);
            received.notes
        };
        assert!(matches!(noted("1", bad, &[]).as_slice(), [one] if one.starts_with("a/p: rule[0]: principal")));
        assert!(noted("2", bad, &[]).is_empty(), "once");
        assert!(noted("3", &bad[9..], &[]).is_empty());
        assert_eq!(noted("4", bad, &[]).len(), 1, "mended, and broken again");
        delta.receive(response(AUTHORIZATION, vec![], &["a/p"]));
        assert!(delta.noted.is_empty());
    }

    #[test]
    fn what_is_held_is_said_on_a_new_stream_and_what_was_refused_comes_again() {
        let mut delta = Delta::new(false, false);
        let [address, authorization] = delta.open(&Node::default(), false);
        assert!(address.initial_resource_versions.is_empty() && authorization.node.is_some());
        let bad = resource("c1//Pod/a/bad", "7", vec![255]);
        let received = delta.receive(response(ADDRESS, vec![workload("w", 1, "5"), bad], &[]));
        assert_eq!((received.update.workloads.len(), received.faults.len()), (1, 1));
        assert_eq!(received.answer.response_nonce, "n");
        assert!(received.answer.error_detail.is_some_and(|e| e.message.starts_with("c1//Pod/a/bad: ")));
        assert!(!delta.synced(), "policies have not been told of yet");
        let received = delta.receive(response(AUTHORIZATION, vec![], &[]));
        assert!(received.answer.error_detail.is_none() && delta.synced() && delta.answered());
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.initial_resource_versions, [("c1//Pod/a/w".to_owned(), "5".to_owned())].into());
        assert!(!delta.answered());
        // A new version of it is refused: it stays known, so that its removal is heard of, but in no version.
        delta.receive(response(ADDRESS, vec![resource("c1//Pod/a/w", "6", vec![255])], &[]));
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.initial_resource_versions, [("c1//Pod/a/w".to_owned(), String::new())].into());
    }

    #[test]
    fn a_list_that_would_be_too_long_is_left_out_and_the_complete_answer_says_what_is_gone() {
        let mut delta = Delta::new(false, false);
        delta.open(&Node::default(), false);
        let many = (0..60_000).map(|n| workload(&format!("{n}{}", "x".repeat(60)), 1, "1")).collect();
        delta.receive(response(ADDRESS, many, &[]));
        delta.receive(response(AUTHORIZATION, vec![], &[]));
        let [address, _] = delta.open(&Node::default(), false);
        assert!(address.initial_resource_versions.is_empty());
        let received = delta.receive(response(ADDRESS, vec![workload("new", 2, "1")], &[]));
        assert_eq!(received.update.gone_workloads.len(), 60_000);
        let received = delta.receive(response(ADDRESS, vec![workload("other", 3, "1")], &[]));
        assert!(received.update.gone_workloads.is_empty(), "only the first answer of a stream is complete");
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.initial_resource_versions.len(), 2);
        let [address, _] = delta.open(&Node::default(), true);
        assert!(address.initial_resource_versions.is_empty(), "the server has said that it is too long");
    }

    #[test]
    fn who_asks_again_gives_up_first_and_the_oldest_question_makes_room() {
        let mut delta = Delta::new(true, false);
        let wanted = |n: usize| Wanted::Workload(format!("u{n}").into());
        let (requests, _) = delta.ask(vec![wanted(0)]);
        assert_eq!(requests.len(), 1);
        let received = delta.receive(response(ADDRESS, vec![], &["u0", "never-asked"]));
        assert_eq!(received.update.absent, [wanted(0)]);
        let (requests, _) = delta.ask(vec![wanted(0)]);
        assert_eq!(requests[0].resource_names_unsubscribe, ["u0"]);
        assert_eq!(requests[0].resource_names_subscribe, ["culvert/nobody-1"], "never a request for nothing");
        assert_eq!(requests[1].resource_names_subscribe, ["u0"]);
        assert_eq!(requests[1].resource_names_unsubscribe, ["culvert/nobody-1"]);
        assert!(delta.expire().forgotten.is_empty());
        assert_eq!(delta.expire().forgotten, [wanted(0)], "what was absent is asked again some time");
        // What came with something else counts as asked for at the server.
        delta.receive(response(ADDRESS, vec![workload("w", 1, "1")], &[]));
        let (requests, _) = delta.ask(vec![Wanted::Workload("c1//Pod/a/w".into())]);
        assert_eq!(requests[0].resource_names_unsubscribe, ["c1//Pod/a/w"]);
        let (requests, update) = delta.ask((1..ASKED_MAX).map(wanted).collect());
        assert_eq!(
            (requests[0].resource_names_unsubscribe.as_slice(), update.forgotten),
            (&["u0".to_owned()][..], vec![wanted(0)])
        );
        // A host that nobody has makes room before what is there, or may be.
        let host = Wanted::Service(ServiceKey::parse("a/host.example").unwrap());
        delta.ask(vec![host.clone()]);
        delta.receive(response(ADDRESS, vec![], &["a/host.example"]));
        let (requests, update) = delta.ask(vec![wanted(70_000)]);
        assert_eq!(
            (requests[0].resource_names_unsubscribe.as_slice(), update.forgotten),
            (&["a/host.example".to_owned()][..], vec![host])
        );
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.resource_names_subscribe.len(), ASKED_MAX + 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u8, u8),
        Remove(u8),
        Reconnect,
        ReconnectWithoutVersions,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (0..6u8, 1..5u8).prop_map(|(name, ip)| Step::Set(name, ip)),
            3 => (0..6u8).prop_map(Step::Remove),
            1 => Just(Step::Reconnect),
            1 => Just(Step::ReconnectWithoutVersions),
        ]
    }

    proptest! {
        /// A server that keeps to the protocol, with and without versions, and changes that happen while nobody listens.
        #[test]
        fn whatever_happens_the_facts_are_the_servers(steps in prop::collection::vec((step(), any::<bool>()), 0..40), versions: bool) {
            let (mut delta, store) = (Delta::new(false, true), Store::default());
            let mut server: BTreeMap<u8, u8> = BTreeMap::new();
            let mut told: BTreeMap<u8, u8> = BTreeMap::new();
            let name = |id: u8| format!("w{id}");
            let full = |id: u8, ip: u8| workload(&name(id), ip, &if versions { ip.to_string() } else { String::new() });
            let push = |delta: &mut Delta, server: &BTreeMap<u8, u8>, told: &mut BTreeMap<u8, u8>, first: Option<&DeltaDiscoveryRequest>| {
                let known = |id: u8| match first {
                    Some(request) => request.initial_resource_versions.get(&format!("c1//Pod/a/{}", name(id))).cloned(),
                    None => told.get(&id).map(u8::to_string),
                };
                let changed = server.iter().filter(|(id, ip)| match (known(**id), first) {
                    (None, _) => true,
                    (Some(version), _) => version != ip.to_string() || (first.is_some() && !versions),
                });
                let resources = changed.map(|(id, ip)| full(*id, *ip)).collect();
                let gone: Vec<String> = (0..6).filter(|id| known(*id).is_some() && !server.contains_key(id)).map(|id| format!("c1//Pod/a/{}", name(id))).collect();
                let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
                *told = server.clone();
                store.update(delta.receive(response(ADDRESS, resources, &gone)).update);
            };
            let [request, _] = delta.open(&Node::default(), false);
            push(&mut delta, &server, &mut told, Some(&request));
            for (step, tell) in steps {
                let without = matches!(step, Step::ReconnectWithoutVersions);
                match step {
                    Step::Set(id, ip) => drop(server.insert(id, ip)),
                    Step::Remove(id) => drop(server.remove(&id)),
                    Step::Reconnect | Step::ReconnectWithoutVersions => {
                        let [request, _] = delta.open(&Node::default(), without);
                        push(&mut delta, &server, &mut told, Some(&request));
                    }
                }
                if tell {
                    push(&mut delta, &server, &mut told, None);
                }
            }
            push(&mut delta, &server, &mut told, None);
            let held: BTreeMap<String, String> = store.load().workloads().map(|w| (w.name.to_string(), w.ips[0].to_string())).collect();
            let expected = server.iter().map(|(id, ip)| (name(*id), format!("10.0.0.{ip}"))).collect();
            prop_assert_eq!(&held, &expected);
            // The state file gives the same facts.
            let restored = Store::default();
            restored.update(Delta::new(false, true).restore(delta.saved()).update);
            let again: BTreeMap<String, String> = restored.load().workloads().map(|w| (w.name.to_string(), w.ips[0].to_string())).collect();
            prop_assert_eq!(again, expected);
        }
    }
}
