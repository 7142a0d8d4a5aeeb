//! What is to be said of culvert's own control plane, where the daemons use it.

use super::nodes::Node;
use super::text::{at, printable};
use crate::cluster::control_plane::{self, NotEnforced, Policies, Replica};
use crate::cluster::{ClusterError, Daemons};
use serde_json::{Value, json};
use std::time::Duration;

/// What the API shows of it.
pub struct ControlPlane {
    namespace: String,
    replicas: Result<Vec<Replica>, String>,
    policies: Policies,
}

/// Looks at the replicas of the control plane that these daemons say they have their facts from; `None` if it is not culvert's.
pub async fn look(daemons: &Daemons, nodes: &[Node], timeout: Duration) -> Option<ControlPlane> {
    let addresses = nodes.iter().filter_map(|node| at(node.page.as_ref().ok()?, "/facts/from").as_str());
    let namespace = addresses.filter_map(control_plane::namespace_of).next()?.to_owned();
    let found = daemons.control_plane(&namespace, timeout).await?;
    Some(ControlPlane::new(namespace, found))
}

impl ControlPlane {
    fn new(namespace: String, found: Result<Vec<Replica>, ClusterError>) -> Self {
        Self { namespace, replicas: found.map_err(|error| error.to_string()), policies: Policies::default() }
    }

    /// Reads what is said of policies. They are only worth notes, and many take long to read.
    pub async fn read_policies(&mut self, daemons: &Daemons, timeout: Duration) {
        self.policies = daemons.policies_not_enforced(timeout).await;
    }

    /// How many replicas are ready, in a line.
    pub fn summary(&self) -> String {
        let namespace = printable(&self.namespace);
        match &self.replicas {
            Err(error) => format!("{namespace}/culvert-control: {}", printable(error)),
            Ok(all) => {
                let ready = all.iter().filter(|replica| replica.ready).count();
                format!("{namespace}/culvert-control: {ready} of {} replicas are ready", all.len())
            }
        }
    }

    /// What is wrong with it.
    pub fn red(&self) -> Vec<String> {
        let none = self.replicas.as_ref().is_ok_and(|all| !all.iter().any(|replica| replica.ready));
        let why = "daemons go on with what they know, but new pods are not announced and certificates not renewed";
        if none { vec![format!("{}: {why}", self.summary())] } else { Vec::new() }
    }

    /// What is worth knowing: replicas that are not ready, and policies that are not enforced as they are written.
    pub fn notes(&self) -> Vec<String> {
        let replicas = self.replicas.as_ref().map(Vec::as_slice).unwrap_or_default();
        let waits = replicas.iter().filter(|replica| !replica.ready).map(|replica| {
            let (pod, node, phase) = (printable(&replica.pod), printable(&replica.node), printable(&replica.phase));
            let node = if node.is_empty() { "no node".to_owned() } else { node };
            format!("control plane: {pod} on {node} is not ready ({phase})")
        });
        let policies = self.policies.not_enforced.iter().map(|policy| {
            let (name, reason, message) =
                (printable(&policy.name), printable(&policy.reason), printable(&policy.message));
            format!("{} {name} is not enforced as it is written ({reason}): {message}", policy.kind)
        });
        let incomplete = self.policies.incomplete.iter();
        let incomplete =
            incomplete.map(|why| format!("policies that are not enforced may be missing here: {}", printable(why)));
        waits.chain(policies).chain(incomplete).collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let policy = |policy: &NotEnforced| json!({"kind": policy.kind, "name": policy.name, "reason": policy.reason, "message": policy.message});
        let replica = |replica: &Replica| json!({"pod": replica.pod, "node": replica.node, "ready": replica.ready, "phase": replica.phase});
        let policies: Vec<Value> = self.policies.not_enforced.iter().map(policy).collect();
        let mut all = json!({"namespace": self.namespace, "policiesNotEnforced": policies});
        let (key, value) = match &self.replicas {
            Ok(replicas) => ("replicas", Value::from(replicas.iter().map(replica).collect::<Vec<Value>>())),
            Err(error) => ("error", json!(error)),
        };
        let why = self.policies.incomplete.as_ref().map(|why| ("policiesError", json!(why)));
        if let Some(all) = all.as_object_mut() {
            all.extend([Some((key, value)), why].into_iter().flatten().map(|(key, value)| (key.to_owned(), value)));
        }
        all
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One with these replicas, by whether they are ready, and a policy that is not enforced.
    pub fn with(ready: &[bool]) -> ControlPlane {
        let replica = |(at, ready): (usize, &bool)| Replica {
            pod: format!("culvert-control-{at}"),
            node: format!("n{at}"),
            ready: *ready,
            phase: "Running".into(),
        };
        let policy = NotEnforced {
            kind: "AuthorizationPolicy",
            name: "shop/p".into(),
            reason: "PartlyEnforced".into(),
            message: "rule 1 needs \u{1b}[1mHTTP".into(),
        };
        let replicas = ready.iter().enumerate().map(replica).collect();
        let policies = Policies { not_enforced: vec![policy], incomplete: None };
        ControlPlane { policies, ..ControlPlane::new("istio-system".into(), Ok(replicas)) }
    }

    #[test]
    fn it_is_wrong_if_no_replica_is_ready() {
        for (ready, red, notes) in
            [(&[true, true][..], 0, 1), (&[true, false], 0, 2), (&[false, false], 1, 3), (&[], 1, 1)]
        {
            let one = with(ready);
            assert_eq!(
                (one.red().len(), one.notes().len()),
                (red, notes),
                "{ready:?}: {:?} {:?}",
                one.red(),
                one.notes()
            );
        }
        assert!(
            with(&[]).red()[0].starts_with("istio-system/culvert-control: 0 of 0 replicas are ready: daemons go on")
        );
        let notes = with(&[true, false]).notes();
        assert_eq!(notes[0], "control plane: culvert-control-1 on n1 is not ready (Running)");
        assert_eq!(
            notes[1],
            "AuthorizationPolicy shop/p is not enforced as it is written (PartlyEnforced): rule 1 needs ?[1mHTTP"
        );
        // What cannot be seen is said, and is not wrong.
        let unseen = ControlPlane::new("mesh".into(), Err(ClusterError::Api("forbidden".into())));
        assert!(unseen.red().is_empty() && unseen.summary().contains("forbidden"));
        assert_eq!(unseen.json()["error"], "the Kubernetes API: forbidden");
        let mut without = with(&[true]);
        without.policies = Policies { not_enforced: Vec::new(), incomplete: Some("forbidden".into()) };
        assert_eq!(without.notes(), ["policies that are not enforced may be missing here: forbidden"]);
        assert_eq!(without.json()["policiesError"], "forbidden");
        assert_eq!(with(&[true]).json()["replicas"][0]["ready"], true);
    }
}
