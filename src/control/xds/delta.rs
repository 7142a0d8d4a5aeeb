//! The delta xDS protocol as a state machine: which resources are held, which are requested, and how responses are
//! answered. Pure: it turns messages into messages and into changes of the mesh facts.
//!
//! One stream carries both types. Either the control plane announces everything (wildcard), or it announces addresses
//! only when they are requested (on-demand). A refused resource is reported without a version on the next stream, so
//! that the server sends it again. First requests that would exceed the server's limit are sent without versions; the
//! complete list that follows shows what has been removed.

use super::decode::{self, Names};
use super::policy;
use super::resources::{Accepted, ResourceSet};
use crate::mesh::address::{NetworkAddress, NetworkCidr, is_asked_for};
use crate::mesh::snapshot::Synced;
use crate::mesh::workload::NetworkMode;
use crate::mesh::{FactKey, Service, ServiceKey, Text, Update, Workload};
use crate::proto::culvert::state::SavedType;
use crate::proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status,
};
use prost::Message;
use std::collections::{HashMap, HashSet, VecDeque};

/// Type of workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Type of policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// Both of them.
pub const TYPES: [&str; 2] = [ADDRESS, AUTHORIZATION];

/// Largest request that is sent. istiod accepts 4 MiB.
const REQUEST_BYTES_MAX: usize = (4 << 20) - (64 << 10);
/// How many faults one refusal names; the others are only counted.
const FAULTS_NAMED: usize = 20;
/// Characters of each fault that a refusal contains.
const FAULT_CHARS: usize = 300;
/// For how many resources notes are remembered, so that each is logged once. When there are more, all are forgotten.
const NOTES_MAX: usize = 10_000;
/// How many names of nonexistent resources are unsubscribed at once when there are too many.
const EVICTED: usize = 1024;
/// Answers about address ranges are used for between one and two times this many calls of [`Delta::expire`].
const RANGE_TICKS: u32 = 6;
/// How many names may be subscribed to on demand; when there are more, some are unsubscribed.
const REQUESTED_MAX: usize = 65_536;

/// The state machine of the protocol.
#[derive(Debug)]
pub struct Delta {
    address: ResourceSet,
    authorization: ResourceSet,
    on_demand: bool,
    /// Whether the encoded resources are kept for the state file.
    keep: bool,
    /// What was requested on demand, by name, and the order of the requests.
    requested: HashMap<String, FactKey>,
    request_order: VecDeque<String>,
    /// Names that came on this stream. The server treats them as subscribed.
    delivered: HashSet<String>,
    /// What does not exist according to answers since the last call of [`Delta::expire`], and according to earlier
    /// ones.
    absent: [HashSet<FactKey>; 2],
    /// The same for answers about address ranges. They are kept longer, because each address outside the mesh needs
    /// many.
    ranges: [HashSet<FactKey>; 2],
    /// Calls of [`Delta::expire`] since `ranges` was last aged.
    ticks: u32,
    /// Requested names that do not exist.
    nonexistent: HashSet<String>,
    /// How many placeholder names have been used, see [`Delta::ask`].
    placeholders: u64,
    names: Names,
    /// The notes that have been returned, by the name of the policy or of the service with ranges.
    noted: HashMap<Text, HashSet<String>>,
    /// Ranges of services that are never searched for, and have not been returned yet.
    unsearched: Vec<String>,
    /// Which types of facts have been declared complete to the store.
    synced: Synced,
}

/// The result of a response.
#[derive(Debug)]
pub struct Received {
    /// The change of the mesh facts.
    pub update: Update,
    /// The answer: an acknowledgement, or a refusal of some resources by name.
    pub answer: DeltaDiscoveryRequest,
    /// Faults in resources that were refused or understood only in part, with their names.
    pub faults: Vec<String>,
    /// Notes on values that are used but may not do what their author believes. Each is returned once.
    pub notes: Vec<String>,
    /// Size of the resources in bytes.
    pub bytes: usize,
}

/// The result of reading a state file.
#[derive(Debug)]
pub struct Restored {
    /// The change of the mesh facts.
    pub update: Update,
    /// Faults of resources that this version does not understand, with their names.
    pub faults: Vec<String>,
    /// Notes, as in [`Received`].
    pub notes: Vec<String>,
}

/// What to report about the resources of one message.
#[derive(Default)]
struct Findings {
    faults: Vec<String>,
    notes: Vec<String>,
}

