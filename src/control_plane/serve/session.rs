//! The server's side of delta xDS as a state machine: what a client wants, what it has been told, and what it has to be
//! told next. Pure.
//!
//! ```text
//!   a push brings a client to one edition:   policies ──► workloads and services ──► removals of policies
//! ```
//! A client applies each message when it arrives, so a workload never arrives before the policies that it lists, and a
//! policy goes only after the workloads that listed it. (istiod sends workloads first.) Each type waits for the
//! acknowledgement of its last response. What changes meanwhile is merged, so a slow client holds up nobody and costs
//! no queue.
//!
//! A refused response counts as acknowledged: what was refused is not sent again until it changes, as with istiod.

use super::difference;
use super::subscription::{MANY, Part, Subscription, TooMuch, View};
use crate::control_plane::catalog::{Edition, Kind};
use crate::mesh::Text;
use crate::proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use bytes::Bytes;
use std::sync::Arc;

/// What a request was.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A subscription, or a change of it.
    Subscription,
    /// The acknowledgement of the last response.
    Acknowledged(Kind),
    /// A refusal of the last response, with the client's words.
    Refused(Kind, String),
    /// It answers a response that is not the last one.
    Stale,
    /// It is about a type that is not served.
    UnknownType,
}

/// A response.
#[derive(Debug)]
pub struct Response {
    /// The type.
    pub kind: Kind,
    /// What its acknowledgement repeats.
    pub nonce: String,
    /// What it says.
    pub parts: Vec<Part>,
    /// Whether it is the first one of its type on this stream.
    pub is_first: bool,
    /// The edition that it leads to.
    pub edition: Arc<Edition>,
}

impl Response {
    /// Its encoded form, in pieces that follow each other.
    pub fn bytes(&self) -> Vec<Bytes> {
        let parts = self.parts.iter().map(|part| part.bytes(self.kind));
        std::iter::once(difference::head(self.kind, &self.nonce)).chain(parts).collect()
    }
}

/// The state of one stream.
#[derive(Debug)]
pub struct Session {
    /// The client's node, whose workloads it gets without asking.
    node: Text,
    addresses: Subscription,
    authorizations: Subscription,
    push: Option<Push>,
    /// Whether addresses are sent to a client that has not asked for policies.
    without_policies: bool,
    nonces: u64,
}

/// A push of an edition that is not finished.
#[derive(Debug)]
struct Push {
    target: Arc<Edition>,
    stage: Stage,
    /// Removals of policies, which are sent last.
    removals: Vec<Part>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Policies,
    Addresses,
    Removals,
}

impl Session {
    /// A stream of a client on `node` that has said nothing yet.
    pub fn new(node: Text) -> Self {
        Self {
            node,
            addresses: Subscription::new(Kind::Address),
            authorizations: Subscription::new(Kind::Authorization),
            push: None,
            without_policies: false,
            nonces: 0,
        }
    }

