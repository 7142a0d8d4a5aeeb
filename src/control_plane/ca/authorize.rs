//! Who may have a certificate for which identity. Pure.
//!
//! A daemon may have the identities of the pods that run on its own node now, and any pod may have its own. Both are
//! judged by what the Kubernetes API says: to which pod the caller's token is bound, and which pods run where. What the
//! caller says about itself does not count.
//!
//! The trust domain must be the mesh's. istiod signs for any that is asked for, so that one CA can serve meshes that
//! change their name. But peers accept the aliases of their trust domain too, and a policy may tell domains apart: a node
//! that may choose the domain could choose the one that a policy allows.

use crate::control_plane::Caller;
use crate::control_plane::running_pods::{RunningPod, RunningPods};
use crate::mesh::{SpiffeName, Text};

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
}

/// What the CA is willing to sign.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Service accounts of daemons.
    pub trusted: Vec<Account>,
    /// The mesh's trust domain.
    pub trust_domain: Text,
}

/// Why a caller does not get a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The pods are not known yet. The caller is to ask again.
    #[error("the pods have not been listed yet")]
    NotYet,
    /// The token is bound to no pod.
    #[error("the token is bound to no pod")]
    Unbound,
    /// The caller's pod does not run.
    #[error("the caller's pod {0} does not run")]
    NoPod(Text),
    /// A pod of this name runs, but the token was bound to an earlier one.
    #[error("the caller's pod {0} is gone, and another one has its name")]
    OldPod(Text),
    /// The caller's pod runs under another service account than the token's.
    #[error("the caller's pod {0} runs under another service account")]
    OtherAccount(Text),
    /// The token is bound to another node than the one on which the pod runs.
    #[error("the caller's pod {0} runs on another node than the one that its token names")]
    OtherNode(Text),
    /// The identity is of another trust domain.
    #[error("the trust domain {0} is not the mesh's")]
    TrustDomain(Text),
    /// The caller asks for another identity than its own, and its service account is not a daemon's.
    #[error("the caller's service account is not one of the trusted ones")]
    NotTrusted,
    /// No pod of the caller's node has the identity.
    #[error("no pod with this identity runs on the node {0}")]
    NotOnNode(Text),
}

impl Refusal {
    /// The reason as a label of a metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotYet => "not_yet",
            Self::Unbound => "unbound_token",
            Self::NoPod(_) => "no_pod",
            Self::OldPod(_) => "old_pod",
            Self::OtherAccount(_) => "other_account",
            Self::OtherNode(_) => "other_node",
            Self::TrustDomain(_) => "trust_domain",
            Self::NotTrusted => "not_trusted",
            Self::NotOnNode(_) => "not_on_node",
        }
    }
}

/// Whether `caller` may have a certificate for `identity` now.
pub fn may_have(caller: &Caller, identity: &SpiffeName, pods: &RunningPods, rules: &Rules) -> Result<(), Refusal> {
    let pod = own_pod(caller, pods)?;
    if identity.trust_domain != rules.trust_domain {
        return Err(Refusal::TrustDomain(identity.trust_domain.clone()));
    }
    if identity.namespace == caller.namespace && identity.service_account == caller.service_account {
        return Ok(());
    }
    let is_caller = |account: &Account| account.namespace == caller.namespace && account.name == caller.service_account;
    if !rules.trusted.iter().any(is_caller) {
        return Err(Refusal::NotTrusted);
    }
    match pods.runs(&pod.node, &identity.namespace, &identity.service_account) {
        true => Ok(()),
        false => Err(Refusal::NotOnNode(pod.node)),
    }
}

/// The pod that the caller's token is bound to, if it runs and is what the token says.
fn own_pod(caller: &Caller, pods: &RunningPods) -> Result<RunningPod, Refusal> {
    let bound = caller.pod.as_ref().ok_or(Refusal::Unbound)?;
    // Asked before the pod is looked up: a list that is completed in between can only make more pods known.
    let complete = pods.is_complete();
    let Some(pod) = pods.get(&caller.namespace, &bound.name) else {
        return Err(if complete { Refusal::NoPod(bound.name.clone()) } else { Refusal::NotYet });
    };
    if !complete {
        return Err(Refusal::NotYet);
    }
    if pod.uid != bound.uid {
        return Err(Refusal::OldPod(bound.name.clone()));
    }
    if pod.service_account != caller.service_account {
        return Err(Refusal::OtherAccount(bound.name.clone()));
    }
    if bound.node.as_ref().is_some_and(|node| *node != pod.node) {
        return Err(Refusal::OtherNode(bound.name.clone()));
    }
    Ok(pod)
}