impl Delta {
    /// A state machine that holds nothing.
    pub fn new(on_demand: bool, keep: bool) -> Self {
        Self {
            address: ResourceSet::default(),
            authorization: ResourceSet::default(),
            on_demand,
            keep,
            requested: HashMap::new(),
            request_order: VecDeque::new(),
            delivered: HashSet::new(),
            absent: Default::default(),
            ranges: Default::default(),
            ticks: 0,
            nonexistent: HashSet::new(),
            placeholders: 0,
            names: Names::default(),
            noted: HashMap::new(),
            unsearched: Vec::new(),
            synced: Synced::default(),
        }
    }

    /// The first requests of a stream, one for each type. `without_versions` is set if the server has found them too
    /// large.
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
            // To subscribe to the wildcard and unsubscribe from it at once means: only the named resources (source: how
            // istiod reads a first request).
            address.resource_names_subscribe =
                std::iter::once("*".to_owned()).chain(self.requested.keys().cloned()).collect();
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

    /// Requests for what is wanted on demand.
    ///
    /// istiod does not answer a request for a name that is subscribed already, so such a name is unsubscribed first. To
    /// a subscription of nothing it answers that everything is gone, so the request that unsubscribes also subscribes
    /// to a placeholder name that does not exist.
    pub fn ask(&mut self, wanted: Vec<FactKey>) -> (Vec<DeltaDiscoveryRequest>, Update) {
        let (mut again, mut names, mut update) = (Vec::new(), Vec::new(), Update::default());
        let mut seen = HashSet::new();
        for wanted in wanted {
            let name = wanted.to_string();
            if !seen.insert(name.clone()) {
                continue;
            }
            let is_repeated = self.requested.insert(name.clone(), wanted).is_some();
            if !is_repeated {
                self.request_order.push_back(name.clone());
            }
            if is_repeated || self.delivered.remove(&name) {
                again.push(name.clone());
            }
            names.push(name);
        }
        let excess = self.requested.len().saturating_sub(REQUESTED_MAX);
        if excess > 0 {
            // Nonexistent names are unsubscribed first, because changes of existing resources must not be missed. The
            // names in this request stay.
            let now: HashSet<&String> = names.iter().collect();
            let nonexistent = self.nonexistent.iter().filter(|name| !now.contains(name)).take(excess.max(EVICTED));
            let mut out: HashSet<String> = nonexistent.cloned().collect();
            let oldest = self.request_order.iter().filter(|name| !now.contains(name) && !out.contains(*name));
            let oldest: Vec<String> = oldest.take(excess.saturating_sub(out.len())).cloned().collect();
            out.extend(oldest);
            for name in &out {
                update.forgotten.extend(self.requested.remove(name).into_iter().flat_map(wanted_by_name));
                self.nonexistent.remove(name);
            }
            for wanted in &update.forgotten {
                for known in self.absent.iter_mut().chain(&mut self.ranges) {
                    known.remove(wanted);
                }
            }
            self.request_order.retain(|name| !out.contains(name));
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
            self.placeholders += 1;
            let placeholder = format!("culvert/nobody-{}", self.placeholders);
            requests.push(request(vec![placeholder.clone()], again));
            given_up.push(placeholder);
        }
        requests.push(request(names, given_up));
        (requests, update)
    }

    /// Processes a response. Valid resources are applied, the others are named in the answer.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, .. } = response;
        let (mut update, mut findings) = (Update::default(), Findings::default());
        let bytes = resources.iter().map(|r| r.resource.as_ref().map_or(0, |any| any.value.len())).sum();
        match type_url.as_str() {
            ADDRESS => self.addresses(resources, removed_resources, &mut update, &mut findings),
            AUTHORIZATION => self.policies(resources, removed_resources, &mut update, &mut findings),
            other => findings.faults.push(format!("{other:?} was not asked for")),
        }
        // This starts again with each stream. Resources that were created while there was no stream arrive one type
        // after the other, and workloads must not be used without the new policies.
        let synced = Synced { addresses: self.address.answered, policies: self.authorization.answered };
        if self.synced != synced {
            self.synced = synced;
            update.synced = Some(synced);
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

    /// Address ranges that are never searched for on demand, since the last call. Each is returned once.
    pub fn unsearched_ranges(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unsearched)
    }

    /// Whether there has ever been a response of each type.
    pub fn synced(&self) -> bool {
        self.address.synced && self.authorization.synced
    }

    /// Whether there has been a response of each type on this stream.
    pub fn answered(&self) -> bool {
        self.address.answered && self.authorization.answered
    }