    fn of(&mut self, kind: Kind) -> &mut Subscription {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.authorizations,
        }
    }

    /// Takes a request.
    pub fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<Received, TooMuch> {
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.url() == request.type_url) else {
            return Ok(Received::UnknownType);
        };
        let (subscribe, unsubscribe) = (request.resource_names_subscribe, request.resource_names_unsubscribe);
        let subscription = self.of(kind);
        if !subscription.is_wanted() {
            subscription.begin(subscribe, &unsubscribe, request.initial_resource_versions)?;
            return Ok(Received::Subscription);
        }
        subscription.change(subscribe, &unsubscribe)?;
        if request.response_nonce.is_empty() {
            return Ok(Received::Subscription);
        }
        if subscription.outstanding.as_ref() != Some(&request.response_nonce) {
            return Ok(Received::Stale);
        }
        subscription.outstanding = None;
        Ok(match request.error_detail {
            Some(detail) => Received::Refused(kind, detail.message),
            None => Received::Acknowledged(kind),
        })
    }

    /// Whether the first answer waits for the client to ask for policies too. A client asks for both types in one breath,
    /// and must not get new workloads without the policies that they list.
    pub fn waits_for_policies(&self) -> bool {
        !self.without_policies && self.addresses.is_unanswered() && !self.authorizations.is_wanted()
    }

    /// The client has had time to ask for policies.
    pub fn stop_waiting(&mut self) {
        self.without_policies = true;
    }

    /// Whether it asks for some addresses by name.
    pub fn is_on_demand(&self) -> bool {
        self.addresses.is_on_demand()
    }

    /// Whether making the next response may take a while.
    pub fn is_heavy(&self, edition: &Edition) -> bool {
        let heavy = |subscription: &Subscription, all: usize| {
            subscription.is_unanswered() && (all >= MANY || subscription.held() >= MANY)
        };
        heavy(&self.addresses, edition.addresses.size()) || heavy(&self.authorizations, edition.authorizations.size())
    }

    /// The next response, if there is one that may be sent now.
    pub fn next(&mut self, view: &View<'_>) -> Option<Response> {
        loop {
            if self.push.is_none() {
                self.push = Some(self.begin(view)?);
            }
            let push = self.push.as_mut()?;
            let (target, stage) = (push.target.clone(), push.stage);
            let (kind, parts) = match stage {
                Stage::Policies => {
                    if self.authorizations.outstanding.is_some() {
                        // Nothing of this push has been said, so the next one may be to a newer edition.
                        self.push = None;
                        return None;
                    }
                    push.stage = Stage::Addresses;
                    if !self.authorizations.is_due(&target) {
                        continue;
                    }
                    let is_first = self.authorizations.is_unanswered();
                    let parts = self.authorizations.tell(&target, &self.node, view);
                    let (removals, parts): (Vec<_>, Vec<_>) = parts.into_iter().partition(Part::removes);
                    push.removals = removals;
                    (Kind::Authorization, (is_first, parts))
                }
                Stage::Addresses => {
                    if self.addresses.outstanding.is_some() {
                        // The same, unless removals wait: a policy that comes back meanwhile must not be removed after.
                        if push.removals.is_empty() {
                            self.push = None;
                        }
                        return None;
                    }
                    push.stage = Stage::Removals;
                    if !self.addresses.is_due(&target) {
                        continue;
                    }
                    let is_first = self.addresses.is_unanswered();
                    (Kind::Address, (is_first, self.addresses.tell(&target, &self.node, view)))
                }
                Stage::Removals => {
                    if !push.removals.is_empty() && self.authorizations.outstanding.is_some() {
                        return None;
                    }
                    let removals = std::mem::take(&mut push.removals);
                    self.push = None;
                    (Kind::Authorization, (false, removals))
                }
            };
            let (is_first, parts) = parts;
            // The first response is sent even if it is empty: by it a client learns that it knows everything.
            if is_first || !parts.is_empty() {
                self.nonces += 1;
                let nonce = self.nonces.to_string();
                self.of(kind).outstanding = Some(nonce.clone());
                return Some(Response { kind, nonce, parts, is_first, edition: target });
            }
        }
    }

    /// A push, if there is something to say.
    fn begin(&self, view: &View<'_>) -> Option<Push> {
        if !view.current.complete || self.waits_for_policies() {
            return None;
        }
        let subscriptions = [&self.addresses, &self.authorizations];
        let is_first = subscriptions.iter().any(|subscription| subscription.is_unanswered());
        let is_later = subscriptions.iter().all(|subscription| subscription.at() <= view.checkpoint.number);
        let target = if is_first && is_later && view.checkpoint.complete { view.checkpoint } else { view.current };
        let is_due = subscriptions.iter().any(|subscription| subscription.is_due(target));
        is_due.then(|| Push { target: target.clone(), stage: Stage::Policies, removals: Vec::new() })
    }
}

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;
