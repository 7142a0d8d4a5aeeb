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

impl Rules {
    /// Whether the caller is a daemon.
    pub fn is_trusted(&self, caller: &Caller) -> bool {
        let is_caller =
            |account: &Account| account.namespace == caller.namespace && account.name == caller.service_account;
        self.trusted.iter().any(is_caller)
    }
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
    if !rules.is_trusted(caller) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::caller::CallerPod;

    /// `namespace/name uid account node`.
    fn run(pods: &RunningPods, text: &str) {
        let words: Vec<&str> = text.split(['/', ' ']).collect();
        let [namespace, name, uid, service_account, node] = [0, 1, 2, 3, 4].map(|at| Text::from(words[at]));
        pods.set(RunningPod { namespace, name, uid, service_account, node });
    }

    fn pods() -> RunningPods {
        let pods = RunningPods::default();
        for pod in [
            "istio-system/ztunnel-1 z1 ztunnel n1",
            "istio-system/ztunnel-2 z2 ztunnel n2",
            "shop/web-1 w1 web n1",
            "shop/cart-1 c1 cart n2",
            "evil/ztunnel e1 ztunnel n1",
        ] {
            run(&pods, pod);
        }
        pods.set_complete();
        pods
    }

    /// `namespace/account`, and `pod uid` or `pod uid node`.
    fn caller(account: &str, pod: &str) -> Caller {
        let (namespace, service_account) = account.split_once('/').unwrap();
        let mut words = pod.split(' ').filter(|word| !word.is_empty()).map(Text::from);
        let pod = words.next().map(|name| CallerPod { name, uid: words.next().unwrap(), node: words.next() });
        Caller { namespace: namespace.into(), service_account: service_account.into(), pod }
    }

    fn rules() -> Rules {
        let trusted = vec![Account { namespace: "istio-system".into(), name: "ztunnel".into() }];
        Rules { trusted, trust_domain: "cluster.local".into() }
    }

    #[test]
    fn a_node_has_the_identities_of_its_own_pods_and_nobody_has_more() {
        const NODE: &str = "istio-system/ztunnel";
        let web = "cluster.local/shop/web";
        for (account, pod, identity, expected) in [
            // A daemon for a pod of its node, and for itself.
            (NODE, "ztunnel-1 z1", web, Ok(())),
            (NODE, "ztunnel-1 z1 n1", web, Ok(())),
            (NODE, "ztunnel-1 z1", "cluster.local/istio-system/ztunnel", Ok(())),
            // A pod for itself, as in dedicated mode.
            ("shop/web", "web-1 w1", web, Ok(())),
            // A pod for another one, of another namespace's account of the same name, and of another node.
            ("shop/web", "web-1 w1", "cluster.local/shop/cart", Err("not_trusted")),
            ("evil/ztunnel", "ztunnel e1", web, Err("not_trusted")),
            ("shop/web", "web-1 w1", "cluster.local/bank/web", Err("not_trusted")),
            // A daemon for pods of other nodes, for pods that do not exist, and for an account of no pod.
            (NODE, "ztunnel-2 z2", web, Err("not_on_node")),
            (NODE, "ztunnel-1 z1", "cluster.local/shop/cart", Err("not_on_node")),
            (NODE, "ztunnel-1 z1", "cluster.local/bank/web", Err("not_on_node")),
            (NODE, "ztunnel-1 z1", "cluster.local/shop/admin", Err("not_on_node")),
            // Tokens: unbound, of an earlier pod, of a pod that is gone, of another node, of another account's pod.
            (NODE, "", web, Err("unbound_token")),
            ("shop/web", "", web, Err("unbound_token")),
            (NODE, "ztunnel-1 z0", web, Err("old_pod")),
            ("shop/web", "web-1 w0", web, Err("old_pod")),
            (NODE, "ztunnel-3 z3", web, Err("no_pod")),
            (NODE, "web-1 w1", web, Err("no_pod")),
            (NODE, "ztunnel-1 z1 n2", web, Err("other_node")),
            ("shop/cart", "web-1 w1", "cluster.local/shop/cart", Err("other_account")),
            // Another trust domain, even for a pod of its own node or for itself.
            (NODE, "ztunnel-1 z1", "other.local/shop/web", Err("trust_domain")),
            ("shop/web", "web-1 w1", "other.local/shop/web", Err("trust_domain")),
        ] {
            let parts: Vec<&str> = identity.split('/').collect();
            let identity = SpiffeName::new(parts[0], parts[1], parts[2]).unwrap();
            let decided = may_have(&caller(account, pod), &identity, &pods(), &rules());
            assert_eq!(decided.map_err(|refusal| refusal.label()), expected, "{account} {pod} asks for {identity}");
        }
    }

    #[test]
    fn a_pod_that_is_gone_takes_the_right_to_its_identity_with_it() {
        let (pods, identity) = (pods(), SpiffeName::new("cluster.local", "shop", "web").unwrap());
        let node = caller("istio-system/ztunnel", "ztunnel-1 z1");
        assert_eq!(may_have(&node, &identity, &pods, &rules()), Ok(()));
        // It has failed, was deleted, or has moved to another node.
        run(&pods, "shop/web-1 w2 web n2");
        assert_eq!(may_have(&node, &identity, &pods, &rules()), Err(Refusal::NotOnNode("n1".into())));
        pods.remove("istio-system", "ztunnel-1");
        assert_eq!(may_have(&node, &identity, &pods, &rules()), Err(Refusal::NoPod("ztunnel-1".into())));
    }

    #[test]
    fn nobody_is_refused_before_the_pods_are_listed_and_nobody_gets_anything() {
        let (pods, identity) = (RunningPods::default(), SpiffeName::new("cluster.local", "shop", "web").unwrap());
        run(&pods, "shop/web-1 w1 web n1");
        run(&pods, "istio-system/ztunnel-1 z1 ztunnel n1");
        for (account, pod) in [
            ("shop/web", "web-1 w1"),
            ("istio-system/ztunnel", "ztunnel-1 z1"),
            ("istio-system/ztunnel", "ztunnel-9 z9"),
        ] {
            assert_eq!(may_have(&caller(account, pod), &identity, &pods, &rules()), Err(Refusal::NotYet));
        }
        let unbound = may_have(&caller("shop/web", ""), &identity, &pods, &rules());
        assert_eq!(unbound, Err(Refusal::Unbound), "that is known at once");
    }
}