    /// Applies workloads and services.
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
                    self.answer_by_workload(&workload, update);
                    update.workloads.push(*workload);
                }
                decode::Address::Service(service) => {
                    self.answer_by_service(&service, update);
                    update.services.push(*service);
                }
            }
            if self.on_demand {
                self.nonexistent.remove(&*name);
                self.delivered.insert(name.to_string());
            }
        }
        let gone = self.address.remove_gone(&seen, removed);
        for name in gone {
            if let Some(wanted) = self.requested.get(&name) {
                wanted_by_name(wanted.clone()).into_iter().for_each(|wanted| self.mark_absent(wanted, update));
                self.nonexistent.insert(name.clone());
            }
            // The uid of a workload contains slashes too, so the name counts as both.
            if let Ok(key) = ServiceKey::parse(&name) {
                update.gone_services.push(key);
            }
            update.gone_workloads.push(name.into());
        }
    }

    /// Applies policies.
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

    /// Those notes on a resource that have not been returned before.
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

    /// Treats a workload as the answer to requests for its addresses. A requested address that is a node's has no
    /// workload of its own. No range starts at the address of a workload, as far as istiod announces.
    fn answer_by_workload(&mut self, workload: &Workload, update: &mut Update) {
        let has_no_owner = workload.network_mode == NetworkMode::HostNetwork;
        for ip in &workload.ips {
            self.answer_address(NetworkAddress { network: workload.network.clone(), ip: *ip }, has_no_owner, update);
        }
    }

    /// Treats a service as the answer to requests for its addresses. A requested address at the start of a range has no
    /// owner other than the range. For other addresses in the range istiod answers by their own names.
    fn answer_by_service(&mut self, service: &Service, update: &mut Update) {
        let unsearched = service.cidrs.iter().filter(|cidr| self.on_demand && !is_asked_for(&cidr.range));
        let unsearched: Vec<String> = unsearched.map(|cidr| cidr.range.to_string()).collect();
        if !unsearched.is_empty() {
            // Names of policies contain no blank, so this key is never a policy's.
            let new = self.new_notes(&format!("service {}", service.key).into(), unsearched);
            self.unsearched.extend(new);
        }
        for vip in &service.vips {
            self.answer_address(vip.clone(), false, update);
        }
        for NetworkCidr { network, range } in &service.cidrs {
            self.answer_address(NetworkAddress { network: network.clone(), ip: range.network() }, true, update);
        }
    }

    /// Treats a received resource with this address as the answer, if the address was requested.
    fn answer_address(&mut self, at: NetworkAddress, has_no_owner: bool, update: &mut Update) {
        if !self.on_demand || !self.requested.contains_key(&at.to_string()) {
            return;
        }
        if has_no_owner {
            self.mark_absent(FactKey::Address(at.clone()), update);
        }
        self.mark_absent(FactKey::Range(at), update);
    }

    /// Records that something that was requested does not exist.
    fn mark_absent(&mut self, wanted: FactKey, update: &mut Update) {
        let [newer, _] = if matches!(wanted, FactKey::Range(_)) { &mut self.ranges } else { &mut self.absent };
        newer.insert(wanted.clone());
        update.absent.push(wanted);
    }

    /// Forgets what was found not to exist before the last call but one. istiod announces new workloads by uid, never
    /// by the address that was requested, so the address must be requested again.
    pub fn expire(&mut self) -> Update {
        let older = |[newer, older]: &mut [HashSet<FactKey>; 2]| std::mem::replace(older, std::mem::take(newer));
        let mut forgotten: Vec<FactKey> = older(&mut self.absent).into_iter().collect();
        self.ticks += 1;
        if self.ticks >= RANGE_TICKS {
            self.ticks = 0;
            forgotten.extend(older(&mut self.ranges));
        }
        Update { forgotten, ..Update::default() }
    }

    /// The held resources, encoded, for the state file.
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
        // The file is only written when both types are complete.
        self.synced = Synced::ALL;
        update.synced = Some(self.synced);
        Restored { update, faults: findings.faults, notes: findings.notes }
    }
}

/// Everything that is requested by the same name.
fn wanted_by_name(wanted: FactKey) -> Vec<FactKey> {
    match wanted {
        FactKey::Address(at) | FactKey::Range(at) => vec![FactKey::Address(at.clone()), FactKey::Range(at)],
        FactKey::Service(_) | FactKey::Workload(_) => vec![wanted],
    }
}

