//! The delta protocol as a state machine: what is held, what is asked for, what is answered. Pure: messages in, messages
//! and an update of the facts out.
//!
//! One stream carries both types. Everything is told (wildcard), or for addresses, what was asked for (on demand). What was
//! refused is not reported as held, so that it comes again. A request beyond the server's limit is sent without versions;
//! the complete list that follows says what is gone.

use super::decode::{self, Names};
use super::policy;
use crate::mesh::{ServiceKey, Text, Update, Wanted};
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
/// Names that may be subscribed to on demand; beyond it the oldest are given up.
const ASKED_MAX: usize = 65_536;

/// What is held of one type.
#[derive(Debug, Default)]
struct Kind {
    /// By name: the version, and the resource itself where it is kept for the state file.
    held: HashMap<Text, Held>,
    /// Whether the first response of this stream has come.
    answered: bool,
    /// Whether the first response of this stream is the complete list of what exists.
    complete: bool,
    /// Whether any response has ever come.
    synced: bool,
}

#[derive(Debug)]
struct Held {
    version: Text,
    resource: Option<Resource>,
}

/// The state machine.
#[derive(Debug)]
pub struct Delta {
    address: Kind,
    authorization: Kind,
    on_demand: bool,
    /// Whether resources are kept as they came, for the state file.
    keep: bool,
    /// What was asked for on demand, by name, and in which order.
    asked: HashMap<String, Wanted>,
    asked_order: VecDeque<String>,
    names: Names,
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
    /// Bytes of the resources.
    pub bytes: usize,
}

impl Delta {
    /// With nothing held.
    pub fn new(on_demand: bool, keep: bool) -> Self {
        Self {
            address: Kind::default(),
            authorization: Kind::default(),
            on_demand,
            keep,
            asked: HashMap::new(),
            asked_order: VecDeque::new(),
            names: Names::default(),
        }
    }

    /// The first requests of a stream, one for each type. `without_versions`: the server has refused them with versions.
    pub fn open(&mut self, node: &Node, without_versions: bool) -> [DeltaDiscoveryRequest; 2] {
        let first = |kind: &mut Kind, type_url: &str| {
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

    /// Requests for what is wanted on demand.
    pub fn ask(&mut self, wanted: Vec<Wanted>) -> (Vec<DeltaDiscoveryRequest>, Update) {
        let request = |subscribe: Vec<String>, unsubscribe: Vec<String>| DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..Default::default()
        };
        let (mut again, mut names, mut update) = (Vec::new(), Vec::new(), Update::default());
        for wanted in wanted {
            let name = wanted.to_string();
            if self.asked.insert(name.clone(), wanted).is_some() {
                // Who asks again for what is subscribed gets no answer; so it is given up first.
                again.push(name.clone());
            } else {
                self.asked_order.push_back(name.clone());
            }
            names.push(name);
        }
        while self.asked.len() > ASKED_MAX {
            let Some(oldest) = self.asked_order.pop_front() else { break };
            update.forgotten.extend(self.asked.remove(&oldest));
            again.push(oldest);
        }
        let mut requests = Vec::new();
        if !again.is_empty() {
            requests.push(request(Vec::new(), again));
        }
        requests.push(request(names, Vec::new()));
        (requests, update)
    }

    /// Takes a response: good resources are applied, bad ones named.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, .. } = response;
        let (mut update, mut faults) = (Update::default(), Vec::new());
        let bytes = resources.iter().map(|r| r.resource.as_ref().map_or(0, |any| any.value.len())).sum();
        match type_url.as_str() {
            ADDRESS => self.addresses(resources, removed_resources, &mut update, &mut faults),
            AUTHORIZATION => self.policies(resources, removed_resources, &mut update, &mut faults),
            other => faults.push(format!("{other:?} was not asked for")),
        }
        let error_detail = (!faults.is_empty()).then(|| Status {
            // INVALID_ARGUMENT of google.rpc.Code.
            code: 3,
            message: refusal(&faults),
            details: Vec::new(),
        });
        let answer =
            DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..DeltaDiscoveryRequest::default() };
        Received { update, answer, faults, bytes }
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
        faults: &mut Vec<String>,
    ) {
        let mut seen = HashSet::new();
        for resource in resources {
            let name = Text::from(resource.name.as_str());
            seen.insert(name.clone());
            let value = resource.resource.as_ref().map(|any| any.value.as_slice());
            match value.ok_or_else(|| "is empty".to_owned()).and_then(|v| decode::address(&name, v, &mut self.names)) {
                Ok(decoded) => {
                    match decoded {
                        decode::Address::Workload(workload) => update.workloads.push(*workload),
                        decode::Address::Service(service) => update.services.push(*service),
                    }
                    self.address.hold(name, resource, self.keep);
                }
                Err(fault) => {
                    self.address.refuse(&name);
                    faults.push(format!("{name}: {fault}"));
                }
            }
        }
        let gone = self.address.gone(&seen, removed);
        for name in gone {
            if let Some(wanted) = self.asked.get(&name) {
                update.absent.push(wanted.clone());
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
        faults: &mut Vec<String>,
    ) {
        let mut seen = HashSet::new();
        for resource in resources {
            let name = Text::from(resource.name.as_str());
            seen.insert(name.clone());
            let value = resource.resource.as_ref().map(|any| any.value.as_slice());
            match value.ok_or_else(|| "is empty".to_owned()).and_then(|v| policy::policy(&name, v)) {
                Ok(decoded) => {
                    update.policies.push(decoded.policy);
                    self.authorization.hold(name.clone(), resource, self.keep);
                    if !decoded.faults.is_empty() {
                        self.authorization.refuse(&name);
                    }
                    faults.extend(decoded.faults.into_iter().map(|fault| format!("{name}: {fault}")));
                }
                Err(fault) => {
                    self.authorization.refuse(&name);
                    faults.push(format!("{name}: {fault}"));
                }
            }
        }
        let gone = self.authorization.gone(&seen, removed);
        update.gone_policies.extend(gone.into_iter().map(Text::from));
    }

    /// What is held, as it came, for the state file.
    pub fn saved(&self) -> Vec<SavedType> {
        let kind = |type_url: &str, kind: &Kind| SavedType {
            type_url: type_url.to_owned(),
            resources: kind.held.values().filter_map(|held| held.resource.clone()).collect(),
        };
        vec![kind(ADDRESS, &self.address), kind(AUTHORIZATION, &self.authorization)]
    }

    /// Takes what a state file holds, as if it had just come.
    pub fn restore(&mut self, types: Vec<SavedType>) -> Update {
        let (mut update, mut faults) = (Update::default(), Vec::new());
        for saved in types {
            match saved.type_url.as_str() {
                ADDRESS => self.addresses(saved.resources, Vec::new(), &mut update, &mut faults),
                AUTHORIZATION => self.policies(saved.resources, Vec::new(), &mut update, &mut faults),
                _ => {}
            }
        }
        for kind in [&mut self.address, &mut self.authorization] {
            (kind.answered, kind.synced) = (false, false);
        }
        update
    }
}

impl Kind {
    fn hold(&mut self, name: Text, mut resource: Resource, keep: bool) {
        let version = std::mem::take(&mut resource.version).into();
        self.held.insert(name, Held { version, resource: keep.then_some(resource) });
    }

    /// What was held before stays so, that its removal is heard of, but in no version, so that it comes again.
    fn refuse(&mut self, name: &str) {
        if let Some(held) = self.held.get_mut(name) {
            held.version = "".into();
        }
    }

    /// What is gone by this response: what it names, and where it is a complete list, what it lacks.
    fn gone(&mut self, seen: &HashSet<Text>, removed: Vec<String>) -> Vec<String> {
        let complete = self.complete && !self.answered;
        (self.answered, self.synced) = (true, true);
        let mut gone: Vec<String> = removed.into_iter().filter(|name| !seen.contains(name.as_str())).collect();
        if complete {
            gone.extend(self.held.keys().filter(|name| !seen.contains(*name)).map(ToString::to_string));
        }
        for name in &gone {
            self.held.remove(name.as_str());
        }
        gone
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