/// The text of a refusal: the first faults, and the number of the others.
fn refusal(faults: &[String]) -> String {
    let cut = |fault: &String| fault.chars().take(FAULT_CHARS).collect::<String>();
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
        let at = |ip: &str| FactKey::Address(crate::mesh::address::parse_network_address(ip).unwrap());
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
            // For other addresses in the range istiod answers itself: one may be a workload whose answer is still to
            // come.
            let FactKey::Address(begins) = first.clone() else { unreachable!() };
            let answered = vec![first.clone(), FactKey::Range(begins)];
            assert_eq!(update.absent, if on_demand { answered.clone() } else { vec![] });
            delta.receive(answer.clone());
            delta.expire();
            assert_eq!(delta.expire().forgotten.len(), usize::from(on_demand), "once, however often it is announced");
            if on_demand {
                let later: Vec<FactKey> = (2..2 * RANGE_TICKS).flat_map(|_| delta.expire().forgotten).collect();
                assert_eq!(later, answered[1..], "an answer about ranges is used for longer");
            }
            let store = Store::new("".into(), "".into(), on_demand);
            store.update(update);
            let now = store.load();
            assert_eq!(now.unasked(first.clone()), None);
            assert!(now.service_around(&"".into(), "10.97.0.0".parse().unwrap(), "x").is_some());
        }
    }

    #[test]
    fn on_demand_a_range_that_is_never_searched_for_is_reported_once() {
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
            let mut reported = |version: &str| {
                delta.receive(response(ADDRESS, vec![resource("a/all.example", version, address.clone())], &[]));
                delta.unsearched_ranges()
            };
            assert_eq!(reported("1"), if on_demand { vec!["service a/all.example: 0.0.0.0/0"] } else { vec![] });
            assert!(reported("2").is_empty());
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
        assert_eq!(noted("4", bad, &[]).len(), 1, "corrected, and wrong again");
        delta.receive(response(AUTHORIZATION, vec![], &["a/p"]));
        assert!(delta.noted.is_empty());
    }

    #[test]
    fn a_new_stream_lists_held_versions_and_asks_for_refused_resources_again() {
        let mut delta = Delta::new(false, false);
        let [address, authorization] = delta.open(&Node::default(), false);
        assert!(address.initial_resource_versions.is_empty() && authorization.node.is_some());
        let bad = resource("c1//Pod/a/bad", "7", vec![255]);
        let received = delta.receive(response(ADDRESS, vec![workload("w", 1, "5"), bad], &[]));
        assert_eq!((received.update.workloads.len(), received.faults.len()), (1, 1));
        assert_eq!(received.answer.response_nonce, "n");
        assert!(received.answer.error_detail.is_some_and(|e| e.message.starts_with("c1//Pod/a/bad: ")));
        assert!(!delta.synced(), "policies have not been announced yet");
        let received = delta.receive(response(AUTHORIZATION, vec![], &[]));
        assert!(received.answer.error_detail.is_none() && delta.synced() && delta.answered());
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.initial_resource_versions, [("c1//Pod/a/w".to_owned(), "5".to_owned())].into());
        assert!(!delta.answered());
        // After a refused update the resource is still listed, so that its removal is noticed, but without a version.
        delta.receive(response(ADDRESS, vec![resource("c1//Pod/a/w", "6", vec![255])], &[]));
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.initial_resource_versions, [("c1//Pod/a/w".to_owned(), String::new())].into());
    }

    #[test]
    fn a_list_of_versions_that_is_too_long_is_left_out_and_the_complete_answer_shows_removals() {
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
        assert!(address.initial_resource_versions.is_empty(), "the server has found it too large");
    }

    #[test]
    fn a_repeated_request_unsubscribes_first_and_the_oldest_one_makes_room() {
        let mut delta = Delta::new(true, false);
        let wanted = |n: usize| FactKey::Workload(format!("u{n}").into());
        let (requests, _) = delta.ask(vec![wanted(0)]);
        assert_eq!(requests.len(), 1);
        let received = delta.receive(response(ADDRESS, vec![], &["u0", "never-asked"]));
        assert_eq!(received.update.absent, [wanted(0)]);
        let (requests, _) = delta.ask(vec![wanted(0)]);
        assert_eq!(requests[0].resource_names_unsubscribe, ["u0"]);
        assert_eq!(requests[0].resource_names_subscribe, ["culvert/nobody-1"], "never a subscription to nothing");
        assert_eq!(requests[1].resource_names_subscribe, ["u0"]);
        assert_eq!(requests[1].resource_names_unsubscribe, ["culvert/nobody-1"]);
        assert!(delta.expire().forgotten.is_empty());
        assert_eq!(delta.expire().forgotten, [wanted(0)], "what did not exist is requested again some time");
        // The server treats what came along with something else as subscribed.
        delta.receive(response(ADDRESS, vec![workload("w", 1, "1")], &[]));
        let (requests, _) = delta.ask(vec![FactKey::Workload("c1//Pod/a/w".into())]);
        assert_eq!(requests[0].resource_names_unsubscribe, ["c1//Pod/a/w"]);
        let (requests, update) = delta.ask((1..REQUESTED_MAX).map(wanted).collect());
        assert_eq!(
            (requests[0].resource_names_unsubscribe.as_slice(), update.forgotten),
            (&["u0".to_owned()][..], vec![wanted(0)])
        );
        // A nonexistent host makes room before resources that exist, or may exist.
        let host = FactKey::Service(ServiceKey::parse("a/host.example").unwrap());
        delta.ask(vec![host.clone()]);
        delta.receive(response(ADDRESS, vec![], &["a/host.example"]));
        let (requests, update) = delta.ask(vec![wanted(70_000)]);
        assert_eq!(
            (requests[0].resource_names_unsubscribe.as_slice(), update.forgotten),
            (&["a/host.example".to_owned()][..], vec![host])
        );
        let [address, _] = delta.open(&Node::default(), false);
        assert_eq!(address.resource_names_subscribe.len(), REQUESTED_MAX + 1);
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
        /// A server that follows the protocol, with and without versions, and changes that happen between streams.
        #[test]
        fn whatever_happens_the_facts_are_the_servers(steps in prop::collection::vec((step(), any::<bool>()), 0..40), versions: bool) {
            let (mut delta, store) = (Delta::new(false, true), Store::default());
            let mut server: BTreeMap<u8, u8> = BTreeMap::new();
            let mut announced: BTreeMap<u8, u8> = BTreeMap::new();
            let name = |id: u8| format!("w{id}");
            let full = |id: u8, ip: u8| workload(&name(id), ip, &if versions { ip.to_string() } else { String::new() });
            let push = |delta: &mut Delta, server: &BTreeMap<u8, u8>, announced: &mut BTreeMap<u8, u8>, first: Option<&DeltaDiscoveryRequest>| {
                let known = |id: u8| match first {
                    Some(request) => request.initial_resource_versions.get(&format!("c1//Pod/a/{}", name(id))).cloned(),
                    None => announced.get(&id).map(u8::to_string),
                };
                let changed = server.iter().filter(|(id, ip)| match (known(**id), first) {
                    (None, _) => true,
                    (Some(version), _) => version != ip.to_string() || (first.is_some() && !versions),
                });
                let resources = changed.map(|(id, ip)| full(*id, *ip)).collect();
                let gone: Vec<String> = (0..6).filter(|id| known(*id).is_some() && !server.contains_key(id)).map(|id| format!("c1//Pod/a/{}", name(id))).collect();
                let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
                *announced = server.clone();
                store.update(delta.receive(response(ADDRESS, resources, &gone)).update);
            };
            let [request, _] = delta.open(&Node::default(), false);
            push(&mut delta, &server, &mut announced, Some(&request));
            for (step, tell) in steps {
                let without = matches!(step, Step::ReconnectWithoutVersions);
                match step {
                    Step::Set(id, ip) => drop(server.insert(id, ip)),
                    Step::Remove(id) => drop(server.remove(&id)),
                    Step::Reconnect | Step::ReconnectWithoutVersions => {
                        let [request, _] = delta.open(&Node::default(), without);
                        push(&mut delta, &server, &mut announced, Some(&request));
                    }
                }
                if tell {
                    push(&mut delta, &server, &mut announced, None);
                }
            }
            push(&mut delta, &server, &mut announced, None);
            let held: BTreeMap<String, String> = store.load().workloads().map(|w| (w.name.to_string(), w.ips[0].to_string())).collect();
            let expected = server.iter().map(|(id, ip)| (name(*id), format!("10.0.0.{ip}"))).collect();
            prop_assert_eq!(&held, &expected);
            // The state file leads to the same facts.
            let restored = Store::default();
            restored.update(Delta::new(false, true).restore(delta.saved()).update);
            let again: BTreeMap<String, String> = restored.load().workloads().map(|w| (w.name.to_string(), w.ips[0].to_string())).collect();
            prop_assert_eq!(again, expected);
        }
    }
}
